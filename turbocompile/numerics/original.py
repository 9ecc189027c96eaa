"""The first truth is the user's module itself: its own calls are compared with the graph that was captured of it.

Every later comparison starts at the captured graph, so that a fault of capture is on both sides of it. Therefore two
calls of the module, made as its user makes them, are compared with two runs of the graph before any pass. The second
call has other tensors and other numbers, because a model that keeps something between calls is right at its first call.
Where the model's Python state still changes at the second call, more calls follow.
"""

from __future__ import annotations

import contextvars
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from turbocompile.capture.isolation import State
from turbocompile.capture.module_weights import quantized
from turbocompile.capture.process import compiling, process_kept
from turbocompile.errors import brief
from turbocompile.ir import signature as sig
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.execute import Runner
from turbocompile.ir.program import Program, Signature
from turbocompile.kernels.quantize.quantize import dequantize
from turbocompile.numerics.errors import compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import is_out_of_memory

CALLS = 2
CALLS_OF_STATE = 8  # where a model's attributes change from call to call
# The largest difference as part of the largest value. The graph has the module's own operations in the module's own
# dtypes, so that most results are equal to the bit; a sum in another order moves a result by a few roundings of 2^-24.
EXACT = 1e-5
EXACT_16 = 2.0**-7  # relative L1 in a 16-bit type: two of its roundings
MULTIPLE = 8  # of the difference that one rounding of the inputs makes, in a model that amplifies roundings
NO_MEMORY = "needs more memory than there is"
STATELESS = "compile a model whose forward depends on its arguments alone"
Leaves = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The result of the comparison. calls: the number of compared calls. wrong: why the graph is not the module; empty
    where it is. words: for the report. warnings: for the user, even where the graph is right.
    """

    calls: int = 0
    wrong: str = ""
    words: str = ""
    warnings: tuple[str, ...] = ()


NOT_COMPARED = Comparison()


@dataclass
class _Made:
    """Calls that were made of a module.

    results: the output tensors of each call. kept: the places of the module's Python state that the calls changed.
    moving: the places that the second call changed. drawn: whose random numbers were drawn. failure: why no further
    call was made.
    """

    calls: list[Leaves] = field(default_factory=list)
    results: list[list[torch.Tensor]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    moving: list[str] = field(default_factory=list)
    drawn: str = ""
    failure: str = ""


class Original:
    """A module and one call of it, as its user makes it.

    args, kwargs: the call; random tensors stand for tensors on the meta device. default_device: the device on which
    the module's own code makes tensors, if the user set one. Calls are made on the module's own device, without
    gradients and with dropout off; afterwards the module and the process are as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        default_device: torch.device | None = None,
    ) -> None:
        self.default_device = default_device or torch.get_default_device()
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs)
        self.device = next((t.device for t in _tensors(model) if t.device.type != "meta"), torch.device("cpu"))
        self.name = type(model).__name__
        self._first: tuple[sig.Spelling, Leaves, list[torch.Tensor]] | None = None

    def compare(self, program: Program, source: TensorSource) -> Comparison:
        """Compares the module with its captured Program. source: gives the weights' values."""
        drawn = _drawn(program)
        if drawn:
            reason = f"{self.name} draws random numbers ({drawn}), so that no two calls of it are alike"
            return Comparison(wrong=f"{reason}; give it the noise as an argument, or build with verify: off")
        numbers = {i.path for i in program.signature.inputs if i.number}
        wrapper = program.signature.return_dict
        signature, tensors = sig.describe(self.model, self.args, self.kwargs, wrapper, numbers)
        spelling = sig.Spelling.of(signature, self.args, self.kwargs)
        calls = self._calls(program, signature, tensors)
        with compiling():
            made = contextvars.copy_context().run(self._made, spelling, calls)
            if made.drawn:
                reason = f"{self.name} draws random numbers ({made.drawn}), so that no two calls of it are alike"
                return Comparison(wrong=f"{reason}; decide by an argument, or build with verify: off")
            if not made.results:
                return self._not_compared(made.failure)
            try:
                differences = self._differences(_Graph(program, source, self.device), made)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    return self._not_compared(NO_MEMORY)
                # Older torch traces operators with dtypes that they do not compute.
                return Comparison(wrong=f"{self.name} computes where its graph does not ({brief(error)})")
        for number, (difference, bound) in enumerate(differences):
            if not difference <= bound:
                return Comparison(number + 1, self._wrong(number, difference, made))
        if made.failure:
            return Comparison(len(made.results), f"{self.name} {made.failure}, and its graph does not; {STATELESS}")
        self._first = spelling, made.calls[0], made.results[0]
        count, worst = len(made.results), max(difference for difference, _ in differences)
        words = f"{count} calls of the module are those of its graph (largest difference {worst:.1e})"
        warned = (
            f"{self.name} changes {_listed(made.moving)} with each call, and its engine keeps nothing between calls; "
            f"{count} calls were equal"
        )
        return Comparison(count, "", words, (warned,) if made.moving else ())

    def _differences(self, run: _Graph, made: _Made) -> list[tuple[float, float]]:
        """For each call, how far the graph's result is from the module's, and how far it may be."""
        pairs = zip(made.calls, made.results, strict=True)
        return [run.difference(leaves, outputs) for leaves, outputs in pairs]

    def _not_compared(self, reason: str) -> Comparison:
        said = f"the engine was not compared with {self.name} itself, because {self.name} {reason}"
        return Comparison(words=f"not compared: the module {reason}", warnings=(said,))

    def unchanged(self) -> bool:
        """Whether the module gives its first result again."""
        if self._first is None:
            return True
        spelling, leaves, outputs = self._first
        with compiling():
            again = contextvars.copy_context().run(self._made, spelling, [leaves]).results
        return bool(again) and all(
            difference <= bound
            for difference, bound in (_difference(a, b) for a, b in zip(again[0], outputs, strict=True))
        )

    # --------------------------------------------------------------------------------------------------------- calls

    def _calls(self, program: Program, signature: Signature, tensors: Sequence[torch.Tensor]) -> list[Leaves]:
        """The example, then calls with random tensors of its shapes and dtypes, and other numbers."""
        given = [t for t in tensors if t.device.type != "meta"]
        real = len(given) == len(tensors)
        calls = [_leaves(signature, tensors)] if real else []
        like = replace(program, signature=signature)
        for seed in range(CALLS_OF_STATE - len(calls)):
            made = random_inputs(like, seed + 1, tensors, zeros=True)
            leaves = _leaves(signature, made)
            for i in signature.inputs:
                if i.number:  # a number may have a range of its own: three quarters of it lie within most ranges
                    value = float(_leaves(signature, tensors)[i.path])
                    leaves[i.path] = value if not len(calls) else 0.75 * value if value else 0.5
            calls.append(leaves)
        return calls

    def _made(self, spelling: sig.Spelling, calls: Sequence[Leaves]) -> _Made:
        """The module's own calls, one after the other."""
        made = _Made()
        state, randomness = State(model=self.model), _randomness()
        try:
            with process_kept(), torch.no_grad():
                state.replace(_dequantized)
                for module in self.model.modules():
                    vars(module)["training"] = False
                for leaves in calls:
                    second = len(made.results) == CALLS - 1
                    before = State(model=self.model) if second else None
                    if not self._make(made, spelling, leaves):
                        break
                    if before is not None:
                        made.moving = before.changed()
                    if len(made.results) >= CALLS and not made.moving:
                        break
                made.drawn = next((k for k, v in _randomness().items() if v != randomness.get(k, v)), "")
                made.kept = [k for k in state.changed() if not k.endswith(".training")]
        finally:
            state.restore()
        return made

    def _make(self, made: _Made, spelling: sig.Spelling, leaves: Leaves) -> bool:
        """Makes a call; where it fails, the first call again, because not every model takes random tensors.

        Returns whether one of the two was made.
        """
        for attempt in (leaves, *made.calls[:1]):
            try:
                made.results.append(self._call(spelling, attempt))
                made.calls.append(attempt)
                made.failure = ""
                return True
            except Exception as error:  # the user's code may raise anything; the report says what it was
                if is_out_of_memory(error):
                    made.failure = "" if made.results else NO_MEMORY
                    continue
                reason = (str(error).strip().split("\n") or [""])[0][:200]
                made.failure = f"raises {type(error).__name__} at call {len(made.calls) + 1} ({reason})"
        return False

    def _call(self, spelling: sig.Spelling, leaves: Leaves) -> list[torch.Tensor]:
        placed = {k: v.to(self.device).clone() if isinstance(v, torch.Tensor) else v for k, v in leaves.items()}
        args, kwargs = spelling.call(placed)
        flat: list[torch.Tensor] = []
        with self.default_device:
            sig.describe_output(self.model(*args, **kwargs), flat)
        return [t.detach().clone() for t in flat]

    def _wrong(self, number: int, difference: float, made: _Made) -> str:
        place = "first" if not number else "second" if number == 1 else f"{number + 1}th"
        words = f"{self.name} gives another result at its {place} call than its graph (off by {difference:.1e})"
        kept = made.moving or (made.kept if number else [])
        if kept:
            return f"{words}, because it keeps something between calls ({_listed(kept)}); {STATELESS}"
        return f"{words}; compile it with verify: off only if you know why, and report it"


