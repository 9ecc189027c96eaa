"""Each format's engine computes the original transformer's mathematics, in float32, on a CPU.

The reference (original_wan.py) is independent of diffusers and of the key maps. Quantized formats are compared with the
numbers that they stand for. Everything is float32: sums of up to 1,536 products in two orders differ by some
1e-6 of the largest value, and 1e-4 of it is far below any wrong name or shape.
"""

from __future__ import annotations

import pytest
import torch
from original_wan import original_wan, random_call, random_state
from wan_files import E4M3, WRITERS, in_8_bits, is_linear

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import Recipe
from turbocompile.runtime.engine import load
from turbocompile.tools.verify_folder import verify_folder
from turbocompile.wan.convert import convert
from turbocompile.wan.keys import diffusers_name
from turbocompile.wan.source import open_source

CLOSE = 1e-4  # of the largest value
# the graphs of the others are those of the same numbers in another file, which convert's test reads
LEFT = (
    "GGUF shards", "GGUF Q6_K", "GGUF Q5_K", "GGUF Q5_0", "GGUF Q5_1", "GGUF Q4_0", "GGUF Q4_1", "GGUF F16", "GGUF F32",
    "hub cache", "shards without an index", "one file in a folder", "ModelOpt hf_quant_config.json",
)  # fmt: skip
BUILT = [name for name in WRITERS if name not in LEFT]
SMALL = {"height": 32, "width": 32, "num_frames": 5}  # 2 x 2 x 2 tokens


def recipe(path, **more) -> Recipe:
    given = {"target": "cpu", "dtype": "float32", "components": "none", "shapes": [SMALL], "verify": "off"}
    return Recipe.from_dict({"model": {"path": str(path)}, **given, **more})


