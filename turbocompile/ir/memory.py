"""Bytes of a Program's weights as stored, and of the activations that are alive at once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from turbocompile.ir.node_cost import storage_bytes
from turbocompile.ir.op_schema import MAY_COPY, is_alias, is_view, schema_name
from turbocompile.ir.program import SHELL, Program, Subgraph, call, walk_tensors
from turbocompile.ir.stored_names import stored_weights
from turbocompile.ir.weights import nbytes


def parameter_bytes(programs: Iterable[Program]) -> int:
    """Bytes of all stored weights. A weight that differs from call to call counts once a call, a shared weight once.

    Programs of several shapes share their weights.
    """
    return sum(parameters_by_dtype(programs).values())


def parameters_by_dtype(programs: Iterable[Program]) -> dict[str, int]:
    """Bytes of all weights as stored, by dtype ("bfloat16", "int8", ...)."""
    stored: dict[str, Any] = {}
    for program in programs:
        stored |= {weight.name: weight.expr for weight in stored_weights(program)}
    found: dict[str, int] = {}
    for expr in stored.values():
        name = str(expr.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + nbytes(expr)
    return dict(sorted(found.items()))


def activation_bytes(program: Program) -> int:
    """The peak of the bytes of activations, inputs included, when each activation is freed after its last use.

    Weights and the workspace of an op are not counted.
    """
    inner = {name: _peak(sub, {}, inputs=False) for name, sub in program.graphs.items() if name != SHELL}
    return _peak(program.shell, inner, inputs=True)


def _peak(sub: Subgraph, inner: Mapping[str, int], inputs: bool) -> int:
    """The peak of one graph. inner: the peaks of the blocks that it calls, by name.

    inputs: whether the inputs of the graph count. The inputs of a block count in the shell, which keeps them alive.
    """
    nodes = list(sub.graph.nodes)
    storage = _storages(nodes)
    size: dict[Any, int] = {}
    born: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for i, node in enumerate(nodes):
        for key, tensor in storage.get(node, ()):
            if key not in born:
                born[key] = i
                counts = key[0].op == "call_function" or (inputs and key[0].op == "placeholder")
                size[key] = storage_bytes(tensor) if counts else 0
        for read in (*node.all_input_nodes, node):
            for key, _ in storage.get(read, ()):
                last[key] = len(nodes) if node.op == "output" or key[0].op == "placeholder" else i
    dying: dict[int, list[Any]] = {}
    for key, i in last.items():
        dying.setdefault(i, []).append(key)
    live = peak = 0
    for i, node in enumerate(nodes):
        made = sum(size[key] for key, _ in storage.get(node, ()) if born[key] == i)
        within = inner.get(str(node.args[0]), 0) if node.op == "call_function" and node.target is call else 0
        peak = max(peak, live + max(made, within))
        live += made - sum(size[key] for key in dying.get(i, ()))
    return peak


def _storages(nodes: list[fx.Node]) -> dict[fx.Node, list[tuple[Any, torch.Tensor]]]:
    """For each node the storages of its value, each as ((node that made the storage, index), tensor)."""
    found: dict[fx.Node, list[tuple[Any, torch.Tensor]]] = {}
    for node in nodes:
        if node.op == "output" or "val" not in node.meta:
            continue
        if node.op == "call_function" and node.target is operator.getitem:
            parent = found[node.args[0]]  # type: ignore[index]
            found[node] = [parent[node.args[1] if len(parent) > 1 else 0]]  # type: ignore[index]
        elif node.op == "call_function" and (is_view(node) or (is_alias(node) and schema_name(node) not in MAY_COPY)):
            found[node] = found[node.args[0]][:1]  # type: ignore[index]
        else:
            found[node] = [((node, i), t) for i, t in enumerate(walk_tensors(node.meta["val"]))]
    return found
