"""Reductions keep their dimensions (`mean(x, dims, True)`, then a reshape); norms and softmax have one spelling."""

from __future__ import annotations

import math
import operator

import torch

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import Answer, Maker, Node, Rules, local, row, rows
from turbocompile.rewrite.match import default_eps, layer_norm, rms_norm, tensors, variables
from turbocompile.rewrite.rules.arithmetic import is_real

aten = torch.ops.aten
(x,) = tensors("x")
sizes, weight, bias, eps = variables("sizes weight bias eps")


@local(aten.mean.dim, aten.sum.dim_IntList, aten.mean.default, aten.sum.default)
def reductions_keep_dims(node: Node, make: Maker) -> Answer:
    """mean(x, dims, False, dtype)   ->   reshape(mean(to(x, dtype), dims, True)), dims sorted, and so for sum."""
    packet = aten.mean if is_op(node, aten.mean) else aten.sum
    target = packet.dim if packet is aten.mean else packet.dim_IntList
    if node.target is packet.default:
        x, dims, keep, out = node.args[0], None, False, node.kwargs.get("dtype")
    else:
        x, dims, keep, out = arguments(node.target, node.args, node.kwargs)
    rank = len(shape(x))
    dims = sorted(d % rank for d in (dims or range(rank))) if rank else []
    if rank == 0 or not is_real(node):
        return None
    if out is not None and dtype(x) != out:
        x = make(aten.to.dtype, x, out)
    args = (x, dims, True)
    if keep:
        return (target, args) if tuple(node.args) != args or node.kwargs else None
    return aten.reshape.default, (make(target, *args), list(shape(node)))


@local(aten.var, aten.std)
def var_is_mean_of_squares(node: Node, make: Maker) -> Answer:
    """var(x, dims)   ->   mean((x - mean(x))**2) * n / (n - correction), std its root, in float32 at least."""
    value = _variance(node, make)
    if value is not None and is_op(node, aten.std):
        value = make(aten.pow.Tensor_Scalar, value, 0.5)
    return value and (aten.reshape.default, (make.cast(value, dtype(node)), list(shape(node))))


def _variance(node: Node, make: Maker) -> Node | None:
    """The variance of a var, std or var_mean, dimensions kept; None where it divides by zero."""
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, arguments(node.target, node.args, node.kwargs), strict=True))
    x, rank = given["self"], len(shape(given["self"]))
    dims = sorted(d % rank for d in (given.get("dim") or range(rank)))
    correction = given["correction"] if "correction" in given else int(given.get("unbiased", True))
    correction = 1 if correction is None else correction
    n = math.prod(shape(x)[d] for d in dims)
    if n <= correction:
        return None
    x = make.cast(x, torch.float32) if dtype(x) in (torch.bfloat16, torch.float16) else x
    centred = make(aten.add.Tensor, x, make(aten.neg.default, make(aten.mean.dim, x, dims, True)))
    value = make(aten.mean.dim, make(aten.pow.Tensor_Scalar, centred, 2), dims, True)
    return make(aten.mul.Tensor, value, n / (n - correction)) if correction else value


@local(operator.getitem)
def item_of_moments(node: Node, make: Maker) -> Answer:
    """var_mean(x, dims)[0]         ->   var(x, dims) written out
    var_mean(x, dims)[1]         ->   reshape(mean(x, dims, True))
    native_layer_norm(x, ...)[0]   ->   layer_norm(x, ...)
    """
    source, i = node.args
    if is_op(source, aten.native_layer_norm.default) and i == 0:
        return aten.layer_norm.default, tuple(source.args)
    if not is_op(source, aten.var_mean):
        return None
    value: Node | None
    if i == 0:
        value = _variance(source, make)
    else:
        x, dims = source.args[0], (list(source.args[1]) if len(source.args) > 1 and source.args[1] else [])
        value = make(aten.mean.dim, x, dims or list(range(len(shape(x)))), True)
    return value and (aten.reshape.default, (make.cast(value, dtype(node)), list(shape(node))))


@local(aten._softmax.default, aten.softmax.int)
def one_softmax(node: Node, make: Maker) -> Answer:
    """softmax(x, dim, dtype)   ->   softmax(to(x, dtype), dim), with dim counted from the first."""
    x, dim = node.args[:2]
    dim %= len(shape(x))
    if node.target is aten.softmax.int and tuple(node.args) == (x, dim) and not node.kwargs:
        return None
    return aten.softmax.int, (make.cast(x, dtype(node)), dim)


def given_eps(x: Node, eps: float | None) -> float:
    """The eps of an RMSNorm as a number, because PyTorch's default depends on the type that the norm is run in."""
    return default_eps(dtype(x)) if eps is None else eps


REDUCTIONS = Rules(
    "reductions",
    rows(
        reductions_keep_dims,
        var_is_mean_of_squares,
        item_of_moments,
        row(layer_norm(x, sizes, weight, bias, eps, ...), layer_norm(x, sizes, weight, bias, eps)),
        row(rms_norm(x, sizes, weight, eps), rms_norm(x, sizes, weight, given_eps)),
        one_softmax,
    ),
)
