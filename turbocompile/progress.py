"""Progress of long work on stderr: in a terminal a live line for each stage, elsewhere a line when a stage ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[str, float], None]]:
    """A function (stage, fraction from 0.0 to 1.0) that shows the stage on stderr, live or at its end."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    with live_bars(console) as progress:
        yield progress


class Lines:
    """Prints `stage 1.2 s` to stderr when a stage ends, and once a minute the fraction of a stage that runs
    longer and the seconds that are left of it."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.told: dict[str, float] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        now = time.perf_counter()
        if fraction < 1.0:
            self.started.setdefault(stage, now)
            if now - self.told.setdefault(stage, now) >= 60.0:
                self.told[stage] = now
                left = (now - self.started[stage]) * (1 / fraction - 1) if fraction else 0.0
                click.echo(f"{stage} {fraction:.0%}" + (f", {left:.0f} s left" if left else ""), err=True)
        elif stage in self.started:
            click.echo(f"{stage} {now - self.started.pop(stage):.1f} s", err=True)


@contextlib.contextmanager
def live_bars(console: Console) -> Iterator[Callable[[str, float], None]]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeLeft(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, fraction: float) -> None:
            if stage not in tasks or (fraction == 0.0 and bars.tasks[tasks[stage]].finished):
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=fraction)

        yield update
