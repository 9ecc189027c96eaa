"""What merged into what: which nodes of the graphs before the passes each node after them stands for.

While passes run, every node carries in its meta the names of the nodes before the passes whose work it does (ORIGINS)
and the passes that made it (PASSES). `graph_views` makes data of it, which an engine keeps beside its printed graphs
(`graphs/<module>.json`) and a page draws. It is read from folders that anyone may have made: `GraphView.from_dict`
trusts nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from turbocompile.errors import EngineError
from turbocompile.ir.cost import natural, node_cost, op_name, tensor_text
from turbocompile.ir.printer import code
from turbocompile.ir.program import SHELL, Program, call, module_path
from turbocompile.ir.reading import items, table

ORIGINS, PASSES = "origins", "passes"  # in a node's meta
INPUT, OUTPUT, CALL = "input", "output", "call"  # ops of a NodeView that are no operators
MAX_NODES = 200_000
MAX_TEXT = 10_000  # characters of a name or a line of code

# --------------------------------------------------------------------------------------------------- while passes run


def begin(program: Program) -> None:
    """Every node stands for itself from here."""
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            node.meta[ORIGINS], node.meta[PASSES] = frozenset([node.name]), ()


def absorb(into: fx.Node, node: fx.Node) -> None:
    """`into` takes over the work of `node`, which is about to go. What no pass has made stays so."""
    if ORIGINS in node.meta:
        into.meta[ORIGINS] = into.meta.get(ORIGINS, frozenset()) | node.meta[ORIGINS]
        if into.meta.get(PASSES):
            into.meta[PASSES] = _joined(node.meta.get(PASSES, ()), into.meta[PASSES])


def follow(name: str, made: Sequence[fx.Node], pairs: Iterable[tuple[fx.Node, fx.Node]]) -> None:
    """A pass made new nodes in the place of old ones; pairs: (old, new) of equal values, before the old ones go.

    What a new node takes over is all that the old one is computed by, up to what the new ones read. Of the new ones it
    is the last that computes something which takes it, not what prepares its inputs and looks at its output.
    """
    new_ones = set(made)
    for node in made:
        node.meta.setdefault(ORIGINS, frozenset())
        node.meta.setdefault(PASSES, (name,))
    for old, new in pairs:
        inside = _above(new, lambda n: n in new_ones)
        read = {n for m in inside for n in m.all_input_nodes}
        done = _above(old, lambda n, read=read: n not in read and n.op == "call_function" and n.target is not call)  # type: ignore[misc]
        views = _above(new, lambda n: n in new_ones and not any(node_cost(n)[0].values()))
        into = new if new not in views else next((n for n in inside if n not in views), new)
        for node in done:
            absorb(into, node)


def _above(node: fx.Node, within: Any) -> list[fx.Node]:
    """The nodes that `node` is computed by, itself included, as far as they are `within`."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in found and within(one):
            found[one] = None
            stack += one.all_input_nodes
    return list(found)


def _joined(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """The names of both in the order they ran, each once."""
    return (*(name for name in one if name not in other), *other)


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class NodeView:
    """A node as it is shown: its printed code, its cost in one run, and by their places in the lists of the GraphView
    the nodes that it reads and, after the passes, those before them that it stands for.

    op: as in "aten.linear", or input, output, call. passes: those that made it, the last one last.
    """

    name: str
    op: str
    code: str
    shape: str
    module: str
    flops: int
    bytes: int
    reads: tuple[int, ...]
    origins: tuple[int, ...] = ()
    passes: tuple[str, ...] = ()

    @property
    def free(self) -> bool:
        """Whether it only looks at data in another way."""
        return not self.flops and not self.bytes and self.op not in (INPUT, OUTPUT, CALL)

    def to_dict(self) -> dict[str, Any]:
        given = {k: getattr(self, k) for k in (*_TEXTS, *_COUNTS)}
        return {**given, **{k: list(v) for k in _LISTS if (v := getattr(self, k))}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], place: int, before: int) -> NodeView:
        """place: its own, which all that it reads precede. before: how many nodes there were before the passes."""
        fields: dict[str, Any] = {k: _text(data[k]) for k in _TEXTS}
        fields |= {k: natural(data[k]) for k in _COUNTS}
        return cls(
            **fields,
            reads=_places(data.get("reads", []), place),
            origins=_places(data.get("origins", []), before),
            passes=tuple(_text(p) for p in items(data.get("passes", []), "passes")),
        )


