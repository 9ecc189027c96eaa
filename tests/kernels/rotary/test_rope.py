"""Rotary embedding against complex products token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops
from turbocompile.kernels.rotary.rope import reference


def tables(grid, widths, dtype=torch.float32):
    """Angles position * 10000^(-i/width), as cos and sin a table an axis."""
    angles = [
        torch.outer(torch.arange(n, dtype=torch.float64), 1e4 ** (-torch.arange(d, dtype=torch.float64) / max(d, 1)))
        for n, d in zip(grid, widths, strict=True)
    ]
    return [a.cos().to(dtype) for a in angles], [a.sin().to(dtype) for a in angles]


def truth(x, cos, sin, grid, interleaved):
    """Pairs as complex numbers, turned one token at a time, in float64."""
    x, half = x.double(), x.shape[-1] // 2
    y = torch.empty_like(x)
    for token, place in enumerate(itertools.product(*(range(n) for n in grid))):
        turn = torch.cat([torch.complex(c[i].double(), s[i].double()) for c, s, i in zip(cos, sin, place, strict=True)])
        first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
        z = torch.complex(x[:, token, :, first], x[:, token, :, second]) * turn
        y[:, token, :, first], y[:, token, :, second] = z.real, z.imag
    return y


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_pairs_turn_by_their_angle(normal, unit, dtype, interleaved):
    grid = (2, 3, 5)
    cos, sin = tables(grid, (22, 21, 21), torch.float64 if dtype == torch.float64 else torch.float32)
    x = normal(2, 30, 3, 128, dtype=dtype)
    y = ops.rope(x, cos, sin, grid, interleaved)
    assert y.dtype == dtype
    # Two products and their sum, each rounded, of numbers no longer than the pair: 4 roundings; then that to x's dtype.
    inner = unit[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = (4 * inner + unit[dtype]) * math.sqrt(2) * x.double().abs().max()
    assert (y.double() - truth(x, cos, sin, grid, interleaved)).abs().max() <= bound


@settings(max_examples=40, deadline=None)
@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    widths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    interleaved=st.booleans(),
)
def test_any_grid_any_split_of_the_head(randn, grid, widths, batch, heads, interleaved):
    widths = [widths[0] + 1, *widths[1:]][: len(grid)]
    cos, sin = tables(grid, widths, torch.float64)
    x = randn(sum(grid))(batch, math.prod(grid), heads, 2 * sum(widths), dtype=torch.float64)
    torch.testing.assert_close(
        ops.rope(x, cos, sin, grid, interleaved), truth(x, cos, sin, grid, interleaved), rtol=0, atol=1e-14
    )


def test_a_view_of_another_layout_turns_alike_and_comes_out_contiguous(normal):
    cos, sin = tables((4, 3), (4, 4))
    x = normal(2, 5, 12, 16).transpose(1, 2)
    y = ops.rope(x, cos, sin, (4, 3), True)
    assert y.is_contiguous()
    assert torch.equal(y, ops.rope(x.contiguous(), cos, sin, (4, 3), True))


def test_positions_that_turn_alike_keep_scores():
    """q.k after rotation depends on the distance alone: the property rotary embedding exists for."""
    cos, sin = tables((9,), (8,), torch.float64)
    q, k = torch.ones(1, 9, 1, 16, dtype=torch.float64), torch.arange(16.0, dtype=torch.float64).expand(1, 9, 1, 16)
    q, k = (ops.rope(t, cos, sin, (9,), True)[0, :, 0] for t in (q, k))
    scores = q @ k.T
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [True, False])
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, same, interleaved):
    cos, sin = tables((2, 3), (3, 5))
    args = (normal(2, 6, 2, 16, dtype=torch.bfloat16), cos, sin, (2, 3), interleaved)
    sound(ops.rope.default, *args)
    same(decomposed(ops.rope.default, *args), ops.rope(*args))


@pytest.mark.parametrize(
    ("grid", "widths", "shape", "words"),
    [
        ((2, 3), (3, 5), (1, 7, 1, 16), "7 tokens"),
        ((2, 3), (3, 4), (1, 6, 1, 16), "7 columns"),
        ((2, 3, 1), (3, 5), (1, 6, 1, 16), "3 axes"),
        ((3, 2), (3, 5), (1, 6, 1, 16), "axis 0"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_reference_and_fake(normal, grid, widths, shape, words):
    cos, sin = tables((2, 3), widths)
    x = normal(*shape)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=words):
            ops.rope(x.to(device), [c.to(device) for c in cos], [s.to(device) for s in sin], grid, True)


def test_a_gradient_is_refused_in_one_sentence(normal):
    from turbocompile.errors import UnsupportedError

    cos, sin = tables((2,), (4,))
    y = ops.rope(normal(1, 2, 1, 8).requires_grad_(), cos, sin, (2,), True)
    with pytest.raises(UnsupportedError, match="turbocompile::rope has no gradient"):
        y.sum().backward()


def test_reference_is_the_op(normal):
    cos, sin = tables((2,), (4,))
    x = normal(1, 2, 1, 8)
    assert torch.equal(reference(x, cos, sin, (2,), False), ops.rope(x, cos, sin, (2,), False))
