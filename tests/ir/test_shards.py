"""Weights in files: shards of bounded size that hold every tensor once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.emit import Emission
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.shards import write_shards
from turbocompile.ir.stored_names import SHARDS, shard_stem
from turbocompile.ir.weights import Load, Mul, Quantize


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), limit=st.integers(16, 400))
def test_shards_hold_every_tensor_once_whatever_their_size(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate(sizes)}
    evaluate = Evaluator(ModuleTensors(nn.ParameterDict(tensors)), {})
    plan = {f"t{i}": Emission(Load(f"t{i}", (n,), torch.float32), "") for i, n in enumerate(sizes)}
    seen = []
    names = write_shards(plan, evaluate, folder, shard_stem("x"), lambda *p: seen.append(p), limit)
    assert names == sorted(path.name for path in folder.glob(SHARDS))
    found = {}
    for name in names:
        shard = load_file(folder / name)
        assert not set(shard) & set(found)
        found |= shard
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert seen[-1] == (4 * sum(sizes), 4 * sum(sizes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_a_gpu_writes_the_bits_that_the_cpu_writes(format):
    """Of 8-bit weights, casts and products with a vector: each operation is rounded as IEEE 754 says on both."""
    tensors = {"w": torch.randn(384, 256, dtype=torch.bfloat16), "v": torch.rand(256)}
    source = ModuleTensors(nn.ParameterDict(tensors))
    weight = Mul(Load("w", (384, 256), torch.bfloat16), Load("v", (256,), torch.float32))
    for part in ("data", "scale"):
        expr = Quantize(weight, format, part)
        there, here = (Evaluator(source, {}, device)(expr) for device in (torch.device("cuda"), None))
        assert there.device.type == "cpu"
        assert torch.equal(there.view(torch.uint8), here.view(torch.uint8))
