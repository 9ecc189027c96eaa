"""A tensor that nothing reads is named with what it is, wherever it lies; one that says nothing is let be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.leftovers import refusal
from turbocompile.wan.source import open_source
from turbocompile.wan.tensors import SINGLE

CPU = {"target": "cpu", "shapes": [{"height": 32, "width": 32, "num_frames": 5}]}
SCALE, LORA, VACE, OTHER = (
    "is a scale, or another part, of a quantized weight",
    "belongs to a LoRA",
    "belongs to VACE's blocks",
    "belongs to no Wan transformer that turbocompile knows",
)
KINDS = [
    ("blocks.0.attn1.to_q.weight_scale", SCALE),
    ("blocks.0.attn1.to_q.scale_input", SCALE),
    ("blocks.1.ffn.net.2.scale", SCALE),
    ("blocks.1.ffn.net.2.qscale", SCALE),
    ("blocks.0.attn1.to_q.weight.absmax", SCALE),
    ("blocks.0.attn1.to_q.weight_zero_point", SCALE),
    ("blocks.0.attn1.to_q.lora_A.default.weight", LORA),
    ("blocks.0.attn1.to_q.lora_down.weight", LORA),
    ("blocks.0.attn1.to_q.diff", LORA),
    ("blocks.0.attn1.to_q.dora_scale", LORA),
    ("lora_unet_blocks_0_self_attn_q.alpha", LORA),
    ("vace_blocks.0.proj_in.weight", VACE),
    ("vace_patch_embedding.weight", VACE),
    ("motion_encoder.direction.weight", OTHER),
    ("blocks.0.attn2.to_z.weight", OTHER),
]


def build(path, **more):
    source = open_source(Recipe.from_dict({"model": {"path": str(path)}, **CPU, **more}))
    source.components.sizes()
    return source.transformers["transformer"].build()


@pytest.fixture
def folder(example, tmp_path):
    shutil.copytree(example("t2v", 128), tmp_path / "wan")
    return tmp_path / "wan"


@pytest.mark.parametrize(("name", "what"), KINDS)
@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_tensor_that_nothing_reads_is_named(folder, name, what, place):
    weights = folder / "transformer" / SINGLE
    save_file({**load_file(weights), name: torch.ones(1), "zzz": torch.ones(1)}, weights)
    path, more = (folder, {}) if place == "folder" else (weights, {"components": "none"})
    with pytest.raises((EngineError, UnsupportedError)) as caught:
        build(path, **more)
    message = str(caught.value)
    assert f"the tensor {name} (and 1 more: zzz) {what}" in message
    assert "\n" not in message
    assert "; " in message.partition(what)[2]  # the mend


def test_a_lora_alone_is_a_lora(tmp_path):
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(UnsupportedError, match=r"belongs to a LoRA.*in the recipe \(or --lora\)"):
        build(tmp_path / "l.safetensors", components="none")


@pytest.mark.parametrize(
    "name",
    ["rope.freqs_cos", "freqs", "blocks.0.attn2.norm_added_q.weight", "blocks.1.attn1.to_q._extra_state"],
)
def test_tables_and_what_diffusers_ignores_are_let_be(folder, name):
    weights = folder / "transformer" / SINGLE
    save_file({**load_file(weights), name: torch.ones(1)}, weights)
    build(folder)


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.input_scale", SCALE),
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.lora_B.weight", LORA),
        (
            "text_encoder",
            "pooler.weight",
            "belongs to another model than the text encoder of the class UMT5EncoderModel",
        ),
        ("vae", "decoder.conv_in.scale_weight", SCALE),
        ("vae", "loss.discriminator.weight", "belongs to another model than the vae of the class AutoencoderKLWan"),
        ("image_encoder", "vision_model.encoder.layers.0.mlp.fc1.weight_scale", SCALE),
        ("image_encoder", "vision_model.extra.weight", "belongs to another model than the image encoder"),
    ],
)
def test_the_parts_around_the_transformer_have_no_leftovers(example, tmp_path, part, name, words):
    shutil.copytree(example("i2v-image"), tmp_path / "wan")
    path = next((tmp_path / "wan" / part).glob("*.safetensors"))
    save_file({**load_file(path), name: torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises((EngineError, UnsupportedError), match=f"the tensor {name} {words}"):
        build(tmp_path / "wan")


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("text_encoder", ["decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"]),
        ("image_encoder", ["text_model.embeddings.token_embedding.weight", "logit_scale", "visual_projection.weight"]),
    ],
)
def test_the_other_half_of_a_whole_model_is_let_be(example, tmp_path, part, names):
    shutil.copytree(example("i2v-image"), tmp_path / "wan")
    path = next((tmp_path / "wan" / part).glob("*.safetensors"))
    before = load_file(path)
    save_file({**before, **{n: torch.ones(1) for n in names}}, path, {"format": "pt"})
    source = open_source(Recipe.from_dict({"model": {"path": str(tmp_path / "wan")}, **CPU}))
    loaded = source.components.load()[part].state_dict()
    known = {k.removeprefix("vision_model."): v for k, v in before.items()}
    assert all(torch.equal(v, known.get(k.removeprefix("vision_model."), v)) for k, v in loaded.items())


@pytest.mark.parametrize("part", ["text_encoder", "vae", "image_encoder"])
def test_a_part_that_lacks_a_tensor_is_refused(example, tmp_path, part):
    """The libraries would draw it at random."""
    shutil.copytree(example("i2v-image"), tmp_path / "wan")
    path = next((tmp_path / "wan" / part).glob("*.safetensors"))
    state = load_file(path)
    name = next(n for n in sorted(state) if n.endswith(".weight") and "0" in n)
    del state[name]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(EngineError, match=r"lacks .*download it again"):
        build(tmp_path / "wan")


def test_a_configuration_of_fewer_layers_than_the_weights_have_is_refused(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1}))
    with pytest.raises(EngineError, match=r"has 1 layers \(num_layers\), and the weights have 2, as in blocks\.1\."):
        build(folder)


def test_a_recipe_may_ask_for_fewer_layers(folder):
    recipe = Recipe.from_dict({"model": {"path": str(folder), "config": {"num_layers": 1}}, **CPU})
    assert len(open_source(recipe).transformers["transformer"].build().blocks) == 1


def test_a_training_states_other_networks_are_let_be_beside_its_average(folder):
    weights = folder / "transformer" / SINGLE
    state = load_file(weights)
    others = {f"{p}{k}": torch.zeros_like(v) for p in ("net.", "net_teacher.") for k, v in state.items()}
    torch.save({**others, **{f"net_ema.{k}": v for k, v in state.items()}}, folder / "x.pth")
    loaded = open_source(Recipe.from_dict({"model": str(folder / "x.pth"), "components": "none", **CPU}))
    assert torch.equal(loaded.transformers["transformer"].tensors.get("proj_out.bias"), state["proj_out.bias"])
    torch.save({**{f"net_ema.{k}": v for k, v in state.items()}, "net_ema.extra": torch.ones(1)}, folder / "x.pth")
    with pytest.raises(EngineError, match=r"extra belongs to no Wan"):
        build(folder / "x.pth", components="none")


def test_the_most_telling_name_is_the_one_that_is_told():
    said = str(refusal("x", ["a.b", "a.lora_A", "vace_x"]))
    assert "the tensor a.lora_A (and 2 more: a.b, vace_x) belongs to a LoRA" in said
