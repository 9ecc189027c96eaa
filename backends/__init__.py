"""Ways to run a Program. Each backend is a module with the functions of `Backend`; nothing above knows which it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.ir.program import Program

BACKENDS = ("triton", "onnx", "tensorrt")
Runner = Callable[..., tuple[torch.Tensor, ...]]


class Backend(Protocol):
    """What a backend module offers."""

    def check(self, target: str) -> None:
        """Raises UnsupportedError in one sentence where this installation cannot build for the target."""

    def emit(
        self, program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str
    ) -> list[str]:
        """Writes what is needed beside the program's JSON and the weights; the files, relative to the folder."""

    def compile_program(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        folder: Path | None = None,
        files: tuple[str, ...] = (),
    ) -> Runner:
        """A callable over the Program's flat tensors. weights: stored name -> tensor, on `device`."""

    def prove(
        self, program: Program, weights: Mapping[str, torch.Tensor], device: torch.device, target: str
    ) -> Runner | None:
        """Raises at a build what `emit` and `compile_program` would raise later; what runs the program on `device`.

        None where nothing had to be made, or what was made runs elsewhere.
        """


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises UnsupportedError where there is none."""
    if name not in BACKENDS:
        raise UnsupportedError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"turbocompile.backends.{name}"))
