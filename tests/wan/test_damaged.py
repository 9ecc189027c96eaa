"""Damaged and incomplete checkpoints of every format end in one sentence that names what is wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from original_wan import random_state
from safetensors.torch import load_file, save_file
from wan_files import COMFY, WRITERS, comfy_int8, original_config, original_folder, prefixed, write_json

from turbocompile.errors import EngineError, TurbocompileError, UnsupportedError
from turbocompile.wan.opening import open_checkpoint, snapshot
from turbocompile.wan.transformer import TransformerSource

FORMATS = (
    "original .pth",
    "original folder",
    "ComfyUI int8",
    "ComfyUI fp8_scaled",
    "TurboDiffusion quant",
    "GGUF Q8_0",
)


@pytest.fixture(scope="module")
def state():
    return random_state(channels=128, ffn=256, text=256, layers=2)


def loaded(path: Path) -> torch.nn.Module:
    opened = open_checkpoint(path, torch.float32)
    return TransformerSource("t", opened.config, opened.tensors, torch.float32, where=opened.where).load()


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint, without the other parts of a pipeline."""
    found = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sorted(p for p in found if not p.name.startswith(("models_t5", "Wan2.1_VAE")))


def refused(path: Path) -> str:
    """The sentence that a checkpoint is refused with."""
    with pytest.raises(TurbocompileError) as caught:
        loaded(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_ends_early_is_refused(format, state, tmp_path):
    path, _ = WRITERS[format](tmp_path, state)
    for file in files_of(path):
        whole = file.read_bytes()
        for share in (0, 0.001, 0.5, 0.999):
            file.write_bytes(whole[: int(share * len(whole))])
            assert str(path.parent if path.is_file() else path) in refused(path)
        file.write_bytes(whole)
    loaded(path)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_that_changed_are_read_or_refused_and_never_raise_anything_else(format, state, tmp_path):
    path, _ = WRITERS[format](tmp_path, state)
    chance = random.Random(3)
    for _ in range(12):
        file = chance.choice(files_of(path))
        whole = file.read_bytes()
        changed = bytearray(whole)
        for _ in range(4):  # mostly in the header
            changed[chance.randrange(min(len(whole), chance.choice((200, 4000, len(whole)))))] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            loaded(path)
        except TurbocompileError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either is right)
        file.write_bytes(whole)


def test_all_that_is_missing_left_over_or_of_another_shape_is_named_in_one_error(state, tmp_path):
    file = dict(state)
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.bias", "head.modulation"):
        del file[name]
    file["blocks.1.cross_attn.o.weight"] = torch.ones(128, 64)
    file["blocks.1.norm3.bias"] = torch.ones(127)
    torch.save(file, tmp_path / "x.pth")
    said = refused(tmp_path / "x.pth")
    for part in (
        "lacks blocks.0.attn1.to_q.weight, blocks.1.ffn.net.2.bias, scale_shift_table, which",
        "blocks.1.attn2.to_out.0.weight has the shape (128, 64), the configuration asks for (128, 128)",
        "blocks.1.norm2.bias has the shape (127,), the configuration asks for (128,)",
    ):
        assert part in said
    write_json(tmp_path / "config.json", original_config(state))
    (tmp_path / "x.pth").unlink()
    names = {"blocks.0.attn1.to_z.weight": torch.ones(1), "blocks.7.attn1.to_z.weight": torch.ones(1)}
    from wan_files import diffusers_names

    save_file({**diffusers_names(file), **names}, tmp_path / "diffusion_pytorch_model.safetensors")
    said = refused(tmp_path)
    assert "lacks" in said
    assert "the tensor blocks.0.attn1.to_z.weight (and 1 more: blocks.7.attn1.to_z.weight) belongs to no Wan" in said


def test_of_many_names_some_are_told_and_the_others_counted(state, tmp_path):
    torch.save({n: t for n, t in state.items() if "norm_" not in n and "cross_attn" not in n}, tmp_path / "x.pth")
    said = refused(tmp_path / "x.pth")
    assert "blocks.0.attn1.norm_k.weight" in said
    assert " and 14 more, which its configuration asks for" in said  # 4 norms and 2 * 10 of cross-attention, less ten


def test_a_tensor_of_two_shards_is_refused(state, tmp_path):
    path, _ = original_folder(tmp_path, state)
    files = [p for p in files_of(path) if p.suffix == ".safetensors"]
    save_file({**load_file(files[0]), **dict(list(load_file(files[1]).items())[:1])}, files[0])
    assert "is in another file of the checkpoint too" in refused(path)