def far(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((out - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def call():
    return random_call()


@pytest.mark.parametrize("format", WRITERS)
def test_a_recipe_opens_every_format_and_finds_out_the_configuration(format, state, tmp_path):
    path, meant = WRITERS[format](tmp_path, state)
    source = open_source(recipe(path))
    transformer = source.transformers["transformer"]
    assert (source.task, source.sla) == ("t2v", "TurboDiffusion" in format)
    config = {k: transformer.config[k] for k in ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers")}
    assert config == {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2}
    loaded = dict(transformer.load().named_parameters())
    assert len(loaded) == len([name for name in meant if "proj_l" not in name])
    assert torch.equal(loaded["blocks.1.attn2.to_v.weight"], meant["blocks.1.cross_attn.v.weight"].float())


@pytest.mark.parametrize("format", BUILT)
def test_the_engine_of_every_format_computes_the_original_mathematics(format, state, call, tmp_path):
    (tmp_path / "m").mkdir()
    path, meant = WRITERS[format](tmp_path / "m", state)
    optimize_recipe(recipe(path), tmp_path / "engine")
    out = load(tmp_path / "engine")(**call, return_dict=False)[0]
    assert far(out, original_wan(meant, **call)) < CLOSE


@pytest.mark.parametrize("format", WRITERS)
def test_diffusers_opens_what_convert_makes_of_every_format(format, state, call, tmp_path):
    from diffusers import WanTransformer3DModel

    (tmp_path / "m").mkdir()
    path, meant = WRITERS[format](tmp_path / "m", state)
    convert(path, tmp_path / "out", "float32")
    model, info = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    plain = {n: w for n, w in meant.items() if "proj_l" not in n}  # diffusers has no sparse-linear attention
    with torch.no_grad():
        out = model(**call, return_dict=False)[0]
    assert far(out, original_wan(plain, **call)) < CLOSE
    loaded = model.state_dict()
    for name, weight in plain.items():
        assert torch.equal(loaded[diffusers_name(name)], weight.reshape(loaded[diffusers_name(name)].shape)), name


def test_image_to_video_with_clip_tokens(tmp_path):
    from diffusers import WanTransformer3DModel

    sizes = {"inputs": 36, "image": 32}
    state, call = random_state(**sizes), random_call(**sizes)
    path, meant = WRITERS["ComfyUI fp8_scaled"](tmp_path, state)
    optimize_recipe(recipe(path), tmp_path / "engine")
    expected = original_wan(meant, **call)
    assert far(load(tmp_path / "engine")(**call, return_dict=False)[0], expected) < CLOSE
    convert(path, tmp_path / "out", "float32")
    with torch.no_grad():
        out = WanTransformer3DModel.from_pretrained(tmp_path / "out")(**call, return_dict=False)[0]
    assert far(out, expected) < CLOSE


def test_the_true_widths_of_the_1_3b(tmp_path):
    """1,536 channels, 12 heads, 8,960 of the FFN, 4,096 of the text, 2 of the 30 layers."""
    sizes = {"channels": 1536, "ffn": 8960, "text": 4096}
    state, call = random_state(**sizes), random_call(text=4096)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    path, meant = WRITERS["original .pth"](tmp_path, state)
    optimize_recipe(recipe(path), tmp_path / "engine")
    out = load(tmp_path / "engine")(**call, return_dict=False)[0]
    assert far(out, original_wan(meant, **call)) < CLOSE


# How far 8-bit activations move the output: a linear by relative L1 0.013 (int8) and 0.037 (fp8) on N(0, 1), and 20 of
# them in a row of 2 blocks, whose errors are independent and pass by residuals.
AS_STORED = {
    "ComfyUI fp8_scaled": ("fp8", 0.05),
    "ComfyUI fp8 by rows": ("fp8", 0.05),
    "plain e4m3": ("fp8", 0.05),
    "ModelOpt config.json": ("fp8", 0.05),
    "ComfyUI int8": ("int8", 0.03),
    "ComfyUI int8 by rows": ("int8", 0.03),
    "TurboDiffusion quant": ("int8_block", 0.03),
    "int8 by tiles": ("int8_block", 0.03),
}


@pytest.mark.parametrize("format", AS_STORED)
def test_an_engine_holds_the_bits_of_8_bit_weights_as_the_checkpoint_stores_them(format, state, call, tmp_path):
    kernels, error = AS_STORED[format]
    (tmp_path / "m").mkdir()
    path, meant = WRITERS[format](tmp_path / "m", state)
    report = optimize_recipe(recipe(path, passes={"w8a8": kernels}), tmp_path / "engine")
    assert not any("anew" in warning for warning in report.warnings)
    assert report.passes["w8a8"].rewritten == 20
    engine = load(tmp_path / "engine")
    tensors = open_source(recipe(path)).transformers["transformer"].tensors
    for layer in range(2):
        for ours in ("attn1.to_out.0", "attn2.to_q", "ffn.net.0.proj", "ffn.net.2"):
            name = f"blocks.{layer}.{ours}."
            data, scale = engine.weights[f"{name}{kernels}_weight"], engine.weights[f"{name}{kernels}_scale"]
            assert torch.equal(data.view(torch.uint8), tensors.get(f"{name}weight.qdata").view(torch.uint8))
            assert torch.equal(scale, tensors.get(f"{name}weight.scale"))
            spread = scale if kernels != "int8_block" else scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            theirs = next(n for n in meant if diffusers_name(n) == f"{name}weight")
            assert torch.equal(data.float() * spread, meant[theirs])
    out = engine(**call, return_dict=False)[0]
    assert (out - original_wan(meant, **call)).abs().sum() / out.abs().sum() < error


def test_the_two_experts_folders_of_wans_own_layout_are_a_pair(tmp_path):
    for seed, name in enumerate(("high_noise_model", "low_noise_model"), 1):
        (tmp_path / "m" / name).mkdir(parents=True)
        WRITERS["original folder"](tmp_path / "m" / name, random_state(seed))
    source = open_source(recipe(tmp_path / "m"))
    assert list(source.transformers) == ["transformer", "transformer_2"]
    assert source.boundary_ratio == 0.875
    for seed, transformer in enumerate(source.transformers.values(), 1):
        assert torch.equal(transformer.tensors.get("proj_out.weight"), random_state(seed)["head.head.weight"])


def test_a_plan_without_weights_and_a_numeric_check_know_stored_weights(state, tmp_path):
    path, _ = WRITERS["ComfyUI fp8_scaled"](tmp_path, state)
    asked = recipe(path, passes={"w8a8": "fp8"}, verify="numeric")
    planned = optimize_recipe(asked, None, dry_run=True)
    built = optimize_recipe(asked, tmp_path / "engine")
    assert planned.passes["w8a8"].rewritten == built.passes["w8a8"].rewritten == 20
    assert verify_folder(tmp_path / "engine", numeric=True).errors["transformer"].rel_l1 < 0.05


@pytest.mark.parametrize(
    ("target", "format"), [("sm90", "float8_e4m3fn"), ("sm80", "int8")], ids=["a card with FP8", "a card without"]
)
def test_auto_keeps_the_checkpoints_format_where_the_target_has_it(target, format, state, tmp_path):
    path, _ = WRITERS["ComfyUI fp8_scaled"](tmp_path, state)
    optimize_recipe(recipe(path, target=target, dtype="bfloat16"), tmp_path / "engine")
    weights = load(tmp_path / "engine", device="cpu").weights
    data = next(w for n, w in weights.items() if n.startswith("blocks.1.ffn.net.2.") and n.endswith("_weight"))
    assert str(data.dtype) == f"torch.{format}"


@pytest.mark.parametrize(
    ("format", "words"), [("plain e5m2", "plain float8_e5m2 to fp8"), ("GGUF Q4_K", "Q4_K to fp8")]
)
def test_a_second_rounding_is_told_with_its_error(format, words, state, tmp_path):
    path, meant = WRITERS[format](tmp_path, state)
    report = optimize_recipe(recipe(path, passes={"w8a8": "fp8"}), tmp_path / "engine")
    (told,) = [w for w in report.warnings if "quantized anew" in w]
    assert "20 weights" in told
    assert words in told
    shown = float(told.partition("by up to ")[2].split()[0])
    errors = []
    for name, weight in meant.items():
        if is_linear(name, weight) and name.startswith("blocks.0."):
            data, scale = in_8_bits(weight, E4M3, by_row=True)
            errors.append(float((data.float() * scale - weight).abs().sum() / weight.abs().sum()))
    assert shown == pytest.approx(max(errors), rel=0.1)  # two digits are shown


def test_layers_in_other_formats_have_graphs_of_their_own(call, tmp_path):
    """The first and the last layer are not quantized, as in many checkpoints."""
    state = random_state(layers=4)
    ends = ("blocks.0.", "blocks.3.")
    file, meant = dict(state), dict(state)
    for name, weight in state.items():
        if is_linear(name, weight) and not name.startswith(ends):
            data, scale = in_8_bits(weight, E4M3, by_row=False)
            file[name], meant[name] = data, data.float() * scale
            file[name.removesuffix("weight") + "scale_weight"] = scale
    torch.save(file, tmp_path / "x.pth")
    optimize_recipe(recipe(tmp_path / "x.pth"), tmp_path / "engine")
    engine = load(tmp_path / "engine")
    assert far(engine(**call, return_dict=False)[0], original_wan(meant, **call)) < CLOSE
    optimize_recipe(recipe(tmp_path / "x.pth", passes={"w8a8": "fp8"}), tmp_path / "engine8")
    engine = load(tmp_path / "engine8")
    data = engine.weights["blocks.2.ffn.net.2.fp8_weight"]
    assert torch.equal(data.view(torch.uint8), file["blocks.2.ffn.2.weight"].view(torch.uint8))
    again = engine.weights["blocks.3.ffn.net.2.fp8_weight"].float() * engine.weights["blocks.3.ffn.net.2.fp8_scale"]
    assert (again - state["blocks.3.ffn.2.weight"]).abs().max() <= state["blocks.3.ffn.2.weight"].abs().max() / 16
    out = engine(**call, return_dict=False)[0]
    assert (out - original_wan(meant, **call)).abs().sum() / out.abs().sum() < 0.06
