"""Checkpoint files in Wan's own layout become diffusers' parameters, all of them and no others."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from turbocompile.capture.module_weights import DATA, SCALE
from turbocompile.errors import EngineError, RecipeError
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.checkpoints import CheckpointTensors, diffusers_name, infer_config, strip_prefix
from turbocompile.wan.source import open_source
from turbocompile.wan.tensors import Tensors
from turbocompile.wan.transformer import build_transformer

C, FFN, TEXT, LAYERS = 256, 384, 32, 2  # two heads of 128


def original_shapes(image: bool = False) -> dict[str, tuple[int, ...]]:
    """The parameters of a 2-layer Wan in its own layout, written down from the published model."""
    channels = 36 if image else 16
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (C, channels, 1, 2, 2),
        "patch_embedding.bias": (C,),
        "head.modulation": (1, 2, C),
    }

    def linear(name: str, out: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, size), (out,)

    linear("text_embedding.0", C, TEXT)
    linear("text_embedding.2", C, C)
    linear("time_embedding.0", C, 256)
    linear("time_embedding.2", C, C)
    linear("time_projection.1", 6 * C, C)
    linear("head.head", 64, C)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, C)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", C, C)
            for part in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{part}.weight"] = (C,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (C,)
        linear(f"{block}.ffn.0", FFN, C)
        linear(f"{block}.ffn.2", C, FFN)
        if image:
            linear(f"{block}.cross_attn.k_img", C, C)
            linear(f"{block}.cross_attn.v_img", C, C)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (C,)
    if image:
        shapes["img_emb.proj.0.weight"] = shapes["img_emb.proj.0.bias"] = (48,)
        linear("img_emb.proj.1", 48, 48)
        linear("img_emb.proj.3", C, 48)
        shapes["img_emb.proj.4.weight"] = shapes["img_emb.proj.4.bias"] = (C,)
    return shapes


def original(image: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in original_shapes(image).items()}


@pytest.mark.parametrize(("image", "count"), [(False, 69), (True, 87)])
def test_every_parameter_has_its_diffusers_name_and_shape(image, count):
    state = original(image)
    assert len(state) == count
    tensors = CheckpointTensors(Tensors(state), "x.pth")
    model = build_transformer(infer_config(tensors, "x.pth"), torch.float32)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tensors.spec(name)[0] for name in tensors.keys()} == wanted  # noqa: SIM118


def test_names_that_are_easily_confused():
    assert diffusers_name("blocks.3.norm3.weight") == "blocks.3.norm2.weight"
    assert diffusers_name("blocks.3.norm2.weight") == "blocks.3.norm3.weight"
    assert diffusers_name("img_emb.proj.4.weight") == "condition_embedder.image_embedder.norm2.weight"
    assert diffusers_name("blocks.0.cross_attn.k_img.bias") == "blocks.0.attn2.add_k_proj.bias"
    assert diffusers_name("blocks.0.cross_attn.k.bias") == "blocks.0.attn2.to_k.bias"
    assert diffusers_name("head.head.weight") == "proj_out.weight"
    assert diffusers_name("head.modulation") == "scale_shift_table"
    for spelling in ("self_attn.attn_op.local_attn", "attn1.attn_op.local_attn", "attn1.attn_impl"):
        assert diffusers_name(f"blocks.1.{spelling}.proj_l.weight") == "blocks.1.attn1.proj_l.weight"
    assert diffusers_name("blocks.0.self_attn.z.weight") is None


def test_prefixes_and_wrappers_are_stripped():
    assert strip_prefix("module.net.blocks.0._checkpoint_wrapped_module.norm3.weight") == "blocks.0.norm3.weight"
    assert strip_prefix("model.diffusion_model.head.head.bias") == "head.head.bias"


def test_the_linear_patch_embedding_is_the_convolution():
    """A Linear over patches flattened as (c, pt, ph, pw) is the Conv3d of kernel and stride (1, 2, 2)."""
    state = original()
    flat = dict(state, **{"patch_embedding.weight": state["patch_embedding.weight"].reshape(C, -1)})
    flat = {f"net.{name}": tensor for name, tensor in flat.items()}
    tensors = CheckpointTensors(Tensors(flat), "x.pth")
    weight = tensors.get("patch_embedding.weight")
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    patches = x.reshape(1, 16, 2, 1, 2, 2, 3, 2).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(1, 12, 64)
    by_linear = patches @ flat["net.patch_embedding.weight"].T
    by_convolution = torch.conv3d(x, weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    # sums of 64 products in two orders: 64 * eps * the largest product sum, about 1
    torch.testing.assert_close(by_convolution, by_linear, atol=64 * 2**-24 * 4, rtol=0)
    assert infer_config(tensors, "x")["in_channels"] == 16


def test_quantized_linears_are_read_either_way():
    state = original()
    name = "blocks.1.ffn.0"
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(-128, 128, (FFN, C), dtype=torch.int8, generator=generator)
    scale = torch.rand(3, 2, generator=generator)
    del state[f"{name}.weight"]
    state |= {f"{name}.int8_weight": data, f"{name}.scale": scale}
    tensors = CheckpointTensors(Tensors(state), "x.pth")
    name = "blocks.1.ffn.net.0.proj.weight"
    assert {n: s.format for n, s in tensors.stored.items()} == {name: "int8_block"}
    weight = tensors.get(name)
    assert weight.dtype == torch.float32
    for row, column in ((0, 0), (127, 128), (383, 255)):
        assert weight[row, column] == data[row, column].float() * scale[row // 128, column // 128]
    assert torch.equal(tensors.get(name + DATA), data)
    assert torch.equal(tensors.get(name + SCALE), scale)
    assert infer_config(tensors, "x")["ffn_dim"] == FFN


def test_broken_checkpoints_are_refused_in_one_sentence():
    state = original()
    with pytest.raises(EngineError, match="this is no Wan transformer"):
        CheckpointTensors(Tensors({"a": torch.ones(1)}), "x.pth")
    with pytest.raises(EngineError, match=r"blocks\.0\.extra\.weight belongs to no Wan transformer"):
        CheckpointTensors(Tensors({**state, "blocks.0.extra.weight": torch.ones(1)}), "x.pth")
    with pytest.raises(EngineError, match="twice, under different prefixes"):
        CheckpointTensors(Tensors({**state, "net.head.modulation": torch.ones(1, 2, C)}), "x.pth")
    data = torch.ones(FFN, C, dtype=torch.int8)
    with pytest.raises(EngineError, match=r"ffn\.0\.weight as a weight and as int8_weight"):
        CheckpointTensors(Tensors({**state, "blocks.0.ffn.0.int8_weight": data}), "x.pth")
    del state["blocks.0.ffn.0.weight"]
    with pytest.raises(EngineError, match=r"ffn\.0\.int8_weight is stored as int8 and has no scale beside it"):
        CheckpointTensors(Tensors({**state, "blocks.0.ffn.0.int8_weight": data}), "x.pth")


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_scaled_float8_in_the_original_layout_is_what_it_stands_for(prefix):
    """As ComfyUI's and Kijai's files are: a scale a weight, one for its input, and an empty marker."""
    state = original()
    file = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in state.items():
        file[name] = weight
        if name.startswith("blocks.") and weight.dim() == 2:
            scale = weight.abs().max() / 448
            path = name.removesuffix(".weight")
            file[name], file[f"{path}.scale_weight"] = (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1)
            file[f"{path}.scale_input"] = torch.ones(1)
            state[name] = file[name].float() * scale
    tensors = CheckpointTensors(Tensors({f"{prefix}{k}": v for k, v in file.items()}), "x")
    assert len(list(tensors.keys())) == len(state)
    assert torch.equal(tensors.get("blocks.1.ffn.net.2.weight"), state["blocks.1.ffn.2.weight"])
    assert torch.equal(tensors.get("blocks.0.attn2.to_k.weight"), state["blocks.0.cross_attn.k.weight"])
    (note,) = tensors.notes
    assert "20 scales of activations" in note


def test_the_average_of_a_training_state_is_the_model():
    state = original()
    both = {f"net.{k}": torch.zeros_like(v) for k, v in state.items()} | {f"net_ema.{k}": v for k, v in state.items()}
    tensors = CheckpointTensors(Tensors(both), "x.pth")
    assert torch.equal(tensors.get("scale_shift_table"), state["head.modulation"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_recipe_opens_a_file_and_says_what_it_lacks(tmp_path, suffix):
    path, state = tmp_path / f"wan{suffix}", original()
    state["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"] = torch.ones(128, 128)
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    with pytest.raises(RecipeError, match="holds the transformer alone"):
        open_source(Recipe.from_dict({"model": str(path), "target": "cpu"}))
    source = open_source(Recipe.from_dict({"model": str(path), "components": "none", "target": "cpu"}))
    assert source.sla
    assert source.task == "t2v"
    model = source.transformers["transformer"].load()
    assert torch.equal(model.blocks[1].attn2.to_q.weight, state["blocks.1.cross_attn.q.weight"])
    assert torch.equal(model.blocks[1].norm2.bias, state["blocks.1.norm3.bias"])


def test_two_files_are_two_experts(tmp_path):
    for name in ("high", "low"):
        torch.save(original(), tmp_path / f"{name}.pth")
    model = {"path": str(tmp_path / "high.pth"), "transformer_2": str(tmp_path / "low.pth")}
    source = open_source(Recipe.from_dict({"model": model, "components": "none", "target": "cpu"}))
    assert list(source.transformers) == ["transformer", "transformer_2"]
    assert source.boundary_ratio == 0.875


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path):
    state = original()
    del state["blocks.1.cross_attn.o.bias"]
    torch.save(state, tmp_path / "x.pth")
    recipe = Recipe.from_dict({"model": str(tmp_path / "x.pth"), "components": "none", "target": "cpu"})
    with pytest.raises(EngineError, match=r"lacks blocks\.1\.attn2\.to_out\.0\.bias"):
        open_source(recipe).transformers["transformer"].build()
