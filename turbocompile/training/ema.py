"""Exponential moving averages of the weights.

    ema <- ema + (1 - beta) * (weight - ema)

beta is constant or, for the power EMA, (1 - 1 / (step + 1)) ** (gamma + 1). The width of a power EMA is a fixed share
of the steps so far, so that it forgets the initial weights (Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models", arXiv 2312.02696, section 3.1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from turbocompile.training.parallel import local


@functools.lru_cache
def power_gamma(width: float) -> float:
    """The exponent gamma of a power EMA whose standard deviation is `width` times the training's length.

    0 < width < 0.289. gamma is the largest real root of g^3 + 7 g^2 + (16 - width^-2) g + (12 - width^-2): a width of
    0.1 gives 6.94, a width of 0.05 gives 16.97.
    """
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * abs(root)))


class Ema:
    """The moving averages of some parameters, float32, sharded as the parameters are; they start as copies of these."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]
        # The weight 1 - beta is a tensor, so that a captured CUDA graph reads the weight of the present step.
        self.weight = torch.zeros((), device=self.parameters[0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Adds the present weights to the averages.

        An update takes three launches for all tensors, does not synchronize, and allocates one transient copy of the
        weights.
        """
        averages = [local(a) for a in self.averages]
        change = torch._foreach_sub([local(p.detach()) for p in self.parameters], averages)
        torch._foreach_mul_(change, self.weight)
        torch._foreach_add_(averages, change)
