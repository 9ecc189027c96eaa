"""How calls are timed: by CUDA events on a GPU, medians of several; and the attentions of a Program so."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import fx

from turbocompile.ir.program import Program
from turbocompile.report.attentions import named_attentions
from turbocompile.runtime.cuda_graph import restore_generator

CALLS = 10  # of a call whose launch is timed
REPEATS = 5  # of an operation in one recording


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], calls: int, cuda: bool) -> float:
    """Seconds of one call among several in a row."""
    call()
    wait(cuda)
    if not cuda:
        spent = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def launch_seconds(call: Callable[[], object]) -> float:
    """Seconds of the CPU until a call returns, with nothing queued before it."""
    spent = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(spent)


def seconds_alone(call: Callable[[], object], cuda: bool) -> float:
    """Seconds of one operation: of REPEATS in a CUDA graph, so that launching them takes no part."""
    if not cuda:
        return median_seconds(call, 3, False)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it cannot be recorded: its launches count too
        restore_generator(torch.device("cuda"))
        return median_seconds(call, REPEATS, True)
    graph.replay()
    torch.cuda.synchronize()
    return median_seconds(graph.replay, 3, True) / REPEATS


def _wake(device: torch.device, seconds: float = 0.3) -> None:
    """Keeps an idle card busy until its clock is up: it counts at a fifth of its speed for the first tenths."""
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        x @ x
        torch.cuda.synchronize()


def time_attentions(program: Program, device: torch.device) -> dict[str, float]:
    """Seconds of one run of each attention, by its site, on N(0, 1) in the shapes and strides of its operands.

    Masks keep every key.
    """
    found = {}
    if device.type == "cuda":
        _wake(device)
    for graph, sub in program.graphs.items():
        for site, node in named_attentions(graph, sub) if program.count(graph) else ():
            values = {n: _filled(n.meta["val"], device) for n in node.all_input_nodes}
            args, kwargs = (fx.map_arg(x, values.__getitem__) for x in (node.args, dict(node.kwargs)))
            found[site] = seconds_alone(lambda t=node.target, a=args, k=kwargs: t(*a, **k), device.type == "cuda")  # type: ignore[misc]
    return found


def _filled(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """N(0, 1) in the shape and strides of a value; ones where it is a mask or whole numbers."""
    if not value.dtype.is_floating_point:
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    if 0 in value.stride():  # expanded: its numbers share memory, which nothing may write at random
        return torch.randn(value.shape, dtype=value.dtype, device=device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).normal_()
