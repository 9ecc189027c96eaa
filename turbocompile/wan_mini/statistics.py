"""Figures of quality with their confidence intervals: shares, means over videos, PSNR, SSIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

RESAMPLES = 2000  # how many resamples a bootstrap draws
# Two videos of 33 x 256 x 256 that differ least, by one in one value, have 10 log10(255^2 * 33 * 256 * 256 * 3) = 116
# dB.
PSNR_OF_EQUAL = 120.0


@dataclass(frozen=True)
class Share:
    """A share: `right` of `total` videos."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """right / total; NaN if total is 0."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "right": self.right,
            "total": self.total,
            "share": self.value if self.total else None,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True)
class Mean:
    """A mean over `count` videos, and its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.value, "low": self.low, "high": self.high, "videos": self.count}


def wilson(right: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval (low, high) of a share (E. B. Wilson, JASA 22, 1927); z: 1.96 for 95 %; (0, 1) if total is 0.

    Unlike share +- z sd, this interval stays between 0 and 1, and does not shrink to a point at a share of 0 or 1.
    """
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    # At shares of 0 and 1 the formula gives 0 and 1 up to rounding, so that the exact value stands here.
    return (middle - half if right else 0.0), (middle + half if right < total else 1.0)


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one figure, each of one video, with an interval by percentile bootstrap (2,000 seeded
    resamples).
    """
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = x[torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Mean(float(x.mean()), low, high, len(x))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """The peak signal-to-noise ratio, in dB, of two uint8 videos of one shape: 10 log10(255^2 / MSE) over all values.

    120 dB if the videos are equal.
    """
    error = float((a.float() - b.float()).square().mean(dtype=torch.float64))
    return 10 * math.log10(255.0**2 / error) if error else PSNR_OF_EQUAL


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """The structural similarity of two uint8 videos (F, H, W, 3), as the mean over frames, channels and windows.

    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE TIP 13 (2004), equation 13: Gaussian windows of 11 x 11 with sigma 1.5 that lie within the frame,
    K1 = 0.01, K2 = 0.03, L = 255. The paper compares grey images; here each channel counts as a grey image.
    """
    x, y = (v.permute(0, 3, 1, 2).flatten(0, 1)[:, None].float() for v in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _window_mean(x), _window_mean(y)
    vx = _window_mean(x * x) - mx * mx
    vy = _window_mean(y * y) - my * my
    vxy = _window_mean(x * y) - mx * my
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(index.mean(dtype=torch.float64))


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    """The Gaussian means (N, 1, H - 10, W - 10) of x (N, 1, H, W), float32.

    They are computed as sums of shifted copies, because a convolution on a GPU would round x to TF32's 11 bits, and
    variances are differences of such means.
    """
    weights = [math.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11)]
    for axis in (2, 3):
        length = x.shape[axis] - 10
        x = sum((w / sum(weights) * x.narrow(axis, k, length) for k, w in enumerate(weights)), torch.zeros(()).to(x))
    return x
