"""Timing for all benchmarks: times between CUDA events, and the versions that a reader needs to repeat a run.

`milliseconds` times calls as Python makes them: below some 0.2 ms that is the time of the launch. `replayed` times them
in CUDA graphs, as an engine runs them.
"""

from __future__ import annotations

import math
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import triton

TURNS = 3
GRAPH = 2.0  # milliseconds that a graph takes at least: its own start and the events' are then below 1%
MOST = 40  # calls in a graph
_Name = TypeVar("_Name")


def milliseconds(calls: Mapping[_Name, Callable[[], object]], rounds: int) -> dict[_Name, list[float]]:
    """Times of each call: TURNS turns over all of them, in each some calls queued one behind the other.

    The card's drift then changes the times of all calls alike.
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


def replayed(
    calls: Mapping[_Name, Sequence[Callable[[], object]]], settle: float = 2.0, span: float = 10.0
) -> dict[_Name, list[float]]:
    """Times of one call of each name, TURNS turns over all names, in each `span` milliseconds of replays of its graph.

    A name's calls do the same on other tensors: its graph runs them in turn, many times over, and each result outlives
    the next call, so that with two of them no call finds in L2 what the one before it read or wrote. settle:
    milliseconds of the same replays before those that are timed: under a load of tensor cores a card lowers its clock
    after some, by another share for each kind of arithmetic.
    """
    pool = torch.cuda.graph_pool_handle()  # one for all: nobody reads the results
    graphs = {name: _graph(some, pool) for name, some in calls.items()}
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, (graph, count) in graphs.items():
            once = _between(graph.replay)
            for _ in range(math.ceil(settle / once)):
                graph.replay()
            rounds = max(3, math.ceil(span / once))
            events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            torch.cuda.synchronize()
            times[name] += [a.elapsed_time(b) / count for a, b in pairwise(events)]
    return times


def _between(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _graph(some: Sequence[Callable[[], object]], pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls in turn, and how many it holds."""
    for call in some:
        call()  # what has to be compiled is
    torch.cuda.synchronize()
    turns = math.ceil(min(MOST, GRAPH / min(_between(call) for call in some)) / len(some))
    graph = torch.cuda.CUDAGraph()
    kept: deque[object] = deque(maxlen=len(some))
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(turns):
            for call in some:
                kept.append(call())
    return graph, turns * len(some)


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
