"""The measured times of an engine that a `bench` keeps: a whole forward, and each kind of operation in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from turbocompile.report.words import duration, size

SHOWN = 20  # operations of a printed table


@dataclass(frozen=True)
class OpTime:
    """Equal operations of one graph, as in the report, and the seconds that all `count` of them take in a forward."""

    graph: str
    name: str
    where: tuple[str, ...]
    shapes: str
    count: int
    seconds: float
    floor: float | None  # the roofline time on this card in seconds; None if the card is not known


@dataclass(frozen=True)
class Bench:
    """The measured times of one module of an engine, in seconds.

    seconds: the median of `calls` forwards as the engine runs them (on a GPU as a CUDA graph). ungraphed: the same,
    kernel by kernel. launch: the CPU's time for one call. peak: the largest number of bytes of GPU memory in use,
    weights included. The last three are None without a GPU.
    """

    engine: str
    device: str
    shape: str
    versions: Mapping[str, str]
    calls: int
    seconds: float
    ungraphed: float | None
    launch: float | None
    first: float  # the first call: kernels are compiled in it
    peak: int | None
    ops: tuple[OpTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "versions": dict(self.versions)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.engine} {self.shape} on {self.device}", style="bold")
        yield Text(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        yield Text(f"forward {duration(self.seconds)}, the median of {self.calls}; the first {duration(self.first)}")
        if self.ungraphed is not None and self.launch is not None and self.peak is not None:
            yield Text(
                f"kernel by kernel {duration(self.ungraphed)}; a call costs the CPU {duration(self.launch)}; "
                f"at most {size(self.peak)} of the GPU"
            )
        table = Table(title="Operations, each timed alone", title_justify="left", box=None, pad_edge=False)
        numbers = ("runs", "time", "at least", "share of the rate")
        for column in ("op", "where", "shapes", *numbers):
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        for op in self.ops[:SHOWN]:
            where = f"{op.graph} {', '.join(w for w in op.where[:3] if w)}".strip()
            table.add_row(*map(Text, (op.name.removeprefix("aten."), where, op.shapes, *_numbers([op]))))
        if rest := self.ops[SHOWN:]:
            table.add_row(f"{len(rest)} more", "", "", *_numbers(rest))
        table.add_row("all", "", "", *_numbers(self.ops))
        yield table

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bench:
        """The inverse of `to_dict`. Raises KeyError or TypeError for other data."""
        ops = tuple(OpTime(**{**op, "where": tuple(op["where"])}) for op in data["ops"])
        return cls(**{**data, "ops": ops})


def _numbers(ops: Sequence[OpTime]) -> tuple[str, str, str, str]:
    """The cells of a row: runs, measured time, roofline time, and the roofline time over the measured time."""
    seconds = sum(op.seconds for op in ops)
    floors = [op.floor for op in ops if op.floor is not None]
    whole = len(floors) == len(ops)
    least, share = (duration(sum(floors)), f"{sum(floors) / seconds:.0%}") if whole and seconds else ("", "")
    return str(sum(op.count for op in ops)), duration(seconds), least, share
