"""The three 8-bit formats, bit by bit against arithmetic written out in numpy, and their error bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize, quantize

FORMATS = ("int8", "int8_block", "fp8")


def e4m3_values():
    """Every finite e4m3 number from 0 on, and the parity of its code: 4 bits of exponent (bias 7), 3 of mantissa."""
    codes = [c for c in range(128) if c != 127]
    values = [(c & 7) / 8 * 2.0**-6 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in codes]
    return np.array(values), np.array(codes) & 1


def nearest_e4m3(x):
    """Round to nearest, ties to the even code, saturating at 448."""
    values, odd = e4m3_values()
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    distance = np.abs(magnitude[..., None] - values)
    tied = distance == distance.min(-1, keepdims=True)
    return np.copysign(values[np.argmin(np.where(tied, odd, 2), -1)], x)


def tiles_by_hand(x):
    """128 x 128 tiles: inv = 128 / amax in float32, round half to even, saturate to int8; scale = amax / 128."""
    x = x.astype(np.float32)
    m, k = x.shape
    data, scale = np.empty((m, k), np.int8), np.empty((-(-m // 128), -(-k // 128)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax = max(np.float32(1e-8), np.abs(x[at]).max())
            data[at] = np.clip(np.rint(x[at] * (np.float32(128) / amax)), -128, 127)
            scale[i, j] = amax / np.float32(128)
    return data, scale


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_tiles_are_those_of_the_released_checkpoints_bit_by_bit(randn, rows, columns, dtype):
    x = randn(rows + columns)(rows, columns, dtype=dtype)
    data, scale = quantize(x, "int8_block")
    expected = tiles_by_hand(x.float().numpy())
    assert np.array_equal(data.numpy(), expected[0])
    assert np.array_equal(scale.numpy(), expected[1])


def test_tiles_span_batch_items(normal, same):
    x = normal(3, 50, 130)
    data, scale = quantize(x, "int8_block")
    same((data.reshape(150, 130), scale), quantize(x.reshape(150, 130), "int8_block"))


def test_the_largest_of_a_tile_saturates_and_its_negative_is_exact():
    x = torch.zeros(2, 128)
    x[0, 0], x[1, 0] = 4.0, -4.0
    data, scale = quantize(x, "int8_block")
    assert (data[0, 0], data[1, 0], scale) == (127, -128, 4 / 128)


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize(x, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert quantize(torch.cat([x, torch.full((1, 1), 128.0)], 1), "int8_block")[0].tolist()[0][1:7] == [
        0,
        2,
        2,
        0,
        -2,
        -2,
    ]


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=2), columns=st.integers(1, 200))
def test_int8_is_symmetric_per_token(randn, shape, columns):
    x = randn(columns)(*shape, columns)
    data, scale = quantize(x, "int8")
    amax = np.abs(x.numpy()).max(-1, keepdims=True)
    assert np.array_equal(data.numpy(), np.rint(x.numpy() * (np.float32(127) / amax)))
    assert np.array_equal(scale.numpy(), amax / np.float32(127))
    assert data.abs().amax() == 127


def test_fp8_is_the_nearest_e4m3(normal):
    x = normal(64, 50) * torch.logspace(-6, 0, 50)
    data, scale = quantize(x, "fp8")
    amax = np.abs(x.numpy()).max(-1, keepdims=True)
    assert np.array_equal(data.float().numpy(), nearest_e4m3(x.numpy() * (np.float32(448) / amax)))
    assert np.array_equal(scale.numpy(), amax / np.float32(448))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantized_is_within_half_a_step(normal, format, dtype):
    x = normal(3, 100, 300, dtype=dtype)
    data, scale = ops.quantize(x, format)
    back = dequantize(data, scale, format, torch.float64)
    step = dequantize(torch.ones_like(data, dtype=torch.float32), scale, format, torch.float64)
    bound = step / 2
    if format == "fp8":  # half of the spacing: 2^-4 relatively, 2^-10 steps below the normal numbers
        bound = torch.maximum(x.double().abs() * 2.0**-4, step * 2.0**-10)
    if format == "int8_block":  # +amax is 128 steps, and 127 is the largest
        bound = torch.where(data == 127, step, bound)
    # float32 rounds the quotient and the product: 127 steps move by 127 * 2^-23 of a step, or the scale by as much.
    assert ((back - x.double()).abs() <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e-30, 6e4])
def test_constant_rows_give_finite_numbers(format, value):
    x = torch.full((5, 130), value)
    back = dequantize(*quantize(x, format), format, torch.float32)
    # a saturated 128 is the worst, 1/128 of it; below the floor of amax all becomes zero
    assert (back - x).abs().max() <= max(abs(value) / 127, 1e-8)


@pytest.mark.parametrize("format", FORMATS)
def test_another_layout_quantizes_alike(normal, same, format):
    x = normal(40, 60).T
    result = quantize(x, format)
    assert all(t.is_contiguous() for t in result)
    same(result, quantize(x.contiguous(), format))


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_rounds_once_to_the_dtype(normal, format):
    data, scale = quantize(normal(70, 200), format)
    exact = dequantize(data, scale, format, torch.float64)
    assert torch.equal(dequantize(data, scale, format, torch.float32), exact.float())
    # 8 bits times 24 bits do not fit float32: at most that rounding lies before the one to bfloat16
    half = dequantize(data, scale, format, torch.bfloat16).double()
    assert ((half - exact).abs() <= exact.abs() * (2.0**-8 + 2.0**-23)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, format):
    x = normal(2, 3, 20)
    sound(ops.quantize.default, x, format)
    same(decomposed(ops.quantize.default, x, format), ops.quantize(x, format))


def test_an_unknown_format_is_refused(normal):
    for function in (ops.quantize, quantize):
        with pytest.raises(ValueError, match="int4"):
            function(normal(2, 2), "int4")
