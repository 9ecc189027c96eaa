"""Measures on the card which kernel computes a linear of 8-bit data fastest, one shape at a time.

`measure` runs the candidates of linear_triton.py, which are Triton's configurations and cuBLAS, on operands of a shape.
The candidates run in CUDA graphs, so that their times do not contain launches from Python. They run in turns, so that a
drift of the card affects all of them alike. Each runs for some milliseconds before it is timed, so that the card has
the clock of a long run. This module stores no results: an engine keeps its choices (`key` -> the fields of a
configuration), and passes each launch its configuration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from turbocompile.kernels._registry import check
from turbocompile.kernels.linear.linear_triton import CONFIGS, LIBRARY, LinearConfig, candidates, launch_linear
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS, blocks

TURNS, CALLS = 3, 10  # how many turns there are over the candidates; how many calls a candidate's graph holds
HOPELESS = 1.25  # a candidate whose first time is more than HOPELESS times the best first time gets no further turn
SETTLE, SPAN = 20.0, 10.0  # milliseconds that a candidate runs in a turn before it is timed, and while it is timed


def key(format: str, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> str:
    """The key under which an engine keeps a choice: the card's name, the format, rows x K to N, the result's dtype."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{card}: {format} {rows}x{k} to {n}, {str(dtype).removeprefix('torch.')}"


def measure(
    format: str, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device, promote: bool = False
) -> dict[LinearConfig, float]:
    """Measures the candidates for a linear from (rows, k) to (rows, n), in dtype.

    Returns milliseconds by configuration, the fastest first. promote: measures only configurations whose sums of e4m3
    products are not cut short. Raises ValueError if no kernel computes the linear.
    """
    found = candidates(format, n, k, dtype, device)
    configs = [c for c in found if c.promote or not promote]
    check(bool(configs), f"no kernel computes {key(format, rows, n, k, dtype, device)}")
    data, scale, weight, weight_scale = _operands(format, rows, n, k, device)

    def call(config: LinearConfig) -> Callable[[], object]:
        return lambda: launch_linear(data, scale, weight, weight_scale, None, format, dtype, config)

    times = _milliseconds([call(c) for c in configs], device)
    return dict(sorted(zip(configs, times, strict=True), key=lambda pair: pair[1]))


def declared(name: str, fields: Mapping[str, Any]) -> LinearConfig:
    """The declared configuration that has these fields; name: the key of the saved choice.

    Raises ValueError if no configuration declared for the key's format has these fields.
    """
    format = name.rpartition(": ")[2].partition(" ")[0]
    matches = [c for c in (*CONFIGS.get(format, ()), *LIBRARY.get(format, ())) if asdict(c) == dict(fields)]
    check(bool(matches), f"{name!r} names no declared configuration of the 8-bit linear: {dict(fields)}")
    return matches[0]


def _operands(format: str, rows: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """data, scale, weight, weight_scale of random codes, because the card's power, and hence its speed, depends on the
    values.
    """
    random = torch.Generator(device).manual_seed(0)

    def codes(m: int) -> torch.Tensor:
        values = torch.randn(m, k, generator=random, device=device, dtype=torch.bfloat16)
        if format == "fp8":
            return (values * 100).clamp(-448, 448).to(FORMATS[format])
        return (values * 30).round().clamp(-127, 127).to(FORMATS[format])

    def scales(m: int) -> torch.Tensor:
        shape = (blocks(m), k // BLOCK) if format == "int8_block" else (m, 1)
        return torch.full(shape, 1e-2, device=device)

    return codes(rows), scales(rows), codes(n), scales(n)


def _milliseconds(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """The median milliseconds of each call on the device; for a hopeless candidate the time of its first turn."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.cuda.device(device):
        graphs = [_graph(call) for call in calls]
        for turn in range(TURNS):
            best = min((own[0] for own in times if own), default=math.inf)
            for own, graph in zip(times, graphs, strict=True):
                if turn and own[0] > HOPELESS * best:
                    continue
                once = _between(graph, 1)
                _between(graph, math.ceil(SETTLE / once))
                own.append(_between(graph, math.ceil(SPAN / once)) / CALLS)
    return [statistics.median(own) for own in times]


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of CALLS calls."""
    call()  # so that the kernel is compiled before the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def _between(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """The milliseconds of one replay of the graph, as the mean of `replays` replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / replays
