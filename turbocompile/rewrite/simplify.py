"""Local rules to a fixpoint: one form for each way of writing a computation.

A rule looks at one node and answers with nothing, with an existing node that has the same value, or with another call
(target, args) that gives the same value; then the node keeps its name. What the rules leave:

* casts are `to.dtype`; a cast is dropped only where it changes nothing, or undoes an exact up-cast,
* layout is `permute`, `reshape`, `expand`, `slice` (step 1), `cat`, `stack`, with non-negative dimensions,
* arithmetic is `add`, `mul`, `neg`, `pow` with scalars second; `a - b` is `a + -b`, `a / b` is `a * b**-1`,
* reductions keep their dimension (`mean(x, dims, True)`, then a reshape).
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile.errors import TurbocompileError
from turbocompile.ir.program import dtype, infer, is_op, shape
from turbocompile.rewrite import lineage
from turbocompile.rewrite.facts import FACTS, PLACE
from turbocompile.rewrite.match import arguments, default_eps, exact

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types too widely to read them
ROUNDS = 20  # a fixpoint is reached in three or four; more means that two rules undo each other

Call = tuple[Any, tuple[Any, ...]]
Answer = Node | Call | None


@dataclass
class Maker:
    """Makes the helper nodes of rules, before the node that is being looked at."""

    graph: fx.Graph
    mode: FakeTensorMode
    at: Node = None

    def __call__(self, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.at):
            node = self.graph.create_node("call_function", target, args, name=target._opname.strip("_"))
        node.meta |= {key: self.at.meta[key] for key in (*PLACE, FACTS) if key in self.at.meta}
        node.meta["val"] = infer(target, node.args, {}, self.mode)
        return node


Local = Callable[[Node, Maker], Answer]
RULES: dict[Any, list[Local]] = defaultdict(list)


def local(*targets: Any) -> Callable[[Local], Local]:
    """Registers a rule for calls of the targets: overloads, or packets for all their overloads."""

    def register(function: Local) -> Local:
        for target in targets:
            overloads = [getattr(target, o) for o in target.overloads()] if hasattr(target, "overloads") else [target]
            for overload in overloads:
                RULES[overload].append(function)
        return function

    return register


def simplify(graph: fx.Graph, mode: FakeTensorMode, moved: dict[str, str]) -> None:
    """Applies the rules until none has an answer. moved: name of each replaced node -> name of what replaced it."""
    make = Maker(graph, mode)
    for _ in range(ROUNDS):
        changed = False
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function" or node.target not in RULES:
                continue
            if not node.users:
                graph.erase_node(node)
                continue
            changed |= _simplify_node(node, make, moved)
        changed |= merge_equal(graph, moved)
        if not changed:
            return
    raise TurbocompileError("the normal form's rules do not come to an end on this graph; please report it")


def _simplify_node(node: Node, make: Maker, moved: dict[str, str]) -> bool:
    changed = False
    for _ in range(ROUNDS):
        make.at = node
        answers = (answer for rule in RULES.get(node.target, ()) if (answer := rule(node, make)) is not None)
        answer = next(answers, None)
        if answer is None:
            return changed
        changed = True
        if isinstance(answer, fx.Node):
            _check(node, answer.target, answer.meta["val"])
            node.replace_all_uses_with(answer)
            lineage.absorb(answer, node)
            moved[node.name] = answer.name
            make.graph.erase_node(node)
            return True
        target, args = answer
        value = infer(target, args, {}, make.mode)
        _check(node, target, value)
        node.target, node.args, node.kwargs = target, args, {}
        node.meta["val"] = value
    raise TurbocompileError(f"the normal form's rules do not come to an end at {node.name} ({node.target})")


def _check(node: Node, target: Any, new: Any) -> None:
    old = node.meta["val"]
    if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
        raise TurbocompileError(
            f"the normal form of {node.name} ({node.target}) would be {target} of {new.dtype} {tuple(new.shape)} "
            f"instead of {old.dtype} {tuple(old.shape)}"
        )


def merge_equal(graph: fx.Graph, moved: dict[str, str]) -> bool:
    """Common subexpressions: the later of two equal nodes becomes the earlier one."""
    seen: dict[Any, Node] = {}
    changed = False
    for node in list(graph.nodes):
        pure = (
            node.op == "get_attr" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        )
        if node.op not in ("call_function", "get_attr") or not pure or _random(node):
            continue
        args = node.args
        if (
            is_op(node, aten.add.Tensor, aten.mul.Tensor)
            and len(args) == 2
            and all(isinstance(a, fx.Node) for a in args)
        ):
            args = tuple(sorted(args, key=lambda a: a.name))
        key = (node.op, node.target, _frozen(args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            lineage.absorb(first, node)
            moved[node.name] = first.name
            graph.erase_node(node)
            changed = True
    return changed


def _random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _frozen(value: Any) -> Any:
    """A hashable form of arguments in which 1, 1.0, True and 0.0, -0.0 differ."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


