"""Samplers, which turn noise into a latent video: `rcm` for distilled models, `flow` for models that are not distilled.

A sampler knows the model only as a function `denoise(x, timestep, expert) -> velocity`:

    x         the state (B, C, T, H, W), in the sampler's dtype (float64 or float32); `denoise` casts it to the model's
    timestep  (B,), between 0 and 1000, on the device of x
    expert    "transformer", or "transformer_2" below the boundary between two experts (Wan2.2)
    velocity  d x / d t of x_t = (1 - t) x_0 + t noise, in the shape of x, any floating dtype
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]
Progress = Callable[[int, int], None]  # called after each step with the steps done and the steps in all

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"
TRAIN_TIMESTEPS = 1000.0  # the network's timestep at time t = 1; it gets 1000 t for a time t in [0, 1]


class SamplingWarning(UserWarning):
    """The sampler runs, but its videos will be bad, because the model was not trained for this sampler."""


def choose_experts(times: Sequence[float], boundary: float | None) -> list[str]:
    """The expert of each step: the high-noise expert until a time is below `boundary`, then the low-noise expert.

    boundary: in the unit of `times`; None if the model has one transformer.
    """
    chosen: list[str] = []
    low = False
    for time in times:
        low = low or (boundary is not None and time < boundary)
        chosen.append(LOW_NOISE if low else HIGH_NOISE)
    return chosen


def draw_noise(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) noise of a shape, float32, on the generator's device.

    The same seed gives the same numbers on the same kind of device.
    """
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