_TEXTS, _COUNTS, _LISTS = ("name", "op", "code", "shape", "module"), ("flops", "bytes"), ("reads", "origins", "passes")


@dataclass(frozen=True)
class GraphView:
    """A graph before and after the passes. calls: how often it runs in one forward."""

    calls: int
    before: tuple[NodeView, ...]
    after: tuple[NodeView, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        both = {"before": self.before, "after": self.after}
        return {"calls": self.calls, **{k: [n.to_dict() for n in nodes] for k, nodes in both.items()}}

    @classmethod
    def from_dict(cls, data: Any) -> GraphView:
        """The inverse of `to_dict`. Raises EngineError in one sentence for anything else."""
        try:
            given = table(data, "a graph")
            old, new = (items(given[k], f"the nodes {k} the passes", MAX_NODES) for k in ("before", "after"))
            before = tuple(NodeView.from_dict(table(n, "a node"), i, 0) for i, n in enumerate(old))
            after = tuple(NodeView.from_dict(table(n, "a node"), i, len(before)) for i, n in enumerate(new))
            return cls(natural(given["calls"]), before, after)
        except (KeyError, ValueError) as error:
            raise EngineError(
                f"the engine's graphs are damaged ({type(error).__name__}: {str(error)[:80]}); build the engine again"
            ) from error


def read_views(data: Any) -> dict[str, GraphView]:
    """The graphs of a module by their names. Raises EngineError in one sentence for what is none."""
    if not isinstance(data, dict):
        raise EngineError("the engine's graphs are damaged (no object); build the engine again")
    return {name: GraphView.from_dict(view) for name, view in data.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{str(value)[:20]!r} is no name")
    return value


def _places(value: Any, end: int) -> tuple[int, ...]:
    places = tuple(natural(v) for v in items(value, "places", MAX_NODES))
    if any(p >= end for p in places):
        raise ValueError(f"{str(value)[:20]} are no places")
    return places


def graph_views(before: Program, after: Program) -> dict[str, GraphView]:
    """All graphs that run, the blocks' first. before: the normalized program, on whose copy the passes ran."""
    names = sorted((g for g in after.graphs if after.count(g)), key=lambda name: name == SHELL)
    found = {}
    for name in names:
        places: dict[str, int] = {}
        old = _views(before, name, places, {})
        found[name] = GraphView(after.count(name), old, _views(after, name, {}, places))
    return found


def _views(program: Program, graph: str, places: dict[str, int], before: Mapping[str, int]) -> tuple[NodeView, ...]:
    """The nodes that a reader wants to see; fills places: name -> place of each node.

    Weights stand in the code of what reads them. One output of several, and a call that continues a call of the same
    graph, are part of the node that they come from.
    """
    made: list[NodeView] = []
    runs: dict[int, list[str]] = {}  # the calls that are one node: graph and prefixes
    paths = iter([i.path for i in program.signature.inputs] if graph == SHELL else [])
    for node in program.graphs[graph].graph.nodes:
        if node.op == "get_attr":
            continue
        reads = tuple(sorted({places[n.name] for n in node.all_input_nodes if n.op != "get_attr"}))
        origins = tuple(sorted(before[o] for o in node.meta.get(ORIGINS, ()) if o in before))
        passes = node.meta.get(PASSES, ()) if before else ()
        if node.target is operator.getitem or (
            node.target is call and runs.get(max(reads, default=-1), [""])[0] == node.args[0]
        ):
            place = max(reads)
            one = made[place]
            reads = tuple(sorted({*one.reads, *reads} - {place}))
            origins = tuple(sorted({*one.origins, *origins}))
            made[place] = replace(one, reads=reads, origins=origins, passes=_joined(one.passes, passes))
        else:
            place = len(made)
            path = next(paths, "") if node.op == "placeholder" else module_path(node)
            work, moved = node_cost(node)
            texts = (node.name, _op(node), code(node), tensor_text(node.meta.get("val")), path)
            made.append(NodeView(*texts, sum(work.values()), moved, reads, origins, passes))
        if node.target is call:
            run = runs.setdefault(place, [str(node.args[0])])
            run.append(str(node.args[1]))
            made[place] = replace(made[place], code=f"{run[0]} x {len(run) - 1}: {run[1]} to {run[-1]}")
        places[node.name] = place
    return tuple(made)


def _op(node: fx.Node) -> str:
    if node.op != "call_function":
        return {"placeholder": INPUT, "output": OUTPUT}[node.op]
    return CALL if node.target is call else op_name(node)
