"""Opening models: what from_pretrained would build, without its memory."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.recipe.presets import VARIANTS, tiny_preset
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.wan.source import open_source


def opened(model, **more):
    return open_source(Recipe.from_dict({"model": model, "target": "cpu", **more}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["t2v", "i2v-image"])
def test_build_and_load_equal_from_pretrained(example, variant, dtype):
    from diffusers import WanTransformer3DModel

    folder = example(variant)
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    source = opened(str(folder), dtype=str(dtype).removeprefix("torch."))
    built = source.transformers["transformer"].build()
    assert all(p.is_meta for p in built.parameters())
    for kind in ("named_parameters", "named_buffers"):
        ours = {name: t.dtype for name, t in getattr(built, kind)()}
        assert ours == {name: t.dtype for name, t in getattr(theirs, kind)()}
    loaded = source.transformers["transformer"].load()
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(loaded, kind)())
        assert all(torch.equal(ours[name], t) for name, t in getattr(theirs, kind)())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_preset_holds_what_its_folder_holds(example, variant):
    folder, memory = opened(str(example(variant))), opened({"preset": tiny_preset(variant).name})
    assert folder.task == memory.task
    assert folder.boundary_ratio == memory.boundary_ratio
    assert list(folder.transformers) == list(memory.transformers)
    for name, transformer in folder.transformers.items():
        ours = memory.transformers[name]
        assert dict(transformer.config) == dict(ours.config)
        assert transformer.image_tokens == ours.image_tokens
        assert set(transformer.tensors.keys()) == set(ours.tensors.keys())
        for key in transformer.tensors.keys():  # noqa: SIM118
            assert torch.equal(transformer.tensors.get(key), ours.tensors.get(key)), key


def test_the_two_experts_differ():
    source = opened({"preset": "wan-tiny-i2v-experts"})
    high, low = (source.transformers[n].tensors.get("proj_out.weight") for n in ("transformer", "transformer_2"))
    assert not torch.equal(high, low)


def test_a_14b_model_is_opened_without_its_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_source(
        Recipe.from_dict({"model": {"preset": "wan2.1-t2v-14b", "weights": "synthetic"}, "target": "sm90"})
    )
    model = source.transformers["transformer"].build()
    assert not any(b.is_meta for b in model.buffers())
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > 28e9
    # the tables are 1 MB; imports that happen here first may take some hundred
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # KB


@pytest.mark.parametrize("variant", VARIANTS)
def test_example_inputs_are_a_call_that_the_model_takes(variant):
    transformer = opened({"preset": tiny_preset(variant).name}).transformers["transformer"]
    args, kwargs = transformer.example_inputs(Shape(32, 64, 5, 2))
    assert args == ()
    real = {k: torch.zeros_like(v, device="cpu") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with torch.no_grad():
        (out,) = transformer.load()(**real)
    assert out.shape == ((2, 48, 2, 2, 4) if variant == "ti2v" else (2, 16, 2, 4, 8))
    assert kwargs["encoder_hidden_states"].shape[1] == 512


def test_activations_stay_sane_through_depth():
    """Synthetic weights: 12 blocks deep the output has the size of a velocity, not of an explosion."""
    source = opened({"preset": "wan-tiny", "config": {"num_layers": 12}})
    transformer = source.transformers["transformer"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        (out,) = transformer.load()(
            torch.randn(1, 16, 2, 8, 8, generator=generator),
            torch.tensor([900.0]),
            torch.randn(1, 512, 64, generator=generator),
            return_dict=False,
        )
    assert 0.1 < out.std() < 10


def test_configuration_changes_reach_the_model_and_its_text_encoder():
    source = opened({"preset": "wan-tiny", "config": {"num_layers": 3, "text_dim": 32}})
    assert len(source.transformers["transformer"].build().blocks) == 3
    assert source.components.load()["text_encoder"].config.d_model == 32


def test_sharded_folders_open(example, tmp_path):
    from diffusers import WanTransformer3DModel

    shutil.copytree(example(), tmp_path / "m")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "m" / "transformer")
    shutil.rmtree(tmp_path / "m" / "transformer")
    model.save_pretrained(tmp_path / "m" / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "m" / "transformer").glob("*.safetensors"))) > 1
    loaded = opened(str(tmp_path / "m")).transformers["transformer"].load().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_synthetic_weights_take_the_configuration_of_a_folder(example, tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copy(example() / "model_index.json", tmp_path)
    shutil.copy(example() / "transformer" / "config.json", tmp_path / "transformer")
    source = opened({"path": str(tmp_path), "weights": "synthetic", "seed": 5})
    expected = opened({"preset": "wan-tiny", "seed": 5}).transformers["transformer"].tensors.get("proj_out.weight")
    assert torch.equal(source.transformers["transformer"].tensors.get("proj_out.weight"), expected)
    assert "text_encoder" in source.components.names
    bare = opened({"path": str(tmp_path / "transformer"), "weights": "synthetic"})
    assert bare.is_synthetic
    assert "vae" in bare.components.names


def test_a_plan_gets_synthetic_weights_for_a_checkpoint(example):
    source = opened(str(example()))
    plan, own = source.synthetic("transformer"), source.transformers["transformer"].tensors
    assert {k: plan.spec(k) for k in plan.keys()} == {k: own.spec(k) for k in own.keys()}  # noqa: SIM118


def test_other_models_and_damage_are_refused_in_one_sentence(example, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(example(), folder)
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "ffn_dim": 640}))
    with pytest.raises(EngineError, match="has the shape"):
        opened(str(folder)).transformers["transformer"].build()
    config.write_text(json.dumps({**values, "_class_name": "WanVACETransformer3DModel"}))
    with pytest.raises(EngineError, match="vace_layers must be layers rising from 0 to at most 1"):
        opened(str(folder))
    config.write_text(json.dumps({**values, "_class_name": "WanAnimateTransformer3DModel"}))
    with pytest.raises(
        UnsupportedError, match=r"a WanAnimateTransformer3DModel, .* turbocompile.optimize\(model, ...\)"
    ):
        opened(str(folder))
    config.write_text("{")
    with pytest.raises(EngineError, match="cannot be read as JSON"):
        opened(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(EngineError, match="there is no such file"):
        opened(str(folder))
    with pytest.raises(RecipeError, match="no folder or file"):
        opened(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_layers", "abc", "must be a whole number of at least 1, not 'abc'"),
        ("num_layers", 0, "must be a whole number of at least 1, not 0"),
        ("num_attention_heads", True, "must be a whole number"),
        ("attention_head_dim", 7, "must be even"),
        ("patch_size", 2, "must be three whole numbers"),
        ("patch_size", [1, 0, 2], "must be three whole numbers"),
        ("text_dim", None, "must be a whole number"),
        ("image_dim", 1.5, "must be a whole number"),
        ("ffn_dim", 1.5, "must be a whole number"),
        ("eps", -1, "must be a number between 0 and 1"),
        ("cross_attn_norm", 3, "must be true or false"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(field, value, sentence):
    with pytest.raises(RecipeError, match=f"{field} {sentence}"):
        opened({"preset": "wan-tiny", "config": {field: value}})


def test_a_folders_fields_of_the_wrong_kind_are_named(example, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(example(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": "abc"}))
    with pytest.raises(EngineError, match="boundary_ratio must be a number from 0 to 1, not 'abc'"):
        opened(str(folder))
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    for wrong in ({"num_layers": "four"}, {"patch_size": None}):
        (folder / "transformer" / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(EngineError, match=f"config.json.*{next(iter(wrong))} must be"):
            opened(str(folder))