# -------------------------------------------------------------------------------------------------------------- casts


@local(aten.to, aten._to_copy, aten.type_as)
def one_cast(node: Node, make: Maker) -> Answer:
    return (
        None if node.target is aten.to.dtype and len(node.args) == 2 else (aten.to.dtype, (node.args[0], dtype(node)))
    )


@local(aten.to.dtype)
def cast_of_cast(node: Node, make: Maker) -> Answer:
    source = node.args[0]
    if dtype(source) == dtype(node):
        return source
    if is_op(source, aten.to.dtype) and exact(dtype(source.args[0]), dtype(source)):
        return aten.to.dtype, (source.args[0], dtype(node))
    return None


# ------------------------------------------------------------------------------------------------------------- layout


@local(aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous)
def same_value(node: Node, make: Maker) -> Answer:
    return node.args[0]


@local(aten.squeeze.dim)
def squeeze_under_permute(node: Node, make: Maker) -> Answer:
    x, dim = node.args
    if not is_op(x, aten.permute.default) or shape(node) == shape(x):
        return None
    source, dims = x.args
    dim %= len(shape(x))
    return _permute_without(dim, dims, make(aten.squeeze.dim, source, dims[dim]))


def _permute_without(dim: int, dims: Sequence[int], source: Node) -> Call:
    """A permute of what lacks the dimension that stood at `dim`."""
    gone = dims[dim]
    return aten.permute.default, (source, [d - (d > gone) for d in dims if d != gone])


