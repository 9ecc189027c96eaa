"""Adapters in a checkpoint's tensors: each style of key gives the sums of dense arithmetic in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.recipe.lora import LoraSpec
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.lora import LoraTensors, changes_of
from turbocompile.wan.source import open_source
from turbocompile.wan.tensors import SyntheticTensors, Tensors
from turbocompile.wan.transformer import build_transformer

CONFIG = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "cross_attn_norm": True, "eps": 1e-6,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64, "image_dim": 20, "added_kv_proj_dim": 32,
}  # fmt: skip
EPS = 2.0**-21  # of the largest value: products of up to 48 terms in float32, and a sum

# Modules in diffusers' names and in Wan's own.
MODULES = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.1.attn2.to_k": "blocks.1.cross_attn.k",
    "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "proj_out": "head.head",
}
# Parameters that take differences alone: diffusers' name, Wan's own, and the key's end.
OTHERS = {
    "blocks.0.norm2.weight": "blocks.0.norm3.diff",
    "blocks.0.norm2.bias": "blocks.0.norm3.diff_b",
    "blocks.1.attn1.norm_q.weight": "blocks.1.self_attn.norm_q.diff",
    "blocks.1.attn2.norm_added_k.weight": "blocks.1.cross_attn.norm_k_img.diff",
    "blocks.1.attn1.to_v.bias": "blocks.1.self_attn.v.diff_b",
    "blocks.0.scale_shift_table": "blocks.0.modulation.diff",
    "blocks.1.scale_shift_table": "blocks.1.diff_m",
    "scale_shift_table": "head.modulation.diff",
    "proj_out.weight": "head.head.diff",
    "condition_embedder.image_embedder.norm1.bias": "img_emb.proj.0.diff_b",
}


@pytest.fixture(scope="module")
def base():
    model = build_transformer(CONFIG, torch.float32)
    return SyntheticTensors({n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}, 0, "transformer")


@pytest.fixture(scope="module")
def factors(base):
    """Module -> (a, b, alpha); ranks differ from module to module."""
    g = torch.Generator().manual_seed(0)
    made = {}
    for i, module in enumerate(MODULES):
        shape, rank = base.spec(f"{module}.weight")[0], 2 + i % 3
        a = torch.randn(rank, *shape[1:], generator=g)
        b = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=g)
        made[module] = (a, b, 1.0 + i % 4)
    return made


def delta(a, b):
    return (b.double().flatten(1) @ a.double().flatten(1)).reshape(b.shape[0], *a.shape[1:])


def specs_of(tensors):
    return {n: tensors.spec(n) for n in tensors.keys()}  # noqa: SIM118


def merged(base, *loras, model="transformer", models=None):
    """The tensors of a model with (path, weight) added."""
    specs = [LoraSpec(str(path), weight) for path, weight in loras]
    found = changes_of(specs, models or {model: specs_of(base)})
    return LoraTensors(base, found[model]) if model in found else base


def same(found, truth, of=None):
    """Within EPS of the largest value. of: another tensor whose size counts, where the result cancels."""
    assert found.dtype == torch.float32
    scale = max(float(t.abs().max()) for t in (truth, *([] if of is None else [of])))
    error = float((found.double() - truth.double()).abs().max()) / scale
    assert error <= EPS, f"differs by {error:.1e}"


def check(base, tensors, truth):
    """Every tensor of `truth` is as there; all others are the base's."""
    for name in base.keys():  # noqa: SIM118
        if name in truth:
            same(tensors.get(name), truth[name])
        else:
            assert torch.equal(tensors.get(name), base.get(name)), name


