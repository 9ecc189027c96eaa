"""torch.compile with this backend: whole models, blocks one by one, and how many engines are kept."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

from turbocompile.build import torch_compile
from turbocompile.build.torch_compile import MOST_SIZES, Engines
from turbocompile.errors import UnsupportedError


class Seen:
    """The backend, and the engines that its callables keep."""

    def __init__(self):
        self.kept: list[Engines] = []

    def backend(self, graph, inputs):
        run = torch_compile.backend(graph, inputs)
        self.kept += [c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, Engines)]
        return run

    def engines(self):
        return [
            engine for kept in self.kept for known in kept._of_weights.values() for engine in known.engines.values()
        ]


@pytest.fixture
def seen():
    torch._dynamo.reset()
    yield Seen()
    torch._dynamo.reset()


def test_torch_compile_reaches_the_same_blocks(tiny, seen):
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    found = torch.compile(tiny, backend=seen.backend)(x, t)
    assert torch.allclose(found, tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))
    (engine,) = seen.engines()
    assert next(iter(engine.engine.programs.values())).count("blocks") == 2


def test_torch_compile_knows_the_backend_by_name_and_takes_other_lengths(tiny):
    compiled = torch.compile(tiny, backend="turbocompile")
    for n in (8, 12, 16):
        x, t = torch.randn(1, n, 64), torch.rand(1)
        assert torch.allclose(compiled(x, t), tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))


def test_torch_compile_of_each_block_has_each_blocks_weights(tiny):
    """Regional compilation: Dynamo compiles one block, and calls what it got with the parameters of the others."""
    model, call = tiny, (torch.randn(2, 6, 64), torch.rand(2))
    expected = model(*call)
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            for block in model.blocks:
                block.compile(backend="turbocompile")
            found = model(*call)
        assert torch.allclose(found, expected, atol=1e-5)
        with torch.no_grad():  # other data in the same parameter
            for p in model.blocks[1].parameters():
                p.data = p.data * 1.5
        changed = model(*call)
        for block in model.blocks:
            block._compiled_call_impl = None
        assert torch.allclose(changed, model(*call), atol=1e-5)
        assert not torch.allclose(changed, expected, atol=1e-3)
    finally:
        torch._dynamo.reset()


def test_torch_compile_runs_what_cannot_be_captured_as_it_is_and_says_so():
    class Cached(torch.nn.Module):
        """Python reads a value in the middle; the part after it writes into a tensor of the part before."""

        def forward(self, x):
            cache = x * 3
            torch._dynamo.graph_break()
            cache.scatter_add_(0, torch.ones(2, 8, dtype=torch.int64), x)
            y = cache + 1
            torch._dynamo.graph_break()
            return y * cache

    torch._dynamo.reset()
    x = torch.randn(2, 8)
    with pytest.warns(RuntimeWarning, match=r"runs as it is, not compiled: the model writes to its input"):
        found = torch.compile(Cached(), backend="turbocompile")(x)
    assert torch.equal(found, Cached()(x))
    torch._dynamo.reset()


def test_torch_compile_under_autograd_is_refused(tiny):
    tiny.requires_grad_(True)
    with pytest.raises(Exception, match="compiles for inference") as caught:
        torch.compile(tiny, backend="turbocompile")(torch.randn(1, 4, 64), torch.rand(1))
    assert isinstance(caught.value.__cause__ or getattr(caught.value, "inner_exception", None), UnsupportedError)


def test_the_engines_of_a_block_go_with_its_weights(tiny, seen):
    """Regional compilation makes one engine a block; a block that is dropped takes its engine along."""
    call = (torch.randn(2, 6, 64), torch.rand(2))
    for block in tiny.blocks:
        block.compile(backend=seen.backend)
    tiny(*call)
    assert len(seen.engines()) == 2
    tiny.blocks = torch.nn.ModuleList([tiny.blocks[0]])
    del block
    gc.collect()
    assert len(seen.engines()) == 1


def test_other_data_in_a_weight_takes_the_place_of_the_engine(tiny, seen):
    compiled = torch.compile(tiny, backend=seen.backend)
    x, t = torch.randn(1, 8, 64), torch.rand(1)
    for _ in range(3):
        with torch.no_grad():
            for p in tiny.parameters():
                p.data = p.data * 1.5
        assert torch.allclose(compiled(x, t), tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))
    assert len(seen.engines()) == 1


def test_the_sizes_that_were_used_last_are_kept():
    """However many sizes a graph is called with, as one traced with dynamic shapes may be."""
    engines, weights, made = Engines(), [torch.zeros(1)], []

    def of(size):
        def make():
            made.append(size)
            return lambda: size

        return engines.of(weights, ((0, size),), make)()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(MOST_SIZES):
            assert of(size) == size
        assert of(0) == 0
    with pytest.warns(RuntimeWarning, match=f"keeps {MOST_SIZES} sizes"):
        assert of(MOST_SIZES) == MOST_SIZES
    assert [of(size) for size in (0, MOST_SIZES)] == [0, MOST_SIZES]
    assert made == [*range(MOST_SIZES), MOST_SIZES]  # size 1 went, which was used longest ago
    with pytest.warns(RuntimeWarning):
        assert of(1) == 1
    assert made[-1] == 1
    (known,) = engines._of_weights.values()
    assert len(known.engines) == MOST_SIZES
    del known
    weights.clear()
    gc.collect()
    assert not engines._of_weights


def test_a_model_with_dynamic_shapes_keeps_as_many(tiny, seen, monkeypatch):
    monkeypatch.setattr(torch_compile, "MOST_SIZES", 2)
    compiled = torch.compile(tiny, backend=seen.backend, dynamic=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in (8, 9, 10, 11):
            x, t = torch.randn(1, n, 64), torch.rand(1)
            assert torch.allclose(compiled(x, t), tiny(x, t), rtol=0, atol=1e-5 * float(tiny(x, t).abs().max()))
    assert len(seen.engines()) == 2
    assert sum("keeps 2 sizes" in str(w.message) for w in said) == 2
