"""Memsets of recorded graphs: the words they write, the order that stays, and on a GPU the bits of a replay."""

from __future__ import annotations

import itertools
import struct
import sys
from types import ModuleType, SimpleNamespace

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbocompile.runtime import cuda_memsets
from turbocompile.runtime.cuda_memsets import fill_of, memsets_to_kernels

MEMSET, KERNEL = 2, 0  # CUgraphNodeType


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(1, 40))
def test_the_words_are_the_bytes_of_the_memset(value, element_size, width):
    written = (value & (1 << 8 * element_size) - 1).to_bytes(element_size, "little") * width
    fill = fill_of(4096, value, element_size, width, 1)
    if len(written) % 4:
        assert fill is None
    else:
        assert fill is not None
        assert struct.pack("<i", fill.word) * fill.length == written
        assert fill.address == 4096


def test_what_is_no_row_of_words_stays_a_memset():
    assert fill_of(4098, 0, 1, 4, 1) is None  # not at a multiple of four
    assert fill_of(4096, 0, 4, 1, 2) is None  # rows, which may lie apart
    assert fill_of(4096, 0, 1, 3, 1) is None


class Driver:
    """The driver's graph calls on a networkx graph, by the signatures of cuda-bindings 12 or 13."""

    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_MEMSET=MEMSET)
    CUgraphNode, CUgraphEdgeData = int, object

    class Status(int):
        name = "CUDA_ERROR_INVALID_VALUE"

    def __init__(self, graph: nx.DiGraph, version: int) -> None:
        self.graph, self.new = graph, itertools.count(1000)
        if version == 12:
            self.cuGraphGetEdges_v2, self.cuGraphAddDependencies_v2 = self.edges, self.connect
            self.cuGraphGetEdges = self.cuGraphAddDependencies = self.refused
        else:
            self.cuGraphGetEdges, self.cuGraphAddDependencies = self.edges, self.connect

    def refused(self, *_):
        return (self.Status(1), None)

    def cuGraphGetNodes(self, handle, count=0):
        return self.Status(0), list(self.graph)[:count], len(self.graph)

    def cuGraphKernelNodeGetParams(self, node):
        raise AssertionError("`_kernels`, which is replaced, calls it alone")

    def cuGraphNodeGetType(self, node):
        return self.Status(0), self.graph.nodes[node]["kind"]

    def cuGraphMemsetNodeGetParams(self, node):
        address = self.graph.nodes[node]["address"]
        return self.Status(0), SimpleNamespace(dst=address, value=0, elementSize=4, width=1, height=1)

    def edges(self, handle, count=0):
        some = list(self.graph.edges)[:count]
        return self.Status(0), [a for a, _ in some], [b for _, b in some], [None] * len(some), self.graph.size()

    def cuGraphAddKernelNode(self, handle, dependencies, count, params):
        assert len(dependencies) == count
        node = next(self.new)
        self.graph.add_node(node, kind=KERNEL, fill=params)
        self.graph.add_edges_from((d, node) for d in dependencies)
        return self.Status(0), node

    def connect(self, handle, starts, ends, data, count):
        assert len(starts) == len(ends) == len(data) == count
        assert all(n in self.graph for n in (*starts, *ends))
        self.graph.add_edges_from(zip(starts, ends, strict=True))
        return (self.Status(0),)

    def cuGraphDestroyNode(self, node):
        self.graph.remove_node(node)
        return (self.Status(0),)


def use(monkeypatch, driver) -> None:
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    kernels = lambda driver, fills: (SimpleNamespace(reset=lambda: None), {f: f for f in fills})  # noqa: E731
    monkeypatch.setattr(cuda_memsets, "_kernels", kernels)


RECORDED = SimpleNamespace(raw_cuda_graph=lambda: 1)