def write(path, tensors, metadata=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


# Each style writes (a, b, alpha) of the modules; True where it writes alpha.
def peft(prefix, middle=""):
    return lambda d, o, a, b, alpha: {
        f"{prefix}{d}.lora_A{middle}.weight": a,
        f"{prefix}{d}.lora_B{middle}.weight": b,
    }


def kohya(prefix, original):
    def keys(d, o, a, b, alpha):
        path = prefix + (o if original else d).replace(".", "_")
        return {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b, f"{path}.alpha": torch.tensor(alpha)}

    return keys


def original(prefix, down="lora_A", up="lora_B", with_alpha=True):
    return lambda d, o, a, b, alpha: {
        f"{prefix}{o}.{down}.weight": a,
        f"{prefix}{o}.{up}.weight": b,
        **({f"{prefix}{o}.alpha": torch.tensor(alpha)} if with_alpha else {}),
    }


STYLES = {
    "diffusers": (peft("transformer."), False),
    "peft": (peft("base_model.model."), False),
    "peft, of a named adapter": (peft("base_model.model.", ".default"), False),
    "bare": (peft(""), False),
    "diffusers, old": (lambda d, o, a, b, alpha: {f"{d}.lora.down.weight": a, f"{d}.lora.up.weight": b}, False),
    "kohya": (kohya("lora_unet_", True), True),
    "kohya of diffusers' names": (kohya("lora_transformer_", False), True),
    "lycoris": (kohya("lycoris_", True), True),
    "comfy": (original("diffusion_model."), True),
    "comfy, whole prefix": (original("model.diffusion_model.", "lora_down", "lora_up"), True),
    "lightx2v": (original("diffusion_model.", "lora_down", "lora_up", False), False),
    "wan": (original(""), True),
    "diffsynth": (original("pipe.dit.", "lora_A.default", "lora_B.default", False), False),
}


@pytest.mark.parametrize("style", STYLES)
def test_each_style_gives_the_sum(base, factors, style, tmp_path):
    keys, has_alpha = STYLES[style]
    tensors, truth = {}, {}
    for module, own in MODULES.items():
        a, b, alpha = factors[module]
        tensors |= keys(module, own, a, b, alpha)
        scale = 0.7 * (alpha / a.shape[0] if has_alpha else 1.0)
        truth[f"{module}.weight"] = base.get(f"{module}.weight").double() + scale * delta(a, b)
    check(base, merged(base, (write(tmp_path / "lora.safetensors", tensors), 0.7)), truth)
    torch.save(tensors, tmp_path / "lora.pth")
    check(base, merged(base, (tmp_path / "lora.pth", 0.7)), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_other_dtypes_are_multiplied_in_float32(base, factors, dtype, tmp_path):
    a, b, _ = factors["proj_out"]
    path = write(tmp_path / "a.safetensors", peft("")("proj_out", "", a.to(dtype), b.to(dtype), 1))
    truth = base.get("proj_out.weight").double() + delta(a.to(dtype), b.to(dtype))
    check(base, merged(base, (path, 1.0)), {"proj_out.weight": truth})


def test_a_checkpoint_of_16_bits_gets_a_sum_that_is_not_rounded(base, factors, tmp_path):
    a, b, _ = factors["proj_out"]
    weight = base.get("proj_out.weight").bfloat16()
    stored = Tensors({"proj_out.weight": weight, "proj_out.bias": base.get("proj_out.bias").bfloat16()})
    found = merged(stored, (write(tmp_path / "a.safetensors", peft("")("proj_out", "", a, b, 1)), 1.0))
    assert found.spec("proj_out.weight") == (tuple(weight.shape), torch.float32)
    assert found.spec("proj_out.bias")[1] == torch.bfloat16
    same(found.get("proj_out.weight"), weight.double() + delta(a, b))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "lora_unet_"])
def test_differences_of_norms_biases_and_modulations_are_added(base, prefix, tmp_path):
    g = torch.Generator().manual_seed(1)
    tensors, truth = {}, {}
    for name, key in OTHERS.items():
        shape = base.spec(name)[0]
        diff = torch.randn(shape, generator=g)
        path, _, part = key.rpartition(".")
        key = f"{prefix}{path.replace('.', '_') if prefix == 'lora_unet_' else path}.{part}"
        tensors[key] = diff[0] if name == "blocks.0.scale_shift_table" else diff  # without its axis of one element
        truth[name] = base.get(name).double() - 0.4 * diff.double()
    check(base, merged(base, (write(tmp_path / "d.safetensors", tensors), -0.4)), truth)