@local(
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
def view_is_reshape(node: Node, make: Maker) -> Answer:
    return aten.reshape.default, (node.args[0], list(shape(node)))


@local(aten.transpose.int, aten.t.default)
def transpose_is_permute(node: Node, make: Maker) -> Answer:
    rank = len(shape(node))
    dims = list(range(rank))
    if rank > 1:
        a, b = (d % rank for d in node.args[1:3]) if len(node.args) == 3 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return aten.permute.default, (node.args[0], dims)


@local(aten.select.int)
def select_is_narrow(node: Node, make: Maker) -> Answer:
    x, dim, index = node.args
    sizes = shape(x)
    dim, index = dim % len(sizes), index % sizes[dim]
    if is_op(x, aten.permute.default):  # under it at once, while it is known which dimension goes
        source, dims = x.args
        return _permute_without(dim, dims, make(aten.select.int, source, dims[dim], index))
    return aten.reshape.default, (make(aten.slice.Tensor, x, dim, index, index + 1), list(shape(node)))


@local(operator.getitem)
def item_of_split(node: Node, make: Maker) -> Answer:
    """An item of a split, chunk or unbind is a narrow."""
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


@local(aten.copy.default)
def copy_is_source(node: Node, make: Maker) -> Answer:
    """What is written into a tensor, in the tensor's type and shape."""
    source = _as_dtype(node.args[1], dtype(node), make)
    return source if shape(source) == shape(node) else (aten.expand.default, (source, list(shape(node))))


@local(aten.reshape.default)
def reshape_rules(node: Node, make: Maker) -> Answer:
    source, sizes = node.args
    if shape(source) == shape(node):
        return source
    if is_op(source, aten.reshape.default):
        return aten.reshape.default, (source.args[0], list(shape(node)))
    return (aten.reshape.default, (source, list(shape(node)))) if list(sizes) != list(shape(node)) else None


@local(aten.reshape.default)
def unit_dims_before_cat_and_expand(node: Node, make: Maker) -> Answer:
    """A reshape that only adds or drops dimensions of one element goes to the parts of a cat, and under an expand.

    Not before it has met the layout changes that read it: the dimension that einsum adds goes away again there.
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


@local(aten.permute.default)
def permute_rules(node: Node, make: Maker) -> Answer:
    source, given = node.args
    rank = len(shape(node))
    dims = [d % rank for d in given]
    if dims == list(range(rank)):
        return source
    if is_op(source, aten.permute.default):
        inner = source.args[1]
        return aten.permute.default, (source.args[0], [inner[d] % rank for d in dims])
    if list(given) != dims:
        return aten.permute.default, (source, dims)
    inserted = _inserted_ones(source)
    if inserted:  # axes of size 1 are inserted last, where they meet other reshapes
        kept = [d for d in range(rank) if d not in inserted]
        inner = make(aten.permute.default, source.args[0], [kept.index(d) for d in dims if d in kept])
        return aten.reshape.default, (inner, list(shape(node)))
    wide = [d for d in dims if shape(source)[d] != 1]
    if wide == sorted(wide) and all(is_op(user, aten.reshape.default) for user in node.users):
        return aten.reshape.default, (source, list(shape(node)))
    return None


def _inserted_ones(node: Node) -> list[int]:
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


@local(aten.expand.default)
def expand_rules(node: Node, make: Maker) -> Answer:
    source, sizes = node.args[:2]
    if shape(source) == shape(node):
        return source
    if is_op(source, aten.expand.default):
        return aten.expand.default, (source.args[0], list(shape(node)))
    return (aten.expand.default, (source, list(shape(node)))) if list(sizes) != list(shape(node)) else None


@local(aten.repeat.default)
def repeat_is_expand(node: Node, make: Maker) -> Answer:
    """repeat(x, r): a new dimension before each repeated one, expanded."""
    x, repeats = node.args
    lead = len(repeats) - len(shape(x))
    sizes = (1,) * lead + shape(x)
    split = [s for r, n in zip(repeats, sizes, strict=True) for s in ((1, n) if r > 1 and n > 1 else (n,))]
    wide = [s for r, n in zip(repeats, sizes, strict=True) for s in ((r, n) if r > 1 and n > 1 else (n * r,))]
    if 0 in wide:
        return None
    expanded = make(aten.expand.default, make(aten.reshape.default, x, split), wide)
    return aten.reshape.default, (expanded, list(shape(node)))


@local(aten.slice.Tensor)
def slice_is_narrow(node: Node, make: Maker) -> Answer:
    """Non-negative bounds, no step: `x[..., i::n]` is the i-th of the last axis of x unflattened by n."""
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
def narrow_of_layout(node: Node, make: Maker) -> Answer:
    """Narrows go to the source: a slice of fused q, k, v is one form, however the heads were arranged."""
    if len(node.args) != 4 or node.kwargs:
        return None
    x, dim, start, stop = node.args
    if is_op(x, aten.slice.Tensor) and len(x.args) == 4 and x.args[1] == dim:
        return aten.slice.Tensor, (x.args[0], dim, x.args[2] + start, x.args[2] + stop)
    if is_op(x, aten.permute.default):
        source, dims = x.args
        return aten.permute.default, (make(aten.slice.Tensor, source, dims[dim], start, stop), dims)
    if is_op(x, aten.reshape.default):
        place = narrow_before_reshape(shape(x.args[0]), shape(x), dim, start, stop)
        if place is not None:
            return aten.reshape.default, (make(aten.slice.Tensor, x.args[0], *place), list(shape(node)))
    if is_op(x, aten.expand.default) and len(shape(x)) == len(shape(x.args[0])):
        source = x.args[0]
        inner = source if shape(source)[dim] == 1 else make(aten.slice.Tensor, source, dim, start, stop)
        return aten.expand.default, (inner, list(shape(node)))
    if is_op(x, aten.cat.default):
        return _narrow_of_cat(x, dim, start, stop, make)
    if is_op(x, aten.stack.default) and x.args[1] == dim and stop == start + 1:
        return aten.reshape.default, (x.args[0][start], list(shape(node)))
    return None


def _narrow_of_cat(x: Node, dim: int, start: int, stop: int, make: Maker) -> Answer:
    parts, along = x.args
    if along != dim:  # worth it where nothing else reads the cat: then it is gone
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


@local(aten.reshape.default, aten.permute.default, aten.slice.Tensor)
def layout_before_cast(node: Node, make: Maker) -> Answer:
    """A cast that only a layout change reads comes after it, so that layout changes meet."""
    source = node.args[0]
    if is_op(source, aten.to.dtype) and len(source.users) == 1 and source.args[0].op != "get_attr":
        moved = make(node.target, source.args[0], *node.args[1:])
        return aten.to.dtype, (moved, dtype(node))
    return None


@local(aten.reshape.default)
def unit_dims_before_sum(node: Node, make: Maker) -> Answer:
    """x + 1 that is read with more axes of size 1 alone, as in (1 + scale)[:, None]: the axes come first."""
    source = node.args[0]
    if is_op(source, aten.add.Tensor) and len(source.users) == 1 and _inserted_ones(node):
        x, other, *rest = source.args
        if isinstance(other, (int, float)) and not rest and not source.kwargs:
            return aten.add.Tensor, (make(aten.reshape.default, x, list(shape(node))), other)
    return None


@local(aten.cat.default)
def cat_rules(node: Node, make: Maker) -> Answer:
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
    parts, given = arguments(aten.stack.default, node.args, node.kwargs)
    dim = given % len(shape(node))
    return (aten.stack.default, (list(parts), dim)) if node.kwargs or node.args[1:] != (dim,) else None


@local(aten.select_scatter.default)
def select_scatter_is_slice_scatter(node: Node, make: Maker) -> Answer:
    base, source, dim, index = node.args
    sizes = list(shape(node))
    dim, index = dim % len(sizes), index % sizes[dim]
    sizes[dim] = 1
    return aten.slice_scatter.default, (base, make(aten.reshape.default, source, sizes), dim, index, index + 1)


@local(aten.slice_scatter.default)
def scatter_is_cat(node: Node, make: Maker) -> Answer:
    """Writes that fill a tensor: interleaved ones are reshape(stack), a narrow one is a cat with what stays."""
    base, source, dim, start, stop, step = _scatter(node)
    if step == 1:
        size = shape(node)[dim]
        left = [make(aten.slice.Tensor, base, dim, 0, start)] if start > 0 else []
        right = [make(aten.slice.Tensor, base, dim, stop, size)] if stop < size else []
        return aten.cat.default, ([*left, _as_dtype(source, dtype(node), make), *right], dim)
    written = {start: source}
    while is_op(base, aten.slice_scatter.default) and len(written) < step:
        below, source, *place = _scatter(base)
        if (place[0], place[3]) != (dim, step):
            return None
        written.setdefault(place[1], source)
        base = below
    if set(written) != set(range(step)) or shape(node)[dim] % step:
        return None
    parts = [_as_dtype(written[i], dtype(node), make) for i in range(step)]
    return aten.reshape.default, (make(aten.stack.default, parts, dim + 1), list(shape(node)))


def _as_dtype(node: Node, wanted: torch.dtype, make: Maker) -> Node:
    return node if dtype(node) == wanted else make(aten.to.dtype, node, wanted)


def _scatter(node: Any) -> tuple[Node, Node, int, int, int, int]:
    """(base, source, dim, start, stop, step) of a slice_scatter, with non-negative bounds."""
    rank, sizes = len(shape(node)), shape(node)
    base, source, dim, start, stop, step = arguments(aten.slice_scatter.default, node.args, node.kwargs)
    start, stop, _ = slice(start, stop).indices(sizes[dim % rank])
    return base, source, dim % rank, start, max(start, stop), step


# --------------------------------------------------------------------------------------------------------- arithmetic


def _opmath(node: Node) -> torch.dtype:
    """What an elementwise kernel computes in, for a result of the node's type."""
    return torch.float32 if dtype(node) in (torch.bfloat16, torch.float16) else dtype(node)


def _real(node: Node) -> bool:
    return dtype(node).is_floating_point


@local(aten.add.Scalar, aten.add.Tensor)
def add_rules(node: Node, make: Maker) -> Answer:
    a, b, alpha = arguments(node.target, node.args, node.kwargs)
    if alpha != 1:
        b = make(aten.mul.Tensor, b, alpha) if isinstance(b, fx.Node) else b * alpha
        return aten.add.Tensor, (a, b)
    if not isinstance(a, fx.Node):  # torch.add(1.0, x)
        return aten.add.Tensor, (b, a)
    if node.target is aten.add.Scalar or node.kwargs or len(node.args) > 2:
        return aten.add.Tensor, (a, b)
    if not isinstance(b, fx.Node) and dtype(a) == dtype(node):
        if b == 0:
            return a
        if _whole(b):
            return aten.add.Tensor, (a, int(b))
    return _broadcast_rules(node, a, b)


def _whole(number: Any) -> bool:
    """Whether a number is a whole one written as a float; 1 and 1.0 are one form."""
    return isinstance(number, float) and number.is_integer() and 0 < abs(number) < 2**53


@local(aten.mul.Scalar, aten.mul.Tensor)
def mul_rules(node: Node, make: Maker) -> Answer:
    a, b = arguments(node.target, node.args, node.kwargs)
    if node.target is aten.mul.Scalar:
        return aten.mul.Tensor, (a, b)
    if not isinstance(a, fx.Node):  # torch.mul(2.0, x)
        return aten.mul.Tensor, (b, a)
    if not isinstance(b, fx.Node):
        if b == 1 and dtype(a) == dtype(node):
            return a
        if b == -1 and dtype(a) == dtype(node):
            return aten.neg.default, (a,)
        if _whole(b) and dtype(a) == dtype(node):
            return aten.mul.Tensor, (a, int(b))
        if is_op(a, aten.sum.dim_IntList) and _real(node) and math.isclose(b * _reduced(a), 1, rel_tol=1e-6):
            return aten.mean.dim, a.args
    elif a is b and _real(node):
        return aten.pow.Tensor_Scalar, (a, 2)
    for x, y in ((a, b), (b, a)):
        if is_op(x, aten.neg.default) and dtype(x) == dtype(node):
            return aten.neg.default, (make(aten.mul.Tensor, x.args[0], y),)
        if is_op(x, aten.sigmoid.default) and x.args[0] is y:
            return aten.silu.default, (y,)
    return _broadcast_rules(node, a, b)


def _reduced(node: Node) -> int:
    """How many elements go into one of a reduction."""
    return math.prod(shape(node.args[0])) // max(1, math.prod(shape(node)))


def _broadcast_rules(node: Node, a: Any, b: Any) -> Answer:
    """An operand that is expanded though broadcasting does it, or that is a constant filled with one number."""
    for x, y, first in ((b, a, False), (a, b, True)):
        if not isinstance(x, fx.Node):
            continue
        if is_op(x, aten.full.default, aten.full_like.default) and isinstance(y, fx.Node):
            fits = shape(y) == shape(node) and dtype(y) == dtype(node) and isinstance(x.args[1], (int, float))
            if fits and not (isinstance(x.args[1], float) and not _real(node)):
                return node.target, (y, x.args[1])
        if is_op(x, aten.expand.default):
            source: Node = x.args[0]
            other = shape(y) if isinstance(y, fx.Node) else ()
            if tuple(torch.broadcast_shapes(shape(source), other)) == shape(node):
                return node.target, ((source, y) if first else (y, source))
    return None


@local(aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar)
def sub_is_add_neg(node: Node, make: Maker) -> Answer:
    a, b, alpha = arguments(node.target, node.args, node.kwargs)
    if not _real(node) and not dtype(node).is_complex:
        return None
    if alpha != 1:
        b = make(aten.mul.Tensor, b, alpha) if isinstance(b, fx.Node) else b * alpha
    if is_op(node, aten.rsub):
        a, b = b, a
    if not isinstance(b, fx.Node):
        return aten.add.Tensor, (a, -b)
    minus = make(aten.neg.default, b)
    return aten.add.Tensor, ((a, minus) if isinstance(a, fx.Node) else (minus, a))


@local(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def div_is_mul_pow(node: Node, make: Maker) -> Answer:
    """a / b is a * b**-1, in the type that the kernel computes in; at most one unit in the last place apart."""
    a, b = node.args
    if not _real(node):
        return None
    if not isinstance(b, fx.Node):
        if b == 0:
            return None
        return aten.mul.Tensor, (_as_dtype(a, dtype(node), make), 1.0 / b)
    inverse = make(aten.pow.Tensor_Scalar, _as_dtype(b, _opmath(node), make), -1)
    if not isinstance(a, fx.Node):  # torch.div(1.0, x)
        product = make(aten.mul.Tensor, inverse, a)
        return aten.to.dtype, (product, dtype(node))
    if dtype(node) == _opmath(node):
        return aten.mul.Tensor, (a, inverse)
    return aten.to.dtype, (make(aten.mul.Tensor, _as_dtype(a, _opmath(node), make), inverse), dtype(node))


@local(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.square.default)
def roots_are_pow(node: Node, make: Maker) -> Answer:
    exponents = {aten.sqrt.default: 0.5, aten.rsqrt.default: -0.5, aten.reciprocal.default: -1, aten.square.default: 2}
    if not _real(node):
        return None
    return aten.pow.Tensor_Scalar, (_as_dtype(node.args[0], dtype(node), make), exponents[node.target])


@local(aten.pow.Tensor_Scalar)
def pow_of_pow(node: Node, make: Maker) -> Answer:
    """1 / sqrt(x) is x**-0.5. Roots come from non-negative x, where exponents multiply; x**2 then a root do not."""
    x, exponent = node.args
    if not _real(node):
        return None
    if exponent == 1 and dtype(x) == dtype(node):
        return x
    if is_op(x, aten.pow.Tensor_Scalar) and x.args[1] in (0.5, -0.5) and exponent == -1:
        return aten.pow.Tensor_Scalar, (x.args[0], -x.args[1])
    if is_op(x, aten.pow.Tensor_Scalar) and x.args[1] == -1 and exponent in (0.5, -0.5):
        return aten.pow.Tensor_Scalar, (x.args[0], -exponent)
    return None


@local(aten.neg.default)
def neg_rules(node: Node, make: Maker) -> Answer:
    x = node.args[0]
    if is_op(x, aten.neg.default):
        return x.args[0]
    if is_op(x, aten.mul.Tensor) and not isinstance(x.args[1], fx.Node) and len(x.users) == 1:
        return aten.mul.Tensor, (x.args[0], -x.args[1])
    return None


@local(aten.addcmul.default, aten.addcdiv.default)
def addcmul_is_add_mul(node: Node, make: Maker) -> Answer:
    """a + value * b * c, in the type that the kernel computes in."""
    a, b, c, value = arguments(node.target, node.args, node.kwargs)
    if not _real(node):
        return None
    wide = _opmath(node)
    a, b, c = (_as_dtype(x, wide, make) if dtype(x) in (torch.bfloat16, torch.float16) else x for x in (a, b, c))
    product = make(aten.mul.Tensor if is_op(node, aten.addcmul) else aten.div.Tensor, b, c)
    total = make(aten.add.Tensor, a, product if value == 1 else make(aten.mul.Tensor, product, value))
    return aten.to.dtype, (total, dtype(node))


@local(aten.lerp.Scalar, aten.lerp.Tensor)
def lerp_is_add_mul(node: Node, make: Maker) -> Answer:
    a, b, weight = node.args
    difference = make(aten.add.Tensor, b, make(aten.neg.default, a))
    return aten.add.Tensor, (a, make(aten.mul.Tensor, difference, weight))


# --------------------------------------------------------------------------------------------------------- reductions


@local(aten.mean.dim, aten.sum.dim_IntList, aten.mean.default, aten.sum.default)
def reductions_keep_dims(node: Node, make: Maker) -> Answer:
    packet = aten.mean if is_op(node, aten.mean) else aten.sum
    target = packet.dim if packet is aten.mean else packet.dim_IntList
    if node.target is packet.default:
        x, dims, keep, out = node.args[0], None, False, node.kwargs.get("dtype")
    else:
        x, dims, keep, out = arguments(node.target, node.args, node.kwargs)
    rank = len(shape(x))
    dims = sorted(d % rank for d in (dims or range(rank))) if rank else []
    if rank == 0 or not _real(node):
        return None
    if out is not None and dtype(x) != out:
        x = make(aten.to.dtype, x, out)
    args = (x, dims, True)
    if keep:
        return (target, args) if tuple(node.args) != args or node.kwargs else None
    return aten.reshape.default, (make(target, *args), list(shape(node)))


@local(aten.var, aten.std)
def var_is_mean_of_squares(node: Node, make: Maker) -> Answer:
    value = _variance(node, make)
    if value is not None and is_op(node, aten.std):
        value = make(aten.pow.Tensor_Scalar, value, 0.5)
    return value and (aten.reshape.default, (_as_dtype(value, dtype(node), make), list(shape(node))))


def _variance(node: Node, make: Maker) -> Node | None:
    """var(x) as mean((x - mean(x))**2) * n / (n - correction), dimensions kept, in float32 at least."""
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, arguments(node.target, node.args, node.kwargs), strict=True))
    x, rank = given["self"], len(shape(given["self"]))
    dims = sorted(d % rank for d in (given.get("dim") or range(rank)))
    correction = given["correction"] if "correction" in given else int(given.get("unbiased", True))
    correction = 1 if correction is None else correction
    n = math.prod(shape(x)[d] for d in dims)
    if n <= correction:
        return None
    x = _as_dtype(x, torch.float32, make) if dtype(x) in (torch.bfloat16, torch.float16) else x
    centred = make(aten.add.Tensor, x, make(aten.neg.default, make(aten.mean.dim, x, dims, True)))
    value = make(aten.mean.dim, make(aten.pow.Tensor_Scalar, centred, 2), dims, True)
    return make(aten.mul.Tensor, value, n / (n - correction)) if correction else value


