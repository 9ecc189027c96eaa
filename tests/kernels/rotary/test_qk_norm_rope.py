"""RMSNorm, heads and rotation against the three steps written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops


def truth(x, weight, eps, per_head, heads, cos, sin, grid, interleaved):
    x = x.double()
    x = x.reshape(*x.shape[:2], heads, -1) if per_head else x
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight.double()
    x = x.reshape(*x.shape[:2], heads, -1)
    if not cos:
        return x
    return ops.rope(x, [c.double() for c in cos], [s.double() for s in sin], grid, interleaved)


def case(make, batch, grid, heads, half, per_head, weighted, turned, dtype):
    tokens = grid[0] * grid[1]
    x = make(batch, tokens, heads * 2 * half, dtype=dtype)
    weight = make(2 * half if per_head else heads * 2 * half) + 1 if weighted else None
    widths = (half - half // 3, half // 3)
    tables = [[make(n, d) for n, d in zip(grid, widths, strict=True)] for _ in "cs"] if turned else [[], []]
    return (x, weight, 1e-6, per_head, heads, *tables, grid if turned else [], True)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    heads=st.integers(1, 3),
    half=st.integers(1, 9),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_the_three_steps_in_one(randn, batch, grid, heads, half, flags):
    per_head, weighted, turned, interleaved = flags
    args = case(randn(half), batch, list(grid), heads, half, per_head, weighted, turned, torch.float64)
    args = (*args[:-1], interleaved)
    y = ops.qk_norm_rope(*args)
    assert y.is_contiguous()
    assert y.shape == (batch, grid[0] * grid[1], heads, 2 * half)
    torch.testing.assert_close(y, truth(*args), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_to_the_dtype_of_x(normal, unit, dtype, per_head):
    args = case(normal, 2, [3, 5], 3, 64, per_head, True, True, dtype)
    expected = truth(*args)
    # Float32 inside: a mean of squares, a root, three products, a sum, within 1e-6 of the largest. Then one rounding.
    error = (ops.qk_norm_rope(*args).double() - expected).abs()
    assert (error <= 1e-6 * expected.abs().max() + unit[dtype] * expected.abs()).all()


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_zero_and_large_rows_stay_finite(normal, scale):
    args = case(normal, 1, [2, 2], 2, 4, False, True, True, torch.bfloat16)
    assert ops.qk_norm_rope(args[0] * scale, *args[1:]).isfinite().all()


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, per_head, turned):
    args = case(normal, 2, [2, 3], 2, 4, per_head, True, turned, torch.float32)
    sound(ops.qk_norm_rope.default, *args)
    same(decomposed(ops.qk_norm_rope.default, *args), ops.qk_norm_rope(*args))


@pytest.mark.parametrize(("heads", "width", "words"), [(3, 16, "3 heads"), (2, 8, "vector of 16")])
def test_what_does_not_fit_is_refused_by_reference_and_fake(normal, heads, width, words):
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=words):
            ops.qk_norm_rope(
                normal(1, 4, 16).to(device), normal(width).to(device), 1e-6, False, heads, [], [], [], True
            )
