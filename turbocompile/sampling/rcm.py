"""The sampler of rCM-distilled models: 1 to 4 steps, no guidance.

rCM trains in TrigFlow, x_t = cos(t) x_0 + sin(t) noise with t = atan(sigma), but the network computes the velocity of
rectified flow, x_r = (1 - r) x_0 + r noise with r = sin(t) / (sin(t) + cos(t)). The schedule is therefore written in
TrigFlow times, and the steps run in rectified-flow times (Zheng et al., "Large Scale Diffusion Distillation via
Score-Regularized Continuous-Time Consistency", arXiv 2510.08431):

    x_0 = x - r v(x, 1000 r)
    SDE:  x' = (1 - r') x_0 + r' noise'          ODE:  x' = x - (r - r') v

Three choices of the released sampler change the numbers, and this sampler makes them, too. The state is float64. The
network's timestep is rounded to bfloat16 (987.654 becomes 988). Noise is drawn in float32, also at the last step, where
it is multiplied by zero, so that the generator ends in the same state as that of the released sampler.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.sampling import (
    LOW_NOISE,
    TRAIN_TIMESTEPS,
    Denoise,
    Progress,
    SamplingWarning,
    choose_experts,
    draw_noise,
)

MAX_STEPS = 4


def flow_time(trig_time: float) -> float:
    """The rectified-flow time in [0, 1] of a TrigFlow time in [0, pi/2]."""
    sine, cosine = math.sin(trig_time), math.cos(trig_time)
    return sine / (sine + cosine)


def schedule(steps: int, sigma_max: float, mid_steps: Sequence[float]) -> list[float]:
    """The steps + 1 falling rectified-flow times, from sigma_max / (1 + sigma_max) to 0.

    sigma_max: 80 for text-to-video, 200 for Wan2.2's image-to-video. mid_steps: TrigFlow times, of which the first
    steps - 1 are used. Raises UnsupportedError unless steps is 1 to MAX_STEPS, there are enough mid steps, and the
    times fall.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise UnsupportedError(f"rcm takes 1 to {MAX_STEPS} steps, not {steps}; unipc and euler take more")
    if len(mid_steps) < steps - 1:
        raise UnsupportedError(f"{steps} steps of rcm need {steps - 1} mid steps, and there are {len(mid_steps)}")
    times = [math.atan(sigma_max), *mid_steps[: steps - 1], 0.0]
    if any(b >= a for a, b in itertools.pairwise(times)):
        raise UnsupportedError(f"the times of rcm must fall from atan(sigma_max) to 0, and they are {times}")
    return [flow_time(t) for t in times]


def network_timestep(time: float, batch: int, device: torch.device) -> torch.Tensor:
    """The timestep that the network gets at a time t in [0, 1]: 1000 t, rounded to bfloat16, as float32 (batch,)."""
    value = (torch.tensor(time, dtype=torch.float32) * TRAIN_TIMESTEPS).bfloat16().float()
    return value.to(device).expand(batch)


@torch.no_grad()
def sample(
    denoise: Denoise,
    latents_shape: Sequence[int],
    *,
    generator: torch.Generator,
    steps: int,
    sigma_max: float,
    mid_steps: Sequence[float],
    ode: bool = False,
    boundary: float | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Draws noise and runs the steps: latents (B, C, T, H, W), float32, on the generator's device.

    latents_shape: (B, C, T, H, W). steps, sigma_max, mid_steps: as in `schedule`, with its errors. ode: follows the ODE
    and draws no further noise. boundary: the rectified-flow time below which "transformer_2" denoises all later steps;
    None if the model has one transformer. Warns (SamplingWarning) if no step is below the boundary.
    """
    times = schedule(steps, sigma_max, mid_steps)
    experts = choose_experts(times[:-1], boundary)
    if boundary is not None and LOW_NOISE not in experts:
        warnings.warn(
            f"no step of these {steps} is below the boundary {boundary:g}, so that the low-noise expert is never used; "
            "take 3 or 4 steps",
            SamplingWarning,
            stacklevel=3,
        )
    x = draw_noise(latents_shape, generator).double() * times[0]
    for i, expert in enumerate(experts):
        now, then = times[i], times[i + 1]
        velocity = denoise(x, network_timestep(now, x.shape[0], x.device), expert).double()
        if ode:
            x = x - (now - then) * velocity
        else:
            x = (1.0 - then) * (x - now * velocity) + then * draw_noise(latents_shape, generator)
        if progress is not None:
            progress(i + 1, steps)
    return x.float()
