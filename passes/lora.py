"""linear(x, w, bias) + scale * linear(linear(x, a), b, shift)   ->   linear(x, w + scale * b @ a, bias + scale * shift)

An adapter (LoRA) that runs beside its linear is added to the linear's weight. Several adapters fold one after another.
So does DoRA, as PEFT computes it:

    y + (g - 1) * (y - bias) + g * scale * linear(linear(x, a), b)   ->   linear(x, g * (w + scale * b @ a), bias)
    with y = linear(x, w, bias), g = m / |w + scale * b @ a| for each row

The sum is computed in float32, and rounded once to the type of a 16-bit weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.ir.weights import AddDiff, AddLora, Dora, Expr, Mul, Reshape
from turbocompile.rewrite.linears import dequantized, first_weight, widened
from turbocompile.rewrite.match import Match, Pass, linear, op, permute, reshape, rewrite, uncast, variables

aten = torch.ops.aten
x, w, bias, a, b, shift, scale, m, sizes = variables("x w bias a b shift scale m sizes")
BASE, DOWN = linear(x, w, bias), linear(x, a)
UP, BA = linear(DOWN, b, shift), permute(linear(permute(a, [1, 0]), b), [1, 0])
FACTORS = (lambda part: part * scale, lambda part: part, lambda part: -part)  # the normal form writes * -1 as a minus
ADAPTED = tuple(BASE + (f(UP) if outside else linear(f(DOWN), b)) for f in FACTORS for outside in (True, False))


def dora_patterns() -> Iterator[Any]:
    """PEFT's DoRA, of linears with a bias and without."""
    for f in FACTORS:
        gain = reshape(m / op(aten.linalg_vector_norm.default)(w + f(BA), 2.0, [1]), sizes)
        for base, plain in ((BASE, BASE - bias), (linear(x, w), linear(x, w))):
            yield base + ((gain - 1) * plain + f(gain * linear(DOWN, b)))


DORA = tuple(dora_patterns())


def unscaled(node: Any) -> Any:
    """The node under casts, under factors of one element, and under a minus."""
    node = uncast(node)
    while is_op(node, aten.mul.Tensor, aten.neg.default):
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


def is_gained(node: Any) -> bool:
    """Whether node is an adapter times a factor for each channel, as DoRA's is."""
    while is_op(node, aten.mul.Tensor, aten.neg.default) and not is_low_rank(node):
        inner = [n for n in node.args if isinstance(n, fx.Node) and shape(n) == shape(node)]
        if len(inner) != 1:
            return False
        node = uncast(inner[0])
    return is_low_rank(node)


def is_dora(node: Any) -> bool:
    """Whether node is a sum of products, of which one is an adapter times a factor for each channel."""
    parts = [uncast(n) for n in node.args] if is_op(node, aten.add.Tensor) else []
    return any(not is_low_rank(n) and is_gained(n) for n in parts)


def adapted(sub: Subgraph) -> Iterator[fx.Node]:
    """Sums with an adapter, in the order of the graph, so that one folds after another."""
    for node in sub.graph.nodes:
        if is_op(node, aten.add.Tensor) and any(is_low_rank(n) or is_dora(uncast(n)) for n in node.args):
            yield node


def reason(m: Match) -> str:
    """Why a sum stays."""
    if any(is_dora(uncast(n)) for n in m.root.args):
        return "it is no DoRA of PEFT's, or another adapter stands before it"
    return "it is no linear(x) + scale * b(a(x))"


def name_of(m: Match, weight: fx.Node, expr: Expr, leaf: str) -> str:
    """The name of the sum: that of the linear's weight, where no other weight of the graph has it."""
    known = next((name for name, other in m.sub.weights.items() if other == expr), None)
    name = known or str(first_weight(weight).target).replace(".base_layer.", ".")
    while m.sub.weights.get(name, expr) != expr:
        name = f"{name.removesuffix(leaf)}adapted_{leaf}"
    return name


@rewrite((*ADAPTED, *DORA), candidates=adapted, reason=reason)
def lora(m: Match) -> fx.Node | str:
    factor = m.bound.get("scale", -1.0 if has_minus(m) else 1.0)
    if isinstance(factor, fx.Node):
        return "its scale is computed in the graph"
    magnitude = m.bound.get("m")
    known = known_weights(m, m.w, m.a, m.b, *([] if magnitude is None else [magnitude]))
    if isinstance(known, str):
        return known
    of, down, up = known[:3]
    bias = m.bound.get("bias")
    if magnitude is None:
        total: Expr = AddLora(widened(of), down, up, float(factor))
        bias = shifted(m, bias, m.bound.get("shift"), float(factor))
    else:
        total = Dora(widened(of), down, up, Reshape(known[3], (of.shape[0], 1)), float(factor))
    if isinstance(bias, str):
        return bias
    return m.op(aten.linear.default, m.x, stored(m, m.w, total), *([] if bias is None else [bias]))


def has_minus(m: Match) -> bool:
    """Whether the adapter is subtracted."""
    waiting, seen = [m.root], {m.x, uncast(m.x)}  # what comes before the linear has signs of its own
    while waiting:
        node = waiting.pop()
        if node in seen or not is_op(node, aten.add, aten.mul, aten.neg, aten.linear, aten.to):
            continue
        seen.add(node)
        low = [unscaled(n) for n in node.all_input_nodes]
        if is_op(node, aten.neg) and any(is_low_rank(n) or is_gained(n) or is_down(m, n) for n in low):
            return True
        waiting += node.all_input_nodes
    return False


def is_down(m: Match, node: Any) -> bool:
    """Whether node is the adapter's first linear."""
    return is_op(node, aten.linear.default) and uncast(node.args[1]) is uncast(m.a)


def shifted(m: Match, bias: fx.Node | None, shift: fx.Node | None, factor: float) -> fx.Node | str | None:
    """The bias with that of an adapter; a reason where one is unknown."""
    if shift is None:
        return bias
    exprs = [m.expr(n) for n in (bias, shift) if n is not None]
    known = [e for e in exprs if e is not None]
    if len(known) < len(exprs):
        return "a bias is computed in the graph"
    first = widened(known[0])
    total = Mul(first, factor) if bias is None else AddDiff(first, known[1], factor)
    return stored(m, shift if bias is None else bias, total, "bias")


def known_weights(m: Match, *nodes: fx.Node) -> list[Expr] | str:
    """The expressions of weights, the first of which an adapter is added to; a reason where one is unknown."""
    exprs = [m.expr(node) for node in nodes]
    known = [e for e in exprs if e is not None]
    if len(known) < len(exprs):
        return "a weight is computed in the graph"
    if dequantized(known[0]):
        return "the weight that it is added to is in 8 bits in the checkpoint"
    return known


def stored(m: Match, old: fx.Node, expr: Expr, leaf: str = "weight") -> fx.Node:
    """The sum that takes the place of a weight or a bias, in its dtype."""
    made = m.weight(name_of(m, old, expr, leaf), expr)
    return made if expr.dtype == dtype(old) else m.op(aten.to.dtype, made, dtype(old))


PASS = Pass("lora", "exact", [lora], quiet=True)
