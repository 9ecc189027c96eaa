"""The same adapters by diffusers and PEFT: their merged weights, and an engine's output beside their model's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.lora import LoraSpec
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.lora import LoraTensors, changes_of
from turbocompile.wan.tensors import Tensors

peft = pytest.importorskip("peft")
WEIGHT = 0.7
BLOCK = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


def factors(model, seed=0):
    """Wan's own path of each linear of the blocks -> its factors."""
    g = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    made = {}
    for i in range(len(model.blocks)):
        for own, theirs in BLOCK.items():
            linear = modules[f"blocks.{i}.{theirs}"]
            a = torch.randn(4, linear.in_features, generator=g) * 0.1
            made[i, own] = a, torch.randn(linear.out_features, 4, generator=g) * 0.1
    return made


def diffusers_style(made):
    return {
        f"transformer.blocks.{i}.{BLOCK[own]}.lora_{x}.weight": f
        for (i, own), pair in made.items()
        for x, f in zip("AB", pair, strict=True)
    }


def comfy_style(made):
    return {
        f"diffusion_model.blocks.{i}.{own}.lora_{x}.weight": f
        for (i, own), pair in made.items()
        for x, f in zip("AB", pair, strict=True)
    } | {f"diffusion_model.blocks.{i}.{own}.alpha": torch.tensor(2.0) for i, own in made}


def kohya_style(made):
    found = {}
    for (i, own), (a, b) in made.items():
        path = f"lora_unet_blocks_{i}_{own.replace('.', '_')}"
        found |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b, f"{path}.alpha": torch.tensor(8.0)}
    return found


def by_diffusers(model, path):
    """The model with the adapter as `load_lora_weights`, `set_adapters` and `fuse_lora` put it into the weights."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    model.load_lora_adapter(state, adapter_name="a", metadata=metadata)
    model.set_adapters(["a"], [WEIGHT])
    model.fuse_lora(adapter_names=["a"])
    model.unload_lora()
    return model.requires_grad_(False)


def by_us(model, path, weight=WEIGHT):
    tensors = Tensors({n: p.detach() for n, p in model.named_parameters()})
    specs = {n: tensors.spec(n) for n in tensors.keys()}  # noqa: SIM118
    return LoraTensors(tensors, changes_of([LoraSpec(str(path), weight)], {"transformer": specs})["transformer"])


def assert_merged_alike(ours, theirs):
    for name, parameter in theirs.named_parameters():
        error = (ours.get(name) - parameter).abs().max() / parameter.abs().max()
        assert error <= 1e-6, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("style", [diffusers_style, comfy_style, kohya_style])
def test_diffusers_merges_the_same_weights(style, wan, tmp_path):
    model = wan()
    path = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in style(factors(model)).items()}, path)
    ours = by_us(wan(), path)
    assert_merged_alike(ours, by_diffusers(model, path))
    assert (ours.get("blocks.0.ffn.net.2.weight") - wan().blocks[0].ffn.net[2].weight).abs().max() > 0.01


CONFIGS = {
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 7}, "alpha_pattern": {r"ffn.net.2": 3}},
    "root": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "bias": {"r": 4, "lora_alpha": 8, "lora_bias": True},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_saves_is_what_peft_merges(case, wan, tmp_path):
    config = peft.LoraConfig(
        target_modules=["to_q", "to_v", "net.0.proj", "net.2", "proj_out"], init_lora_weights=False, **CONFIGS[case]
    )
    model = peft.get_peft_model(wan(), config)
    g = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
    model.save_pretrained(tmp_path)
    ours = by_us(wan(), tmp_path, 1.0)
    assert_merged_alike(ours, model.merge_and_unload())


def test_what_diffusers_saves_with_its_configuration_is_read_alike(wan, tmp_path):
    from diffusers import WanPipeline

    model = wan()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "net.2"], rank_pattern={"net.2": 6})
    model.add_adapter(config, adapter_name="a")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    WanPipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(model, adapter_name="a"),
        transformer_lora_adapter_metadata=model.peft_config["a"].to_dict(),
    )  # fmt: skip
    model.fuse_lora(adapter_names=["a"])
    model.unload_lora()
    assert_merged_alike(by_us(wan(), tmp_path, 1.0), model)


def test_an_engine_with_adapters_is_the_merged_model(example, tmp_path):
    from diffusers import WanTransformer3DModel

    folder = example("t2v")
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    path = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in comfy_style(factors(model)).items()}, path)
    recipe = Recipe.from_dict({
        "model": str(folder), "shapes": [{"height": 64, "width": 64, "num_frames": 5}], "target": "cpu",
        "components": "none", "passes": {"w8a8": "off", "attention": "native"}, "lora": f"{path}:{WEIGHT}",
    })  # fmt: skip
    optimize_recipe(recipe, tmp_path / "engine")
    engine = turbocompile.load(tmp_path / "engine")
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["recipe"]["lora"][0]["weight"] == WEIGHT
    shapes = engine.shapes[0]
    g = torch.Generator().manual_seed(0)
    call = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | {
        "timestep": torch.tensor([500.0])
    }
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
        truth = by_diffusers(model, path)(**call, return_dict=False)[0]
        found = engine(**call, return_dict=False)[0]
    assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()  # some hundred float32 roundings of exact rewrites
    assert (plain - truth).abs().max() > 1e-2 * truth.abs().max()
