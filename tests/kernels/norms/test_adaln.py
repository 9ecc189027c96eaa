"""Modulated LayerNorm against the separate operators and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops


def truth(x, scale, shift, weight, bias, eps):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    n = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    n = n if weight is None else n * weight.double()
    n = n if bias is None else n + bias.double()
    return n * (1 + scale.double()) + shift.double()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    channels=st.integers(2, 40),
    form=st.sampled_from(["batch", "shared", "vector", "token"]),
    affine=st.tuples(st.booleans(), st.booleans()),
)
def test_formula_over_every_broadcast(randn, batch, tokens, channels, form, affine):
    make = randn(channels)
    shape = {"batch": (batch, 1), "shared": (1, 1), "vector": (), "token": (batch, tokens)}[form] + (channels,)
    weight, bias = (make(channels, dtype=torch.float64) if given else None for given in affine)
    scale, shift = make(*shape, dtype=torch.float64), make(*shape, dtype=torch.float64)
    args = (make(batch, tokens, channels, dtype=torch.float64), scale, shift, weight, bias, 1e-6)
    torch.testing.assert_close(ops.adaln(*args), truth(*args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1536, 5120, 1000])
def test_float32_moves_by_less_than_a_millionth_from_the_separate_operators(normal, channels):
    x, scale, shift, weight, bias = (
        normal(2, 9, channels) * 3 + 1,
        *(normal(2, 1, channels) for _ in "ab"),
        *(normal(channels) for _ in "ab"),
    )
    separate = F.layer_norm(x, (channels,), weight, bias, 1e-6) * (1 + scale) + shift
    y = ops.adaln(x, scale, shift, weight, bias, 1e-6)
    assert (y - separate).abs().max() <= 1e-6 * separate.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_to_the_dtype_of_x_whatever_the_modulation_has(normal, unit, dtype):
    args = (normal(2, 9, 1536, dtype=dtype), normal(2, 1, 1536), normal(2, 1, 1536), None, None, 1e-6)
    expected = truth(*args)
    # Float32 inside: mean, variance, root, product, sum within 1e-6 of the largest; then one rounding of each element.
    error = (ops.adaln(*args).double() - expected).abs()
    assert (error <= 1e-6 * expected.abs().max() + unit[dtype] * expected.abs()).all()


def test_the_variance_counts_the_channels_alone(normal):
    """1536 channels padded to 2048 would add mean^2 / 3 to the variance: a factor 2 in y where the mean is 3 sigma."""
    x = normal(4, 1536) + 3
    zero = torch.zeros(1536)
    y = ops.adaln(x, zero, zero, None, None, 1e-6)
    assert (y.double().std(-1, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_rows_give_the_shift(value):
    x = torch.full((1, 3, 64), value)
    shift = torch.arange(64.0)
    assert torch.equal(ops.adaln(x, torch.ones(64), shift, None, None, 1e-6), shift.expand(1, 3, 64))


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_is_quantize_of_the_op(normal, same, dtype, format):
    args = (normal(2, 70, 200, dtype=dtype), normal(2, 1, 200), normal(2, 1, 200), normal(200), None, 1e-6)
    same(ops.adaln_quantize(*args, format), ops.quantize(ops.adaln(*args), format))


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, format):
    args = (normal(2, 5, 16), normal(2, 1, 16), normal(16), normal(16), normal(16), 1e-6)
    sound(ops.adaln.default, *args)
    same(decomposed(ops.adaln.default, *args), ops.adaln(*args))
    sound(ops.adaln_quantize.default, *args, format)
    same(decomposed(ops.adaln_quantize.default, *args, format), ops.adaln_quantize(*args, format))


@pytest.mark.parametrize("shape", [(3, 1, 16), (2, 4, 16), (1, 2, 5, 16), (15,)])
def test_a_modulation_that_does_not_fit_is_refused_by_reference_and_fake(normal, shape):
    x, zero, other = normal(2, 5, 16), torch.zeros(16), normal(*shape)
    for device in ("cpu", "meta"):
        for scale, shift in ((zero, other), (other, zero)):
            with pytest.raises(ValueError, match="does not broadcast"):
                ops.adaln(x.to(device), scale.to(device), shift.to(device), None, None, 1e-6)
