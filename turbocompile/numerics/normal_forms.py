"""Is the normal form of each graph the same function as the captured graph, and does it round no more?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbocompile.errors import TurbocompileError, VerificationError, brief
from turbocompile.ir.program import Program
from turbocompile.numerics.errors import compare, differs, rounds_more
from turbocompile.numerics.interpreter import Interpreter, Uncomputed
from turbocompile.numerics.program_values import (
    Weights,
    as_engine,
    first_and_last,
    given_to,
    results_of,
    run_widest,
    told_apart,
    widened,
)

JITTERS = 3  # more inputs, a rounding apart, on which the rounding of a whole graph is measured
Names = tuple[str, str]  # of one value: in the graph as captured, and in its normal form


def wrong_forms(
    captured: Program, normal: Program, weights: Weights, inputs: Sequence[torch.Tensor], seed: int = 0
) -> dict[str, str]:
    """The graphs whose normal form is another function than the captured graph, or rounds more -> by how much.

    captured, normal: a Program before and after `normalize`. inputs: the tensors of a call, in the order of the
    Program's inputs. Each graph is run by itself, on the true values of its inputs. Raises VerificationError where a
    captured graph is finite in its own dtype and not in float64, because nothing can be measured then;
    Uncomputed where a captured graph cannot be computed; torch.OutOfMemoryError.
    """
    keep = {graph: {n.name for n in given_to(captured, graph)} for graph in captured.graphs}
    truth, wide = run_widest(captured, weights, inputs, keep)
    found = {}
    for graph in list(truth):
        pairs = list(zip(given_to(captured, graph), given_to(normal, graph), strict=True))
        true = truth.pop(graph)
        values = {old.name: as_engine(true[old.name], old) for old, _ in pairs}
        values = told_apart(captured, graph, values)
        given = {(old.name, new.name): values[old.name] for old, new in pairs}
        forms = _Forms(captured, normal, graph, given, weights, wide)
        reason = forms.wrong(seed)
        if reason:
            found[graph] = reason
    return found


@dataclass
class _Forms:
    """A graph as captured and in normal form. given: the values that both are given, in the engine's dtypes."""

    captured: Program
    normal: Program
    graph: str
    given: Mapping[Names, Any]
    weights: Weights
    wide: torch.dtype | None

    def run(self, program: Program, prefix: str, wide: torch.dtype | None, given: Mapping[Names, Any]) -> list[Any]:
        """The results of `program`, which is one of the two, in the call with this prefix."""
        sub, form = program.graphs[self.graph], int(program is self.normal)
        first = prefix in program.prefixes(self.graph)[:1]
        interpreter = Interpreter(sub, self.weights(sub, prefix, wide, first), wide)
        named = widened({names[form]: v for names, v in given.items()}, wide)
        results = [n.name for n in results_of(program, self.graph)]
        values = interpreter(named, lambda node, args: named[node.name], set(results))
        return [values[name] for name in results]

    def wrong(self, seed: int) -> str:
        """Why the normal form cannot stand for the captured graph; empty where it can."""
        first, *last = first_and_last(self.captured, self.graph)
        true = self.run(self.captured, first, self.wide, self.given)
        reason = self._differs(first, true)
        for prefix in last:
            reason = reason or self._differs(prefix, self.run(self.captured, prefix, self.wide, self.given))
        return reason or self._rounds_more(first, true, seed)

    def _differs(self, prefix: str, true: Sequence[Any]) -> str:
        """How far the two are apart in the widest dtype; empty where they are one function. true: of the captured."""
        found = self._of_normal(prefix, self.wide)
        if isinstance(found, str):
            return found
        for node, a, b in zip(results_of(self.captured, self.graph), found, true, strict=True):
            reason = differs(compare(a, b), node.meta["val"].dtype, self.wide)
            if reason:
                return f"its normal form is another function: {reason}"
        return ""

    def _of_normal(self, prefix: str, wide: torch.dtype | None) -> list[Any] | str:
        """The results of the normal form, or why it cannot be computed."""
        try:
            return self.run(self.normal, prefix, wide, self.given)
        except Uncomputed as failed:
            return f"its normal form cannot be computed ({failed.reason})"
        except TurbocompileError as error:
            return f"its normal form cannot be computed ({brief(error)})"

    def _rounds_more(self, prefix: str, true: Sequence[Any], seed: int) -> str:
        """How much more the normal form rounds than the captured graph; empty where it does not."""
        own = self.run(self.captured, prefix, None, self.given)
        found = self._of_normal(prefix, None)
        if isinstance(found, str):
            return found
        reason = ""
        for i, node in enumerate(results_of(self.captured, self.graph)):
            dtype = node.meta["val"].dtype
            if bool((own[i].isfinite() & ~true[i].isfinite()).any()):
                raise VerificationError(
                    f"the graph {self.graph!r} is not finite in float64 where it is in {dtype}, so that nothing can be "
                    "measured; build with verify: off"
                )
            after, before = compare(found[i], true[i]), [compare(own[i], true[i])]
            if rounds_more(after, before, dtype):  # by chance, where few roundings make up the error before?
                before += [compare(again[i], true[i]) for again in self._jittered(prefix, seed)]
            reason = reason or rounds_more(after, before, dtype)
        return reason and f"its normal form rounds more: {reason}"

    def _jittered(self, prefix: str, seed: int) -> Iterator[list[Any]]:
        """The results of the captured graph on JITTERS other inputs, each within a rounding of the given ones."""
        generator = torch.Generator().manual_seed(seed)

        def moved(t: Any) -> Any:
            if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype.itemsize == 1:
                return t
            up = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (t.double() * (1 + torch.finfo(t.dtype).eps * up)).to(t.dtype)

        for _ in range(JITTERS):
            given = {names: fx.node.map_aggregate(value, moved) for names, value in self.given.items()}
            yield self.run(self.captured, prefix, None, given)
