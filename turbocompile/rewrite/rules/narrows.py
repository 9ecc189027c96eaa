"""Slices, cats and stacks: a slice goes to its source, and writes into a tensor become a cat or a stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from turbocompile.ir.arguments import arguments
from turbocompile.ir.program import dtype, is_op, shape
from turbocompile.rewrite.local import SIZES, Answer, Maker, Node, Rules, local, row, rows
from turbocompile.rewrite.match import narrow, op, permute, reshape, tensors, variables

aten = torch.ops.aten
stack = op(aten.stack.default)
(x,) = tensors("x")
parts, dims, dim, start, stop, first, last = variables("parts dims dim start stop first last")


@local(aten.slice.Tensor)
def slice_is_narrow(node: Node, make: Maker) -> Answer:
    """slice(x, dim, start, end)   ->   narrow(x, dim, start, stop) with bounds from 0 to the size of the dimension
    x[..., i::n]                ->   reshape(narrow(reshape(x, (..., size / n, n)), -1, i, i + 1))
    """
    x, dim, start, end, step = arguments(aten.slice.Tensor, node.args, node.kwargs)
    sizes = list(shape(x))
    dim %= len(sizes)
    first, stop, _ = slice(start, end).indices(sizes[dim])
    if shape(node) == tuple(sizes):
        return x
    if step == 1:
        args = (x, dim, first, max(first, stop))
        return (aten.slice.Tensor, args) if tuple(node.args) != args else None
    if sizes[dim] % step or shape(node)[dim] * step != sizes[dim]:
        return None
    split = make(aten.reshape.default, x, [*sizes[:dim], sizes[dim] // step, step, *sizes[dim + 1 :]])
    return aten.reshape.default, (make(aten.slice.Tensor, split, dim + 1, first, first + 1), list(shape(node)))


@local(aten.slice.Tensor)
def narrow_under_reshape(node: Node, make: Maker) -> Answer:
    """narrow(reshape(x))   ->   reshape(narrow(x)), so that a slice of fused q, k, v is one form for all layouts."""
    x, dim, start, stop, *step = node.args
    if step or node.kwargs or not is_op(x, aten.reshape.default):
        return None
    place = narrow_before_reshape(shape(x.args[0]), shape(x), dim, start, stop)
    if place is None:
        return None
    return aten.reshape.default, (make(aten.slice.Tensor, x.args[0], *place), list(shape(node)))


@local(aten.slice.Tensor)
def narrow_under_expand(node: Node, make: Maker) -> Answer:
    """narrow(expand(x))   ->   expand(narrow(x)), or expand(x) along an axis that x has once."""
    x, dim, start, stop, *step = node.args
    if step or node.kwargs or not is_op(x, aten.expand.default) or len(shape(x)) != len(shape(x.args[0])):
        return None
    source = x.args[0]
    inner = source if shape(source)[dim] == 1 else make(aten.slice.Tensor, source, dim, start, stop)
    return aten.expand.default, (inner, list(shape(node)))


@local(aten.slice.Tensor)
def narrow_of_cat(node: Node, make: Maker) -> Answer:
    """narrow(cat(parts, dim), dim, ...)     ->   the part that holds the range, narrowed, or the cat of whole parts
    narrow(cat(parts, along), dim, ...)   ->   cat(narrow(part, dim, ...) of each, along), where all read such narrows
    """
    x, dim, start, stop, *step = node.args
    if step or node.kwargs or not is_op(x, aten.cat.default):
        return None
    parts, along = x.args
    if along != dim:  # the cat is gone then, because nothing else reads it
        if not all(is_op(u, aten.slice.Tensor) and u.args[1] == dim for u in x.users):
            return None
        return aten.cat.default, ([make(aten.slice.Tensor, p, dim, start, stop) for p in parts], along)
    at, kept = 0, []
    for part in parts:
        size = shape(part)[dim]
        a, b = max(start - at, 0), min(stop - at, size)
        if a < b:
            kept.append((part, a, b, size))
        at += size
    if len(kept) == 1:
        part, a, b, _ = kept[0]
        return aten.slice.Tensor, (part, dim, a, b)
    if kept and all(a == 0 and b == size for _, a, b, size in kept):
        return aten.cat.default, ([part for part, *_ in kept], dim)
    return None


def narrow_before_reshape(
    source: Sequence[int], result: Sequence[int], dim: int, start: int, stop: int
) -> tuple[int, int, int] | None:
    """(dim, start, stop) of the narrow of `source` that holds a narrow of `result`, its reshape; None if there is none.

    The dimensions of both are grouped where their products meet; within its group the narrowed dimension must be the
    outermost that is not 1, and the range must fall on whole rows of such a dimension of the source.
    """
    if 0 in result:
        return None
    for ins, outs in _groups(source, result):
        if dim not in outs:
            continue
        if any(result[d] != 1 for d in outs if d < dim):
            return None
        row = math.prod(result[d] for d in outs if d > dim)
        a, b = start * row, stop * row
        for d in ins:
            inner = math.prod(source[e] for e in ins if e > d)
            if source[d] != 1:
                return (d, a // inner, b // inner) if a % inner == 0 and b % inner == 0 else None
    return None


def _groups(source: Sequence[int], result: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions of source and result with equal products, as short as they can be."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(result):
        ins, outs = [], []
        a = b = 1
        if i < len(source):
            ins, a, i = [i], source[i], i + 1
        if j < len(result):
            outs, b, j = [j], result[j], j + 1
        while a != b or not ins or not outs:
            if a <= b and i < len(source):
                a, ins, i = a * source[i], [*ins, i], i + 1
            elif j < len(result):
                b, outs, j = b * result[j], [*outs, j], j + 1
            else:
                break
        groups.append((ins, outs))
    return groups


@local(aten.cat.default)
def cat_rules(node: Node, make: Maker) -> Answer:
    """cat([x])                      ->   x
    cat([cat([x, y]), z])         ->   cat([x, y, z])
    cat([reshape(x), reshape(y)])   ->   stack([x, y]), where each reshape inserts the dimension
    """
    parts, given = arguments(aten.cat.default, node.args, node.kwargs)
    dim = given % len(shape(node))
    full = [p for p in parts if shape(p) != (0,) and shape(p)[dim] > 0 and dtype(p) == dtype(node)]
    if len(full) == 1 and shape(full[0]) == shape(node):
        return full[0]
    if dtype(parts[0]) == dtype(node) and any(_cat_along(p, dim) for p in full) and len(full) == len(parts):
        return aten.cat.default, ([q for p in parts for q in (p.args[0] if _cat_along(p, dim) else [p])], dim)
    unsqueezed = [p.args[0] if is_op(p, aten.reshape.default) else None for p in parts]
    thin = [*shape(node)[:dim], *shape(node)[dim + 1 :]]
    if len(parts) > 1 and all(s is not None and list(shape(s)) == thin for s in unsqueezed):
        return aten.stack.default, (unsqueezed, dim)
    return (aten.cat.default, (list(parts), dim)) if node.kwargs or node.args[1:] != (dim,) else None


def _cat_along(node: Node, dim: int) -> bool:
    return is_op(node, aten.cat.default) and len(node.users) == 1 and node.args[1:] == (dim,)


@local(aten.stack.default)
def stack_rules(node: Node, make: Maker) -> Answer:
    """stack(parts, dim=-1)   ->   stack(parts, rank - 1)"""
    parts, given = arguments(aten.stack.default, node.args, node.kwargs)
    dim = given % len(shape(node))
    return (aten.stack.default, (list(parts), dim)) if node.kwargs or node.args[1:] != (dim,) else None


@local(aten.select_scatter.default)
def select_scatter_is_slice_scatter(node: Node, make: Maker) -> Answer:
    """select_scatter(x, source, dim, i)   ->   slice_scatter(x, reshape(source), dim, i, i + 1)"""
    base, source, dim, index = node.args
    sizes = list(shape(node))
    dim, index = dim % len(sizes), index % sizes[dim]
    sizes[dim] = 1
    return aten.slice_scatter.default, (base, make(aten.reshape.default, source, sizes), dim, index, index + 1)


@local(aten.slice_scatter.default)
def scatter_is_cat(node: Node, make: Maker) -> Answer:
    """slice_scatter(x, source, dim, start, stop)   ->   cat([x before start, source, x from stop on], dim)
    writes at 0::n, 1::n, ..., n-1::n               ->   reshape(stack(sources, dim + 1))
    """
    base, source, dim, start, stop, step = _scatter(node)
    if step == 1:
        size = shape(node)[dim]
        left = [make(aten.slice.Tensor, base, dim, 0, start)] if start > 0 else []
        right = [make(aten.slice.Tensor, base, dim, stop, size)] if stop < size else []
        return aten.cat.default, ([*left, make.cast(source, dtype(node)), *right], dim)
    written = {start: source}
    while is_op(base, aten.slice_scatter.default) and len(written) < step:
        below, source, *place = _scatter(base)
        if (place[0], place[3]) != (dim, step):
            return None
        written.setdefault(place[1], source)
        base = below
    if set(written) != set(range(step)) or shape(node)[dim] % step:
        return None
    parts = [make.cast(written[i], dtype(node)) for i in range(step)]
    return aten.reshape.default, (make(aten.stack.default, parts, dim + 1), list(shape(node)))


def _scatter(node: Any) -> tuple[Node, Node, int, int, int, int]:
    """(base, source, dim, start, stop, step) of a slice_scatter, with non-negative bounds."""
    rank, sizes = len(shape(node)), shape(node)
    base, source, dim, start, stop, step = arguments(aten.slice_scatter.default, node.args, node.kwargs)
    start, stop, _ = slice(start, stop).indices(sizes[dim % rank])
    return base, source, dim % rank, start, max(start, stop), step


NARROWS = Rules(
    "narrows",
    rows(
        slice_is_narrow,
        row(
            narrow(narrow(x, dim, first, last), dim, start, stop),
            narrow(x, dim, lambda first, start: first + start, lambda first, stop: first + stop),
        ),
        row(
            narrow(permute(x, dims), dim, start, stop),
            permute(narrow(x, lambda dims, dim: dims[dim], start, stop), dims),
        ),
        narrow_under_reshape,
        narrow_under_expand,
        narrow_of_cat,
        row(
            narrow(stack(parts, dim), dim, start, stop),
            reshape(lambda parts, start: parts[start], SIZES),
            where=lambda start, stop: stop == start + 1,
        ),
        cat_rules,
        stack_rules,
        select_scatter_is_slice_scatter,
        scatter_is_cat,
    ),
)