@local(operator.getitem)
def item_of_moments(node: Node, make: Maker) -> Answer:
    """The parts of var_mean, and the normed tensor of native_layer_norm."""
    source, i = node.args
    if is_op(source, aten.native_layer_norm.default) and i == 0:
        return aten.layer_norm.default, tuple(source.args)
    if not is_op(source, aten.var_mean):
        return None
    value: Node | None
    if i == 0:
        value = _variance(source, make)
    else:
        x, dims = source.args[0], (list(source.args[1]) if len(source.args) > 1 and source.args[1] else [])
        value = make(aten.mean.dim, x, dims or list(range(len(shape(x)))), True)
    return value and (aten.reshape.default, (_as_dtype(value, dtype(node), make), list(shape(node))))


@local(aten.layer_norm.default)
def layer_norm_without_hint(node: Node, make: Maker) -> Answer:
    """Without the choice of a cuDNN kernel, and with its eps."""
    args = tuple(arguments(aten.layer_norm.default, node.args, node.kwargs)[:5])
    return (aten.layer_norm.default, args) if tuple(node.args) != args or node.kwargs else None


@local(aten.rms_norm.default)
def rms_norm_names_its_eps(node: Node, make: Maker) -> Answer:
    """The eps that PyTorch chooses by the type of x; else it would change with the type that the norm is run in."""
    x, sizes, weight, eps = arguments(node.target, node.args, node.kwargs)
    args = (x, sizes, weight, default_eps(dtype(x)) if eps is None else eps)
    return (aten.rms_norm.default, args) if tuple(node.args) != args or node.kwargs else None


