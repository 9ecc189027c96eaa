"""rotary embedding in any style   ->   rope(x, cos, sin, grid, interleaved)

The rotary may be written as pairs, `stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)` (the normal form of strided
writes and of complex products, too), as halves, `cat([...], -1)`, or over the full width, `x * cos + turned(x) * sin`.
Tables that the model puts together from one table an axis of the token grid stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from turbocompile.kernels import ops
from turbocompile.passes.rope_tables import alike, repeated, tables_per_axis

from turbocompile.ir.program import Subgraph, dtype, is_op, shape
from turbocompile.rewrite.match import Match, Pass, matches, rewrite, uncast, unwiden, variables

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types too widely to read them
x, turned, x1, x2, cos, sin, cos2, sin2 = variables("x turned x1 x2 cos sin cos2 sin2")

ROTATED = [x1 * cos - x2 * sin, x2 * cos2 + x1 * sin2]
FULL_WIDTH = x * cos + turned * sin
TURNED = [-x2, x1]
FORM = "x1 * cos - x2 * sin, x2 * cos + x1 * sin with x1, x2 the pairs or halves of the last axis"


@dataclass(frozen=True)
class Rotated:
    """The tensor that is turned: `source`, or its part `narrow`, reshaped and permuted by `dims` to `sizes`.

    interleaved: whether its pairs lie side by side, or half a head apart.
    """

    source: Node
    narrow: tuple[int, int, int] | None
    dims: tuple[int, ...] | None
    sizes: tuple[int, ...]
    interleaved: bool


def rotations(sub: Subgraph) -> Iterator[Node]:
    """Two sums of products side by side in the last axis, and sums of products with a tensor that is half negated."""
    for node in sub.graph.nodes:
        parts = two_parts(node)
        if parts is not None and all(_sum_of_products(p) for p in parts):
            yield node
        elif is_op(node, aten.add.Tensor) and _sum_of_products(node):
            factors = [f for product in node.args for f in uncast(product).args if isinstance(f, fx.Node)]
            for factor in factors:
                halves = two_parts(_unshaped(factor))
                if halves is not None and sum(is_op(uncast(h), aten.neg.default) for h in halves) == 1:
                    yield node
                    break


def two_parts(node: Any) -> list[Node] | None:
    """The parts of a stack in one of the last two axes, or of a cat in the last, of two like tensors."""
    if not is_op(node, aten.stack.default, aten.cat.default) or len(node.args[0]) != 2:
        return None
    parts, dim = node.args
    rank = len(shape(node))
    last = (rank - 1,) if is_op(node, aten.cat.default) else (rank - 1, rank - 2)
    return list(parts) if dim in last and shape(parts[0]) == shape(parts[1]) else None


def _interleaved(node: Node) -> bool:
    return is_op(node, aten.stack.default) and node.args[1] == len(shape(node)) - 1


def _sum_of_products(node: Node) -> bool:
    node = uncast(node)
    if not is_op(node, aten.add.Tensor):
        return False
    terms = [uncast(t.args[0]) if is_op(t, aten.neg.default) else t for t in map(uncast, node.args)]
    return all(is_op(t, aten.mul.Tensor) and all(isinstance(a, fx.Node) for a in t.args) for t in terms)


def _unshaped(node: Node) -> Node:
    while is_op(node, aten.reshape.default, aten.permute.default, aten.to.dtype):
        node = node.args[0]
    return node


def pairs(a: Node, b: Node) -> Rotated | None:
    """The tensor whose pairs (or halves) in the last axis are a and b; None where they are of no such tensor."""
    a, b = uncast(a), uncast(b)
    if is_op(a, aten.permute.default) and is_op(b, aten.permute.default) and a.args[1] == b.args[1]:
        dims = tuple(a.args[1])
        inner = pairs(a.args[0], b.args[0])
        if inner is None or inner.dims is not None or dims[-1] != len(dims) - 1:
            return None
        return replace(inner, dims=dims, sizes=tuple(inner.sizes[d] for d in dims))
    narrows = [n.args[0] if is_op(n, aten.reshape.default) else n for n in (a, b)]
    if shape(a) != shape(b) or not all(is_op(n, aten.slice.Tensor) and len(n.args) == 4 for n in narrows):
        return None
    (source, dim, start, middle), (other, other_dim, middle2, stop) = (n.args for n in narrows)
    if source is not other or dim != other_dim or middle != middle2 or middle - start != stop - middle:
        return None
    return _joined(source, dim, start, stop, shape(a))


def _joined(source: Node, dim: int, start: int, stop: int, part: tuple[int, ...]) -> Rotated | None:
    """source from start to stop along dim, whose two equal parts have the sizes `part`, as one tensor."""
    sizes, rank = shape(source), len(shape(source))
    whole = (start, stop) == (0, sizes[dim])
    joined = (*part[:-1], 2 * part[-1])
    if whole and sizes[dim] == 2 and dim == rank - 1 and part == sizes[:-1]:
        return Rotated(source, None, None, joined, True)
    if whole and sizes[dim] == 2 and dim == rank - 2 and part == (*sizes[:-2], sizes[-1]):
        return Rotated(source, None, None, joined, False)
    rows = math.prod(part[:-1]) == math.prod(sizes[:-1])
    if dim == rank - 1 and 2 * part[-1] == stop - start and rows:
        return Rotated(source, None if whole else (dim, start, stop), None, joined, False)
    return None


Place = tuple[Node, Any, Any, tuple[int, ...]]


def described(node: Node) -> Place:
    """(source, narrow of its last axis, permutation, sizes): two tensors of which these are equal are one."""
    node, narrow, dims, sizes = unwiden(node), None, None, shape(node)
    if is_op(node, aten.permute.default):
        node, dims = unwiden(node.args[0]), tuple(node.args[1])
    while is_op(node, aten.reshape.default):
        node = unwiden(node.args[0])
    if is_op(node, aten.slice.Tensor) and len(node.args) == 4 and node.args[1] == len(shape(node)) - 1:
        node, narrow = unwiden(node.args[0]), tuple(node.args[1:])
    return node, narrow, dims, sizes


def _same_tensor(rotated: Rotated, node: Node) -> bool:
    source, narrow, _, _ = described(rotated.source)
    if rotated.narrow is not None:
        source, narrow = unwiden(rotated.source), rotated.narrow
    return (source, narrow, rotated.dims, rotated.sizes) == described(node)


@rewrite(candidates=rotations)
def rotary(m: Match) -> Node | str:
    reasons = []
    for rotated, c, s in _readings(m):
        outcome = _rope(m, rotated, c, s)
        if not isinstance(outcome, str):
            return outcome
        reasons.append(outcome)
    return reasons[0] if reasons else f"does not have the form {FORM}"


def _readings(m: Match) -> Iterator[tuple[Rotated, tuple[Node, Node], tuple[Node, Node]]]:
    """(what is turned, cosines, sines) for every way to read the site; the tables of both halves of each pair."""
    parts = two_parts(m.root)
    if parts is not None:
        for b in matches(ROTATED, parts):
            rotated = pairs(b["x1"], b["x2"])
            if rotated is not None and rotated.interleaved == _interleaved(m.root):
                yield rotated, (b["cos"], b["cos2"]), (b["sin"], b["sin2"])
        return
    for b in matches(FULL_WIDTH, m.root):
        node = uncast(b["turned"])
        shaped = uncast(node.args[0]) if is_op(node, aten.reshape.default) else node
        halves = two_parts(shaped)
        for found in matches(TURNED, halves) if halves is not None else ():
            rotated = pairs(found["x1"], found["x2"])
            if rotated is None or rotated.interleaved != _interleaved(shaped):
                continue
            if _same_tensor(rotated, b["x"]) and rotated.sizes == shape(node):
                both = [repeated(m, b[name], rotated.interleaved) for name in ("cos", "sin")]
                yield rotated, both[0], both[1]


def _rope(m: Match, rotated: Rotated, cosines: Any, sines: Any) -> Node | str:
    sizes = rotated.sizes
    if math.prod(sizes) != m.root.meta["val"].numel() or sizes[-1] % 2:
        return f"does not have the form {FORM}"
    (c, c2), (s, s2) = cosines, sines
    if not (alike(m, c, c2) and alike(m, s, s2)):
        return "the two elements of a pair are not seen to be turned by one angle"
    axis = token_axis(sizes, (shape(c), shape(s)))
    if isinstance(axis, str):
        return axis
    c, s = (_widened(m, t, sizes, axis) for t in (c, s))
    node = _build(m, rotated)
    grid, cos_tables, sin_tables = tables_per_axis(m, c, s, sizes[axis], sizes[-1] // 2, dtype(node))
    order = [0, 2, 1, 3]
    swapped = len(sizes) == 4 and axis == 2
    if swapped:
        node = m.op(aten.permute.default, node, order)
    else:
        lead, heads = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 : -1])
        node = m.op(aten.reshape.default, node, [lead, sizes[axis], heads, sizes[-1]])
    result = m.op(ops.rope.default, node, cos_tables, sin_tables, grid, rotated.interleaved)
    if swapped:
        result = m.op(aten.permute.default, result, order)
    return m.op(aten.reshape.default, result, list(shape(m.root)))


def token_axis(sizes: Sequence[int], tables: Sequence[tuple[int, ...]]) -> int | str:
    """The one axis of x along which the tables vary, or why there is none."""
    rank, found = len(sizes), set()
    for table in tables:
        if len(table) > rank or table[-1] not in (1, sizes[-1] // 2):
            return "the tables are not as wide as half a head"
        padded = (1,) * (rank - len(table)) + table
        found |= {d for d in range(rank - 1) if padded[d] > 1}
    if len(found) != 1:
        if rank == 4 and found:
            return "the tables differ between batch entries or heads"
        return "the tables do not vary along one axis of the tokens"
    (axis,) = found
    return axis


def _widened(m: Match, table: Node, sizes: tuple[int, ...], axis: int) -> Node:
    """A table that does not vary along tokens or channels (a cosine of zero angles), repeated to do so."""
    wide = [1] * len(sizes[:-1]) + [sizes[-1] // 2]
    wide[axis] = sizes[axis]
    if math.prod(shape(table)) == math.prod(wide):
        return table
    padded = [1] * (len(sizes) - len(shape(table))) + list(shape(table))
    return m.op(aten.expand.default, m.op(aten.reshape.default, table, padded), wide)


def _build(m: Match, rotated: Rotated) -> Node:
    """The turned tensor, in the type that the result is used in where its own type is that one."""
    source = unwiden(rotated.source)
    wide = dtype(m.root) if m.result_dtype() != dtype(source) else dtype(source)
    node = source if rotated.narrow is None else m.op(aten.slice.Tensor, source, *rotated.narrow)
    node = node if dtype(node) == wide else m.op(aten.to.dtype, node, wide)
    if rotated.dims is None:
        return m.op(aten.reshape.default, node, list(rotated.sizes))
    inverse = [rotated.sizes[rotated.dims.index(d)] for d in range(len(rotated.dims))]
    return m.op(aten.permute.default, m.op(aten.reshape.default, node, inverse), list(rotated.dims))


PASS = Pass("rope", "exact", [rotary], provides=("rope",))
