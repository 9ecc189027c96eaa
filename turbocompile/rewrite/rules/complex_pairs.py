"""Complex numbers become real pairs in a last axis of 2, from the node that reads them as pairs towards the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import Answer, Maker, Node, Rules, local, row, rows
from turbocompile.rewrite.match import op, tensors

aten = torch.ops.aten
stack, as_pairs = op(aten.stack.default), op(aten.view_as_real.default)
cos, sin = op(aten.cos.default), op(aten.sin.default)
x, y, angle = tensors("x y angle")


def _pairs(z: Any, make: Maker) -> Node:
    """A complex tensor as real pairs. A conjugate is written out, because view_as_real takes none."""
    if is_op(z, aten._conj.default, aten.conj_physical.default, aten.resolve_conj.default):
        inner = _pairs(z.args[0], make)
        if is_op(z, aten.resolve_conj.default):
            return inner
        return make(
            aten.stack.default, [_part(inner, 0, make), make(aten.neg.default, _part(inner, 1, make))], len(shape(z))
        )
    return make(aten.view_as_real.default, z)


def _part(pairs: Node, i: int, make: Maker) -> Node:
    """The real (0) or imaginary (1) parts of pairs."""
    sizes = list(shape(pairs))
    return make(aten.reshape.default, make(aten.slice.Tensor, pairs, len(sizes) - 1, i, i + 1), sizes[:-1])


@local(aten.view_as_real.default)
def complex_is_pairs(node: Node, make: Maker) -> Answer:
    """pairs(f(z))     ->   f(pairs(z)) for layout changes, casts, cat and stack
    pairs(conj(z))   ->   stack([real, -imag])
    pairs(a * b)     ->   stack([a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real])
    """
    z = node.args[0]
    last = len(shape(z))
    if is_op(z, aten._conj.default, aten.conj_physical.default, aten.resolve_conj.default):
        return _pairs(z, make)
    if is_op(z, aten.to.dtype) and dtype(z.args[0]).is_complex:
        return z.target, (_pairs(z.args[0], make), dtype(node))
    if is_op(z, aten.reshape.default, aten.expand.default):
        return z.target, (_pairs(z.args[0], make), [*shape(z), 2])
    if is_op(z, aten.permute.default):
        return z.target, (_pairs(z.args[0], make), [*z.args[1], last])
    if is_op(z, aten.slice.Tensor):
        return z.target, (_pairs(z.args[0], make), *z.args[1:])
    if is_op(z, aten.cat.default, aten.stack.default):
        return z.target, ([_pairs(p, make) for p in z.args[0]], *z.args[1:])
    if is_op(z, aten.mul.Tensor) and isinstance(z.args[1], fx.Node):
        return _complex_product(z, make)
    return None


def _complex_product(z: Node, make: Maker) -> Answer:
    a, b = z.args
    if not (dtype(a).is_complex and dtype(b).is_complex):
        return None
    ar, ai, br, bi = (_part(_pairs(x, make), i, make) for x in (a, b) for i in (0, 1))
    mul, add = aten.mul.Tensor, aten.add.Tensor
    x = make(add, make(mul, ar, br), make(aten.neg.default, make(mul, ai, bi)))
    y = make(add, make(mul, ar, bi), make(mul, ai, br))
    return aten.stack.default, ([x, y], len(shape(z)))


def new_axis(node: Node) -> int:
    """The last axis of the pairs."""
    return len(shape(node)) - 1


COMPLEX_PAIRS = Rules(
    "complex pairs",
    rows(
        row(as_pairs(op(aten.view_as_complex.default)(x)), x),
        row(as_pairs(op(aten.polar.default)(x, angle)), stack([x * cos(angle), x * sin(angle)], new_axis)),
        row(as_pairs(op(aten.complex.default)(x, y)), stack([x, y], new_axis)),
        complex_is_pairs,
    ),
)
