"""The graphs of a module before and after the passes, as data: what an engine keeps and a page draws.

An engine keeps the data beside its printed graphs (`graphs/<module>.json`). Anyone may have made the folder that the
data is read from, so `GraphView.from_dict` checks each value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbocompile.errors import EngineError
from turbocompile.ir.cost import natural
from turbocompile.ir.reading import MAX_TEXT, items, table
from turbocompile.ir.sizes import MAX_NODES

INPUT, OUTPUT, CALL = "input", "output", "call"  # ops of a NodeView that are no operators


@dataclass(frozen=True)
class NodeView:
    """A node as a page shows it: its printed code, its cost in one run, and its relations to other nodes.

    op: as in "aten.linear", or input, output, call. flops, bytes: of one run. reads: positions, in the same list of the
    GraphView, of the nodes that it reads. origins: of a node after the passes, the positions of the nodes before the
    passes that it replaces. passes: the passes that made it, the last one last.
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
        """Whether the node is a view, which computes and moves nothing."""
        return not self.flops and not self.bytes and self.op not in (INPUT, OUTPUT, CALL)

    def to_dict(self) -> dict[str, Any]:
        given = {k: getattr(self, k) for k in (*_TEXTS, *_COUNTS)}
        return {**given, **{k: list(v) for k in _LISTS if (v := getattr(self, k))}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], position: int, before: int) -> NodeView:
        """The inverse of `to_dict`. Raises KeyError or ValueError for other data.

        position: the node's own, which the positions of all nodes that it reads must precede. before: the number of
        nodes before the passes.
        """
        fields: dict[str, Any] = {k: _text(data[k]) for k in _TEXTS}
        fields |= {k: natural(data[k]) for k in _COUNTS}
        return cls(
            **fields,
            reads=_positions(data.get("reads", []), position),
            origins=_positions(data.get("origins", []), before),
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


def _positions(value: Any, end: int) -> tuple[int, ...]:
    positions = tuple(natural(v) for v in items(value, "places", MAX_NODES))
    if any(p >= end for p in positions):
        raise ValueError(f"{str(value)[:20]} are no places")
    return positions