def test_set_weight_replaces_and_other_adapters_add_to_it(base, factors, tmp_path):
    a, b, _ = factors["proj_out"]
    value, bias = torch.randn(base.spec("proj_out.weight")[0]), torch.randn(base.spec("proj_out.bias")[0])
    keys = {"diffusion_model.head.head.set_weight": value, "diffusion_model.head.head.set_bias": bias}
    one = write(tmp_path / "set.safetensors", keys)
    two = write(tmp_path / "a.safetensors", peft("")("proj_out", "", a, b, 1))
    alone = merged(base, (one, 0.5))
    assert torch.equal(alone.get("proj_out.weight"), value)
    assert torch.equal(alone.get("proj_out.bias"), bias)
    check(base, merged(base, (two, 2.0), (one, 1.0)), {
        "proj_out.weight": value.double() + 2 * delta(a, b), "proj_out.bias": bias,
    })  # fmt: skip
    with pytest.raises(EngineError, match=r"replaces proj_out\.weight \(set_weight\), which another LoRA replaces too"):
        merged(base, (one, 1.0), (one, 1.0))


def lengths(v, by_rows=True):
    return v.flatten(1).norm(dim=1 if by_rows else 0, keepdim=True)


@pytest.mark.parametrize("module", ["blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj", "patch_embedding"])
def test_dora_of_peft_scales_the_rows_of_the_sum(base, factors, module, tmp_path):
    a, b, _ = factors[module]
    w = base.get(f"{module}.weight").double()
    m = torch.rand(w.shape[0]) + 0.5
    stored = m if w.dim() == 2 else m.reshape(1, -1, *(1 for _ in w.shape[2:]))
    for end in (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight"):
        tensors = {**peft("base_model.model.")(module, "", a, b, 1), f"base_model.model.{module}{end}": stored}
        v = (w + 0.6 * delta(a, b)).flatten(1)
        truth = (m.double()[:, None] * v / lengths(v)).reshape(w.shape)
        found = merged(base, (write(tmp_path / "d.safetensors", tensors), 0.6))
        check(base, found, {f"{module}.weight": truth})


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_dora_of_kohya_takes_a_share_of_the_change_by_rows_or_columns(base, factors, by_rows, weight, tmp_path):
    a, b, alpha = factors["blocks.0.ffn.net.0.proj"]
    w = base.get("blocks.0.ffn.net.0.proj.weight").double()
    m = torch.rand((w.shape[0], 1) if by_rows else (1, w.shape[1])) + 0.5
    tensors = kohya("lora_unet_", True)("", "blocks.0.ffn.0", a, b, alpha)
    path = write(tmp_path / "d.safetensors", {**tensors, "lora_unet_blocks_0_ffn_0.dora_scale": m})
    v = w + alpha / a.shape[0] * delta(a, b)
    truth = w + weight * (m.double() * v / lengths(v, by_rows) - w)
    check(base, merged(base, (path, weight)), {"blocks.0.ffn.net.0.proj.weight": truth})


def test_adapters_add_up_in_any_order_each_relative_to_the_weight_itself(base, factors, tmp_path):
    module = "blocks.0.attn1.to_q"
    a, b, _ = factors[module]
    w = base.get(f"{module}.weight").double()
    m, diff = torch.rand(w.shape[0]) + 0.5, torch.randn(w.shape)
    plain = write(tmp_path / "plain.safetensors", peft("")(module, "", a, b, 1))
    dora = write(tmp_path / "dora.safetensors", {**peft("")(module, "", a, b, 1), f"{module}.lora_magnitude_vector": m})
    dense = write(tmp_path / "dense.safetensors", {f"diffusion_model.{MODULES[module]}.diff": diff})
    v = w + 2 * delta(a, b)
    truth = w + 0.5 * delta(a, b) + (m.double()[:, None] * v / lengths(v) - w) - 0.3 * diff.double()
    given = [(plain, 0.5), (dora, 2.0), (dense, -0.3)]
    for order in (given, given[::-1]):
        found = merged(base, *order).get(f"{module}.weight")
        same(found, truth, of=v)


def test_weight_0_changes_nothing_and_is_checked_all_the_same(base, factors, tmp_path):
    a, b, _ = factors["proj_out"]
    assert merged(base, (write(tmp_path / "a.safetensors", peft("")("proj_out", "", a, b, 1)), 0.0)) is base
    with pytest.raises(EngineError, match="no tensor of the model matches"):
        merged(base, (write(tmp_path / "b.safetensors", peft("")("proj_in", "", a, b, 1)), 0.0))


# ------------------------------------------------------------------------------------------- PEFT's configuration


PEFT_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "rank_pattern": {"attn2.to_k": 4, r"blocks\.\d+\.ffn\.net\.2": 3},
    "alpha_pattern": {"to_k": 1.5, "^blocks.0.attn1.to_q": 5.0},
}  # fmt: skip
RANKS = {"blocks.0.attn1.to_q": (2, 5.0), "blocks.1.attn2.to_k": (4, 1.5), "blocks.1.ffn.net.2": (3, 6.0)}


