"""Ways to run a Program: each backend is a module with the functions of `Backend`, and its callers know no more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.ir.program import Program

BACKENDS = ("triton", "onnx", "tensorrt")
Runner = Callable[..., tuple[torch.Tensor, ...]]
Tuning = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Kind ("linears", "attentions") -> the name of a choice -> the fields of the chosen configuration. Never changed."""
NO_TUNING: Tuning = {}


class Backend(Protocol):
    """The functions that each backend module has."""

    def check(self, target: str) -> None:
        """Raises UnsupportedError in one sentence where this installation cannot build for the target."""

    def emit(
        self, program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str
    ) -> list[str]:
        """Writes the files that an engine needs beside the program's JSON and the weights.

        Returns their names, relative to the folder.
        """

    def compile_program(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        folder: Path | None = None,
        files: tuple[str, ...] = (),
        tuning: Tuning = NO_TUNING,
    ) -> Runner:
        """A callable over the Program's flat tensors. weights: stored name -> tensor, on `device`.

        folder, files: the files that `emit` wrote, and where; none of an engine in memory. tuning: the configurations
        of our kernels, for a backend that launches them.
        """

    def prove(
        self, program: Program, weights: Mapping[str, torch.Tensor], device: torch.device, target: str
    ) -> Runner | None:
        """Raises at a build the errors that `emit` and `compile_program` would raise later.

        Returns the callable that runs the program on `device`; None where nothing had to be made, or where the callable
        would run on another machine.
        """


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises UnsupportedError where there is none."""
    if name not in BACKENDS:
        raise UnsupportedError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"turbocompile.backends.{name}"))
