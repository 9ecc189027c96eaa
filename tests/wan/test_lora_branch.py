"""Adapters beside their linears: the merged model's numbers, and 8-bit weights that keep their bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.source import open_source

FIELDS = {
    "model": {"preset": "wan-tiny", "weights": "synthetic", "config": {"num_layers": 4}}, "components": "none",
    "shapes": [{"height": 64, "width": 64, "num_frames": 5}], "target": "cpu",
}  # fmt: skip
RANKS = {
    "blocks.0.attn1.to_q": 3, "blocks.1.attn1.to_q": 5, "blocks.2.ffn.net.2": 4, "blocks.3.attn2.to_v": 2,
    "condition_embedder.time_proj": 2,
}  # fmt: skip


def recipe(passes, **fields):
    return Recipe.from_dict({**FIELDS, "passes": {"attention": "native", **passes}, **fields})


@pytest.fixture(scope="module")
def plain():
    return open_source(recipe({})).transformers["transformer"]


@pytest.fixture(scope="module")
def lora(plain, tmp_path_factory):
    """A LoRA of some linears of some blocks, with an alpha, a bias' difference and a convolution's factors."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for module, rank in {**RANKS, "patch_embedding": 2}.items():
        shape = plain.tensors.spec(f"{module}.weight")[0]
        ones = [1] * (len(shape) - 2)
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=g) * 0.3
        tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, *ones, generator=g) * 0.3
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    tensors["blocks.1.attn1.to_k.diff_b"] = torch.ones(plain.tensors.spec("blocks.1.attn1.to_k.bias")[0])
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_file(tensors, path)
    return str(path)


def branch(lora, weight=0.5):
    return [{"path": lora, "weight": weight, "mode": "branch"}]


@pytest.fixture(scope="module")
def call(plain):
    g = torch.Generator().manual_seed(1)
    _, kwargs = plain.example_inputs(recipe({}).shapes[0])
    made = {k: torch.randn(v.shape, generator=g) for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    return {**made, "timestep": torch.tensor([500.0]), "return_dict": False}


@pytest.fixture(scope="module")
def truth(lora, call):
    """The output of the eager model with the adapter merged."""
    merged = open_source(recipe({}, lora=[{"path": lora, "weight": 0.5}])).transformers["transformer"].load()
    return merged(**call)[0]


def engine_of(folder, *args, **fields):
    report = optimize_recipe(recipe(*args, **fields), folder)
    return turbocompile.load(folder), report


def test_branches_compute_the_merged_model(plain, lora, call, truth, tmp_path):
    source = open_source(recipe({}, lora=branch(lora))).transformers["transformer"]
    eager = source.load()
    assert (eager(**call)[0] - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert (plain.load()(**call)[0] - truth).abs().max() > 0.1 * truth.abs().max()
    engine, report = engine_of(tmp_path / "engine", {"w8a8": "off"}, lora=branch(lora))
    assert (engine(**call)[0] - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert "of 4 blocks" in report.compared  # with branches, as the eager model has them
    shapes = {n: tuple(t.shape) for n, t in engine.weights.items() if "lora_A" in n}
    assert shapes["blocks.3.attn1.to_q.lora_A.weight"][0] == 5  # the largest rank of a block, here filled with zeros
    assert not any("patch_embedding" in name or "to_k" in name for name in shapes)  # these are merged


def test_an_8_bit_linear_keeps_its_bytes_beside_a_wide_branch(lora, call, truth, tmp_path):
    w8a8 = {"w8a8": {"format": "int8", "budget": 1.0}, "fuse_qkv": "off"}
    base, _ = engine_of(tmp_path / "base", w8a8)
    beside, report = engine_of(tmp_path / "beside", w8a8, lora=branch(lora))
    merged, _ = engine_of(tmp_path / "merged", w8a8, lora=[{"path": lora, "weight": 0.5}])
    kept = [name for name in base.weights if name.endswith("int8_weight")]
    assert len(kept) == 4 * 10
    assert all(torch.equal(beside.weights[name], base.weights[name]) for name in kept)
    assert {t.dtype for name, t in beside.weights.items() if "lora_" in name} == {torch.float32}
    reasons = {skip.reason for skip in report.passes["w8a8"].skipped}
    assert "it is a factor of an adapter, which stays wide" in reasons
    errors = [(engine(**call)[0] - truth).norm() / truth.norm() for engine in (beside, merged, base)]
    assert errors[0] < 2 * errors[1] < errors[2]


def test_a_dry_run_and_an_engine_of_16_bits_have_branches_too(lora, tmp_path):
    report = optimize_recipe(recipe({"w8a8": "off"}, lora=branch(lora)), None, dry_run=True)
    assert report.passes["fuse_qkv"].sites > 0
    source = open_source(recipe({}, lora=branch(lora), dtype="bfloat16")).transformers["transformer"]
    dtypes = {p.dtype for n, p in source.build().named_parameters() if "blocks.0.attn1.to_q.lora_" in n}
    assert dtypes == {torch.bfloat16}
