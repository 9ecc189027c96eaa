"""What several passes ask of a graph: attentions in any writing, the linears that feed them, layouts, result dtypes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from turbocompile.ir.arguments import arguments
from turbocompile.ir.attention_ops import BHLD, BLHD, is_attention
from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.kernels import ops as ours
from turbocompile.rewrite.linears import rows
from turbocompile.rewrite.match import Match, default_eps, is_cast, uncast, unwiden

aten = torch.ops.aten

# ------------------------------------------------------------------------------------- attention in any writing


@dataclass(frozen=True)
class Operands:
    """softmax(q k^T * scale + mask) v with q (B, H, L, D), k (B, H or fewer, L_k, D), v likewise.

    mask: boolean (true: attend) or added, broadcast to (B, H, L, L_k). scale None: head_dim**-0.5.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float | None
    mask: fx.Node | None = None
    is_causal: bool = False

    @property
    def scale_value(self) -> float:
        return shape(self.q)[-1] ** -0.5 if self.scale is None else self.scale


def softmax_attentions(sub: Subgraph) -> Iterator[fx.Node]:
    """Attentions as SDPA, and products whose left factor is a softmax."""
    for node in sub.graph.nodes:
        explicit = is_op(node, aten.matmul.default) and is_op(_unbatched(node.args[0]), aten.softmax.int)
        if explicit or is_op(node, aten.scaled_dot_product_attention.default):
            yield node


def operands(m: Match) -> Operands | str:
    """The operands of the attention at the root, for which new nodes may be made; or the reason why it has none."""
    if is_op(m.root, aten.matmul.default):
        return _explicit(m)
    given = arguments(m.root.target, m.root.args, m.root.kwargs)  # type: ignore[arg-type]
    q, k, v, mask, dropout, is_causal, scale, _ = given
    if dropout:
        return f"has dropout ({dropout:g}); call model.eval() before it is captured"
    lead = shape(q)[:-3]
    if any(shape(n)[:-3] != lead for n in (k, v)):
        return "its operands have different batches"
    if len(lead) != 1:
        q, k, v = (straightened(m, _with_one_batch(m, n)) for n in (q, k, v))
        mask = _mask_of_one_batch(m, mask, lead, ranks=len(shape(m.root)))
    return Operands(q, *grouped(m, k, v), scale, mask, bool(is_causal))


def _with_one_batch(m: Match, node: fx.Node) -> fx.Node:
    """A node (B, ..., H, L, D), or (B, L, D) of one head, as (B, H, L, D)."""
    *batch, length, channels = shape(node)
    heads = batch.pop() if len(batch) > 1 else 1
    return reshaped(m, node, (math.prod(batch), heads, length, channels))


def _mask_of_one_batch(m: Match, mask: Any, lead: tuple[int, ...], ranks: int) -> Any:
    """The mask for operands of one batch axis, where the operands have `ranks` axes: `lead`, then (H, L, D)."""
    if mask is None or len(shape(mask)) < 3:
        return mask
    if ranks == 3:  # (B, L, K) of one head
        return reshaped(m, mask, (shape(mask)[0], 1, *shape(mask)[1:]))
    batch, rest = shape(mask)[:-3], shape(mask)[-3:]
    if all(n == 1 for n in batch):
        return reshaped(m, mask, (1, *rest))
    return reshaped(m, m.op(aten.expand.default, mask, [*lead, *rest]), (math.prod(lead), *rest))


def _unbatched(node: Any) -> Any:
    """The node under floating casts and under reshapes of the batch axes."""
    node = uncast(node)
    while is_op(node, aten.reshape.default) and shape(node)[-2:] == shape(node.args[0])[-2:]:
        node = uncast(node.args[0])
    return node


