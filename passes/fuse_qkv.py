"""linear(x, q), linear(x, k), linear(x, v)   ->   y = linear(x, cat(q, k, v)); y[:nq], y[nq:nq + nk], y[nq + nk:]

The linears feed one attention and share their input. A shared input is not enough, because the k and v of all
cross-attentions share the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from turbocompile.ir.attention_ops import attentions
from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.ir.weights import Cat, Expr, Zeros, is_adapted
from turbocompile.rewrite.attention_sites import feeding_linears
from turbocompile.rewrite.facts import note
from turbocompile.rewrite.linears import first_weight, widened
from turbocompile.rewrite.match import Match, Pass, rewrite

aten = torch.ops.aten


def groups(sub: Subgraph) -> Iterator[list[fx.Node]]:
    """Linears that feed one attention and share an input, in the order q, k, v."""
    taken: set[fx.Node] = set()
    for node in attentions(sub):
        by_input: dict[object, list[fx.Node]] = {}
        for operand in node.args[:3]:
            for linear in feeding_linears(operand):
                group = by_input.setdefault(linear.args[0], [])
                if is_op(linear, aten.linear.default) and linear not in taken and linear not in group:
                    group.append(linear)
        for group in by_input.values():
            if len(group) > 1:
                taken.update(group)
                yield group


def first_of_groups(sub: Subgraph) -> Iterator[fx.Node]:
    """The first linear of each group, in the order of the graph: the sites."""
    yield from [first(group, sub) for group in groups(sub)]


def first(group: list[fx.Node], sub: Subgraph) -> fx.Node:
    """The linear of the group that the graph computes first."""
    return next(n for n in sub.graph.nodes if n in group)


def fused_name(names: list[str]) -> str:
    """attn.to_q.weight, attn.to_k.weight  ->  attn.to_q_to_k.weight"""
    heads, leaf = [name.rpartition(".")[0] for name in names], names[0].rpartition(".")[2]
    parent = heads[0].rpartition(".")[0]
    lasts = [head.removeprefix(parent + ".") if parent else head for head in heads]
    return ".".join(filter(None, [parent, "_".join(lasts).replace(".", "_"), leaf]))


@rewrite(candidates=first_of_groups)
def fuse_qkv(m: Match) -> dict[fx.Node, fx.Node] | str:
    group = next(g for g in groups(m.sub) if m.root in g)
    weights: list[Any] = [linear.args[1] for linear in group]
    exprs = [m.expr(w) for w in weights]
    known = [e for e in exprs if e is not None]
    if len(known) < len(exprs):
        return "a weight is computed in the graph"
    if len({e.dtype for e in known}) > 1:
        return "the weights have different types"
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in group]
    given = [m.expr(b) for b in biases if b is not None]
    if any(e is None for e in given):
        return "a bias is computed in the graph"
    names = [str(first_weight(w).target) for w in weights]
    stored = known[0].dtype
    if any(is_adapted(e) for e in known):  # the sum with the adapters is rounded once
        known = [widened(e) for e in known]
    weight = m.weight(fused_name(names), Cat(tuple(known), 0))
    if known[0].dtype != stored:
        weight = m.op(aten.to.dtype, weight, stored)
    arguments = [group[0].args[0], weight]
    if given:
        zeros = [Zeros(e.shape[:1], e.dtype) for e in known]
        parts: list[Expr] = [z if b is None else m.expr(b) or z for b, z in zip(biases, zeros, strict=True)]
        arguments.append(m.weight(fused_name(names).removesuffix("weight") + "bias", Cat(tuple(parts), 0)))
    wide = note(m.op(aten.linear.default, *arguments), linears=len(group))
    return dict(zip(group, _slices(m, wide, [e.shape[0] for e in known]), strict=True))


def _slices(m: Match, wide: fx.Node, sizes: list[int]) -> Iterator[fx.Node]:
    start, last = 0, len(shape(wide)) - 1
    for size in sizes:
        yield m.op(aten.slice.Tensor, wide, last, start, start + size)
        start += size


PASS = Pass("fuse_qkv", "exact", [fuse_qkv], needs=("attention",))
