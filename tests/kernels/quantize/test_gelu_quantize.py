"""GELU and its quantization in one: what the two operators give in turn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_comes_back_within_half_a_step(normal, approximate):
    x = normal(3, 40, 100, dtype=torch.float64) * 2
    data, scale = ops.gelu_quantize(x, approximate, "int8")
    if approximate == "none":
        expected = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    else:
        expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    # the scale is stored in float32: 127 steps of it are off by 127 * 2^-24 steps
    assert ((dequantize(data, scale, "int8", torch.float64) - expected).abs() <= scale.double() * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_two_operators_in_turn(normal, same, dtype, format):
    x = normal(2, 70, 200, dtype=dtype)
    activated = F.gelu(x.float(), approximate="tanh").to(dtype)
    same(ops.gelu_quantize(x, "tanh", format), ops.quantize(activated, format))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, approximate):
    args = (normal(2, 5, 16), approximate, "int8_block")
    sound(ops.gelu_quantize.default, *args)
    same(decomposed(ops.gelu_quantize.default, *args), ops.gelu_quantize(*args))


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_extreme_rows_stay_finite(value):
    data, scale = ops.gelu_quantize(torch.full((2, 8), value), "tanh", "fp8")
    assert data.float().isfinite().all()
    assert scale.isfinite().all()


def test_an_unknown_approximation_is_refused_by_the_fake():
    with pytest.raises(ValueError, match="sigmoid"):
        ops.gelu_quantize(torch.zeros(2, 8, device="meta"), "sigmoid", "int8")
