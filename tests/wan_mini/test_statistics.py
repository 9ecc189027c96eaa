"""Shares, means, PSNR and SSIM against known values and independent definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbocompile.wan_mini.statistics import PSNR_OF_EQUAL, Share, mean_of, psnr, ssim, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998), table I,
        # method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_has_the_published_ends(right, total, low, high):
    found = wilson(right, total)
    assert found == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_interval_holds_the_share_and_is_symmetric(total, share):
    right = round(share * total)
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_nothing_of_nothing_is_unknown():
    assert wilson(0, 0) == (0.0, 1.0)
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).to_dict()["share"] is None
    assert Share(3, 4).to_dict()["share"] == 0.75


def test_a_mean_has_the_interval_of_its_standard_error():
    """Of 400 normal figures: +- 1.96 sigma / sqrt(n), within a tenth of it (2,000 resamples and the sample's sigma)."""
    x = np.random.default_rng(0).normal(30.0, 2.0, 400)
    found = mean_of(list(x))
    half = 1.96 * 2.0 / 20
    assert found.value == pytest.approx(x.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)
    assert found == mean_of(list(x))
    alone = mean_of([7.0])
    assert (alone.value, alone.low, alone.high, alone.count) == (7.0, 7.0, 7.0, 1)


# ------------------------------------------------------------------------------------------------------- PSNR and SSIM


def frames(seed: int, height: int = 24, width: int = 31) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, height, width, 3), generator=generator).to(torch.uint8)


def test_psnr_is_that_of_its_definition():
    a = frames(0)
    b = a.clone()
    b[..., 0] = torch.where(b[..., 0] > 250, b[..., 0] - 5, b[..., 0] + 5)  # a mean squared error of 25 / 3
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 * 3 / 25), abs=1e-5)
    assert psnr(a, a) == PSNR_OF_EQUAL
    one = a.clone()
    one[0, 0, 0, 0] ^= 1
    assert psnr(a, one) < PSNR_OF_EQUAL


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, window by window, in float64."""
    k = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(k, k) / np.outer(k, k).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    count, height, width, channels = a.shape
    for f in range(count):
        for c in range(channels):
            for y in range(height - 10):
                for x in range(width - 10):
                    p, q = (v[f, y : y + 11, x : x + 11, c].astype(np.float64) for v in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("noise", [4, 40, 255])
def test_ssim_is_that_of_its_definition(noise):
    """The variances are differences of squares: up to 255^2 * 2^-23 * 11 off, of c2 = 58 at least."""
    a = frames(0)
    b = (a.float() + noise * (torch.rand(a.shape, generator=torch.Generator().manual_seed(1)) - 0.5)).clamp(0, 255)
    b = b.round().to(torch.uint8)
    assert ssim(a, b) == pytest.approx(plain_ssim(a.numpy(), b.numpy()), abs=255**2 * 2**-23 * 11 / 58)


def test_ssim_of_equals_is_one_and_of_a_shift_of_brightness_is_the_luminance_term():
    flat = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(frames(0), frames(0)) == pytest.approx(1.0, abs=1e-6)
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-4)
    assert ssim(frames(0), frames(1)) < 0.1
