"""The scale that smooths the input of 8-bit linears in a layer (SmoothQuant), from the layer's inputs and weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), divided by its geometric mean, rounded to a power of two

j: a channel of the linears' input. max|X_j|: over all recorded inputs and tokens. max|W_j|: over the rows of all
linears that share the input. A power of two changes only the exponent of a weight, so that folding s into it loses no
bit. Of several alphas the one with the smallest worst error is taken. It must bring the sites within their budget, and
lower the error by MARGIN, or by LEAST where the sites were over their budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MARGIN = 0.1  # of the error: the choice of recorded inputs moves an error by about as much
LEAST = 0.02
OCTAVES = 12  # s is between 2^-12 and 2^12, so that 16-bit dtypes hold the quotients
NO_HELP = f"that lowers its error by less than {MARGIN:.0%}, or not below its budget"


@dataclass(frozen=True)
class Scale:
    """The scale of one layer. alpha None: all ones."""

    s: torch.Tensor
    alpha: float | None = None


def scale_of(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s (K,) in float32. x, weight: (K,), the largest magnitude of each channel. s is 1 where one of the two is 0."""
    known = (x > 0) & (weight > 0)
    octaves = alpha * torch.log2(x.double()) - (1 - alpha) * torch.log2(weight.double())
    octaves = torch.where(known, octaves, torch.zeros_like(octaves))
    octaves = octaves - octaves.sum() / known.sum().clamp(min=1)
    octaves = torch.where(known, octaves.round().clamp(-OCTAVES, OCTAVES), torch.zeros_like(octaves))
    return torch.exp2(octaves).float()


def best_scale(
    x: torch.Tensor,
    weight: torch.Tensor,
    alphas: Sequence[float],
    plain: Mapping[str, float],
    budget: float,
    errors: Callable[[torch.Tensor], Mapping[str, float]],
) -> Scale:
    """The scale with the smallest worst error; a scale of ones where none lowers the error enough.

    x, weight: (K,), the largest magnitude of each channel. plain: site -> relative L1 without a scale. errors: gives
    the same with a scale (K,).
    """
    top = max(plain.values())
    best = Scale(torch.ones_like(x, dtype=torch.float32))
    least = top
    for alpha in alphas:
        s = scale_of(x, weight, alpha)
        found = max(errors(s).values())
        if found < least:
            best, least = Scale(s, alpha), found
    helps = least <= budget and least <= (1 - (MARGIN if top <= budget else LEAST)) * top
    return best if helps else Scale(torch.ones_like(best.s))
