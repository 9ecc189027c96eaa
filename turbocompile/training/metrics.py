"""The output of a training run: metrics.jsonl, TensorBoard, and progress on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from turbocompile.training.parallel import mean_over_ranks

log = logging.getLogger(__name__)


class Window:
    """The metrics of the steps since the last line. They stay on the device, so that the host waits only for `rows`.

    A checkpoint stores the rows of the present window, so that a resumed run writes the same line as an uninterrupted
    run. size: how many steps a window holds at most.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.names: tuple[str, ...] = ()
        self.buffer = torch.zeros(0, device=device)
        self.start()

    def start(self, carried: list[dict[str, float]] | None = None) -> None:
        """Begins a new window, with the rows that a checkpoint stored in `carried`."""
        self.carried, self.count = list(carried or []), 0

    def add(self, names: tuple[str, ...], row: torch.Tensor) -> None:
        if names != self.names or self.count == len(self.buffer):
            self.carried, self.count = self.rows(), 0
            self.names, self.buffer = names, torch.zeros(self.size, len(names), device=self.device)
        self.buffer[self.count].copy_(row)
        self.count += 1

    def rows(self) -> list[dict[str, float]]:
        """The metrics of each step by name, as means over the processes. Waits for the device."""
        fresh = mean_over_ranks(self.buffer[: self.count]).tolist() if self.count else []
        return self.carried + [dict(zip(self.names, row, strict=True)) for row in fresh]


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that hold the metric; NaN if a value is not finite."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(c) / len(c) if all(map(math.isfinite, c)) else math.nan for name, c in columns.items()}


class MetricsLog:
    """Writes a run's lines of metrics; only one process has a MetricsLog.

    step: the step from which the run resumes; the lines of later steps are removed.
    """

    def __init__(self, folder: Path, step: int, steps: int, *, show: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        _truncate(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = _tensorboard(folder / "tensorboard", step)
        self.progress = _Progress(step, steps) if show else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **{name: v if math.isfinite(v) else None for name, v in values.items()}}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.progress is not None:
            self.progress.show(step, values)

    def sync(self) -> None:
        """Writes all lines to disk, because a checkpoint on disk must never be newer than the lines on disk."""
        os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.progress is not None:
            self.progress.close()


def _truncate(path: Path, step: int) -> None:
    """Removes the lines after a step, and a line that a kill cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("tensorboard is not installed (pip install 'turbocompile[training]'); metrics go to JSONL alone")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class _Progress:
    """Shows progress on stderr: a bar in a terminal, otherwise a line for each call of `show`."""

    def __init__(self, step: int, steps: int) -> None:
        self.console = Console(stderr=True)
        self.steps = steps
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=step)
            self.bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        else:
            print(f"step {step}/{self.steps}  {text}", file=self.console.file, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
