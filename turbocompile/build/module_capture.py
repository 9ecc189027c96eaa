"""A user's module is captured for some calls of it, in a way whose graph gives the module's own results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from turbocompile.build.captured import Twin
from turbocompile.build.inputs import VERIFY_TOKENS, max_tokens
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import CaptureError, RecipeError
from turbocompile.ir.program import Program, Signature
from turbocompile.ir.signature import (
    bound,
    describe,
    differs,
    fits,
    float_timesteps,
    given_numbers,
    tensors_of,
)
from turbocompile.numerics.original import NOT_COMPARED, Comparison, Original
from turbocompile.numerics.recording import Recorded
from turbocompile.recipe.options import CompileOptions

ModuleCall = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class Request:
    """What is to be captured of a module.

    calls: a Program each. known_calls: calls that have a Program already. verify_args: a smaller call to measure
    rewrites on. default_device: what the user set; the module's own calls have it.
    """

    model: nn.Module
    calls: Sequence[ModuleCall]
    options: CompileOptions
    verify_args: ModuleCall | None
    recorded: Recorded | None
    default_device: torch.device | None = None
    known_calls: Sequence[ModuleCall] = ()


@dataclass(frozen=True)
class Taken:
    """What was captured of a module.

    programs: call name -> Program. twin: what rewrites are measured on, None and `unmeasured` why. example: the tensors
    of the twin's call. comparison: of the module with the graph; original: what made it.
    """

    programs: Mapping[str, Program]
    twin: Twin | None
    unmeasured: str
    example: Sequence[torch.Tensor] = ()
    comparison: Comparison = NOT_COMPARED
    original: Original | None = None


@dataclass(frozen=True)
class _Way:
    """How calls are captured. numbers: paths of the Python floats that are inputs. float_timesteps: integers are taken
    as floats first.
    """

    numbers: frozenset[str] = frozenset()
    float_timesteps: bool = True


def take(request: Request) -> Taken:
    """Captures a module in the way that serves most calls of those whose graph is the module.

    Raises CaptureError where it cannot be captured, or where no graph gives the module's own results.
    """
    ways = _ways(request)
    for way in ways:
        try:
            taken = _Capture(request, way).taken()
        except CaptureError:
            if way == ways[-1]:
                raise
            continue
        if not taken.comparison.wrong:
            return taken
    raise CaptureError(taken.comparison.wrong)


def _ways(request: Request) -> list[_Way]:
    """The ways to try, the last of which is the example call alone. Where nothing is compared, only what is sure."""
    if request.options.verify != "numeric":
        return [_Way()]
    ways = [_Way()]
    numbers = _changing_numbers(request.model, [*request.known_calls, *request.calls])
    if request.recorded is None and numbers:
        ways.insert(0, _Way(numbers=numbers))
    signature, _ = describe(request.model, *request.calls[0])
    if float_timesteps(signature) != signature:
        ways.append(_Way(float_timesteps=False))
    return ways


def _changing_numbers(model: nn.Module, calls: Sequence[ModuleCall]) -> frozenset[str]:
    """Floats that are arguments by themselves; of those in containers (options of a LoRA, which fold into weights) the
    ones that differ between the calls.
    """
    given = [given_numbers(model, *call) for call in calls]
    paths = {path for one in given for path in one}
    differing = {path for path in paths if len({one[path] for one in given if path in one}) > 1}
    return frozenset(path for path in paths if "." not in path) | differing


@dataclass
class _Capture:
    """The captures of one way. made: name of a call -> the call."""

    request: Request
    way: _Way
    programs: dict[str, Program] = field(default_factory=dict)
    made: dict[str, ModuleCall] = field(default_factory=dict)

    def taken(self) -> Taken:
        """Captures, and compares with the module."""
        request = self.request
        for args, kwargs in request.calls:
            if not any(_is_of(program.signature, args, kwargs) for program in self.programs.values()):
                name = f"call-{len(self.programs)}" if self.programs else "call"
                self.programs[name], self.made[name] = self._captured((args, kwargs)), (args, kwargs)
        if request.options.verify != "numeric":
            return Taken(self.programs, None, f"not measured: the recipe says verify: {request.options.verify}")
        if any(p.device.type == "meta" for p in request.model.parameters()):
            reason = "not measured: the parameters are on the meta device, so there are no numbers"
            return Taken(self.programs, None, reason)
        call, twin = self._twin()
        original = Original(request.model, *call, request.default_device)
        tokens = max_tokens(twin.program)
        if tokens > VERIFY_TOKENS:
            reason = (
                f"not measured: the call has {tokens} tokens, more than {VERIFY_TOKENS}; "
                "give optimize() a smaller call as verify_args=(args, kwargs)"
            )
            if original.device.type == "cpu":
                return Taken(self.programs, None, reason)
            return Taken(self.programs, None, reason, [], self._compared(original, twin), original)
        given = request.recorded is None
        example = describe(request.model, *call, numbers=self.way.numbers)[1] if given else []
        return Taken(self.programs, twin, "", example, self._compared(original, twin), original)

    def _twin(self) -> tuple[ModuleCall, Twin]:
        """The call that rewrites are measured on: one like the recorded, that of verify_args, or the smallest."""
        request = self.request
        if request.recorded is not None:
            call = request.recorded.example(request.model, *request.calls[0])
            try:
                return call, Twin(self._captured(call))
            except CaptureError as error:
                where = request.recorded.where
                raise RecipeError(f"{where}: the model does not take these inputs ({error})") from error
        if request.verify_args is not None:
            call = tuple(request.verify_args[0]), dict(request.verify_args[1])
            return call, Twin(self._captured(call))
        name = min(self.made, key=lambda n: sum(t.numel() for t in _tensors(self.made[n])))
        return self.made[name], Twin(self.programs[name], name)

    def _captured(self, call: ModuleCall) -> Program:
        numbers, floating = self.way.numbers, self.way.float_timesteps
        return capture(self.request.model, *call, numbers=numbers, float_timesteps=floating)

    def _compared(self, original: Original, twin: Twin) -> Comparison:
        return original.compare(twin.program, ModuleTensors(self.request.model, original.device))


def _is_of(signature: Signature, args: Any, kwargs: Any) -> bool:
    """Whether a call is one that the signature stands for already."""
    given = bound(signature, args, kwargs)
    return not differs(signature, given) and fits(signature, tensors_of(signature, given))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in _tensors(item)]
