"""r = x + gate * y; norm(r) * (1 + scale) + shift   ->   r, n = residual_norm(x, y, gate, scale, shift, weight, bias)
r = x + gate * y                                   ->   r = gated_residual(x, y, gate)

The gate, the modulation and the norm's weights may each be missing, and a quantize may follow the norm; but x + y alone
is no site. The norm is a LayerNorm or an RMSNorm, affine, plain or modulated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from turbocompile.kernels import ops

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.rewrite.attention_sites import (
    Norm,
    as_norm,
    in_result_dtype,
    lone_quantize,
    readers,
    replaced_items,
    result_dtype,
    token_layout,
)
from turbocompile.rewrite.match import LAST, Match, Pass, matches, rewrite, rms_norm, uncast, unwiden, variables

aten = torch.ops.aten
r, scale, shift, weight, eps = variables("r scale shift weight eps")
MODULATED_RMS = rms_norm(r, LAST, weight, eps) * (1 + scale) + shift  # a modulated LayerNorm is an adaln already


@dataclass(frozen=True)
class Following:
    """The norm that reads a residual: its last node, the norm, its modulation, and the format it is quantized to."""

    node: fx.Node
    norm: Norm
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    format: str | None = None


def following(residual: fx.Node) -> Following | None:
    """The first norm that reads the residual."""
    for node in readers(residual):
        if is_op(node, ops.adaln, ops.adaln_quantize) and uncast(node.args[0]) is residual:
            arguments: Any = node.args
            x, by, plus, w, b, epsilon, *format = arguments
            return Following(node, Norm("layer", x, w, b, epsilon), by, plus, format[0] if format else None)
        norm = as_norm(node)
        if norm is not None and uncast(norm.x) is residual:
            sums = [n for product in readers(node) for n in readers(product)] if norm.kind == "rms" else []
            for end in sums:
                for found in matches(MODULATED_RMS, end):
                    return Following(end, norm, found["scale"], found["shift"])
            return Following(node, norm)
    return None


def terms(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node | None]]:
    """(x, y, gate) for each reading of a sum as x + gate * y, then as x + y."""
    given: Any = node.args
    sides = [(given[0], given[1]), (given[1], given[0])]
    for x, other in sides:
        product = uncast(other)
        if is_op(product, aten.mul.Tensor) and all(isinstance(n, fx.Node) for n in product.args):
            a, b = product.args
            for y, gate in ((b, a), (a, b)):
                if shape(x) == shape(y) == shape(node):
                    yield x, y, gate
    if all(isinstance(n, fx.Node) and shape(n) == shape(node) for n in sides[0]):
        yield *sides[0], None


def is_sum(node: fx.Node) -> bool:
    """Whether node adds two tensors to a floating (batch, tokens, channels), or one with more axes of tokens."""
    added = is_op(node, aten.add.Tensor) and len(node.args) == 2 and isinstance(node.args[1], fx.Node)
    return added and len(shape(node)) >= 3 and dtype(node).is_floating_point


def residuals(sub: Subgraph) -> Iterator[fx.Node]:
    """Sums with a product as a term, and sums that a norm reads."""
    for node in sub.graph.nodes:
        if is_sum(node) and any(gate is not None or following(node) for _, _, gate in terms(node)):
            yield node


@rewrite(candidates=residuals)
def residual_norm(m: Match) -> fx.Node | dict[fx.Node, fx.Node] | str:
    reasons = []
    for x, y, gate in terms(m.root):
        made: fx.Node | dict[fx.Node, fx.Node] | str | None = None if gate is None else token_layout(m, gate)
        if made is None:
            made = built(m, in_result_dtype(m, m.root, x), unwiden(y), gate, following(m.root))
        if not isinstance(made, str):
            return made
        reasons.append(made)
    return reasons[0]


def built(
    m: Match, x: fx.Node, y: fx.Node, gate: fx.Node | None, found: Following | None
) -> fx.Node | dict[fx.Node, fx.Node] | str:
    """The op, with the norm where there is one that is computed in the residual's dtype."""
    reason = "no norm follows the sum" if found is None else unfit(m, found)
    if found is None or reason is not None:
        return str(reason) if gate is None else m.op(ops.gated_residual, x, y, gate)
    norm = found.norm
    arguments = (x, y, gate, found.scale, found.shift, norm.weight, norm.bias, norm.eps, norm.kind)
    quantize = lone_quantize(found.node)
    format = found.format or (quantize.args[1] if quantize is not None else None)
    if format is None:
        made = m.op(ops.residual_norm, *arguments)
        return {m.root: item(m, made, 0), found.node: item(m, made, 1)}
    made = m.op(ops.residual_norm_quantize, *arguments, format)
    return {m.root: item(m, made, 0), **replaced_items(quantize or found.node, made, m, first=1)}


def item(m: Match, made: fx.Node, index: int) -> fx.Node:
    return m.op(operator.getitem, made, index)


def unfit(m: Match, found: Following) -> str | None:
    """Why the norm cannot join the residual; None where it can."""
    given = [n for n in (found.scale, found.shift) if n is not None]
    used = result_dtype(m.root)
    if found.format is None and used not in (dtype(found.node), result_dtype(found.node)):
        return f"the norm is used in {result_dtype(found.node)} and the residual in {used}"
    return token_layout(m, *given)


PASS = Pass("residual_norm", "exact", [residual_norm], needs=("adaln",))
