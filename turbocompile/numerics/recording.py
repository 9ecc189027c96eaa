"""Recorded inputs: what a model is really called with, in a file that calibration measures 8-bit linears on.

    with turbocompile.record(pipe.transformer, "inputs.safetensors"):
        pipe("a cat walking on the beach")

The file is safetensors. `0.hidden_states` is the tensor `hidden_states` of the first call kept, `1.hidden_states` that
of the second; an argument within a list or a dict has its place behind a dot, as in `0.freqs.1`. Calls are of one
shape, and are numbered in the order they were made.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from turbocompile.defaults import CALIBRATION_CALLS, MAX_CALIBRATION_CALLS
from turbocompile.errors import RecipeError
from turbocompile.files import check_file, replacing
from turbocompile.ir.program import Signature
from turbocompile.ir.signature import Spelling, describe

MAX_TOKENS = 4096  # of a call that a build measures on: its truth is computed in float64, on a CPU mostly
THIN = 3  # odd, so that of the two forwards of a guided step both kinds are kept
_NAME = re.compile(r"(0|[1-9]\d{0,5})\.(.+)", re.S)

Call = dict[str, torch.Tensor]  # tensors by their place in the arguments


class Recording:
    """Some calls of modules, spread over all that are made: `calls` of them at the end, in memory three times as many.

    How many calls come is not known, so that each is kept at first; whenever there are too many, two of three go.
    """

    def __init__(self, calls: int = CALIBRATION_CALLS) -> None:
        if not 1 <= calls <= MAX_CALIBRATION_CALLS:
            raise RecipeError(f"calls must be 1 to {MAX_CALIBRATION_CALLS}, not {calls}")
        self.calls, self.seen, self.stride = calls, 0, 1
        self.kept: list[Call] = []

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes a call, where it has the shapes of the first. Raises CaptureError for an argument that is no tensor."""
        signature, tensors = describe(module, args, kwargs)
        names = [i.path for i in signature.inputs]
        sizes = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
        if self.kept and sizes != {n: tuple(t.shape) for n, t in self.kept[0].items()}:
            return
        if self.seen % self.stride == 0:
            copies = (t.detach().to("cpu", copy=True).contiguous() for t in tensors)
            self.kept.append(dict(zip(names, copies, strict=True)))
        self.seen += 1
        if len(self.kept) == THIN * self.calls:
            self.kept, self.stride = self.kept[::THIN], self.stride * THIN

    def chosen(self) -> list[Call]:
        """The calls to write, evenly spread over those kept, the first and the last included."""
        count = min(self.calls, len(self.kept))
        last = len(self.kept) - 1
        return [self.kept[round(i * last / max(count - 1, 1))] for i in range(count)]

    def save(self, path: str | Path) -> Path:
        """Writes the file. Raises RecipeError where no call was made."""
        chosen = self.chosen()
        if not chosen:
            raise RecipeError(f"{path}: nothing was recorded, the model was not called")
        tensors = {f"{i}.{name}": t for i, call in enumerate(chosen) for name, t in call.items()}
        path = check_file(path, ".safetensors")
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        return path


@contextlib.contextmanager
def record(module: nn.Module, path: str | Path, calls: int = CALIBRATION_CALLS) -> Iterator[Recording]:
    """Records what `module` is called with inside the `with`, and writes it to `path` where that ends well.

    module: the eager model, as in `pipe.transformer`. calls: how many are kept, spread over all that are made.
    """
    recording, path = Recording(calls), check_file(path, ".safetensors")
    with recording_calls(recording, module):
        yield recording
    recording.save(path)


