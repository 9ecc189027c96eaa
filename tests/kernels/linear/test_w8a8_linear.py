"""8-bit linears: bit by bit against numpy integers, and their error on Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize, quantize


def bfloat16(x):
    return torch.from_numpy(x).bfloat16()


def tiles_by_hand(data, scale, weight, weight_scale):
    """int32 sums over 128 of K; the scales' product in float32; float32 sums, k upwards."""
    (m, k), n = data.shape, weight.shape[0]
    total = np.zeros((m, n), np.float32)
    for kb in range(k // 128):
        at = slice(128 * kb, 128 * kb + 128)
        integers = data[:, at].astype(np.int32) @ weight[:, at].astype(np.int32).T
        for mb in range(scale.shape[0]):
            for nb in range(weight_scale.shape[0]):
                tile = slice(128 * mb, 128 * mb + 128), slice(128 * nb, 128 * nb + 128)
                total[tile] += integers[tile].astype(np.float32) * (scale[mb, kb] * weight_scale[nb, kb])
    return total


@settings(max_examples=12, deadline=None)
@given(m=st.integers(1, 300), n=st.integers(1, 40), k=st.integers(1, 4), biased=st.booleans())
def test_tiles_are_summed_as_the_released_kernel_sums_them(randn, m, n, k, biased):
    make = randn(m)
    data, scale = quantize(make(m, 128 * k), "int8_block")
    weight, weight_scale = quantize(make(8 * n, 128 * k) * 0.02, "int8_block")
    bias = make(8 * n, dtype=torch.bfloat16) if biased else None
    y = ops.w8a8_linear(data, scale, weight, weight_scale, bias, "int8_block", torch.bfloat16)
    expected = bfloat16(tiles_by_hand(*(t.numpy() for t in (data, scale, weight, weight_scale))))
    assert torch.equal(y, expected if bias is None else expected + bias)


def test_rows_beyond_one_chunk_meet_their_own_scales(normal):
    data, scale = quantize(normal(3, 700, 128), "int8_block")  # 2,100 rows in 17 tiles
    weight, weight_scale = quantize(normal(16, 128), "int8_block")
    y = ops.w8a8_linear(data, scale, weight, weight_scale, None, "int8_block", torch.float32)
    parts = (data.reshape(2100, 128).numpy(), scale.numpy(), weight.numpy(), weight_scale.numpy())
    assert np.array_equal(y.reshape(2100, 16).numpy(), tiles_by_hand(*parts))


@pytest.mark.parametrize("k", [64, 1024, 1025, 13824])
def test_integer_sums_are_exact_at_any_depth(k):
    generator = torch.Generator().manual_seed(k)
    data, weight = (torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8) for n in (3, 5))
    data[0], weight[0] = -128, -128  # the largest sum there is, 2^14 k
    one = torch.ones(3, 1), torch.ones(5, 1)
    y = ops.w8a8_linear(data, one[0], weight, one[1], None, "int8", torch.float64)
    assert torch.equal(y, (data.long() @ weight.long().T).double())


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_after_scales_and_bias(normal, unit, format, dtype):
    x, w, bias = normal(2, 9, 300), normal(20, 300), normal(20)
    (data, scale), (weight, weight_scale) = quantize(x, format), quantize(w, format)
    y = ops.w8a8_linear(data, scale, weight, weight_scale, bias, format, dtype)
    assert y.dtype == dtype
    a, b = (dequantize(*q, format, torch.float64) for q in ((data, scale), (weight, weight_scale)))
    # float32 inside: 300 products summed are off by at most 300 units of the sum of their magnitudes, one for the rest
    inner = unit[torch.float64 if dtype == torch.float64 else torch.float32] * 305 * (a.abs() @ b.abs().T + bias.abs())
    expected = a @ b.T + bias
    assert ((y.double() - expected).abs() <= inner + unit[dtype] * (expected.abs() + inner)).all()


@pytest.mark.parametrize(
    ("format", "low", "high"), [("int8_block", 0.0125, 0.014), ("int8", 0.010, 0.013), ("fp8", 0.033, 0.041)]
)
def test_error_on_gaussian_data_is_the_published_one(normal, format, low, high):
    """x N(0,1), w N(0, 0.02^2), K = 1536: relative error 1.325% for tiles, 1.15% per token, 3.7% in e4m3."""
    x, w = normal(512, 1536), normal(384, 1536) * 0.02
    y = ops.w8a8_linear(*quantize(x, format), *quantize(w, format), None, format, torch.float32).double()
    truth = x.double() @ w.double().T
    assert low < (y - truth).norm() / truth.norm() < high
    assert low < (y - truth).abs().sum() / truth.abs().sum() < high
    if format == "int8_block":
        assert torch.cosine_similarity(y.flatten(), truth.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_zero_rows_give_the_bias(normal, format):
    bias = normal(16)
    x = torch.zeros(2, 3, 128)
    y = ops.w8a8_linear(*quantize(x, format), *quantize(normal(16, 128), format), bias, format, torch.float32)
    assert torch.equal(y, bias.expand(2, 3, 16))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, format, biased):
    bias = normal(24) if biased else None
    args = (*quantize(normal(2, 70, 256), format), *quantize(normal(24, 256), format), bias, format, torch.float32)
    sound(ops.w8a8_linear.default, *args)
    y = ops.w8a8_linear(*args)
    # int8 and fp8 are the same matmul; tiles sum 256 products in another order: either is within 260 units of the sum
    # of their magnitudes
    a, b = (dequantize(*q, format, torch.float32).abs() for q in (args[:2], args[2:4]))
    bound = 2 * 260 * 2.0**-24 * (a @ b.T + 4) if format == "int8_block" else 0
    assert ((decomposed(ops.w8a8_linear.default, *args) - y).abs() <= bound).all()


def test_what_does_not_fit_is_refused_by_reference_and_fake(normal):
    x, w = quantize(normal(4, 128), "int8"), quantize(normal(8, 128), "int8")
    tiles = quantize(normal(8, 100), "int8_block")
    cases = [
        ((*x, *w, None, "fp8"), "fp8 does not fit"),
        ((*x, w[0], w[1][:7], None, "int8"), "weight_scale"),
        ((x[0][:, :64], x[1], *w, None, "int8"), "64 channels"),
        ((*x, *w, torch.zeros(7), "int8"), "bias"),
        ((*quantize(normal(4, 100), "int8_block"), *tiles, None, "int8_block"), "K % 128"),
    ]
    for args, words in cases:
        for device in ("cpu", "meta"):
            moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
            with pytest.raises(ValueError, match=words):
                ops.w8a8_linear(*moved, torch.float32)