def _explicit(m: Match) -> Operands | str:
    weights = _unbatched(m.root.args[0])
    if weights.args[1] not in (-1, len(shape(weights)) - 1):
        return f"its softmax is over axis {weights.args[1]}, not over the keys"
    scores, scale, mask = _unbatched(weights.args[0]), 1.0, None
    while not is_op(scores, aten.matmul.default):
        terms: Any = scores.args if is_op(scores, aten.add.Tensor, aten.mul.Tensor) else ()
        if is_op(scores, aten.mul.Tensor) and not isinstance(terms[1], fx.Node):
            scale, scores = scale * terms[1], _unbatched(terms[0])
        elif is_op(scores, aten.add.Tensor) and isinstance(terms[1], fx.Node) and mask is None and scale == 1.0:
            product, mask = terms if _is_scores(terms[0]) else terms[::-1]
            scores = _unbatched(product)
        else:
            return "what its softmax is of is no product of q and k, scaled by a number and masked by a sum"
    q, left = _unscaled(m, in_result_dtype(m, m.root, scores.args[0]))
    k, right = _unscaled(m, _transposed(m, in_result_dtype(m, m.root, scores.args[1])))
    v = in_result_dtype(m, m.root, m.root.args[1])  # type: ignore[arg-type]
    batch, heads = _heads(m.root, q)
    sizes = {n: math.prod(shape(n)) // (batch * shape(n)[-1] * shape(n)[-2]) for n in (q, k, v)}
    if mask is not None:
        if len(shape(mask)) == 3 and shape(mask)[0] == batch * heads:
            mask = reshaped(m, mask, (batch, heads, *shape(mask)[1:]))
        mask = in_result_dtype(m, m.root, mask)
    q, k, v = (straightened(m, reshaped(m, n, (batch, sizes[n], *shape(n)[-2:]))) for n in (q, k, v))
    return Operands(q, *grouped(m, k, v), scale * left * right, mask)


def _is_scores(node: Any) -> bool:
    """Whether a term is the product of q and k, perhaps scaled by a number."""
    node = _unbatched(node)
    while _is_scaled(node):
        node = _unbatched(node.args[0])
    return is_op(node, aten.matmul.default)


def _unscaled(m: Match, node: fx.Node) -> tuple[fx.Node, float]:
    """The node without a number that multiplies it under its layout, and that number."""
    if _is_scaled(node):
        return node.args[0], float(node.args[1])  # type: ignore[return-value,arg-type]
    if is_op(node, aten.permute.default, aten.reshape.default):
        inner, factor = _unscaled(m, node.args[0])  # type: ignore[arg-type]
        if factor != 1.0:
            return m.op(node.target, inner, *node.args[1:]), factor
    return node, 1.0


def _transposed(m: Match, node: fx.Node) -> fx.Node:
    """node with its last two axes exchanged, where possible below a reshape of the batch axes."""
    rank = len(shape(node))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if is_op(node, aten.permute.default) and list(node.args[1]) == swapped:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.reshape.default) and shape(node)[-2:] == shape(node.args[0])[-2:]:  # type: ignore[arg-type]
        inner = _transposed(m, node.args[0])  # type: ignore[arg-type]
        return reshaped(m, inner, (*shape(node)[:-2], *shape(inner)[-2:]))
    return m.op(aten.permute.default, node, swapped)


def _heads(root: fx.Node, q: fx.Node) -> tuple[int, int]:
    """(batch, heads) of an attention that may have them in one axis."""
    if len(shape(q)) > 3 or len(shape(root)) > 3:
        return math.prod(shape(root)[:-3]), shape(root)[-3]
    for node in (q, *root.users):
        other = node.args[0] if node is q else node
        if is_op(node, aten.reshape.default) and len(shape(other)) == 4:  # type: ignore[arg-type]
            batch, heads, *rest = shape(other)  # type: ignore[arg-type]
            if batch * heads == shape(root)[0] and rest == list(shape(q if node is q else root)[-2:]):
                return batch, heads
    return 1, math.prod(shape(root)[:-2])


# --------------------------------------------------------------------------------------- what feeds an attention

_PASSED = (
    aten.to.dtype,
    aten.permute.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.rms_norm.default,
    aten.layer_norm.default,
    ours.rope,
    ours.qk_norm_rope,
)


