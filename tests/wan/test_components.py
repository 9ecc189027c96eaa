"""Components: the same from memory, from a folder and from an engine; nothing but known classes is loaded."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import turbocompile.build.from_recipe as build
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.components import MODELS, FolderComponents, load_components
from turbocompile.wan.source import open_source


def components(model, **more):
    return open_source(Recipe.from_dict({"model": model, "target": "cpu", **more})).components


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_folder_and_copy_hold_the_same(example, tmp_path, dtype):
    memory = components({"preset": "wan-tiny-i2v-image"}, dtype=dtype)
    folder = components(str(example("i2v-image")), dtype=dtype)
    assert set(memory.names) == set(folder.names)
    table = folder.save(tmp_path / "copy")
    first, second, third = memory.load(), folder.load(), load_components(tmp_path / "copy", table)
    for name in MODELS:
        assert same(first[name], second[name]), name
        assert same(second[name], third[name]), name
    assert next(third["text_encoder"].parameters()).dtype == getattr(torch, dtype)
    assert next(third["vae"].parameters()).dtype == torch.float32
    text = "A red panda, 日本"
    assert first["tokenizer"](text).input_ids == third["tokenizer"](text).input_ids
    assert first["scheduler"].config.flow_shift == third["scheduler"].config.flow_shift == 3.0


@pytest.mark.parametrize("model", [{"preset": "wan-tiny"}, None], ids=["memory", "folder"])
def test_sizes_are_predicted_within_a_percent(example, tmp_path, model):
    found = components(model or str(example()), dtype="bfloat16")
    predicted = found.sizes()
    found.save(tmp_path / "c")
    for name, size in predicted.items():
        real = sum(p.stat().st_size for p in (tmp_path / "c" / name).iterdir())
        # headers and configurations come on top: under 1% of a real model, up to 26 KB here
        assert abs(real - size) <= 0.01 * real + 26_000, name
    assert abs(sum(predicted.values()) - _bytes(tmp_path / "c")) <= 0.01 * _bytes(tmp_path / "c")


def _bytes(folder) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_making_components_leaves_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    components({"preset": "wan-tiny"}).load()
    assert torch.equal(torch.rand(1), expected)


def test_none_are_none():
    found = components({"preset": "wan-tiny"}, components="none")
    assert found.load() == found.table() == found.sizes() == {}


def test_components_of_another_folder(example):
    found = components({"preset": "wan-tiny-128"}, components=str(example()))
    assert isinstance(found, FolderComponents)
    assert set(found.names) == {"vae", "text_encoder", "tokenizer", "scheduler"}


@pytest.mark.parametrize(
    "row",
    [{"class": "AutoModel"}, {"class": "subprocess.Popen"}, {"class": "AutoencoderKLWan", "folder": "../vae"}, {}],
)
def test_only_known_classes_in_plain_folders_are_loaded(example, row):
    with pytest.raises(EngineError, match="component vae is"):
        load_components(example(), {"vae": row})


@pytest.mark.parametrize(
    "addition",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"_attn_implementation": "owner/kernels"},
    ],
)
def test_configurations_that_ask_for_other_code_are_refused(example, tmp_path, addition):
    shutil.copytree(example() / "text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | addition))
    with pytest.raises(EngineError, match="asks for code from elsewhere"):
        load_components(tmp_path, {"text_encoder": {"class": "UMT5EncoderModel"}})


def test_damage_is_one_sentence(example, tmp_path):
    shutil.copytree(example() / "vae", tmp_path / "vae")
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(EngineError, match="component vae cannot be loaded") as caught:
        load_components(tmp_path, {"vae": {"class": "AutoencoderKLWan"}})
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError):
        load_components(tmp_path, {"tokenizer": {"class": "PreTrainedTokenizerFast"}})


@pytest.mark.parametrize("part", ["weights", "configuration", "shard"])
def test_damage_is_found_before_a_build_takes_its_time(example, tmp_path, monkeypatch, part):
    folder = tmp_path / "wan"
    shutil.copytree(example(), folder)
    if part == "weights":
        path = next((folder / "vae").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1000])
        words = f"{path}: this is no whole safetensors file"
    elif part == "configuration":
        path = folder / "text_encoder" / "config.json"
        path.write_text(path.read_text()[:-10])
        words = f"{path}: cannot be read as JSON"
    else:
        path = folder / "text_encoder" / "model-00002-of-00002.safetensors"
        index = {"weight_map": {"a": next((folder / "text_encoder").glob("*.safetensors")).name, "b": path.name}}
        (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
        words = f"{path}: this part of the weights is missing"
    monkeypatch.setattr(build, "_TransformerBuild", None)  # it is not called
    recipe = Recipe.from_dict({"model": {"path": str(folder)}, "target": "cpu"})
    with pytest.raises(EngineError, match=re.escape(words)):
        build.optimize_recipe(recipe, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_an_unknown_class_in_a_pipeline_is_unsupported(example, tmp_path):
    index = json.loads((example() / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match="vae is a AutoencoderKL, turbocompile knows AutoencoderKLWan"):
        FolderComponents(tmp_path, torch.float32)
