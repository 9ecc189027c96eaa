"""What the benchmarks share: times between CUDA events, and what a reader needs to repeat a run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import triton

TURNS = 3
_Name = TypeVar("_Name")


def milliseconds(calls: Mapping[_Name, Callable[[], object]], rounds: int) -> dict[_Name, list[float]]:
    """Times of each call: TURNS turns over all of them, in each some calls queued one behind the other.

    The card's drift then meets all alike.
    """
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            call()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
            for start, end in events:
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            times[name] += [start.elapsed_time(end) for start, end in events]
    return times


def versions() -> dict[str, str]:
    """Card, libraries and commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": found.stdout.strip() or "unknown",
    }
