"""Brings every way of writing a computation to one form, and cleans up after each pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile.program import Subgraph, call

aten = torch.ops.aten


def clean(sub: Subgraph, mode: FakeTensorMode) -> dict[str, str]:
    """Merges equal nodes, then drops dead ones; returns by what (name) each merged node was replaced."""
    moved: dict[str, str] = {}
    _merge_equal(sub.graph, moved)
    _drop_dead(sub)
    return moved


def _merge_equal(graph: fx.Graph, moved: dict[str, str]) -> None:
    """Common subexpressions: the later of two equal nodes becomes the earlier one."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.target is call:
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            moved[node.name] = first.name
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """A hashable form of node arguments; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    return value if isinstance(value, fx.Node) else (type(value), value)


def _drop_dead(sub: Subgraph) -> None:
    """Drops what nobody reads (calls of blocks included), and the weights that are read no more."""
    for node in reversed(list(sub.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            sub.graph.erase_node(node)
    read = {str(n.target) for n in sub.graph.nodes if n.op == "get_attr"}
    for name in set(sub.weights) - read:
        del sub.weights[name]
