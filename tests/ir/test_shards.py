"""Weights in files: shards of bounded size that hold every tensor once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from turbocompile.kernels.quantize.quantize import dequantize

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
def test_a_gpu_computes_the_weights_that_the_cpu_computes(format):
    """A card divides by a constant through its reciprocal, so that a scale may be off by a unit in its last place, and
    a value between two steps may fall to the other one."""
    tensors = {"w": torch.randn(384, 256, dtype=torch.bfloat16), "v": torch.rand(256)}
    source = ModuleTensors(nn.ParameterDict(tensors))
    weight = Mul(Load("w", (384, 256), torch.bfloat16), Load("v", (256,), torch.float32))
    made = []
    for device in (torch.device("cuda"), None):
        parts = [Evaluator(source, {}, device)(Quantize(weight, format, part)) for part in ("data", "scale")]
        assert all(t.device.type == "cpu" for t in parts)
        made.append(parts)
    (data, scale), (expected, expected_scale) = made
    torch.testing.assert_close(scale, expected_scale, rtol=2**-22, atol=0)
    assert (data.float() != expected.float()).float().mean() < 0.01
    torch.testing.assert_close(
        dequantize(data, scale, format, torch.float32), dequantize(expected, expected_scale, format, torch.float32),
        rtol=2**-3, atol=1.01 * expected_scale.max().item(),
    )  # fmt: skip
