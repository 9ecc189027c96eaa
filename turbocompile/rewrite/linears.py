"""The linears of a graph and the weights that they read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.ir.weights import Cast, Cat, Dequantize, Expr, Permute, Reshape, Slice, is_adapted
from turbocompile.rewrite.facts import facts

aten = torch.ops.aten


def all_linears(sub: Subgraph) -> Iterator[fx.Node]:
    """The floating-point linears of a graph, in order."""
    yield from (n for n in sub.graph.nodes if is_op(n, aten.linear.default))


def held(node: fx.Node) -> int:
    """How many linears of the model a linear stands for: fuse_qkv makes one linear of several."""
    return facts(node).linears


def first_weight(node: fx.Node) -> fx.Node:
    """The first stored weight under casts and layout changes."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node


def given_weights(linear: fx.Node) -> list[fx.Node]:
    """A linear's weight, and its bias where it has one."""
    return [n for n in linear.args[1:] if n is not None]  # type: ignore[misc]


def dequantized(expr: Expr | None) -> list[Dequantize]:
    """The quantized tensors of the checkpoint that make up a weight; empty where something else is part of it."""
    if isinstance(expr, Cast):
        return dequantized(expr.of)
    if isinstance(expr, Cat) and expr.dim == 0:
        parts = [dequantized(part) for part in expr.of]
        return [d for part in parts for d in part] if all(parts) else []
    return [expr] if isinstance(expr, Dequantize) else []


def weight_expr(node: Any, sub: Subgraph) -> Expr | None:
    """The node as an expression over checkpoint tensors; None where it is not a weight in another layout or dtype."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return sub.weights.get(str(node.target))
    if is_op(node, aten.cat.default):
        parts = [weight_expr(n, sub) for n in node.args[0]]  # type: ignore[union-attr]
        known = tuple(p for p in parts if p is not None)
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        return Cat(known, dim % len(known[0].shape)) if len(known) == len(parts) else None
    layouts = (aten.to.dtype, aten.reshape.default, aten.permute.default, aten.slice.Tensor)
    of = weight_expr(node.args[0], sub) if is_op(node, *layouts) else None
    if of is None:
        return None
    value = node.meta["val"]
    if is_op(node, aten.to.dtype):
        return Cast(of, value.dtype)
    if is_op(node, aten.reshape.default):
        return Reshape(of, tuple(value.shape))
    if is_op(node, aten.permute.default):
        return Permute(of, tuple(d % value.dim() for d in node.args[1]))  # type: ignore[union-attr]
    _, dim, start, end, step = arguments(aten.slice.Tensor, node.args, node.kwargs)
    size = of.shape[dim]
    start, stop, _ = slice(start, end).indices(size)
    return Slice(of, dim % len(of.shape), start, stop) if step == 1 and start < stop else None


def widened(expr: Expr) -> Expr:
    """A weight in float32 at least; of a weight with adapters, their sum before it is rounded."""
    if isinstance(expr, Cast) and is_adapted(expr.of):
        return expr.of
    return Cast(expr, torch.float32) if expr.dtype.itemsize < 4 else expr


def rows(node: fx.Node) -> int:
    """The number of vectors along the last axis."""
    return math.prod(shape(node)[:-1])
