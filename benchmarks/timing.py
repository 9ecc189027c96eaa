"""Timing for all benchmarks: times between CUDA events, and the versions that a reader needs to repeat a run.

`milliseconds` times calls from Python; below some 0.2 ms such a time is that of the launch. `replayed` times calls in
CUDA graphs, as an engine runs them.
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
GRAPH = 2.0  # the least milliseconds of a graph, so that the start of the graph and the events take less than 1%
MOST = 40  # the most calls in a graph
_Name = TypeVar("_Name")


def milliseconds(calls: Mapping[_Name, Callable[[], object]], rounds: int) -> dict[_Name, list[float]]:
    """The times of each call, in milliseconds, by name, over TURNS turns.

    A turn queues some calls of each name one behind the other. A drift of the card then changes the times of all calls
    alike.
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
    """The times of one call of each name, in milliseconds, over TURNS turns; a turn replays each name's graph for
    `span`.

    The calls of a name do the same work on different tensors. The name's graph runs these calls in turn, many times,
    and each result outlives the next call, so that with two calls no call finds the data of the call before in L2.
    settle: milliseconds of replays before the timed replays, because under a load of tensor cores a card lowers its
    clock after some milliseconds, differently for each kind of arithmetic. span: milliseconds of timed replays.
    """
    pool = torch.cuda.graph_pool_handle()  # one pool for all graphs, because nobody reads the results
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
    """The milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _graph(some: Sequence[Callable[[], object]], pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph that runs the calls in turn, and how many calls it holds."""
    for call in some:
        call()  # compiles before the recording
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
    """The card, the versions of the libraries, and the commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": found.stdout.strip() or "unknown",
    }
