"""Layout: `permute`, `reshape`, `expand`, `slice` (step 1), with non-negative dimensions, no two of a kind in a row."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import (
    DTYPE,
    SIZES,
    Answer,
    Call,
    Maker,
    Node,
    Rules,
    expand,
    local,
    overloads,
    row,
    rows,
    to,
)
from turbocompile.rewrite.match import numbers, op, permute, reshape, tensors, variables

aten = torch.ops.aten
x, y = tensors("x y")
(c,) = numbers("c")
dims, inner = variables("dims inner")

SAME_VALUES = overloads(aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous)
VIEWS = overloads(
    aten.view.default,
    aten._unsafe_view,
    aten.view_as,
    aten.reshape_as,
    aten.squeeze,
    aten.unsqueeze,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._reshape_alias,
)


@local(aten.squeeze.dim)
def squeeze_under_permute(node: Node, make: Maker) -> Answer:
    """squeeze(permute(x, dims), dim)   ->   permute(squeeze(x, dims[dim]), the other dims)"""
    x, dim = node.args
    if not is_op(x, aten.permute.default) or shape(node) == shape(x):
        return None
    source, dims = x.args
    dim %= len(shape(x))
    return _permute_without(dim, dims, make(aten.squeeze.dim, source, dims[dim]))


def _permute_without(dim: int, dims: Sequence[int], source: Node) -> Call:
    """A permute by `dims` of a source that lacks the dimension which stood at `dim`."""
    gone = dims[dim]
    return aten.permute.default, (source, [d - (d > gone) for d in dims if d != gone])


@local(aten.transpose.int, aten.t.default)
def transpose_is_permute(node: Node, make: Maker) -> Answer:
    """transpose(x, a, b)   ->   permute(x, dims with a and b exchanged)"""
    rank = len(shape(node))
    dims = list(range(rank))
    if rank > 1:
        a, b = (d % rank for d in node.args[1:3]) if len(node.args) == 3 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return aten.permute.default, (node.args[0], dims)


@local(aten.select.int)
def select_is_narrow(node: Node, make: Maker) -> Answer:
    """select(x, dim, i)                  ->   reshape(narrow(x, dim, i, i + 1))
    select(permute(x, dims), dim, i)   ->   permute(select(x, dims[dim], i), the other dims)

    It goes under a permute at once, because a reshape no longer tells which dimension it drops.
    """
    x, dim, index = node.args
    sizes = shape(x)
    dim, index = dim % len(sizes), index % sizes[dim]
    if is_op(x, aten.permute.default):
        source, dims = x.args
        return _permute_without(dim, dims, make(aten.select.int, source, dims[dim], index))
    return aten.reshape.default, (make(aten.slice.Tensor, x, dim, index, index + 1), list(shape(node)))


@local(operator.getitem)
def item_of_split(node: Node, make: Maker) -> Answer:
    """split(x, size, dim)[i]   ->   narrow(x, dim, start, stop), and so for chunk
    unbind(x, dim)[i]        ->   select(x, dim, i)
    """
    source, i = node.args
    if not is_op(source, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split):
        return None
    x, parts = source.args[0], source.meta["val"]
    names = [a.name for a in source.target._schema.arguments]
    given = arguments(source.target, source.args, source.kwargs)
    dim = given[names.index("dim")] % len(shape(x))
    if is_op(source, aten.unbind):
        return aten.select.int, (x, dim, i)
    start = sum(p.shape[dim] for p in parts[:i])
    return aten.slice.Tensor, (x, dim, start, start + parts[i].shape[dim])


@local(aten.reshape.default)
def unit_dims_before_cat_and_expand(node: Node, make: Maker) -> Answer:
    """reshape(cat(parts))   ->   cat(reshape(part) of each),   reshape(expand(x))   ->   expand(reshape(x))

    For a reshape that only adds or drops dimensions of one element, where no layout change reads it: it meets those
    first, because a dimension that einsum adds goes away again there.
    """
    source = node.args[0]
    if not is_op(source, aten.cat.default, aten.expand.default) or len(source.users) > 1:
        return None
    if any(is_op(user, aten.permute.default, aten.reshape.default) for user in node.users):
        return None
    old, new = shape(source), shape(node)
    kept = [d for d, n in enumerate(old) if n != 1], [d for d, n in enumerate(new) if n != 1]
    if [old[d] for d in kept[0]] != [new[d] for d in kept[1]]:
        return None
    place = dict(zip(*kept, strict=True))

    def resized(part: Node) -> list[int]:
        sizes = [1] * len(new)
        for was, now in place.items():
            sizes[now] = shape(part)[was]
        return sizes

    if is_op(source, aten.expand.default):
        under = source.args[0]
        if len(shape(under)) != len(old):
            return None
        return aten.expand.default, (make(aten.reshape.default, under, resized(under)), list(new))
    parts, dim = source.args
    if dim not in place or any(shape(p)[dim] == old[dim] for p in parts):
        return None
    return aten.cat.default, ([make(aten.reshape.default, p, resized(p)) for p in parts], place[dim])


def positive(node: Node, dims: Sequence[int]) -> list[int]:
    """Dimensions of the node, counted from the first."""
    return [d % len(shape(node)) for d in dims]


@local(aten.permute.default)
def inserted_axes_after_permute(node: Node, make: Maker) -> Answer:
    """permute(reshape(x, (..., 1, ...)))   ->   reshape(permute(x), (..., 1, ...)): axes of one element come last."""
    source, dims = node.args
    inserted = inserted_ones(source)
    if not inserted:
        return None
    kept = [d for d in range(len(dims)) if d not in inserted]
    inner = make(aten.permute.default, source.args[0], [kept.index(d) for d in dims if d in kept])
    return aten.reshape.default, (inner, list(shape(node)))


def moves_ones_alone(node: Node, x: Node, dims: Sequence[int]) -> bool:
    """Whether a permute moves axes of size 1 alone, and only reshapes read it."""
    wide = [d for d in dims if shape(x)[d] != 1]
    return wide == sorted(wide) and all(is_op(user, aten.reshape.default) for user in node.users)


def inserted_ones(node: Node) -> list[int]:
    """The axes of size 1 that a reshape inserts, where it does nothing else."""
    if not is_op(node, aten.reshape.default):
        return []
    rest, inserted = list(shape(node.args[0])), []
    for axis, size in enumerate(shape(node)):
        if rest and rest[0] == size:
            rest.pop(0)
        elif size == 1:
            inserted.append(axis)
        else:
            return []
    return [] if rest else inserted


@local(aten.repeat.default)
def repeat_is_expand(node: Node, make: Maker) -> Answer:
    """repeat(x, r)   ->   reshape(expand(reshape(x, (..., 1, n, ...)), (..., r, n, ...)))"""
    x, repeats = node.args
    lead = len(repeats) - len(shape(x))
    sizes = (1,) * lead + shape(x)
    split = [s for r, n in zip(repeats, sizes, strict=True) for s in ((1, n) if r > 1 and n > 1 else (n,))]
    wide = [s for r, n in zip(repeats, sizes, strict=True) for s in ((r, n) if r > 1 and n > 1 else (n * r,))]
    if 0 in wide:
        return None
    expanded = make(aten.expand.default, make(aten.reshape.default, x, split), wide)
    return aten.reshape.default, (expanded, list(shape(node)))


LAYOUT = Rules(
    "layout",
    rows(
        [row(op(same)(x, ...), x) for same in SAME_VALUES],
        squeeze_under_permute,
        [row(op(view)(x, ...), reshape(x, SIZES)) for view in VIEWS],
        transpose_is_permute,
        select_is_narrow,
        item_of_split,
        row(op(aten.copy.default)(y, x, ...), expand(to(x, DTYPE), SIZES)),  # y gets the values of x
        row(reshape(x, ...), x),
        row(reshape(reshape(x, ...), ...), reshape(x, SIZES)),
        row(reshape(x, ...), reshape(x, SIZES)),
        unit_dims_before_cat_and_expand,
        row(permute(x, dims), x, where=lambda node, dims: positive(node, dims) == list(range(len(dims)))),
        row(
            permute(permute(x, inner), dims),
            permute(x, lambda node, inner, dims: [inner[d] % len(dims) for d in positive(node, dims)]),
        ),
        row(permute(x, dims), permute(x, positive)),
        inserted_axes_after_permute,
        row(permute(x, dims), reshape(x, SIZES), where=moves_ones_alone),
        row(expand(x, ...), x),
        row(expand(expand(x, ...), ...), expand(x, SIZES)),
        row(expand(x, ...), expand(x, SIZES)),
        repeat_is_expand,
    ),
)

# -------------------------------------------------------------------------------------------------------------- inwards


@local(aten.reshape.default, aten.permute.default, aten.slice.Tensor)
def layout_before_cast(node: Node, make: Maker) -> Answer:
    """reshape(to(x, dtype))   ->   to(reshape(x), dtype), and so for permute and slice, so that layout changes meet.

    Where the layout change alone reads the cast, and x is no stored weight.
    """
    source = node.args[0]
    if is_op(source, aten.to.dtype) and len(source.users) == 1 and source.args[0].op != "get_attr":
        moved = make(node.target, source.args[0], *node.args[1:])
        return aten.to.dtype, (moved, dtype(node))
    return None


# These come after the rules of narrows: layout changes go below casts and sums, where they meet other layout changes.
INWARDS = Rules(
    "layout inwards",
    rows(
        layout_before_cast,
        row(  # as in (1 + scale)[:, None]
            reshape(x + c, ...),
            reshape(x, SIZES) + c,
            where=lambda node: len(node.args[0].users) == 1 and bool(inserted_ones(node)),
        ),
    ),
)