class _Graph:
    """A captured Program with its weights, on a device, run without any pass."""

    def __init__(self, program: Program, source: TensorSource, device: torch.device) -> None:
        self.program, self.device = program, device
        evaluate = Evaluator(source, program.constants)
        plan = weight_plan({"call": program})
        weights = {name: evaluate(e.expr, e.prefix).to(device) for name, e in plan.items()}
        self.runner = Runner(program, weights, device)

    def __call__(self, leaves: Leaves) -> list[torch.Tensor]:
        inputs = self.program.signature.inputs
        tensors = [torch.as_tensor(leaves[i.path], dtype=sig.NUMBER) if i.number else leaves[i.path] for i in inputs]
        placed = [t.to(self.device).clone() for t in sig.cast(self.program.signature, tensors)]
        return list(self.runner(*placed))

    def difference(self, leaves: Leaves, outputs: Sequence[torch.Tensor]) -> tuple[float, float]:
        """How far the graph's results are from the module's `outputs`, and how far rounding alone may move them."""
        found = self(leaves)
        if len(found) != len(outputs) or any(a.shape != b.shape for a, b in zip(found, outputs, strict=True)):
            return float("inf"), 0.0
        worst = (0.0, EXACT)
        moved: list[torch.Tensor] | None = None
        for k, (a, b) in enumerate(zip(found, outputs, strict=True)):
            difference, bound = _difference(a, b)
            if not difference <= bound:
                moved = moved or self(_nudged(leaves))
                bound = max(bound, MULTIPLE * _difference(moved[k], a)[0])
            if not difference <= worst[0] or not worst[0] <= worst[1]:
                worst = (difference, bound) if worst[0] <= worst[1] else worst
        return worst


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """How far a is from b, and the bound for that. Infinite where their dtypes differ, or their places not finite."""
    if a.dtype != b.dtype:
        return float("inf"), 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return (0.0 if torch.equal(a, b) else float("inf")), 0.0
    if b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a.nan_to_num()[~finite], b.nan_to_num()[~finite]):
        return float("inf"), 0.0
    error = compare(torch.where(finite, a, 0.0), torch.where(finite, b, 0.0))
    return (error.rel_l1, EXACT_16) if b.dtype.itemsize <= 2 else (error.max_rel, EXACT)


