"""Where a scale of a linear's input can be folded: into the norm that makes it, or into the v of an attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbocompile.ir.arguments import arguments
from turbocompile.ir.attention_ops import BHLD, BLHD, SLA, attention_layout, is_attention
from turbocompile.ir.program import Subgraph, is_op, shape
from turbocompile.ir.weights import RELATIVE, Load
from turbocompile.rewrite.attention_sites import Place, as_norm, below_layout, readers
from turbocompile.rewrite.linears import dequantized, first_weight, given_weights, weight_expr
from turbocompile.rewrite.match import is_cast, uncast

aten = torch.ops.aten
NO_PRODUCER = "no producer to fold a scale into"


@dataclass(frozen=True)
class Fold:
    """Linears that share an input whose channels can be scaled where the input is made.

    base: the start of the names of the vectors s and 1 / s, as in "attn1.to_q.". channels: of the input. attention: the
    attention that makes the input; None where a norm, perhaps modulated, makes it.
    """

    linears: tuple[fx.Node, ...]
    base: str
    channels: int
    attention: fx.Node | None = None

    def vector(self, name: str) -> Load:
        """The float32 vector s ("smooth") or 1 / s ("unsmooth") of (channels,), of each layer."""
        return Load(f"{RELATIVE}{self.base}{name}", (self.channels,), torch.float32)


def fold_of(linear: fx.Node, sub: Subgraph) -> Fold | str:
    """Where a scale of a linear's input can go; a string is the reason why it cannot."""
    x = uncast(linear.args[0])
    reading = readers(x)
    if any(not is_op(n, aten.linear.default) or uncast(n.args[0]) is not x for n in reading):
        return "something else than linears reads its input"
    exprs = [weight_expr(n.args[1], sub) for n in reading]
    if any(e is None or dequantized(e) for e in exprs):
        return "a weight is computed in the graph, or 8 bits in the checkpoint"
    linears = tuple(n for n in sub.graph.nodes if n in reading)
    weight: Any = linears[0].args[1]
    base, channels = str(first_weight(weight).target).removesuffix("weight"), shape(weight)[1]
    if foldable(x, sub, last=True):
        return Fold(linears, base, channels)
    attention = attention_under(x)
    if attention is None:
        return NO_PRODUCER
    return unfoldable(attention, x, sub) or Fold(linears, base, channels, attention)


def foldable(node: fx.Node, sub: Subgraph, last: bool = False) -> bool:
    """Whether the node is a norm, perhaps cast, scaled and shifted alike for all tokens, with one reader.

    last: whether the node is the input itself, which several linears may read.
    """
    if not last and len(node.users) != 1:
        return False
    norm = as_norm(node)
    if norm is not None:
        return all(w is None or weight_expr(w, sub) is not None for w in (norm.weight, norm.bias))
    if is_cast(node):
        return foldable(node.args[0], sub)  # type: ignore[arg-type]
    if not is_op(node, aten.add.Tensor, aten.mul.Tensor) or len(node.args) != 2:
        return False
    inner = [n for n in node.args if isinstance(n, fx.Node) and shape(n) == shape(node) and foldable(n, sub)]
    others = [n for n in node.args if n not in inner]
    if len(inner) != 1 or not isinstance(others[0], fx.Node):
        return False
    sizes = shape(others[0])
    return is_op(node, aten.mul.Tensor) or (sizes[-1:] == shape(node)[-1:] and all(n == 1 for n in sizes[1:-1]))


def has_norm(node: Any) -> bool:
    """Whether the node is a norm under casts, sums and products."""
    if is_op(node, aten.add.Tensor, aten.mul.Tensor):
        return any(has_norm(n) for n in node.args)
    return has_norm(node.args[0]) if is_cast(node) else as_norm(node) is not None


def attention_under(node: fx.Node) -> fx.Node | None:
    """The attention whose heads the node (batch, tokens, channels) holds side by side; None for another node."""
    if not is_op(node, aten.reshape.default):
        return None
    inner, order = uncast(node.args[0]), BLHD
    if is_op(inner, aten.permute.default) and list(inner.args[1]) == [0, 2, 1, 3]:
        inner, order = uncast(inner.args[0]), BHLD
    found = is_attention(inner) and attention_layout(inner) == order
    batch, tokens, channels = shape(node) if len(shape(node)) == 3 else (0, 0, 0)
    sizes = dict(zip(order, shape(inner), strict=True)) if found else {}
    whole = found and (sizes["b"], sizes["l"], sizes["h"] * sizes["d"]) == (batch, tokens, channels)
    return inner if whole else None


def unfoldable(attention: fx.Node, x: fx.Node, sub: Subgraph) -> str | None:
    """Why x, the heads of an attention side by side, cannot be scaled through v; None where it can be."""
    if is_op(attention, *SLA):
        return "SLA's linear branch mixes the channels of v"
    layout, q, v = attention_layout(attention), *q_and_v(attention)
    if shape(q)[layout.index("h")] != shape(v)[layout.index("h")]:
        return "a head of v serves several heads of q"
    place, path = below_layout(Place(v, layout, shape(v))), path_of_v(attention)
    base = path[-1]
    if place.node is not base or place.order != BLHD or shape(base)[-1] != place.sizes[2] * place.sizes[3]:
        return "v is not the channels of a linear"
    if any(len(n.users) != 1 for n in [*between(x, attention)[1:], *path]):
        return "something else reads the attention, or its v"
    linear: Any = base.args[0] if is_op(base, aten.slice.Tensor) else base
    if not is_op(linear, aten.linear.default) or any(weight_expr(w, sub) is None for w in given_weights(linear)):
        return "v is not made by a linear with weights of its own"
    if dequantized(weight_expr(linear.args[1], sub)):
        return "the weight that makes v is in 8 bits in the checkpoint"
    return None if linear is base or all(of_channels(n) for n in linear.users) else "v is not some channels of a linear"


def of_channels(node: fx.Node) -> bool:
    """Whether the node is a slice of adjacent channels."""
    if not is_op(node, aten.slice.Tensor):
        return False
    _, dim, _, _, step = arguments(aten.slice.Tensor, node.args, node.kwargs)
    return dim % len(shape(node)) == len(shape(node)) - 1 and step == 1


def between(node: fx.Node, attention: fx.Node) -> list[fx.Node]:
    """node and the nodes under it, down to the attention, which is not among them."""
    path = []
    while node is not attention:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return path


def q_and_v(attention: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The operands q and v of an attention."""
    return attention.args[0], attention.args[2]  # type: ignore[return-value]


def path_of_v(attention: fx.Node) -> list[fx.Node]:
    """The attention, the layout changes and casts behind its v, and what makes v: a linear or a slice of one."""
    path, node = [attention], q_and_v(attention)[1]
    while is_cast(node) or is_op(node, aten.reshape.default, aten.permute.default):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return [*path, node]
