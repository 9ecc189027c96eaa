"""What a run says of itself: metrics.jsonl, TensorBoard, and progress on stderr."""

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
    """The metrics of the steps since the last line, on the device: nothing waits for the device until it is read.

    A checkpoint within a window stores its rows, so that a resumed run writes the line that an uninterrupted one does.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.names: tuple[str, ...] = ()
        self.buffer = torch.zeros(0, device=device)
        self.start()

    def start(self, carried: list[dict[str, float]] | None = None) -> None:
        """A new window, after the rows that a checkpoint carried."""
        self.carried, self.count = list(carried or []), 0

    def add(self, names: tuple[str, ...], row: torch.Tensor) -> None:
        if names != self.names or self.count == len(self.buffer):
            self.carried, self.count = self.rows(), 0
            self.names, self.buffer = names, torch.zeros(self.size, len(names), device=self.device)
        self.buffer[self.count].copy_(row)
        self.count += 1

    def rows(self) -> list[dict[str, float]]:
        """One dictionary a step, each a mean over processes. Waits for the device."""
        fresh = mean_over_ranks(self.buffer[: self.count]).tolist() if self.count else []
        return self.carried + [dict(zip(self.names, row, strict=True)) for row in fresh]


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(c) / len(c) if all(map(math.isfinite, c)) else math.nan for name, c in columns.items()}


class MetricsLog:
    """Writes lines of metrics of one run; one process has it. `step` is where the run resumes: later lines go."""

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
        """To disk: a checkpoint must not outlive the lines before it."""
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
    """Removes the lines after a step, and one that was cut short by a kill."""
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
    """A bar in a terminal, elsewhere a line each time."""

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
