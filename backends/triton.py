"""The backend that runs a Program as it is: generated Python over ATen and turbocompile's operators (ir/execute.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from turbocompile.backends import NO_TUNING, Tuning
from turbocompile.backends.launchers import launchers

from turbocompile.ir.execute import Around, Runner
from turbocompile.ir.program import Program


def check(target: str) -> None:
    """Refuses nothing: the code is generated where the engine runs, so every target can be built for."""


def emit(program: Program, weights: Mapping[str, torch.Tensor], folder: Path, name: str, target: str) -> list[str]:
    """Writes nothing, because the code is generated from the program and the weights."""
    return []


def prove(program: Program, weights: Mapping[str, torch.Tensor], device: torch.device, target: str) -> None:
    """Proves nothing: no file is made before an engine runs, and the build verified the passes."""


def compile_program(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    folder: Path | None = None,
    files: tuple[str, ...] = (),
    tuning: Tuning = NO_TUNING,
    around: Around = lambda call: None,
) -> Runner:
    """A callable over flat tensors. weights: stored name -> tensor, all on `device`.

    around: gives a call of a block what runs before it and after it.

    Raises EngineError where the tuning chose a configuration for this card that no kernel declares.
    """
    return Runner(program, weights, device, launchers(tuning, device), around)