def of_ranks(base, prefix):
    g = torch.Generator().manual_seed(2)
    tensors, deltas = {}, {}
    for module, (rank, alpha) in RANKS.items():
        out, columns = base.spec(f"{module}.weight")[0]
        a, b = torch.randn(rank, columns, generator=g), torch.randn(out, rank, generator=g)
        tensors |= peft(prefix)(module, "", a, b, 1)
        deltas[module] = (delta(a, b), rank, alpha)
    return tensors, deltas


def scaled_truth(base, deltas, root):
    return {
        f"{module}.weight": base.get(f"{module}.weight").double() + alpha / (math.sqrt(rank) if root else rank) * change
        for module, (change, rank, alpha) in deltas.items()
    }


@pytest.mark.parametrize("root", [False, True])
def test_a_folder_of_peft_has_its_scales_in_the_configuration(base, root, tmp_path):
    tensors, deltas = of_ranks(base, "base_model.model.")
    write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PEFT_CONFIG, "use_rslora": root}))
    check(base, merged(base, (tmp_path, 1.0)), scaled_truth(base, deltas, root))


@pytest.mark.parametrize("root", [False, True])
def test_a_file_of_diffusers_has_them_in_its_header(base, root, tmp_path):
    tensors, deltas = of_ranks(base, "transformer.")
    said = {f"transformer.{k}": v for k, v in {**PEFT_CONFIG, "use_rslora": root}.items()}
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        check(base, merged(base, (path, 1.0)), scaled_truth(base, deltas, root))


