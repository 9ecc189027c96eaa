"""An engine lets its model go: of the model's memory it holds the tensors that it runs, and no others."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import turbocompile

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RECIPES = {
    "no pass": {"passes": "off"},
    "the exact passes": None,
    "8-bit linears": {"passes": {"w8a8": "int8"}},
}


def storages(module: nn.Module) -> dict[str, StorageWeakRef]:
    """Weak references to the storages of a module's parameters and buffers, by the tensors' names."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in named}


def alive(references: dict[str, StorageWeakRef]) -> list[str]:
    """The names of the storages that something still holds, after a collection of what only holds itself."""
    gc.collect()
    return [name for name, reference in references.items() if not reference.expired()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.register_buffer("table", torch.randn(6, 64))

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x) + self.table), approximate="tanh"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def call() -> torch.Tensor:
    return torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_no_storage_of_the_model_outlives_it(recipe, tmp_path):
    """On a CPU an engine's weights are its own memory. Also behind a copy, and `save` still works."""
    torch.manual_seed(0)
    model = Model().eval()
    held = storages(model)
    engine = turbocompile.optimize(model, (call(),), recipe=recipe, target="cpu")
    expected = engine(call())
    twin = copy.deepcopy(engine)
    assert len(alive(held)) == len(held)
    del model
    assert alive(held) == []
    for number, one in enumerate((engine, twin)):
        saved = turbocompile.load(one.save(tmp_path / str(number)))
        assert torch.equal(one(call()), expected)
        assert torch.equal(saved(call()), expected)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_module_that_compiles_at_its_first_call_lets_go_too(recipe):
    model = Model().eval()
    held = storages(model)
    lazy = turbocompile.optimize(model, recipe=recipe, target="cpu")
    lazy(call())
    engine = lazy.engine
    del model, lazy
    assert alive(held) == []
    assert engine(call()).shape == (1, 6, 64)


def test_an_engine_of_onnx_lets_go_too():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Model().eval()
    held = storages(model)
    engine = turbocompile.optimize(model, (call(),), backend="onnx", target="cpu")
    del model
    assert alive(held) == []
    assert engine(call()).shape == (1, 6, 64)


class TestCuda:
    pytestmark = on_gpu

    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
    def test_only_the_storages_that_it_runs_are_alive(self, recipe):
        model = Model().eval().cuda()
        held = storages(model)
        engine = turbocompile.optimize(model, (call().cuda(),), recipe=recipe)
        own = {t.untyped_storage().data_ptr() for t in engine.weights.values()}
        shared = {name for name, t in model.state_dict().items() if t.untyped_storage().data_ptr() in own}
        del model
        assert set(alive(held)) == shared
        if recipe == RECIPES["8-bit linears"]:
            assert not any(name.endswith(("up.weight", "down.weight")) for name in shared)
