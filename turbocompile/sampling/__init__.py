"""From noise to a latent video: `rcm` for distilled models, `flow` for teachers.

A sampler knows nothing of models. It calls `denoise(x, timestep, expert) -> velocity`:

    x         the state (B, C, T, H, W), in the sampler's dtype (float64 or float32); the callee casts it
    timestep  (B,), in units of 1000 training timesteps, on the device of x
    expert    "transformer", or "transformer_2" below the boundary between two experts (Wan2.2)
    velocity  d x / d t of x_t = (1 - t) x_0 + t noise, in the shape of x, any floating dtype
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]
Progress = Callable[[int, int], None]  # called after each step: steps done, steps in all

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"
TRAIN_TIMESTEPS = 1000.0  # a network is given 1000 t for a time t in [0, 1]


class SamplingWarning(UserWarning):
    """The sampler runs, but its result will be bad, because the model was not made for it."""


def choose_experts(times: Sequence[float], boundary: float | None) -> list[str]:
    """The expert of each step: the high-noise one until a time is below `boundary`, from there on the low-noise one.

    boundary: in the unit of `times`; None where there is one transformer.
    """
    chosen: list[str] = []
    low = False
    for time in times:
        low = low or (boundary is not None and time < boundary)
        chosen.append(LOW_NOISE if low else HIGH_NOISE)
    return chosen


def draw_noise(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) in float32 on the generator's device: the same seed gives the same numbers on one kind of device."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