@local(aten._softmax.default, aten.softmax.int)
def one_softmax(node: Node, make: Maker) -> Answer:
    x, dim = node.args[:2]
    dim %= len(shape(x))
    if node.target is aten.softmax.int and tuple(node.args) == (x, dim) and not node.kwargs:
        return None
    return aten.softmax.int, (_as_dtype(x, dtype(node), make), dim)


# ----------------------------------------------------------------------------------------------------------- products


@local(aten.mm.default, aten.bmm.default)
def one_matmul(node: Node, make: Maker) -> Answer:
    return aten.matmul.default, node.args


@local(aten.baddbmm.default, aten.addmm.default)
def addmm_is_matmul_add(node: Node, make: Maker) -> Answer:
    bias, a, b, beta, alpha = arguments(node.target, node.args, node.kwargs)
    product = make(aten.matmul.default, a, b)
    product = product if alpha == 1 else make(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return aten.reshape.default, (product, list(shape(node)))
    return aten.add.Tensor, (product, bias if beta == 1 else make(aten.mul.Tensor, bias, beta))


@local(aten.matmul.default)
def matmul_of_weight_is_linear(node: Node, make: Maker) -> Answer:
    """x @ w.T of a weight is a linear."""
    a, b = node.args
    if is_op(b, aten.permute.default) and b.args[1] == [1, 0] and b.args[0].op == "get_attr" and len(shape(a)) > 1:
        return aten.linear.default, (a, b.args[0])
    return None


@local(aten.matmul.default)
def matmul_keeps_batch_dims(node: Node, make: Maker) -> Answer:
    """bmm over merged leading dimensions (einsum) is a matmul over the dimensions themselves."""
    a, b = node.args
    if not (is_op(a, aten.reshape.default) and is_op(b, aten.reshape.default)):
        return None
    x, y = a.args[0], b.args[0]
    sx, sy = shape(x), shape(y)
    merged = len(shape(a)) == len(shape(b)) == 3 and len(sx) == len(sy) > 3
    if merged and sx[:-2] == sy[:-2] and sx[-2:] == shape(a)[1:] and sy[-2:] == shape(b)[1:]:
        return aten.reshape.default, (make(aten.matmul.default, x, y), list(shape(node)))
    return None


@local(aten.add.Tensor)
def linear_takes_bias(node: Node, make: Maker) -> Answer:
    """linear(x, w) + b of a vector weight is linear(x, w, b)."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for product, bias in (node.args, node.args[::-1]):
        plain = is_op(product, aten.linear.default) and len([a for a in product.args if a is not None]) == 2
        vector = isinstance(bias, fx.Node) and bias.op == "get_attr" and shape(bias) == shape(node)[-1:]
        if plain and vector and len(product.users) == 1 and dtype(bias) == dtype(product) == dtype(node):
            return aten.linear.default, (*product.args[:2], bias)
    return None


# ------------------------------------------------------------------------------------------------------------ complex


def _pairs(z: Any, make: Maker) -> Node:
    """A complex tensor as real pairs; a conjugate, which cannot be viewed so, with its sign turned."""
    if is_op(z, aten._conj.default, aten.conj_physical.default, aten.resolve_conj.default):
        inner = _pairs(z.args[0], make)
        if is_op(z, aten.resolve_conj.default):
            return inner
        return make(
            aten.stack.default, [_part(inner, 0, make), make(aten.neg.default, _part(inner, 1, make))], len(shape(z))
        )
    return make(aten.view_as_real.default, z)


def _part(pairs: Node, i: int, make: Maker) -> Node:
    """The real (0) or imaginary (1) parts of pairs."""
    sizes = list(shape(pairs))
    return make(aten.reshape.default, make(aten.slice.Tensor, pairs, len(sizes) - 1, i, i + 1), sizes[:-1])


@local(aten.view_as_real.default)
def complex_is_pairs(node: Node, make: Maker) -> Answer:
    """Complex numbers become real pairs in a last axis of 2: layout, cast, product, conjugate and polar form."""
    z = node.args[0]
    last = len(shape(z))
    if is_op(z, aten.view_as_complex.default):
        return z.args[0]
    if is_op(z, aten._conj.default, aten.conj_physical.default, aten.resolve_conj.default):
        return _pairs(z, make)
    if is_op(z, aten.to.dtype) and dtype(z.args[0]).is_complex:
        return z.target, (_pairs(z.args[0], make), dtype(node))
    if is_op(z, aten.reshape.default, aten.expand.default):
        return z.target, (_pairs(z.args[0], make), [*shape(z), 2])
    if is_op(z, aten.permute.default):
        return z.target, (_pairs(z.args[0], make), [*z.args[1], last])
    if is_op(z, aten.slice.Tensor):
        return z.target, (_pairs(z.args[0], make), *z.args[1:])
    if is_op(z, aten.cat.default, aten.stack.default):
        return z.target, ([_pairs(p, make) for p in z.args[0]], *z.args[1:])
    if is_op(z, aten.polar.default):
        radius, angle = z.args
        x, y = (make(aten.mul.Tensor, radius, make(f, angle)) for f in (aten.cos.default, aten.sin.default))
        return aten.stack.default, ([x, y], last)
    if is_op(z, aten.complex.default):
        return aten.stack.default, (list(z.args), last)
    if is_op(z, aten.mul.Tensor) and isinstance(z.args[1], fx.Node):
        return _complex_product(z, make)
    return None


def _complex_product(z: Node, make: Maker) -> Answer:
    a, b = z.args
    if not (dtype(a).is_complex and dtype(b).is_complex):
        return None
    ar, ai, br, bi = (_part(_pairs(x, make), i, make) for x in (a, b) for i in (0, 1))
    mul, add = aten.mul.Tensor, aten.add.Tensor
    x = make(add, make(mul, ar, br), make(aten.neg.default, make(mul, ai, bi)))
    y = make(add, make(mul, ar, bi), make(mul, ai, br))
    return aten.stack.default, ([x, y], len(shape(z)))
