"""Bytes of a Program's weights as stored, and of the activations that are alive at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


# ------------------------------------------------------------------------------------- the order of the allocations

Workspace = Callable[[fx.Node], int]


@dataclass(frozen=True)
class Allocation:
    """One event of a run: `bytes` are allocated under `id`, or freed where `bytes` is 0."""

    id: int
    bytes: int


def allocations(program: Program, workspace: Workspace = lambda node: 0) -> list[Allocation]:
    """What one forward allocates and frees beside weights and inputs, in order; the outputs stay at the end.

    workspace: the bytes that an op allocates besides its results and frees before it returns.
    """
    return _Walk(program, workspace).run()


class _Walk:
    """Follows the generated code (execute.py): a value is freed after its last use, a block's inputs after the call."""

    def __init__(self, program: Program, workspace: Workspace) -> None:
        self.program, self.workspace = program, workspace
        self.events: list[Allocation] = []
        self.holders: dict[int, int] = {}  # id -> graphs that hold it: a block's output is held by block and shell
        self.lives = {name: _Lives(sub) for name, sub in program.graphs.items()}

    def run(self) -> list[Allocation]:
        inputs = [[0] for _ in self.program.shell.inputs()]  # 0: memory that is none of the run's
        self._graph(self.program.shell, self.lives[SHELL], inputs)
        return self.events

    def _graph(self, sub: Subgraph, lives: _Lives, inputs: Sequence[list[int]]) -> list[list[int]]:
        """Runs a graph. inputs: the ids of the storages of each input. Returns those of each output, still held."""
        given = dict(zip(sub.inputs(), inputs, strict=True))
        ids: dict[Any, int] = {}
        for i, node in enumerate(lives.nodes):
            made = [(key, t) for key, t in lives.storage.get(node, ()) if lives.born[key] == i]
            if node.op == "placeholder":
                ids |= {key: given[node][min(n, len(given[node]) - 1)] for n, (key, _) in enumerate(made)}
            elif node.op == "call_function" and node.target is call:
                block = str(node.args[0])
                taken = [[ids[key] for key, _ in lives.storage[a]] or [0] for a in node.args[3:]]  # type: ignore[index]
                out = self._graph(self.program.graphs[block], self.lives[block], taken)
                ids |= {key: out[n][0] for n, (key, _) in enumerate(made)}
            else:
                ids |= {key: self._allocated(t) if node.op == "call_function" else 0 for key, t in made}
                if node.op == "call_function" and (size := self.workspace(node)):
                    self._released(self._taken(size))
            for key in lives.dying.get(i, ()):
                self._released(ids[key])
        outputs = [[ids[key] for key, _ in lives.storage.get(n, ())] or [0] for n in sub.outputs()]
        for one in {key: None for n in sub.outputs() for key, _ in lives.storage.get(n, ())}:
            if one[0].op == "placeholder":  # the caller holds it as the input, and as an output now
                self.holders[ids[one]] = self.holders.get(ids[one], 0) + 1
        return outputs

    def _allocated(self, tensor: torch.Tensor) -> int:
        return self._taken(storage_bytes(tensor))

    def _taken(self, size: int) -> int:
        if not size:
            return 0
        self.events.append(Allocation(len(self.events) + 1, size))
        made = self.events[-1].id
        self.holders[made] = 1
        return made

    def _released(self, one: int) -> None:
        if not one:
            return
        self.holders[one] -= 1
        if not self.holders[one]:
            self.events.append(Allocation(one, 0))


class _Lives:
    """The storages of a graph: where each is made, and after which node each is freed."""

    def __init__(self, sub: Subgraph) -> None:
        self.nodes = list(sub.graph.nodes)
        self.storage = _storages(self.nodes)
        self.born: dict[Any, int] = {}
        last: dict[Any, int] = {}
        for i, node in enumerate(self.nodes):
            for key, _ in self.storage.get(node, ()):
                self.born.setdefault(key, i)
            for read in (*node.all_input_nodes, node):
                for key, _ in self.storage.get(read, ()):
                    last[key] = len(self.nodes) if node.op == "output" or key[0].op == "placeholder" else i
        self.dying: dict[int, list[Any]] = {}
        for key, i in last.items():
            self.dying.setdefault(i, []).append(key)
