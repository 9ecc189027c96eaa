"""The linears of a graph and the weights that they read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.ir.weights import Cast, Cat, Dequantize, Expr, is_adapted
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


def widened(expr: Expr) -> Expr:
    """A weight in float32 at least; of a weight with adapters, their sum before it is rounded."""
    if isinstance(expr, Cast) and is_adapted(expr.of):
        return expr.of
    return Cast(expr, torch.float32) if expr.dtype.itemsize < 4 else expr


def rows(node: fx.Node) -> int:
    """The number of vectors along the last axis."""
    return math.prod(shape(node)[:-1])
