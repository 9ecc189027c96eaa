"""rope(heads(rms_norm(q))), rope(heads(rms_norm(k)))   ->   qk_norm_rope(q), qk_norm_rope(k)

One op does everything between a projection (B, L, H * D) and an attention (B, L, H, D): RMSNorm over all channels or
over each head, rotary or none, layout. A site is one attention. There is one op for each tensor, because the k of
cross-attention depends on the prompt alone, and because two attentions may share their q. Concatenated streams (text
and image) get one op each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from turbocompile.kernels import ops

from turbocompile.ir.attention_ops import BLHD, attention_layout, attentions
from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.rewrite.attention_sites import Place, as_norm, below_layout, in_result_dtype, permuted, reshaped
from turbocompile.rewrite.match import Match, Pass, rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotary:
    """The tables of a rope, per axis."""

    cos: tuple[fx.Node, ...]
    sin: tuple[fx.Node, ...]
    grid: tuple[int, ...]
    interleaved: bool


NO_ROTARY = Rotary((), (), (), True)


def sources_of_q_and_k(attention: fx.Node) -> list[Place]:
    """The nodes that make q and k, under their layout: a rope, a concatenation, a norm or another node."""
    order = attention_layout(attention)
    return [below_layout(Place(node, order, shape(node))) for node in attention.args[:2]]  # type: ignore[arg-type]


def parts(place: Place) -> list[Place]:
    """The streams that a node concatenates along the tokens; empty where it is no such concatenation."""
    at = place.order.index("l")
    channels = place.order == BLHD and shape(place.node) == (*place.sizes[:2], place.sizes[2] * place.sizes[3])
    if not is_op(place.node, aten.cat.default) or not (place.whole or channels) or place.node.args[1] != at:
        return []
    streams: list[fx.Node] = place.node.args[0]  # type: ignore[assignment]
    return [Place(n, place.order, (*place.sizes[:at], shape(n)[at], *place.sizes[at + 1 :])) for n in streams]


def kinds(place: Place) -> set[str]:
    """The kinds of nodes between an operand and its projection: "rope", "rms", "layer"."""
    source: Any = place.node.args[0] if place.node.args else None
    if is_op(place.node, ops.rope):
        return {"rope"} | kinds(below_layout(replace(place, node=source)))
    norm = as_norm(place.node)
    return {norm.kind} if norm else {k for part in parts(place) for k in kinds(below_layout(part))}


def normed(sub: Subgraph) -> Iterator[fx.Node]:
    """Attentions whose q or k is normed or rotated."""
    yield from (
        n for n in attentions(sub) if len(shape(n)) == 4 and any(kinds(place) for place in sources_of_q_and_k(n))
    )


def rebuilt(m: Match, top: fx.Node, place: Place, rotary: Rotary | None) -> fx.Node | None:
    """The rotated value of a place as qk_norm_rope of its projection, (B, L, H, D); None where it has another form."""
    place = below_layout(place)
    node = place.node
    if is_op(node, ops.rope) and rotary is None and place.whole and place.order == BLHD:
        source, cos, sin, grid, interleaved = node.args
        return rebuilt(m, top, replace(place, node=source), Rotary(tuple(cos), tuple(sin), tuple(grid), interleaved))  # type: ignore[arg-type]
    streams = parts(place)
    if streams:
        return concatenated(m, top, streams, rotary)
    if len(place.sizes) != len(place.order):  # heads are part of the batch
        return None
    norm = as_norm(node)
    batch, tokens, head_dim = (place.sizes[place.order.index(axis)] for axis in "bld")
    size = shape(node)[-1]
    per_head = size == head_dim and place.order[-1] == "d"
    if norm is None or norm.kind != "rms" or not (per_head or (size == place.heads * head_dim and place.order == BLHD)):
        return None
    x = in_result_dtype(m, top, norm.x)
    if per_head:
        x = permuted(m, reshaped(m, x, place.sizes), place.order, BLHD)
    x = reshaped(m, x, (batch, tokens, place.heads * head_dim))
    r = rotary or NO_ROTARY
    tables = (list(r.cos), list(r.sin), list(r.grid), r.interleaved)
    return m.op(ops.qk_norm_rope, x, norm.weight, norm.eps, per_head, place.heads, *tables)


def concatenated(m: Match, top: fx.Node, streams: list[Place], rotary: Rotary | None) -> fx.Node | None:
    """One op for each stream; tables over the whole sequence are cut where they have one axis."""
    if rotary is not None and len(rotary.grid) != 1:
        return None
    made, start = [], 0
    for stream in streams:
        stop = start + stream.sizes[stream.order.index("l")]
        cut = rotary
        if rotary is not None:
            cos, sin = ((m.op(aten.slice.Tensor, t[0], 0, start, stop),) for t in (rotary.cos, rotary.sin))
            cut = Rotary(cos, sin, (stop - start,), rotary.interleaved)
        new = rebuilt(m, top, stream, cut)
        if new is None:
            return None
        made.append(new)
        start = stop
    return m.op(aten.cat.default, made, 1)


@rewrite(candidates=normed)
def qk_norm_rope(m: Match) -> dict[fx.Node, fx.Node] | str:
    replaced: dict[fx.Node, fx.Node] = {}
    for place in sources_of_q_and_k(m.root):
        new = rebuilt(m, place.node, place, None)
        if new is not None:
            replaced[place.node] = reshaped(m, permuted(m, new, BLHD, place.order), shape(place.node))
    if replaced:
        return replaced
    found = {k for place in sources_of_q_and_k(m.root) for k in kinds(place)}
    if "rms" not in found:
        return "q and k have no RMSNorm" + (
            ", but a LayerNorm" if "layer" in found else "; the rotary is one op already"
        )
    return "the RMSNorm is not over the channels of q and k or over their heads"


PASS = Pass("qk_norm_rope", "exact", [qk_norm_rope], needs=("attention", "rope"))
