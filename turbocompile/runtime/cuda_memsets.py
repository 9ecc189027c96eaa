"""Memsets of a recorded CUDA graph become kernels, because a graph of kernels alone is launched in one piece.

cuBLAS and cuDNN set a counter of four bytes to zero before many of their kernels. Each such memset ends the sequence of
kernels that the driver hands over at once: a replay of 1,045 nodes, 121 of them memsets, cost the CPU five times as
much as the same graph with kernels instead of memsets (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from typing import Any, NamedTuple

import torch

_REPEATED = {1: 0x01010101, 2: 0x00010001, 4: 1}  # an element of so many bytes, repeated to a word

_CALLS = (
    "cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphMemsetNodeGetParams", "cuGraphKernelNodeGetParams",
    "cuGraphGetEdges", "cuGraphAddKernelNode", "cuGraphAddDependencies", "cuGraphDestroyNode",
)  # fmt: skip


class Fill(NamedTuple):
    """The words that a memset writes: `length` times the 32 bits of `word`, from `address` on."""

    address: int
    word: int  # as a signed number
    length: int


def fill_of(address: int, value: int, element_size: int, width: int, height: int) -> Fill | None:
    """The words that a memset node writes; None where it writes rows apart from each other, or parts of words.

    Args:
        address: bytes.
        value: the value of each element, in the low bits.
        element_size: bytes of an element: 1, 2 or 4.
        width: elements in a row.
        height: number of rows.
    """
    size = width * element_size
    if height != 1 or size % 4 or address % 4:
        return None
    word = (value & (1 << 8 * element_size) - 1) * _REPEATED[element_size]
    return Fill(address, word - (word >> 31 << 32), size // 4)


def memsets_to_kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Replaces the memsets of a graph that was recorded with `keep_graph=True` and is not instantiated yet.

    Returns how many memsets it replaced. It replaces none, and the graph is as it was, where cuda-bindings (which comes
    with PyTorch for CUDA) is not installed, or lacks a call, or the driver does (before CUDA 12.3).

    Raises:
        RuntimeError: the driver refused a call; the graph must not be used then.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return 0
    if not all(hasattr(driver, call) for call in _CALLS):
        return 0
    handle = graph.raw_cuda_graph()
    try:
        fills = _fills(driver, handle)
        before, after = _neighbours(driver, handle)
    except RuntimeError as error:
        if "not found" not in str(error):  # the bindings say so where the driver lacks a call
            raise
        return 0
    if not fills:
        return 0
    kept, kernels = _kernels(driver, set(fills.values()))
    for old, fill in fills.items():
        first, then = before[old], after[old]
        new = int(_done(driver.cuGraphAddKernelNode(handle, _of(driver, first), len(first), kernels[fill]))[0])
        _connect(driver, handle, new, then)
        _done(driver.cuGraphDestroyNode(driver.CUgraphNode(old)))
        before[new], after[new] = first, then
        for neighbours, ends in ((after, first), (before, then)):
            for end in ends:
                neighbours[end] = [new if n == old else n for n in neighbours[end]]
    kept.reset()  # the new nodes have their own copies of the parameters
    return len(fills)


def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a driver call, without its status. Raises RuntimeError where the call failed."""
    if int(result[0]) != 0:
        raise RuntimeError(f"the CUDA driver changes no graph here: {result[0].name}")
    return result[1:]


def _fills(driver: Any, handle: int) -> dict[int, Fill]:
    """The words that each memset node writes, for the memsets that a kernel can stand for."""
    memset = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET
    fills = {}
    for node in _nodes(driver, handle):
        if _done(driver.cuGraphNodeGetType(node))[0] == memset:
            p = _done(driver.cuGraphMemsetNodeGetParams(node))[0]
            fill = fill_of(int(p.dst), p.value, p.elementSize, p.width, p.height)
            if fill is not None:
                fills[int(node)] = fill
    return fills


def _nodes(driver: Any, handle: int) -> list[Any]:
    count = _done(driver.cuGraphGetNodes(handle))[-1]
    return list(_done(driver.cuGraphGetNodes(handle, count))[0]) if count else []


def _of(driver: Any, nodes: list[int]) -> list[Any]:
    return [driver.CUgraphNode(n) for n in nodes]


def _neighbours(driver: Any, handle: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """For each node the nodes that it waits for, and the nodes that wait for it.

    CUDA 12 has a second version of the calls, which knows the data of edges; CUDA 13 has only that version. The edges
    of a memset have no data.
    """
    edges = getattr(driver, "cuGraphGetEdges_v2", driver.cuGraphGetEdges)
    count = _done(edges(handle))[-1]
    before, after = defaultdict(list), defaultdict(list)
    if count:
        starts, ends, *_ = _done(edges(handle, count))
        for start, end in zip(starts, ends, strict=True):
            before[int(end)].append(int(start))
            after[int(start)].append(int(end))
    return before, after


def _connect(driver: Any, handle: int, start: int, ends: list[int]) -> None:
    if not ends:
        return
    connect = getattr(driver, "cuGraphAddDependencies_v2", driver.cuGraphAddDependencies)
    plain = [driver.CUgraphEdgeData() for _ in ends]
    _done(connect(handle, _of(driver, [start] * len(ends)), _of(driver, ends), plain, len(ends)))


def _kernels(driver: Any, fills: set[Fill]) -> tuple[torch.cuda.CUDAGraph, dict[Fill, Any]]:
    """The parameters of a kernel node for each fill, and the recorded graph that holds them, which never runs.

    They are recorded because a Triton kernel has parameters besides its arguments, which differ by version and which
    only Triton's own launch knows.
    """
    from turbocompile.kernels.memory.fill_triton import launch_fill

    graph = torch.cuda.CUDAGraph(keep_graph=True)
    scratch = torch.empty(1, dtype=torch.int32, device="cuda")
    launch_fill(scratch.data_ptr(), 0, 1)  # compiled and loaded before the recording
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for fill in fills:
            launch_fill(*fill)
    kernels = {}
    for node in _nodes(driver, graph.raw_cuda_graph()):
        p = _done(driver.cuGraphKernelNodeGetParams(node))[0]
        address, word, length = (ctypes.c_void_p * 3).from_address(int(p.kernelParams))
        if address is None or word is None or length is None:
            raise RuntimeError("the CUDA driver does not say what a kernel node is called with")
        kernels[
            Fill(
                ctypes.c_int64.from_address(address).value,
                ctypes.c_int32.from_address(word).value,
                ctypes.c_int32.from_address(length).value,
            )
        ] = p
    return graph, kernels