@pytest.mark.parametrize("name", ["pth", "gguf"])
def test_a_shard_that_is_missing_is_named(name, state, tmp_path):
    write_json(tmp_path / "config.json", original_config(state))
    torch.save(dict(list(state.items())[::2]), tmp_path / f"model-00001-of-00003.{name}")
    assert f"model-00002-of-00003.{name}, model-00003-of-00003.{name} are missing" in refused(tmp_path)


def test_several_checkpoints_in_one_folder_are_named(state, tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
    assert "holds several checkpoints (a.pth, b.pth); give the file of one" in refused(tmp_path)


def test_a_scale_that_the_header_promises_is_missed(state, tmp_path):
    path, _ = comfy_int8(tmp_path, state)
    file = load_file(path)
    lost = [f"{COMFY}blocks.{i}.ffn.0.weight_scale" for i in range(2)]
    said = {"layers": {n.removesuffix(".weight_scale"): {"format": "int8_tensorwise"} for n in lost}}
    save_file({n: t for n, t in file.items() if n not in lost}, path, {"_quantization_metadata": json.dumps(said)})
    told = refused(path)
    assert "is said to be scaled and has no scale beside it" in told
    assert all(n.removesuffix("_scale") in told for n in lost)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("no json", "is no list of layers"),
        ('{"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}', "stored as nvfp4, which turbocompile does not read"),
        (
            '{"layers": {"blocks.0.ffn.0": {"format": "int8_tensorwise", "convrot": true}}}',
            "rotated in groups of 256 columns",
        ),
        ('{"layers": {"blocks.9.ffn.0": {"format": "int8_tensorwise"}}}', "describes blocks.9.ffn.0.weight, which the"),
    ],
)
def test_what_a_header_says_and_nobody_reads_is_refused(said, words, state, tmp_path):
    path, _ = comfy_int8(tmp_path, state)
    save_file(load_file(path), path, {"_quantization_metadata": said})
    assert words in refused(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes, and turbocompile reads"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized by modelopt NVFP4"),
        ({"quant_method": "gguf"}, "quantized by gguf"),
    ],
)
def test_other_quantizations_of_a_folder_are_named(config, words, state, tmp_path):
    path, _ = WRITERS["diffusers folder"](tmp_path, state)
    values = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**values, "quantization_config": config})
    with pytest.raises(UnsupportedError, match=words):
        loaded(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "s2v"}, "of the type 's2v'"),
        ({"dim": 100, "num_heads": 3}, "dim 100 is no multiple of num_heads 3"),
        ({"window_size": [4, 4]}, "window_size"),
        ({"num_layers": "two"}, "num_layers must be"),
        ({"num_heads": 2}, None),  # heads of 64 channels: another model of the same shapes
        ({"ffn_dim": 512}, "ffn.net.0.proj.weight has the shape"),
    ],
)
def test_a_configuration_of_another_model_is_refused(change, words, state, tmp_path):
    path, _ = original_folder(tmp_path, state)
    write_json(path / "config.json", {**original_config(state), **change})
    if words is None:
        assert loaded(path).config.attention_head_dim == 64
    else:
        assert words in refused(path)


def test_the_caches_folder_without_a_main_snapshot_is_refused(tmp_path):
    for part in ("blobs", "snapshots/a", "snapshots/b"):
        (tmp_path / part).mkdir(parents=True)
    with pytest.raises(EngineError, match="has the snapshots a, b; name one of them"):
        snapshot(tmp_path)
    assert snapshot(tmp_path / "snapshots" / "a") == tmp_path / "snapshots" / "a"


def test_gguf_without_its_package_says_what_to_install(state, tmp_path, monkeypatch):
    import sys

    path, _ = WRITERS["GGUF Q8_0"](tmp_path, state)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'turbocompile[gguf]'" in refused(path)


def test_a_gguf_tensor_folded_to_another_size_is_refused(state, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.head.modulation", [1, 3, 128])
    writer.add_tensor("head.modulation", state["head.modulation"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "head.modulation holds [1, 2, 128] numbers, and the metadata says" in refused(tmp_path / "x.gguf")


def test_a_file_of_another_model_is_refused(tmp_path):
    save_file(prefixed({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, COMFY), tmp_path / "x.safetensors")
    assert "this is no Wan transformer, it has no patch_embedding.weight" in refused(tmp_path / "x.safetensors")