@contextlib.contextmanager
def recording_calls(recording: Recording, *modules: nn.Module) -> Iterator[None]:
    """Lets the modules' calls be recorded."""
    hooks = [m.register_forward_pre_hook(recording.add, with_kwargs=True) for m in modules]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Recorded:
    """Calls that were recorded. where: the file, or what else they came from, for messages."""

    calls: tuple[Call, ...]
    where: str

    def tensors(self, signature: Signature) -> list[list[torch.Tensor]]:
        """The tensors of each call in the order, shapes and dtypes of the signature. Raises RecipeError."""
        found = []
        for number, call in enumerate(self.calls):
            self._check_names(number, call, signature)
            made = []
            for wanted in signature.inputs:
                tensor, name = call[wanted.path], f"{number}.{wanted.path}"
                if tuple(tensor.shape) != wanted.shape:
                    self._refuse(f"{name!r} has the shape {list(tensor.shape)}, the model takes {list(wanted.shape)}")
                floating = (tensor.is_floating_point(), wanted.dtype.is_floating_point)
                if floating[0] != floating[1] and not wanted.cast:
                    self._refuse(f"{name!r} is {_dtype(tensor.dtype)}, the model takes {_dtype(wanted.dtype)}")
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    self._refuse(f"{name!r} has a value that is no finite number")
                made.append(tensor.to(wanted.dtype))
            found.append(made)
        return found

    def _check_names(self, number: int, call: Call, signature: Signature) -> None:
        wanted = [i.path for i in signature.inputs]
        for path in call:
            if path not in wanted:
                self._refuse(f"the model has no input {path!r} ({number}.{path}); it takes {', '.join(wanted)}")
        for path in wanted:
            if path not in call:
                self._refuse(f"the tensor '{number}.{path}' is missing")

    def _refuse(self, what: str) -> None:
        raise RecipeError(f"{self.where}: {what}; record the inputs again, from the model that is compiled")

    def example(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The first call, made as the given one is, with its other arguments."""
        signature, _ = describe(model, args, kwargs)
        self._check_names(0, self.calls[0], signature)
        leaves = {i.path: self.calls[0][i.path].to(i.dtype) for i in signature.inputs}
        made, named = replace(Spelling.of(signature, args, kwargs), return_dict=None).call(leaves)
        return tuple(made), named

    def between(self, low: float, high: float) -> Recorded:
        """The calls whose timestep is at least `low` and below `high`."""
        kept = [c for c in self.calls if low <= float(c["timestep"].max() if "timestep" in c else low) < high]
        return replace(self, calls=tuple(kept))


def read_inputs(path: str | Path) -> Recorded:
    """The calls of a file. Raises RecipeError in one sentence where it is none."""
    where = f"calibration: {path}"
    if not Path(path).is_file():
        raise RecipeError(f"{where}: there is no such file; `turbocompile calibrate RECIPE -o {path}` records one")
    calls: dict[int, Call] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                parts = _NAME.fullmatch(name)
                if parts is None:
                    raise RecipeError(
                        f"{where}: the tensor {name[:60]!r} is not named as in '0.hidden_states' (number of the call, "
                        "dot, argument); rename it"
                    )
                calls.setdefault(int(parts[1]), {})[parts[2]] = file.get_tensor(name)
    except SafetensorError as error:
        raise RecipeError(f"{where}: this is no safetensors file ({error}); record the inputs again") from error
    for i in range(len(calls)):
        if i not in calls:
            raise RecipeError(f"{where}: there is a call {max(calls)} and no call {i}; number the calls from 0 on")
    return _checked(Recorded(tuple(calls[i] for i in range(len(calls))), where))


def given_inputs(calibration: Any, model: nn.Module) -> Recorded:
    """Calibration inputs as a user gives them: a file, a sequence of calls, or a function that returns one.

    A call is a tuple of arguments, a dict of keyword arguments, or a pair of both. Raises RecipeError, CaptureError.
    """
    if isinstance(calibration, Recorded):
        return calibration
    if isinstance(calibration, (str, Path)):
        return read_inputs(calibration)
    calls = calibration() if callable(calibration) else calibration
    if isinstance(calls, (torch.Tensor, Mapping)) or not isinstance(calls, Iterable):
        raise RecipeError(
            "calibration: give a list of calls, each a tuple of arguments, a dict of keyword arguments or a pair of "
            f"both, and not a {type(calls).__name__}"
        )
    found = []
    for call in calls:
        signature, tensors = describe(model, *_arguments(call))
        found.append(dict(zip([i.path for i in signature.inputs], tensors, strict=True)))
    return _checked(Recorded(tuple({k: t.detach().cpu() for k, t in call.items()} for call in found), "calibration"))


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Mapping):
        return (), dict(call)
    if isinstance(call, torch.Tensor):
        return (call,), {}
    if not isinstance(call, Sequence) or isinstance(call, str):
        raise RecipeError(
            "calibration: a call is a tuple of arguments, a dict of keyword arguments or a pair of both, and not a "
            f"{type(call).__name__}"
        )
    if len(call) == 2 and isinstance(call[0], (tuple, list)) and isinstance(call[1], Mapping):
        return tuple(call[0]), dict(call[1])
    return tuple(call), {}


def _checked(recorded: Recorded) -> Recorded:
    if not recorded.calls:
        raise RecipeError(f"{recorded.where}: there is no call in it; record one at least")
    if len(recorded.calls) > MAX_CALIBRATION_CALLS:
        raise RecipeError(
            f"{recorded.where}: there are {len(recorded.calls)} calls, more than {MAX_CALIBRATION_CALLS}; keep some of "
            "them, spread over the steps"
        )
    first = recorded.calls[0]
    for number, call in enumerate(recorded.calls):
        for name, tensor in call.items():
            if name in first and tensor.shape != first[name].shape:
                raise RecipeError(
                    f"{recorded.where}: '{number}.{name}' has the shape {list(tensor.shape)} and '0.{name}' "
                    f"{list(first[name].shape)}; calls have one shape"
                )
    return recorded


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
