"""Residual sums and the norms behind them, against the separate operators and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops


def true_norm(r, scale, shift, weight, bias, eps, norm):
    r = r.double()
    r = r - r.mean(-1, keepdim=True) if norm == "layer" else r
    n = r / (r.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    n = n if weight is None else n * weight.double()
    n = n if bias is None else n + bias.double()
    n = n if scale is None else n * (1 + scale.double())
    return n if shift is None else n + shift.double()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    channels=st.integers(2, 40),
    norm=st.sampled_from(["layer", "rms"]),
    present=st.tuples(*[st.booleans()] * 4),
)
def test_formula_with_every_choice_of_operands(randn, batch, tokens, channels, norm, present):
    make = randn(channels)

    def wide(*shape):
        return make(*shape, dtype=torch.float64)

    x, y = wide(batch, tokens, channels), wide(batch, tokens, channels)
    gate = wide(batch, 1, channels) if present[0] else None
    scale, shift = (wide(batch, 1, channels), wide(channels)) if present[1] else (None, None)
    weight, bias = (wide(channels) if p else None for p in present[2:])
    residual, normed = ops.residual_norm(x, y, gate, scale, shift, weight, bias, 1e-6, norm)
    r = x + y if gate is None else x + gate * y
    torch.testing.assert_close(residual, r, rtol=0, atol=1e-14)
    torch.testing.assert_close(normed, true_norm(r, scale, shift, weight, bias, 1e-6, norm), rtol=1e-10, atol=1e-10)
    assert torch.equal(ops.gated_residual(x, y, gate), residual)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_float32_moves_by_less_than_a_millionth_from_the_separate_operators(normal, norm):
    x, y, gate, scale, shift = normal(2, 9, 1536), normal(2, 9, 1536), *(normal(2, 1, 1536) for _ in "abc")
    weight = normal(1536)
    r = x + gate * y
    n = F.layer_norm(r, (1536,), weight, None, 1e-6) if norm == "layer" else F.rms_norm(r, (1536,), weight, 1e-6)
    separate = n * (1 + scale) + shift
    residual, normed = ops.residual_norm(x, y, gate, scale, shift, weight, None, 1e-6, norm)
    assert (residual - r).abs().max() <= 1e-6 * r.abs().max()
    assert (normed - separate).abs().max() <= 1e-6 * separate.abs().max()


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_reads_the_residual_as_it_is_stored(normal, unit, dtype, norm):
    x, y = normal(2, 9, 1536, dtype=dtype), normal(2, 9, 1536, dtype=dtype)
    gate, scale, shift = (normal(2, 1, 1536) for _ in "abc")
    residual, normed = ops.residual_norm(x, y, gate, scale, shift, None, None, 1e-6, norm)
    assert residual.dtype == normed.dtype == dtype
    for got, expected in (
        (residual, x.double() + gate.double() * y.double()),
        (normed, true_norm(residual, scale, shift, None, None, 1e-6, norm)),
    ):  # float32 inside, within 1e-6 of the largest, then one rounding
        error = (got.double() - expected).abs()
        assert (error <= 1e-6 * expected.abs().max() + unit[dtype] * expected.abs()).all()


def test_a_float32_residual_takes_a_bfloat16_update(normal):
    x, y = normal(2, 3, 64), normal(2, 3, 64, dtype=torch.bfloat16)
    residual, normed = ops.residual_norm(x, y, None, None, None, None, None, 1e-6, "rms")
    assert residual.dtype == normed.dtype == torch.float32
    assert torch.equal(residual, x + y)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_rows_stay_finite(value, norm):
    x = torch.full((1, 3, 64), value, dtype=torch.bfloat16)
    residual, normed = ops.residual_norm(x, x, None, None, None, None, None, 1e-6, norm)
    assert residual.isfinite().all()
    assert normed.isfinite().all()


@pytest.mark.parametrize("format", ["int8", "int8_block", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_is_quantize_of_the_op(normal, same, dtype, format):
    x, y, gate = normal(2, 70, 200, dtype=dtype), normal(2, 70, 200, dtype=dtype), normal(2, 1, 200)
    args = (x, y, gate, None, None, normal(200), normal(200), 1e-6, "layer")
    residual, normed = ops.residual_norm(*args)
    same(ops.residual_norm_quantize(*args, format), (residual, *ops.quantize(normed, format)))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, norm):
    x = normal(2, 16, 5).transpose(1, 2)  # outputs are contiguous, whatever x is
    y, gate = normal(2, 5, 16), normal(2, 1, 16)
    full = (x, y, gate, normal(2, 1, 16), normal(2, 1, 16), normal(16), None, 1e-6, norm)
    bare = (x, y, None, None, None, None, None, 1e-6, norm)
    for args in (full, bare):
        for op, rest in (
            (ops.gated_residual, args[:3]),
            (ops.residual_norm, args),
            (ops.residual_norm_quantize, (*args, "int8")),
        ):
            sound(op.default, *rest)
            same(decomposed(op.default, *rest), op(*rest))


@pytest.mark.parametrize("at", ["y", "gate", "weight", "norm"])
def test_what_does_not_fit_is_refused_by_reference_and_fake(normal, at):
    args = {"x": normal(2, 5, 16), "y": normal(2, 5, 16), "gate": None, "scale": None, "shift": None}
    args |= {"weight": None, "bias": None, "eps": 1e-6, "norm": "rms"}
    args[at] = {"y": normal(2, 1, 16), "gate": normal(3, 1, 16), "weight": normal(2, 16), "norm": "group"}[at]
    for device in ("cpu", "meta"):
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        with pytest.raises(ValueError):
            ops.residual_norm(**moved)