def _nudged(leaves: Leaves) -> Leaves:
    """The call with each floating tensor moved by about one rounding of its type."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for path, value in leaves.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize > 1:
            sign = torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1
            wide = value.double() * (1 + torch.finfo(value.dtype).eps * sign)
            made[path] = wide.to(value.dtype)
        else:
            made[path] = value
    return made


def _drawn(program: Program) -> str:
    """The first operator of a Program that draws random numbers; empty where none does."""
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_off(node):
                return str(node.target)
    return ""


def _is_off(node: fx.Node) -> bool:
    """Whether an operator that may drop values (dropout, attention, recurrent cells) is told to drop none."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    ways = [given[name] for name in ("p", "dropout", "dropout_p") if name in given]
    if "dropout_p" in names and "dropout_p" not in given:
        return True
    return given.get("train") is False or (bool(ways) and all(way == 0 for way in ways))


def _randomness() -> dict[str, Any]:
    """The states of the random generators of Python and of numpy, by their names."""
    found: dict[str, Any] = {"Python's random": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy.random"] = (kind, keys.tobytes(), *rest)
    return found


def _dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that torchao quantized, in its own dtype. Its activations stay as they are: passes quantize these."""
    parts = quantized("a weight", tensor)
    if parts is None:
        return tensor
    made = dequantize(parts.data, parts.scale, parts.format, tensor.dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _leaves(signature: Signature, tensors: Sequence[torch.Tensor]) -> Leaves:
    pairs = zip(signature.inputs, tensors, strict=True)
    return {i.path: float(t) if i.number else t for i, t in pairs}


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = sorted(names)[:most]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(n.removeprefix("model.") for n in shown) + more
