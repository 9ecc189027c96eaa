"""Which kernel computes a linear of 8-bit data: measured on the card, kept by shape, saved with an engine.

`choose` lets the candidates of linear_triton.py compete, Triton's configurations and cuBLAS, on operands of a shape: in
CUDA graphs, so that a launch from Python is not in their times, in turns, so that the card's drift meets all alike, and
after some milliseconds of the same, so that its clock is that of a long run. The op then runs the winner at that shape,
and the default where nothing was measured. `saved` and `restore` carry the choices; what is restored has to be one of
the declared configurations.
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

TURNS, CALLS = 3, 10  # over the candidates; of a call in a graph
SETTLE, SPAN = 20.0, 10.0  # milliseconds of each turn: before it is timed, and timed

_CHOICES: dict[str, LinearConfig] = {}


def launch_chosen(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """w8a8_linear's op by what was chosen for its shape, or by the default."""
    rows, (n, k) = data.shape[:-1].numel(), weight.shape
    config = _CHOICES.get(key(format, rows, n, k, dtype, data.device)) if _CHOICES else None
    return launch_linear(data, scale, weight, weight_scale, bias, format, dtype, config)


def key(format: str, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> str:
    """What a choice is kept under: the card, the format, M x K to N, the result's dtype."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{card}: {format} {rows}x{k} to {n}, {str(dtype).removeprefix('torch.')}"


def choose(
    format: str, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device, promote: bool = False
) -> dict[LinearConfig, float]:
    """Measures the candidates for the shape and keeps the fastest. Their milliseconds, the fastest first.

    promote: only those whose sums of e4m3 products are not cut short.
    """
    found = candidates(format, n, k, dtype, device)
    configs = [c for c in found if c.promote or not promote]
    check(bool(configs), f"no kernel computes {key(format, rows, n, k, dtype, device)}")
    data, scale, weight, weight_scale = _operands(format, rows, n, k, device)

    def call(config: LinearConfig) -> Callable[[], object]:
        return lambda: launch_linear(data, scale, weight, weight_scale, None, format, dtype, config)

    times = _milliseconds([call(c) for c in configs], device)
    ordered = dict(sorted(zip(configs, times, strict=True), key=lambda pair: pair[1]))
    _CHOICES[key(format, rows, n, k, dtype, device)] = next(iter(ordered))
    return ordered


def saved() -> dict[str, dict[str, Any]]:
    """The choices as JSON takes them."""
    return {name: asdict(config) for name, config in _CHOICES.items()}


def restore(choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Takes what `saved` gave over into this process. ValueError for a configuration that is not declared for it."""
    read: dict[str, LinearConfig] = {}
    for name, fields in choices.items():
        format = name.rpartition(": ")[2].partition(" ")[0]
        declared = (*CONFIGS.get(format, ()), *LIBRARY.get(format, ()))
        matches = [c for c in declared if asdict(c) == dict(fields)]
        check(bool(matches), f"{name!r} names no declared configuration of the 8-bit linear: {dict(fields)}")
        read[name] = matches[0]
    _CHOICES.update(read)


def forget() -> None:
    """Back to the defaults."""
    _CHOICES.clear()


def _operands(format: str, rows: int, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """data, scale, weight, weight_scale of random codes: what the values are costs power, hence time."""
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
    """Median times of the calls on the device."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.cuda.device(device):
        graphs = [_graph(call) for call in calls]
        for _ in range(TURNS):
            for own, graph in zip(times, graphs, strict=True):
                once = _between(graph, 1)
                _between(graph, math.ceil(SETTLE / once))
                own.append(_between(graph, math.ceil(SPAN / once)) / CALLS)
    return [statistics.median(own) for own in times]


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS of it."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def _between(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Milliseconds of one replay, of some."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / replays