@given(st.sampled_from([12, 13]), st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_what_follows_what_stays(version, memsets, data):
    """Any graph: each memset gives way to a kernel that waits for the same nodes, and the same nodes wait for it."""
    graph = nx.DiGraph()
    for i, memset in enumerate(memsets):
        graph.add_node(i, kind=MEMSET if memset else KERNEL, address=4096 + 4 * i)
    graph.add_edges_from(p for p in itertools.combinations(range(len(memsets)), 2) if data.draw(st.booleans()))
    expected = graph.copy()
    with pytest.MonkeyPatch.context() as patched:
        use(patched, Driver(graph, version))
        assert memsets_to_kernels(RECORDED) == sum(memsets)
    assert all(kind == KERNEL for _, kind in graph.nodes(data="kind"))
    place = {n: (f.address - 4096) // 4 if (f := fill) else n for n, fill in graph.nodes(data="fill")}
    assert nx.utils.edges_equal(nx.relabel_nodes(graph, place).edges, expected.edges, directed=True)


@pytest.fixture
def one_memset():
    graph = nx.DiGraph()
    graph.add_node(0, kind=MEMSET, address=4096)
    graph.add_node(1, kind=KERNEL)
    graph.add_edge(0, 1)
    return graph


@pytest.mark.parametrize("call", ["cuGraphGetNodes", "cuGraphGetEdges", "cuGraphDestroyNode"])
def test_a_refusal_is_raised(monkeypatch, one_memset, call):
    driver = Driver(one_memset, 13)
    setattr(driver, call, driver.refused)
    use(monkeypatch, driver)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        memsets_to_kernels(RECORDED)


@pytest.mark.parametrize("call", ["cuGraphGetEdges_v2", "cuGraphNodeGetType", "cuGraphMemsetNodeGetParams"])
def test_a_driver_that_lacks_a_call_leaves_the_graph_as_it_was(monkeypatch, one_memset, call):
    def missing(*_):
        raise RuntimeError(f'Function "{call}" not found')  # as the bindings say it

    driver, before = Driver(one_memset, 12), one_memset.copy()
    setattr(driver, call, missing)
    use(monkeypatch, driver)
    assert memsets_to_kernels(RECORDED) == 0
    assert nx.utils.graphs_equal(one_memset, before)


def test_bindings_that_lack_a_call_leave_the_graph_as_it_was(monkeypatch, one_memset):
    driver = Driver(one_memset, 13)
    del driver.cuGraphGetEdges
    use(monkeypatch, driver)
    assert memsets_to_kernels(RECORDED) == 0
    assert dict(one_memset.nodes(data="kind")) == {0: MEMSET, 1: KERNEL}


def test_without_the_bindings_nothing_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert memsets_to_kernels(RECORDED) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    def test_a_replay_writes_what_the_memsets_wrote(self):
        """First, between kernels, beside them on another stream, twice in a row, last, and bytes that are no words."""
        from cuda.bindings import driver

        def memset(t: torch.Tensor, bits: int, value: int) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            call = getattr(driver, f"cuMemsetD{bits}Async")
            assert call(t.data_ptr(), value, 8 * t.nbytes // bits, stream)[0] == 0

        one, few, many = (torch.ones(n, dtype=torch.int32, device="cuda") for n in (1, 5, 3000))
        odd = torch.ones(7, dtype=torch.int8, device="cuda")
        seen = torch.zeros(4, dtype=torch.int64, device="cuda")
        graph, side = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            memset(one, 32, 0xFFFFFFFE)
            seen[0] = one.sum()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                memset(few, 16, 1)
                few += 2
            memset(many, 8, 0)
            memset(odd, 8, 3)
            memset(many, 8, 1)
            seen[1] = many.sum()
            torch.cuda.current_stream().wait_stream(side)
            seen[2], seen[3] = few.sum(), odd.sum()
            memset(one, 32, 9)
        kinds = lambda: [driver.cuGraphNodeGetType(n)[1] for n in cuda_memsets._nodes(driver, graph.raw_cuda_graph())]  # noqa: E731
        kind, before = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET, kinds()
        assert before.count(kind) == 6
        assert memsets_to_kernels(graph) == 5
        assert (kinds().count(kind), len(kinds())) == (1, len(before))
        graph.instantiate()
        for _ in range(3):
            for t in (one, few, many, odd, seen):
                t.fill_(5)
            graph.replay()
            assert seen.tolist() == [-2, 3000 * 0x01010101, 5 * (0x00010001 + 2), 21]
            assert (one.item(), few.tolist(), odd.tolist()) == (9, [0x00010003] * 5, [3] * 7)

    def test_a_recorded_call_has_none_left(self):
        from cuda.bindings import driver

        from turbocompile.runtime.cuda_graph import CudaGraph, Pool

        counter = torch.ones(1, dtype=torch.int32, device="cuda")

        def run(x):
            driver.cuMemsetD32Async(counter.data_ptr(), 2, 1, torch.cuda.current_stream().cuda_stream)
            return (x * counter,)

        graph, x = CudaGraph(run, Pool(torch.device("cuda", torch.cuda.current_device()))), torch.ones(9).cuda()
        for _ in range(4):
            counter.fill_(3)
            assert torch.equal(graph(x)[0], 2 * x)
        assert graph.recorded
        kinds = [driver.cuGraphNodeGetType(n)[1] for n in cuda_memsets._nodes(driver, graph._graph.raw_cuda_graph())]
        assert driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET not in kinds
