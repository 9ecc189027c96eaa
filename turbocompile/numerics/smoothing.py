"""Which scale smooths the input of 8-bit linears in a layer (SmoothQuant), from what the layer is given.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), divided by its geometric mean, rounded to a power of two

j: a channel of the linears' input. X: over all recorded inputs and tokens; W: over the rows of all linears that share
the input. A power of two changes the exponent of a weight and nothing else, so that folding s loses no bit. Of several
alphas the one is taken whose worst error is smallest; it must leave the sites within their budget, and help by MARGIN,
or by LEAST where they were over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MARGIN = 0.1  # of the error: below that an error moves with the inputs that happened to be recorded
LEAST = 0.02
OCTAVES = 12  # s is within 2^-12 and 2^12: 16-bit types hold what it divides
NO_HELP = f"that lowers its error by less than {MARGIN:.0%}, or not below its budget"


@dataclass(frozen=True)
class Scale:
    """The scale of one layer. alpha None: all ones."""

    s: torch.Tensor
    alpha: float | None = None


def scale_of(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s (K,) in float32, of the largest magnitudes of the channels; 1 for channels that are zero on one side."""
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
    """The scale that helps most; ones where none helps.

    x, weight: the largest magnitude of each channel. plain: site -> relative L1 without a scale. errors: the same with
    one.
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
