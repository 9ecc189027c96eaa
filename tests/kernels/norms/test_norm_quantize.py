"""A norm and its quantization in one: what the two operators give in turn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_comes_back_within_a_step(normal, format, norm, dtype):
    x, weight, bias = normal(2, 70, 200, dtype=dtype) * 3 + 1, normal(200), normal(200)
    data, scale = ops.norm_quantize(x, weight, bias, 1e-6, norm, format)
    wide = x.double()
    if norm == "layer":
        expected = F.layer_norm(wide, (200,), weight.double(), bias.double(), 1e-6)
    else:
        expected = F.rms_norm(wide, (200,), weight.double(), 1e-6) + bias.double()
    back = dequantize(data, scale, format, torch.float64)
    step = dequantize(torch.ones(data.shape), scale, format, torch.float64)
    # A saturated 128 is off by a step, all else by half of one; e4m3 by 2^-4 of the value; bfloat16 before by 2^-8.
    bound = torch.maximum(expected.abs() * 2.0**-4, step) if format == "fp8" else step
    assert ((back - expected).abs() <= bound * 1.001 + expected.abs() * 2.0**-8).all()


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_equal_to_the_two_operators_in_turn(normal, same, format):
    x = normal(2, 9, 64, dtype=torch.bfloat16)
    normed = F.layer_norm(x.float(), (64,), None, None, 1e-6).bfloat16()
    same(ops.norm_quantize(x, None, None, 1e-6, "layer", format), ops.quantize(normed, format))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, norm):
    args = (normal(2, 5, 16), normal(16), None, 1e-6, norm, "fp8")
    sound(ops.norm_quantize.default, *args)
    same(decomposed(ops.norm_quantize.default, *args), ops.norm_quantize(*args))


def test_an_unknown_norm_is_refused_by_reference_and_fake(normal):
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="group"):
            ops.norm_quantize(normal(2, 16).to(device), None, None, 1e-6, "group", "int8")
