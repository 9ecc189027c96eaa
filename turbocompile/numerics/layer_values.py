"""The true values of each layer: a Program is run layer by layer, with the weights of one layer in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.program import Program, Subgraph
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.interpreter import CPU, Interpreter, Values
from turbocompile.numerics.program_values import is_float64


class _Held:
    """A source that keeps what was read of one layer: its weights are asked for again, to be quantized."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.held: dict[str, torch.Tensor] = {}

    def keys(self) -> Iterable[str]:
        return self.source.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.source.spec(name)

    def get(self, name: str) -> torch.Tensor:
        if name not in self.held:
            self.held[name] = self.source.get(name)
        return self.held[name]


@dataclass(frozen=True)
class Layer:
    """One call of a block: its true values for each input, by node name, and its weights."""

    graph: str
    prefix: str
    values: list[Values]
    evaluate: Evaluator

    @property
    def name(self) -> str:
        return self.prefix.rstrip(".")


def each_layer(
    program: Program,
    source: TensorSource,
    inputs: Inputs,
    wanted: Mapping[str, set[str]],
    device: torch.device = CPU,
) -> Iterator[Layer]:
    """The calls in the order they run, each with the true values of the wanted nodes of its graph.

    All inputs go through a layer before the next one's weights are read.
    """
    held = _Held(source)
    evaluate = Evaluator(held, program.constants)
    wide = torch.float64 if is_float64(program.shell) else torch.float32

    def evaluation(sub: Subgraph, prefix: str) -> Interpreter:
        return Interpreter(sub, lambda n: evaluate(sub.weights[str(n.target)], prefix).to(device), wide, device)

    shell = evaluation(program.shell, "")
    names = [n.name for n in program.shell.inputs()]
    runs = []
    for call in inputs.calls:
        given = {k: t.to(device, wide if t.is_floating_point() else t.dtype) for k, t in zip(names, call, strict=True)}
        runs.append(shell.steps(given, keep=()))
    with torch.no_grad():
        waiting = [next(run, None) for run in runs]
    while all(w is not None for w in waiting):
        held.held.clear()
        graph, prefix = waiting[0][0].args[:2]  # type: ignore[index]
        sub = program.graphs[graph]
        block, outputs = evaluation(sub, prefix), [n.name for n in sub.outputs()]
        found = []
        for _, args in waiting:  # type: ignore[misc]
            given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
            found.append(block(given, keep=wanted.get(graph, set()).union(outputs)))
        yield Layer(graph, prefix, found, evaluate)
        with torch.no_grad():
            for i, run in enumerate(runs):
                result = tuple(found[i][name] for name in outputs)
                waiting[i] = _sent(run, result[0] if len(result) == 1 else result)


def _sent(run: Any, value: Any) -> Any:
    """What a generator yields next; None at its end."""
    try:
        return run.send(value)
    except StopIteration:
        return None
