"""Cosine and sine tables as graphs: whether two are the same, whether one repeats, and the tables per axis of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from turbocompile.ir.program import SHELL, dtype, is_op, shape
from turbocompile.ir.weights import Constant, full_name
from turbocompile.rewrite.match import Match, uncast

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types too widely to read them
POINTWISE = (aten.to.dtype, aten.cos.default, aten.sin.default, aten.exp.default, aten.neg.default)
WITH_SCALAR = (aten.mul.Tensor, aten.add.Tensor, aten.pow.Tensor_Scalar)

# ---------------------------------------------------------------------------------------------------------- sameness


def alike(m: Match, a: Node, b: Node) -> bool:
    """Whether two tables have the same values: the same node, or constants that are equal when computed."""
    if uncast(a) is uncast(b):
        return True
    return all(_equal(value(m, a, p), value(m, b, p)) for p in m.program.prefixes(m.graph) or [""])


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def value(m: Match, node: Node, prefix: str) -> torch.Tensor | None:
    """The value that a node has in the call of its graph with this prefix, where it depends on stored constants alone;
    None where it depends on anything else.
    """
    values: dict[Node, Any] = {}
    stack = [node]
    while stack:
        top = stack[-1]
        waiting = [n for n in top.all_input_nodes if n not in values]
        if top.op == "get_attr":
            expr = m.sub.weights[str(top.target)]
            key = full_name(expr.key, prefix) if isinstance(expr, Constant) else ""
            known = m.program.constants.get(key)
            if known is None or isinstance(known, FakeTensor):
                return None
            values[top] = known
            stack.pop()
        elif top.op != "call_function" or not isinstance(top.target, torch._ops.OpOverload):
            return None
        elif waiting:
            stack += waiting
        else:
            args, kwargs = fx.map_arg((top.args, top.kwargs), values.__getitem__)
            values[top] = top.target(*args, **kwargs)
            stack.pop()
    return values[node]


# -------------------------------------------------------------------------------------------------------- repetition


def repeated(m: Match, table: Node, interleaved: bool) -> tuple[Node, Node]:
    """The two tables of half the width of a full-width one: of first and second elements of pairs (or of halves).

    Where the graph shows that they are one table, it is the same node twice.
    """
    found = _repeated(m, table, interleaved)
    if found is not None:
        return found
    lead, half = list(shape(table)[:-1]), shape(table)[-1] // 2
    same = _doubled(m, m.graph, table, interleaved)
    if interleaved:
        split = m.op(aten.reshape.default, table, [*lead, half, 2])
        parts = [m.op(aten.slice.Tensor, split, len(lead) + 1, i, i + 1) for i in ((0,) if same else (0, 1))]
        parts = [m.op(aten.reshape.default, p, [*lead, half]) for p in parts]
    else:
        parts = [m.op(aten.slice.Tensor, table, len(lead), i, i + half) for i in ((0,) if same else (0, half))]
    return parts[0], parts[-1]


def _repeated(m: Match, table: Node, interleaved: bool) -> tuple[Node, Node] | None:
    lead, half = list(shape(table)[:-1]), shape(table)[-1] // 2
    source: Any = table.args[0] if table.args and isinstance(table.args[0], fx.Node) else None

    def on_both(found: tuple[Node, Node] | None, target: Any, *rest: Any) -> tuple[Node, Node] | None:
        if found is None:
            return None
        first = m.op(target, found[0], *rest)
        return first, first if found[1] is found[0] else m.op(target, found[1], *rest)

    if pointwise(table):
        return on_both(_repeated(m, source, interleaved), table.target, *table.args[1:])
    if is_op(table, aten.expand.default) and shape(source)[-1:] == shape(table)[-1:]:
        return on_both(_repeated(m, source, interleaved), table.target, [*lead, half])
    if is_op(table, aten.reshape.default) and shape(source)[-1:] == shape(table)[-1:]:
        return on_both(_repeated(m, source, interleaved), table.target, [*lead, half])
    if not interleaved and is_op(table, aten.cat.default) and table.args[1] == len(lead):
        return _cat_of_two(m, list(table.args[0]))
    if interleaved and is_op(table, aten.reshape.default) and shape(source)[-2:] == (half, 2):
        if is_op(source, aten.stack.default) and source.args[1] == len(shape(source)) - 1:
            return on_both(tuple(source.args[0]), aten.reshape.default, [*lead, half])
        if is_op(source, aten.expand.default) and shape(source.args[0])[-2:] == (half, 1):
            under = source.args[0]
            if math.prod(shape(under)) == math.prod(lead) * half:
                one = m.op(aten.reshape.default, under, [*lead, half])
                return one, one
    return None


def _cat_of_two(m: Match, parts: list[Node]) -> tuple[Node, Node] | None:
    n, last = len(parts) // 2, len(shape(parts[0])) - 1
    halves = parts[:n], parts[n:]
    if len(parts) % 2 or [shape(p) for p in halves[0]] != [shape(p) for p in halves[1]]:
        return None
    if n == 1:
        return parts[0], parts[1]
    first = m.op(aten.cat.default, halves[0], last)
    return first, first if halves[0] == halves[1] else m.op(aten.cat.default, halves[1], last)


def _doubled(m: Match, graph: str, node: Node, interleaved: bool) -> bool:
    """Whether the graph shows that both elements of each pair of the last dimension (or both halves of it) are one.

    An input of a block is followed to the argument of each call.
    """
    if node.op == "placeholder" and graph != SHELL:
        place = list(m.program.graphs[graph].inputs()).index(node)
        calls = [c for c in m.program.calls() if c.graph == graph]
        return all(_doubled(m, SHELL, c.node.args[3:][place], interleaved) for c in calls)
    source: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    sizes, last = shape(node), len(shape(node)) - 1
    if not sizes or sizes[-1] % 2:
        return False
    if is_op(node, aten.full.default):
        return True
    if is_op(node, aten.cat.default):
        parts = list(node.args[0])
        if node.args[1] == last and not interleaved:
            n = len(parts) // 2
            return len(parts) % 2 == 0 and parts[:n] == parts[n:]
        return all(_doubled(m, graph, p, interleaved) for p in parts)
    if source is None:
        return False
    if is_op(node, aten.expand.default) and shape(source)[-1:] == (1,):
        return True
    keeps = is_op(node, aten.expand.default, aten.reshape.default) and shape(source)[-1:] == sizes[-1:]
    other = is_op(node, aten.slice.Tensor, aten.index_select.default) and node.args[1] != last
    turned = is_op(node, aten.permute.default) and node.args[1][-1] == last
    rows = is_op(node, aten.embedding.default) or (
        is_op(node, aten.index.Tensor) and all(i is None for i in node.args[1][len(shape(source)) - 1 :])
    )
    if pointwise(node) or keeps or other or turned or rows:
        return _doubled(m, graph, source, interleaved)
    if interleaved and is_op(node, aten.reshape.default) and shape(source)[-2:] == (sizes[-1] // 2, 2):
        if is_op(source, aten.stack.default, aten.cat.default) and source.args[1] == len(shape(source)) - 1:
            return len(source.args[0]) == 2 and source.args[0][0] is source.args[0][1]
        return is_op(source, aten.expand.default) and shape(source.args[0])[-1] == 1
    return False


def pointwise(node: Node) -> bool:
    """Whether node computes each element from one element of one tensor."""
    return is_op(node, *POINTWISE) or (is_op(node, *WITH_SCALAR) and not isinstance(node.args[1], fx.Node))


# ---------------------------------------------------------------------------------------------------------- the axes


@dataclass(frozen=True)
class Factored:
    """A table whose rows are the tokens of `grid`, row-major: side by side, pieces that depend on one axis each.

    pieces: (axis, table of (grid[axis], columns)); axis None for a piece of one row.
    """

    grid: tuple[int, ...]
    pieces: tuple[tuple[int | None, Node], ...]


def tables_per_axis(
    m: Match, cos: Node, sin: Node, tokens: int, columns: int, wanted: torch.dtype
) -> tuple[list[int], list[Node], list[Node]]:
    """(grid, cosine tables, sine tables): one (grid[i], columns) table an axis, else one (tokens, columns) table.

    cos, sin: (1, ..., tokens, ..., 1, columns). wanted: the type that is rotated; no table stays wider.
    """
    both = [_settled(m, _factor(m, t)) for t in (cos, sin)]
    found = []
    c, s = both
    if c is not None and s is not None and c.grid == s.grid and math.prod(c.grid) == tokens:
        found = [[table for _, table in b.pieces] for b in (c, s)]
    if c is not None and found and [shape(t) for t in found[0]] == [shape(t) for t in found[1]]:
        grid = list(c.grid)
    else:
        grid, found = [tokens], [[m.op(aten.reshape.default, t, [tokens, columns])] for t in (cos, sin)]
    narrow = wanted if wanted == torch.float64 else torch.float32
    cast = [
        [m.op(aten.to.dtype, t, narrow) if dtype(t).itemsize > narrow.itemsize else t for t in side] for side in found
    ]
    return grid, cast[0], cast[1]


def _factor(m: Match, node: Node) -> Factored | None:
    """The pieces that a table is put together from; None where the graph shows none."""
    sizes, last = shape(node), len(shape(node)) - 1
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    found: Factored | None = None
    if pointwise(node):
        inner = _factor(m, source)
        found = inner and _each(inner, lambda t: m.op(node.target, t, *node.args[1:]))
    elif is_op(node, aten.reshape.default) and shape(source)[-1:] == sizes[-1:]:
        inner = _factor(m, source)
        found = inner if inner and len(inner.pieces) > 1 else None
    elif is_op(node, aten.reshape.default) and _is_unsqueezed(source, sizes[-1]):
        found = _factor(m, _squeezed(m, source))
    elif is_op(node, aten.reshape.default):
        found = _picked(m, node)
    elif is_op(node, aten.slice.Tensor) and node.args[1] == last:
        found = _columns(m, _factor(m, source), *node.args[2:4])
    elif is_op(node, aten.expand.default) and len(shape(source)) == len(sizes) and shape(source)[-1] == sizes[-1]:
        inner = _base(m, source) or _factor(m, source)
        found = Factored(sizes[:-1], inner.pieces) if inner and inner.grid == shape(source)[:-1] else None
    elif is_op(node, aten.cat.default) and node.args[1] == last:
        parts = [_factor(m, p) for p in node.args[0]]
        known = [p for p in parts if p is not None]
        if len(known) == len(parts) and all(p.grid == known[0].grid for p in known):
            found = Factored(known[0].grid, tuple(piece for p in known for piece in p.pieces))
    return found or _base(m, node)


def _is_unsqueezed(node: Any, columns: int) -> bool:
    return is_op(node, aten.cat.default, aten.expand.default) and shape(node)[-2:] == (columns, 1)


def _squeezed(m: Match, node: Node) -> Node:
    """A table without its last dimension, of one element: one of the two parts of complex numbers."""
    sizes = list(shape(node)[:-1])
    if is_op(node, aten.cat.default) and node.args[1] < len(sizes):
        return m.op(aten.cat.default, [_squeezed(m, p) for p in node.args[0]], node.args[1])
    if is_op(node, aten.expand.default) and len(shape(node.args[0])) == len(sizes) + 1:
        return m.op(aten.expand.default, _squeezed(m, node.args[0]), sizes)
    return m.op(aten.reshape.default, node, sizes)


def _base(m: Match, node: Node) -> Factored | None:
    sizes = shape(node)
    axes = [d for d, n in enumerate(sizes[:-1]) if n > 1]
    if len(axes) > 1 or len(sizes) < 2:
        return None
    axis = axes[0] if axes else None
    rows = sizes[axis] if axis is not None else 1
    return Factored(sizes[:-1], ((axis, m.op(aten.reshape.default, node, [rows, sizes[-1]])),))


def _each(found: Factored, change: Any) -> Factored:
    return Factored(found.grid, tuple((axis, change(table)) for axis, table in found.pieces))


def _columns(m: Match, found: Factored | None, start: int, stop: int) -> Factored | None:
    if found is None:
        return None
    at, pieces = 0, []
    for axis, table in found.pieces:
        width = shape(table)[-1]
        a, b = max(start - at, 0), min(stop - at, width)
        if a < b:
            pieces.append((axis, table if (a, b) == (0, width) else m.op(aten.slice.Tensor, table, 1, a, b)))
        at += width
    return Factored(found.grid, tuple(pieces))


def _picked(m: Match, node: Node) -> Factored | None:
    """Every n-th column: reshape(slice(reshape(table, (..., columns, n)), -1, i, i + 1), (..., columns))."""
    narrow = node.args[0]
    if not is_op(narrow, aten.slice.Tensor) or not is_op(narrow.args[0], aten.reshape.default):
        return None
    split, dim, i, stop = narrow.args
    table, n, columns = split.args[0], shape(split)[-1], shape(node)[-1]
    if dim != len(shape(split)) - 1 or stop != i + 1 or shape(split)[-2] != columns or shape(table)[-1] != columns * n:
        return None
    inner = _factor(m, table)
    if inner is None or any(shape(t)[-1] % n for _, t in inner.pieces):
        return None

    def pick(t: Node) -> Node:
        rows, width = shape(t)
        narrow = m.op(aten.slice.Tensor, m.op(aten.reshape.default, t, [rows, width // n, n]), 2, i, stop)
        return m.op(aten.reshape.default, narrow, [rows, width // n])

    return _each(inner, pick)


def _settled(m: Match, found: Factored | None) -> Factored | None:
    """One piece an axis, in the order of the axes; None where the pieces lie otherwise."""
    if found is None:
        return None
    merged: list[tuple[int | None, list[Node]]] = []
    for axis, table in found.pieces:
        if merged and axis is not None and merged[-1][0] == axis:
            merged[-1][1].append(table)
        else:
            merged.append((axis, [table]))
    grid, tables, at = [], [], 0
    for axis, parts in merged:  # a piece of one row is an axis of one element, which may stand anywhere
        if axis is not None:
            if axis < at or any(n > 1 for n in found.grid[at:axis]):
                return None
            at = axis + 1
        grid.append(1 if axis is None else found.grid[axis])
        tables.append(parts[0] if len(parts) == 1 else m.op(aten.cat.default, parts, 1))
    if any(n > 1 for n in found.grid[at:]):
        return None
    return Factored(tuple(grid), tuple(enumerate(tables)))