def is_of_heads(node: fx.Node) -> bool:
    """Whether each vector of a node belongs to one head: a reshape split the channels, or an attention made it."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        top = todo.pop()
        if top in seen or top.op != "call_function" or not isinstance(top.meta["val"], torch.Tensor):
            continue
        seen.add(top)
        if rows(top) != rows(node):  # node is one of several parts of top, as of a modulation
            continue
        if is_attention(top):
            return True
        source: Any = top.args[0] if top.args else None
        if is_op(top, aten.reshape.default) and shape(source)[-1] != shape(top)[-1]:
            if shape(source)[-1] > shape(top)[-1]:
                return True
        elif is_op(top, aten.linear.default):
            todo.append(source)
        elif not is_op(top, aten.permute.default) or list(top.args[1])[-1] == len(shape(top)) - 1:  # type: ignore[arg-type]
            todo += [n for n in top.all_input_nodes if n.op != "get_attr"]
    return False


def feeding_linears(node: Any) -> list[fx.Node]:
    """The linears that a node comes from, through norms, rotary, layout changes and concatenation alone."""
    while is_op(node, *_PASSED) or _is_scaled(node):
        node = node.args[0]
    if is_op(node, aten.cat.default):
        return [linear for part in node.args[0] for linear in feeding_linears(part)]
    return [node] if is_op(node, aten.linear.default, ours.w8a8_linear) else []


def _is_scaled(node: Any) -> bool:
    return is_op(node, aten.mul.Tensor) and not isinstance(node.args[1], fx.Node)


def are_of_same_tokens(q: fx.Node, k: fx.Node) -> bool:
    """Whether queries and keys are projections of the same tokens."""
    of_q, of_k = ({uncast(linear.args[0]) for linear in feeding_linears(n)} for n in (q, k))
    return bool(of_q) and of_q == of_k


# -------------------------------------------------------------------------------------------------- layout of heads


def permuted(m: Match, node: fx.Node, source: str, target: str) -> fx.Node:
    """node, whose axes are named by `source`, with its axes in the order of `target`."""
    dims = [source.index(axis) for axis in target]
    return node if dims == sorted(dims) else m.op(aten.permute.default, node, dims)


def reshaped(m: Match, node: fx.Node, sizes: Any) -> fx.Node:
    """node in another shape."""
    return node if shape(node) == tuple(sizes) else m.op(aten.reshape.default, node, list(sizes))


def ungrouped(m: Match, node: fx.Node, heads: int) -> fx.Node:
    """The tensor under a repetition of each head (axis `heads`) for its group of queries; node where there is none."""
    if is_op(node, aten.permute.default):
        dims = list(node.args[1])  # type: ignore[arg-type]
        inner = ungrouped(m, node.args[0], dims[heads])  # type: ignore[arg-type]
        return node if inner is node.args[0] else m.op(aten.permute.default, inner, dims)
    repeat = node
    while is_op(repeat, aten.reshape.default):
        repeat = repeat.args[0]  # type: ignore[assignment]
    if not is_op(repeat, aten.expand.default):
        return node
    wide, narrow = shape(repeat), shape(repeat.args[0])  # type: ignore[arg-type]
    sizes = shape(node)
    if wide == sizes and narrow == (*sizes[:heads], 1, *sizes[heads + 1 :]):  # one group
        return repeat.args[0]  # type: ignore[return-value]
    repeated = (*sizes[:heads], wide[heads], wide[heads + 1], *sizes[heads + 1 :]) if len(wide) > heads + 1 else ()
    once = (*wide[: heads + 1], 1, *wide[heads + 2 :])
    if wide != repeated or narrow != once:
        return node
    return reshaped(m, repeat.args[0], (*wide[: heads + 1], *wide[heads + 2 :]))  # type: ignore[arg-type]


def token_layout(m: Match, *values: Any) -> str | None:
    """Why a kernel cannot read one of the values as a scale, shift or gate of the root (batch, tokens, channels).

    None where it can read all: each is alike for all tokens, or given for each token and channel.
    """
    for value in values:
        if not isinstance(value, fx.Node):
            return f"{value} is a number, and no tensor"
        if shape(value) != shape(m.root) and not m.constant_along_tokens(value):
            return f"{value.name} {list(shape(value))} is neither alike for all tokens nor given for each"
        if shape(value)[-1:] != shape(m.root)[-1:]:
            return f"{value.name} {list(shape(value))} has not the channels of {list(shape(m.root))}"
    return None


def grouped(m: Match, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """k and v (B, H, L, D) without a repetition of their heads for the queries of a group."""
    fewer = ungrouped(m, k, 1), ungrouped(m, v, 1)
    return fewer if shape(fewer[0])[1] == shape(fewer[1])[1] else (k, v)


def straightened(m: Match, node: fx.Node) -> fx.Node:
    """A node (B, H, L, D) as one reshape and one permutation of the tensor under all its layout changes.

    The layout is read off the strides that the changes give to a contiguous tensor. The node itself comes back where a
    change copies, or where the layout is another.
    """
    base, changes = node, []
    while is_op(base, aten.permute.default, aten.reshape.default):
        changes.append(base)
        base = base.args[0]  # type: ignore[assignment]
    viewed = torch.empty(shape(base), device="meta")
    try:
        for change in reversed(changes):
            viewed = viewed.permute(change.args[1]) if is_op(change, aten.permute) else viewed.view(shape(change))  # type: ignore[arg-type]
    except RuntimeError:  # a reshape that copies
        return node
    batch, heads, length, head_dim = shape(node)
    for order, sizes in ((BLHD, (batch, length, heads, head_dim)), (BHLD, shape(node))):
        straight = torch.empty(sizes, device="meta").permute([order.index(axis) for axis in BHLD])
        pairs = zip(viewed.stride(), straight.stride(), shape(node), strict=True)
        if all(a == b for a, b, size in pairs if size > 1):
            return permuted(m, reshaped(m, base, sizes), order, BHLD)
    return node


@dataclass(frozen=True)
class Place:
    """A node on the way from an attention's operand to its projection, and the layout of its numbers.

    Row by row the node holds the numbers of a tensor with axes in this `order` ("bhld", "blhd") of these sizes; the
    node itself may have another shape.
    """

    node: fx.Node
    order: str
    sizes: tuple[int, ...]

    @property
    def heads(self) -> int:
        return self.sizes[self.order.index("h")]

    @property
    def whole(self) -> bool:
        return shape(self.node) == self.sizes


def below_layout(place: Place) -> Place:
    """The place under casts, permutations and reshapes."""
    while True:
        node, source = place.node, place.node.args[0] if place.node.args else None
        if is_cast(node) or is_op(node, aten.reshape.default):
            place = replace(place, node=source)  # type: ignore[arg-type]
        elif is_op(node, aten.permute.default) and place.whole and len(place.sizes) == len(place.order):
            axes = {d: (axis, size) for d, axis, size in zip(node.args[1], place.order, place.sizes, strict=True)}  # type: ignore[arg-type]
            order, sizes = zip(*(axes[d] for d in range(4)), strict=True)
            place = Place(source, "".join(order), sizes)  # type: ignore[arg-type]
        else:
            return place


# ------------------------------------------------------------------------------------------------- dtypes, quantize


def in_result_dtype(m: Match, node: fx.Node, value: fx.Node) -> fx.Node:
    """`value`, an input of `node`, in the dtype that the readers of `node` use its result in.

    An operator that computes in float32 inside and returns the dtype of its input then rounds once, at the end, where
    the graph rounded.
    """
    used = result_dtype(node)
    under = unwiden(value)
    if dtype(under) == used:
        return under
    return value if dtype(value) == used else m.op(aten.to.dtype, value, used)


def result_dtype(node: fx.Node) -> torch.dtype:
    """The dtype that all readers of node cast it to; its own where they do not agree."""
    used = {dtype(n) if is_cast(n) else dtype(node) for n in node.users}
    return used.pop() if len(used) == 1 else dtype(node)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read node, or that read a floating cast of it."""
    return [r for user in node.users for r in (readers(user) if is_cast(user) else [user])]


