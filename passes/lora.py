"""linear(x, w, bias) + scale * linear(linear(x, a), b)   ->   linear(x, w + scale * b @ a, bias)

An adapter (LoRA) that runs beside its linear is added to the linear's weight. Several adapters fold one after another.
The sum is computed in float32, and rounded once to the type of a 16-bit weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.ir.weights import AddLora, Expr
from turbocompile.rewrite.linears import dequantized, first_weight, widened
from turbocompile.rewrite.match import Match, Pass, linear, rewrite, uncast, variables

aten = torch.ops.aten
x, w, bias, a, b, scale = variables("x w bias a b scale")
BASE, DOWN = linear(x, w, bias), linear(x, a)
ADAPTED = (BASE + linear(DOWN, b) * scale, BASE + linear(DOWN * scale, b), BASE + linear(DOWN, b))


def unscaled(node: Any) -> Any:
    """The node under casts and under factors of one element."""
    node = uncast(node)
    while is_op(node, aten.mul.Tensor):
        inner = [n for n in node.args if isinstance(n, fx.Node) and shape(n) == shape(node)]
        if len(inner) != 1 or any(math.prod(shape(n)) > 1 for n in node.all_input_nodes if n is not inner[0]):
            break
        node = uncast(inner[0])
    return node


def is_low_rank(node: Any) -> bool:
    """Whether node is a linear of a linear with fewer channels between them than on either side."""
    up = unscaled(node)
    down: Any = unscaled(up.args[0]) if is_op(up, aten.linear.default) else None
    return is_op(down, aten.linear.default) and shape(down)[-1] < min(shape(up)[-1], shape(down.args[0])[-1])


def adapted(sub: Subgraph) -> Iterator[fx.Node]:
    """Sums with an adapter."""
    for node in sub.graph.nodes:
        if is_op(node, aten.add.Tensor) and any(is_low_rank(n) for n in node.args):
            yield node


def name_of(m: Match, weight: fx.Node, expr: Expr) -> str:
    """The name of the sum: that of the linear's weight, where no other weight of the graph has it."""
    known = next((name for name, other in m.sub.weights.items() if other == expr), None)
    name = known or str(first_weight(weight).target).replace(".base_layer.", ".")
    while m.sub.weights.get(name, expr) != expr:
        name = f"{name.removesuffix('weight')}adapted_weight"
    return name


@rewrite(ADAPTED, candidates=adapted, reason=lambda m: "it is no linear(x) + scale * b(a(x)) without a bias of its own")
def lora(m: Match) -> fx.Node | str:
    factor = m.bound.get("scale", 1.0)
    if isinstance(factor, fx.Node):
        return "its scale is computed in the graph"
    exprs = [m.expr(node) for node in (m.w, m.a, m.b)]
    known = [e for e in exprs if e is not None]
    if len(known) < 3:
        return "a weight is computed in the graph"
    if dequantized(known[0]):
        return "the weight that it is added to is in 8 bits in the checkpoint"
    expr = AddLora(widened(known[0]), known[1], known[2], float(factor))
    weight = m.weight(name_of(m, m.w, expr), expr)
    if expr.dtype != dtype(m.w):
        weight = m.op(aten.to.dtype, weight, dtype(m.w))
    return m.op(aten.linear.default, m.x, weight, *([] if m.bias is None else [m.bias]))


PASS = Pass("lora", "exact", [lora], quiet=True)
