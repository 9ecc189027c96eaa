"""Products: `matmul` with its batch dimensions, and `linear` where a weight is multiplied."""

from __future__ import annotations

import torch

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import Answer, Maker, Node, Rules, local, row, rows
from turbocompile.rewrite.match import linear, matmul, op, permute, tensors

aten = torch.ops.aten
x, y, w = tensors("x y w")


@local(aten.baddbmm.default, aten.addmm.default)
def addmm_is_matmul_add(node: Node, make: Maker) -> Answer:
    """addmm(bias, a, b, beta, alpha)   ->   a @ b * alpha + bias * beta"""
    bias, a, b, beta, alpha = arguments(node.target, node.args, node.kwargs)
    product = make(aten.matmul.default, a, b)
    product = product if alpha == 1 else make(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return aten.reshape.default, (product, list(shape(node)))
    return aten.add.Tensor, (product, bias if beta == 1 else make(aten.mul.Tensor, bias, beta))


@local(aten.matmul.default)
def matmul_keeps_batch_dims(node: Node, make: Maker) -> Answer:
    """reshape(x, (B * H, L, D)) @ reshape(y, (B * H, D, K))   ->   reshape(x @ y), as einsum writes it."""
    a, b = node.args
    if not (is_op(a, aten.reshape.default) and is_op(b, aten.reshape.default)):
        return None
    x, y = a.args[0], b.args[0]
    sx, sy = shape(x), shape(y)
    merged = len(shape(a)) == len(shape(b)) == 3 and len(sx) == len(sy) > 3
    if merged and sx[:-2] == sy[:-2] and sx[-2:] == shape(a)[1:] and sy[-2:] == shape(b)[1:]:
        return aten.reshape.default, (make(aten.matmul.default, x, y), list(shape(node)))
    return None


@local(aten.eye.default, aten.eye.m)
def eye_compares_positions(node: Node, make: Maker) -> Answer:
    """eye(n, m)   ->   to(reshape(arange(n), [n, 1]) == arange(m))

    Positions are of 64 bits: torch's own way counts in the fewest bits, which no CPU does for more than 256 of them.
    """
    if any(is_linear_of(user, node) for user in node.users):
        return None  # the linear goes first
    n, m = shape(node)
    rows_ = make(aten.reshape.default, make(aten.arange.default, n), [n, 1])
    return aten.to.dtype, (make(aten.eq.Tensor, rows_, make(aten.arange.default, m)), dtype(node))


def is_linear_of(user: Node, x: Node) -> bool:
    """Whether a node is a linear of x without a bias, in the dtype of x."""
    given = arguments(user.target, user.args, user.kwargs) if is_op(user, aten.linear.default) else [None]
    return given[0] is x and given[2] is None and dtype(given[1]) == dtype(x)


@local(aten.linear.default)
def linear_of_eye(node: Node, make: Maker) -> Answer:
    """linear(eye(n), w)   ->   permute(w, [1, 0]), as PEFT multiplies the factors of an adapter"""
    x, w = node.args[:2]
    if is_op(x, aten.eye) and shape(x)[0] == shape(x)[1] and is_linear_of(node, x):
        return aten.permute.default, (w, [1, 0])
    return None


def is_bias(node: Node, y: Node) -> bool:
    """Whether y is a stored vector of the last axis, added to a linear of the same dtype that nothing else reads."""
    if y.op != "get_attr" or shape(y) != shape(node)[-1:]:
        return False
    (product,) = (n for n in node.args if n is not y)
    return len(product.users) == 1 and dtype(y) == dtype(product) == dtype(node)


PRODUCTS = Rules(
    "products",
    rows(
        row(op(aten.mm.default)(x, y), x @ y),
        row(op(aten.bmm.default)(x, y), x @ y),
        addmm_is_matmul_add,
        row(
            matmul(x, permute(w, [1, 0])),
            linear(x, w),
            where=lambda x, w: w.op == "get_attr" and len(shape(x)) > 1,
        ),
        matmul_keeps_batch_dims,
        eye_compares_positions,
        linear_of_eye,
        row(linear(x, w) + y, linear(x, w, y), where=is_bias),
    ),
)
