"""Sources of tensors: names and shapes at once, values one at a time, damage in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from turbocompile.kernels.quantize.quantize import FORMATS, dequantize

from turbocompile.capture.module_weights import DATA, SCALE
from turbocompile.errors import EngineError
from turbocompile.wan.tensors import INDEX, SINGLE, SyntheticTensors, checkpoint_file, safetensors_folder, synthetic


def test_synthetic_values_depend_on_seed_and_name_alone():
    specs = {f"w{i}": ((3, 4), torch.float32) for i in range(4)}
    tensors = SyntheticTensors(specs, 7, "transformer")
    forward = [tensors.get(name) for name in specs]
    backward = [tensors.get(name) for name in reversed(specs)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], forward[1])
    assert not torch.equal(forward[0], SyntheticTensors(specs, 8, "transformer").get("w0"))
    assert not torch.equal(forward[0], SyntheticTensors(specs, 7, "transformer_2").get("w0"))


def test_synthetic_linears_keep_the_size_of_what_they_are_given():
    # Var(W x) = fan_in * Var(W) * Var(x) = 1; W has 256^2 values, so that its own std strays by 1 / sqrt(2 * 256^2),
    # 0.3%, and a row's norm by 1 / sqrt(2 * 256), 4%
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    y = x @ synthetic("blocks.0.ffn.weight", (256, 256), 0).T
    assert abs(y.std().item() - 1.0) < 0.1


def test_synthetic_norms_are_near_one_and_not_one():
    weight = synthetic("norm.weight", (4096,), 0)
    assert abs(weight.mean().item() - 1.0) < 5 * 0.1 / 4096**0.5
    assert abs(weight.std().item() - 0.1) < 0.01


@pytest.mark.parametrize(("format", "scale"), [("int8_block", (2, 3)), ("int8", (256, 1)), ("fp8", (256, 1))])
def test_synthetic_quantized_linears_agree_with_their_weight(format, scale):
    specs = {
        "a.weight": ((256, 384), torch.bfloat16),
        f"a.weight{DATA}": ((256, 384), FORMATS[format]),
        f"a.weight{SCALE}": (scale, torch.float32),
    }
    tensors = SyntheticTensors(specs, 0, "transformer")
    parts = tensors.get(f"a.weight{DATA}"), tensors.get(f"a.weight{SCALE}")
    assert [(tuple(p.shape), p.dtype) for p in parts] == list(specs.values())[1:]
    weight = tensors.get("a.weight")
    assert torch.equal(weight, dequantize(*parts, format, torch.bfloat16))
    assert abs(weight.float().std().item() * 384**0.5 - 1.0) < 0.02


def test_shards_are_one_source(tmp_path):
    a, b = torch.randn(2, 3), torch.arange(4, dtype=torch.int8)
    save_file({"a": a}, tmp_path / "x-1.safetensors")
    save_file({"b": b}, tmp_path / "x-2.safetensors")
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    tensors = safetensors_folder(tmp_path)
    assert sorted(tensors.keys()) == ["a", "b"]
    assert tensors.spec("b") == ((4,), torch.int8)
    assert torch.equal(tensors.get("a"), a)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(EngineError, match=r"x-2\.safetensors: this part of the checkpoint is missing"):
        safetensors_folder(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(EngineError, match="not the name of a file beside the index"):
        safetensors_folder(tmp_path)


def test_damage_is_one_sentence(tmp_path):
    with pytest.raises(EngineError, match="the folder has no weights"):
        safetensors_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EngineError, match="pickled weights"):
        safetensors_folder(tmp_path)
    save_file({"a": torch.randn(64)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-8])
    with pytest.raises(EngineError, match="no whole safetensors file"):
        safetensors_folder(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(EngineError, match="no index"):
        safetensors_folder(tmp_path)


@pytest.mark.parametrize("nest", [lambda d: d, lambda d: {"state_dict": d}, lambda d: {"model": d, "step": 3}])
def test_pth_files_are_flat_or_nested(tmp_path, nest):
    torch.save(nest({"a": torch.ones(2, 2)}), tmp_path / "x.pth")
    tensors = checkpoint_file(tmp_path / "x.pth")
    assert list(tensors.keys()) == ["a"]
    assert tensors.spec("a") == ((2, 2), torch.float32)


class _Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_pth_files_run_no_code(tmp_path, capsys):
    torch.save({"a": _Evil()}, tmp_path / "x.pth")
    with pytest.raises(EngineError, match="cannot be read as a checkpoint of plain tensors"):
        checkpoint_file(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""
    (tmp_path / "y.pth").write_bytes(b"no checkpoint")
    with pytest.raises(EngineError, match="cannot be read"):
        checkpoint_file(tmp_path / "y.pth")
