"""Arithmetic: `add`, `mul`, `neg`, `pow` with numbers second; `a - b` is `a + -b`, `a / b` is `a * b**-1`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import DTYPE, Answer, Maker, Node, Rules, local, row, rows, to
from turbocompile.rewrite.match import mean, numbers, op, silu, tensors, variables

aten = torch.ops.aten
mul, neg, power = op(aten.mul.Tensor), op(aten.neg.default), op(aten.pow.Tensor_Scalar)
x, y = tensors("x y")
c, n = numbers("c n")
a, b, dims = variables("a b dims")


def is_real(node: Node) -> bool:
    """Whether the node is of a real floating type."""
    return dtype(node).is_floating_point


def is_field(node: Node) -> bool:
    """Whether the node is real or complex."""
    return is_real(node) or dtype(node).is_complex


def keeps_dtype(node: Node, x: Node) -> bool:
    """Whether x has the dtype of the node, so that no promotion to another type is lost."""
    return dtype(x) == dtype(node)


def computed_in(node: Node) -> torch.dtype:
    """The dtype that an elementwise kernel computes in, for a result of the node's type: float32 for 16 bits."""
    return torch.float32 if dtype(node) in (torch.bfloat16, torch.float16) else dtype(node)


def is_whole(number: Any) -> bool:
    """Whether a number is a whole number written as a float; 1 and 1.0 are one form."""
    return isinstance(number, float) and number.is_integer() and 0 < abs(number) < 2**53


@local(aten.add.Scalar, aten.add.Tensor)
def add_in_one_spelling(node: Node, make: Maker) -> Answer:
    """add(a, b, alpha)   ->   a + b * alpha, a number second."""
    a, b, alpha = arguments(node.target, node.args, node.kwargs)
    if alpha != 1:
        b = make(aten.mul.Tensor, b, alpha) if isinstance(b, fx.Node) else b * alpha
        return aten.add.Tensor, (a, b)
    if not isinstance(a, fx.Node):  # torch.add(1.0, x)
        return aten.add.Tensor, (b, a)
    one = node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2
    return None if one else (aten.add.Tensor, (a, b))


@local(aten.mul.Scalar, aten.mul.Tensor)
def mul_in_one_spelling(node: Node, make: Maker) -> Answer:
    """mul(a, b)   ->   a * b, a number second."""
    a, b = arguments(node.target, node.args, node.kwargs)
    if not isinstance(a, fx.Node):  # torch.mul(2.0, x)
        return aten.mul.Tensor, (b, a)
    return (aten.mul.Tensor, (a, b)) if node.target is aten.mul.Scalar else None