def test_whole_modules_and_biases_that_peft_saves_are_taken(base, factors, tmp_path):
    a, b, _ = factors["proj_out"]
    bias, whole = torch.randn(b.shape[0]), torch.randn(base.spec("blocks.0.attn1.to_k.weight")[0])
    prefix = "base_model.model."
    tensors = {
        **peft(prefix)("proj_out", "", a, b, 1), f"{prefix}proj_out.lora_B.bias": bias,
        f"{prefix}blocks.0.attn1.to_k.weight": whole,
    }  # fmt: skip
    write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": a.shape[0], "lora_alpha": 2 * a.shape[0]}))
    check(base, merged(base, (tmp_path, 0.5)), {
        "proj_out.weight": base.get("proj_out.weight").double() + delta(a, b),
        "proj_out.bias": base.get("proj_out.bias").double() + bias.double(),
        "blocks.0.attn1.to_k.weight": whole,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------- two experts


@pytest.fixture(scope="module")
def experts(base):
    specs = specs_of(base)
    return {"transformer": base, "transformer_2": SyntheticTensors(specs, 0, "transformer_2")}


@pytest.mark.parametrize(
    ("expert", "changed"),
    [("both", {"transformer", "transformer_2"}), ("high", {"transformer"}), ("low", {"transformer_2"})],
)
def test_a_lora_is_for_one_expert_or_for_both(experts, factors, expert, changed, tmp_path):
    a, b, _ = factors["proj_out"]
    path = write(tmp_path / "a.safetensors", peft("transformer.")("proj_out", "", a, b, 1))
    models = {name: specs_of(t) for name, t in experts.items()}
    assert set(changes_of([LoraSpec(str(path), 1.0, expert)], models)) == changed


@pytest.mark.parametrize("prefixes", [("transformer.", "transformer_2."), ("high_noise_model.", "low_noise_model.")])
def test_a_file_of_two_loras_is_split(experts, factors, prefixes, tmp_path):
    tensors = {}
    for module, prefix in zip(("proj_out", "blocks.0.attn1.to_q"), prefixes, strict=True):
        tensors |= peft(prefix)(module, "", *factors[module])
    path = write(tmp_path / "a.safetensors", tensors)
    models = {name: specs_of(t) for name, t in experts.items()}
    found = changes_of([LoraSpec(str(path))], models)
    assert {name: list(changes.of) for name, changes in found.items()} == {
        "transformer": ["proj_out.weight"], "transformer_2": ["blocks.0.attn1.to_q.weight"],
    }  # fmt: skip
    assert set(changes_of([LoraSpec(str(path), expert="low")], models)) == {"transformer_2"}
    one = {"transformer": models["transformer"]}
    assert set(changes_of([LoraSpec(str(path), expert="high")], one)) == {"transformer"}
    with pytest.raises(RecipeError, match="for the high and low-noise expert, which does not fit a model without"):
        changes_of([LoraSpec(str(path))], one)
    with pytest.raises(RecipeError, match="for the low-noise expert, and the model has one transformer"):
        changes_of([LoraSpec(str(path), expert="low")], one)


# ------------------------------------------------------------------------------------------------------------ refusals


def wrong(a, b, **more):
    return {**peft("")("proj_out", "", a, b, 1), **more}


REFUSED = {
    "another model's": ({f"blocks.{i}.mlp.lora_{x}.weight": torch.ones(2, 2) for i in range(7) for x in "AB"},
        r"no tensor of the model matches 14 keys .*blocks\.0\.mlp\.lora_A\.weight, .* and 4 more"),
    "one key of another model": (wrong(torch.ones(2, 32), torch.ones(16, 2), **{"proj_in.diff": torch.ones(2)}),
        r"matches 1 key of this LoRA, .*: proj_in\.diff"),
    "no bias": ({"blocks.0.attn1.norm_q.diff_b": torch.ones(32)}, r"norm_q\.diff_b"),
    "other columns": (wrong(torch.ones(2, 31), torch.ones(16, 2)), r"make no proj_out\.weight \[16, 32\]"),
    "other rows": (wrong(torch.ones(2, 32), torch.ones(15, 2)), r"make no proj_out\.weight \[16, 32\]"),
    "ranks": (wrong(torch.ones(3, 32), torch.ones(16, 2)), r"ranks of .*\[3, 32\].*\[16, 2\] differ"),
    "half": ({"proj_out.lora_A.weight": torch.ones(2, 32)}, r"lora_A\.weight is a part of a LoRA whose other parts"),
    "alpha alone": ({"proj_out.alpha": torch.tensor(2.0)}, r"proj_out\.alpha is a part of a LoRA"),
    "alphas": (wrong(torch.ones(2, 32), torch.ones(16, 2), **{"proj_out.alpha": torch.ones(2)}), "should be one"),
    "an endless alpha": (wrong(torch.ones(2, 32), torch.ones(16, 2), **{"proj_out.alpha": torch.tensor(math.inf)}),
        "should be a finite number"),
    "magnitude": (wrong(torch.ones(2, 32), torch.ones(16, 2), **{"proj_out.dora_scale": torch.ones(1, 31)}),
        r"dora_scale has the shape \[1, 31\]"),
    "another shape": ({"proj_out.diff": torch.ones(16, 31)}, r"proj_out\.diff has the shape \[16, 31\]"),
    "integers": (wrong(torch.ones(2, 32, dtype=torch.int8), torch.ones(16, 2)), "holds whole numbers"),
    "no LoRA": ({"proj_out.weight": torch.ones(16, 32)}, r"this is no LoRA.*proj_out\.weight"),
    "strange": (wrong(torch.ones(2, 32), torch.ones(16, 2), **{"proj_out.lora_C.weight": torch.ones(1)}),
        r"holds 1 key of no known kind of LoRA: proj_out\.lora_C\.weight"),
    "two adapters": ({"proj_out.lora_A.one.weight": torch.ones(1), "proj_out.lora_B.two.weight": torch.ones(1)},
        "holds the adapters one, two"),
    "twice": ({"proj_out.diff": torch.ones(16, 32), "transformer.proj_out.diff": torch.ones(16, 32)}, "the same part"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_listed(base, case, tmp_path):
    tensors, message = REFUSED[case]
    with pytest.raises(EngineError, match=message):
        merged(base, (write(tmp_path / "a.safetensors", tensors), 1.0))


OTHER_KINDS = {
    "lora_unet_blocks_0_ffn_0.lokr_w1": "a LoKr",
    "lycoris_blocks_0_ffn_0.hada_w1_a": "a LoHa",
    "blocks.0.ffn.0.oft_blocks": "an OFT",
    "lora_unet_blocks_0_ffn_0.lora_mid.weight": "three factors",
    "diffusion_model.patch_embedding.reshape_weight": "changes the shapes",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "a LoRA of the text encoder",
    "text_encoder.layers.0.lora_A.weight": "a LoRA of the text encoder",
}


@pytest.mark.parametrize("key", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(base, key, tmp_path):
    with pytest.raises(UnsupportedError, match=OTHER_KINDS[key]):
        merged(base, (write(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}), 1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"peft_type": "LOHA"}, "of the kind LOHA"), ({"init_lora_weights": "pissa_niter_4"}, "belongs to weights that"),
     ({"fan_in_fan_out": True}, "fan_in_fan_out")],
)  # fmt: skip
def test_configurations_of_other_kinds_are_refused(base, values, message, tmp_path):
    write(tmp_path / "adapter_model.safetensors", peft("")("proj_out", "", torch.ones(2, 32), torch.ones(16, 2), 1))
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match=message):
        merged(base, (tmp_path, 1.0))


def test_a_configuration_of_another_rank_is_refused(base, tmp_path):
    write(tmp_path / "adapter_model.safetensors", peft("")("proj_out", "", torch.ones(2, 32), torch.ones(16, 2), 1))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    with pytest.raises(EngineError, match="has the rank 2, and the configuration says 4"):
        merged(base, (tmp_path, 1.0))


def test_a_path_of_nothing_says_so(base, tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(RecipeError, match=r"there is no file or folder|should hold one LoRA"):
            merged(base, (path, 1.0))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(EngineError, match="no whole safetensors file"):
        merged(base, (tmp_path, 1.0))


# -------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_adds_its_adapters_to_the_model(factors, tmp_path):
    model = {"preset": "wan-tiny", "weights": "synthetic"}
    plain = open_source(Recipe.from_dict({"model": model, "target": "cpu"})).transformers["transformer"]
    shape = plain.tensors.spec("blocks.1.ffn.net.2.weight")[0]
    a, b = torch.randn(3, shape[1]), torch.randn(shape[0], 3)
    path = write(tmp_path / "a.safetensors", peft("transformer.")("blocks.1.ffn.net.2", "", a, b, 1))
    recipe = Recipe.from_dict({"model": model, "target": "cpu", "lora": f"{path}:0.5"})
    assert [(x.path, x.weight) for x in recipe.lora] == [(str(path), 0.5)]
    found = open_source(Recipe.from_dict(recipe.to_dict())).transformers["transformer"]
    truth = plain.tensors.get("blocks.1.ffn.net.2.weight").double() + 0.5 * delta(a, b)
    same(dict(found.load().named_parameters())["blocks.1.ffn.net.2.weight"].detach(), truth)
    with pytest.raises(RecipeError, match="low-noise expert, and the model has one transformer"):
        open_source(Recipe.from_dict({**recipe.to_dict(), "lora": [{"path": str(path), "expert": "low"}]}))