def lone_quantize(node: fx.Node) -> fx.Node | None:
    """The quantize, where it is the only reader of node; else None."""
    found = readers(node)
    return found[0] if len(found) == 1 and is_op(found[0], ours.quantize) else None


def replaced_items(old: fx.Node, new: fx.Node, m: Match, first: int = 0) -> dict[fx.Node, fx.Node]:
    """Each item of the tuple `old` that is read -> the item of `new`, from `first` on, that stands for it."""
    items = [n for n in old.users if n.target is operator.getitem]
    return {n: m.op(operator.getitem, new, first + n.args[1]) for n in items}  # type: ignore[operator]


@dataclass(frozen=True)
class Norm:
    """A layer_norm ("layer") or rms_norm ("rms") over the last axis."""

    kind: str
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


def as_norm(node: Any) -> Norm | None:
    """The norm that a node computes; None for another node, and for a norm over more than the last axis."""
    if not is_op(node, aten.layer_norm.default, aten.rms_norm.default):
        return None
    x, sizes, weight, *rest = arguments(node.target, node.args, node.kwargs)
    if len(sizes) != 1:
        return None
    if is_op(node, aten.layer_norm.default):
        return Norm("layer", x, weight, rest[0], float(rest[1]))
    eps = default_eps(dtype(x)) if rest[0] is None else rest[0]
    return Norm("rms", x, weight, None, float(eps))