def is_inverse_of_count(node: Node, y: Node, c: float) -> bool:
    """Whether c is one divided by the number of elements of y that go into one element of the node."""
    return is_real(node) and math.isclose(c * (math.prod(shape(y)) // max(1, math.prod(shape(node)))), 1, rel_tol=1e-6)


@local(aten.add.Tensor, aten.mul.Tensor)
def broadcast_operands(node: Node, make: Maker) -> Answer:
    """x + expand(y)   ->   x + y where broadcasting expands y;   x + full(c)   ->   x + c"""
    a, b = node.args
    for x, y, first in ((b, a, False), (a, b, True)):
        if not isinstance(x, fx.Node):
            continue
        if is_op(x, aten.full.default, aten.full_like.default) and isinstance(y, fx.Node):
            fits = shape(y) == shape(node) and dtype(y) == dtype(node) and isinstance(x.args[1], (int, float))
            if fits and not (isinstance(x.args[1], float) and not is_real(node)):
                return node.target, (y, x.args[1])
        if is_op(x, aten.expand.default):
            source: Node = x.args[0]
            other = shape(y) if isinstance(y, fx.Node) else ()
            if tuple(torch.broadcast_shapes(shape(source), other)) == shape(node):
                return node.target, ((source, y) if first else (y, source))
    return None


@local(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def div_is_mul_pow(node: Node, make: Maker) -> Answer:
    """a / b   ->   a * b**-1, in the type that the kernel computes in; at most one unit in the last place apart."""
    a, b = node.args
    if not is_real(node):
        return None
    if not isinstance(b, fx.Node):
        if b == 0:
            return None
        return aten.mul.Tensor, (make.cast(a, dtype(node)), 1.0 / b)
    inverse = make(aten.pow.Tensor_Scalar, make.cast(b, computed_in(node)), -1)
    if not isinstance(a, fx.Node):  # torch.div(1.0, x)
        product = make(aten.mul.Tensor, inverse, a)
        return aten.to.dtype, (product, dtype(node))
    if dtype(node) == computed_in(node):
        return aten.mul.Tensor, (a, inverse)
    return aten.to.dtype, (make(aten.mul.Tensor, make.cast(a, computed_in(node)), inverse), dtype(node))


@local(aten.addcmul.default, aten.addcdiv.default)
def addcmul_is_add_mul(node: Node, make: Maker) -> Answer:
    """addcmul(a, b, c, value)   ->   a + b * c * value, in the type that the kernel computes in, and so for addcdiv."""
    a, b, c, value = arguments(node.target, node.args, node.kwargs)
    if not is_real(node):
        return None
    wide = computed_in(node)
    a, b, c = (make.cast(x, wide) if dtype(x) in (torch.bfloat16, torch.float16) else x for x in (a, b, c))
    product = make(aten.mul.Tensor if is_op(node, aten.addcmul) else aten.div.Tensor, b, c)
    total = make(aten.add.Tensor, a, product if value == 1 else make(aten.mul.Tensor, product, value))
    return aten.to.dtype, (total, dtype(node))


SUB, RSUB = (aten.sub.Tensor, aten.sub.Scalar), (aten.rsub.Tensor, aten.rsub.Scalar)
ROOTS = {aten.sqrt: 0.5, aten.rsqrt: -0.5, aten.reciprocal: -1, aten.square: 2}

ARITHMETIC = Rules(
    "arithmetic",
    rows(
        add_in_one_spelling,
        row(x + 0, x),
        row(x + c, x + (lambda c: int(c)), where=lambda node, x, c: is_whole(c) and keeps_dtype(node, x)),
        mul_in_one_spelling,
        row(x * 1, x),
        row(x * -1, -x, where=keeps_dtype),
        row(x * c, x * (lambda c: int(c)), where=lambda node, x, c: is_whole(c) and keeps_dtype(node, x)),
        row(op(aten.sum.dim_IntList)(y, dims, True) * c, mean(y, dims, True), where=is_inverse_of_count),
        row(mul(x, x), x**2, where=is_real),
        row(mul(neg(x), b), -(x * b), where=keeps_dtype),
        row(mul(op(aten.sigmoid.default)(x), x), silu(x)),
        broadcast_operands,
        [row(op(sub)(x, c, alpha=n), x + (lambda c, n: -(c * n)), where=is_field) for sub in SUB],
        [row(op(sub)(a, y), a + -y, where=is_field) for sub in SUB],
        [row(op(sub)(a, y, alpha=n), a + -(y * n), where=is_field) for sub in SUB],
        [row(op(rsub)(y, b), b + -y, where=is_field) for rsub in RSUB],
        [row(op(rsub)(y, b, alpha=n), b + -(y * n), where=is_field) for rsub in RSUB],
        div_is_mul_pow,
        [row(op(root.default)(x), to(x, DTYPE) ** exponent, where=is_real) for root, exponent in ROOTS.items()],
        row(x**1, x, where=is_real),
        # 1 / sqrt(x) is x**-0.5. Exponents multiply for x >= 0, as x is under a root; (x**2)**0.5 is not x.
        [row(power(x**r, -1), x**-r, where=is_real) for r in (0.5, -0.5)],
        [row(power(x**-1, r), x**-r, where=is_real) for r in (0.5, -0.5)],
        row(neg(neg(x)), x),
        row(neg(x * c), x * (lambda c: -c), where=lambda node: len(node.args[0].users) == 1),
        addcmul_is_add_mul,
        [row(op(lerp)(x, y, b), x + (y - x) * b) for lerp in (aten.lerp.Scalar, aten.lerp.Tensor)],
    ),
)
