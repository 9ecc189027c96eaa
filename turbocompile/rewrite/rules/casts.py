"""Casts: each is `to.dtype`, and stays only where it changes something, and does not undo an exact up-cast."""

from __future__ import annotations

import torch

from turbocompile.ir.program import dtype
from turbocompile.rewrite.local import DTYPE, Rules, overloads, row, rows, to
from turbocompile.rewrite.match import exact, op, tensors

aten = torch.ops.aten
(x,) = tensors("x")

CASTS = Rules(
    "casts",
    rows(
        [row(op(cast)(x, ...), to(x, DTYPE)) for cast in overloads(aten.to, aten._to_copy, aten.type_as)],
        row(to(to(x, ...), ...), to(x, DTYPE), where=lambda node, x: exact(dtype(x), dtype(node.args[0]))),
    ),
)
