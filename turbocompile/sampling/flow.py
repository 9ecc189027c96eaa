"""The sampler of models that are not distilled: diffusers' solvers of the flow-matching ODE, with guidance.

The loop is that of diffusers' WanPipeline, so that an engine gives the pipeline's numbers, except that the solver
always gets velocities in float32. The Euler solver returns the dtype of the velocity, and a state in bfloat16 would
lose 50 small steps to rounding. Guidance is classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.sampling import LOW_NOISE, TRAIN_TIMESTEPS, Denoise, Progress, choose_experts, draw_noise

SOLVERS = ("unipc", "euler")
# (x, timestep, expert, conditional) -> velocity; conditional: True for the prompt, False for the negative prompt
Conditioned = Callable[[torch.Tensor, torch.Tensor, str, bool], torch.Tensor]


def guided(denoise: Conditioned, guidance: float, low_noise: float | None = None) -> Denoise:
    """The velocity with classifier-free guidance: u + guidance (c - u), float32, as a function for a sampler.

    c is the velocity for the prompt, u the velocity for the negative prompt. The network is called twice a step, or
    once if guidance is 1, because the formula then gives c. low_noise: guidance of the low-noise expert; that of the
    other one where not given.
    """

    def velocity(x: torch.Tensor, timestep: torch.Tensor, expert: str) -> torch.Tensor:
        conditional = denoise(x, timestep, expert, True).float()
        scale = low_noise if low_noise is not None and expert == LOW_NOISE else guidance
        if scale == 1.0:
            return conditional
        unconditional = denoise(x, timestep, expert, False).float()
        return unconditional + scale * (conditional - unconditional)

    return velocity


def make_scheduler(kind: str, shift: float) -> Any:
    """diffusers' solver "unipc" (UniPC on the flow's sigmas) or "euler"; shift: moves the times towards noise.

    Raises UnsupportedError for another kind.
    """
    import diffusers

    if kind == "unipc":
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=int(TRAIN_TIMESTEPS),
            flow_shift=shift,
        )
    if kind == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(TRAIN_TIMESTEPS), shift=shift)
    raise UnsupportedError(f"there is no solver {kind!r}; choose one of {', '.join(SOLVERS)}")


@torch.no_grad()
def sample(
    denoise: Denoise,
    latents_shape: Sequence[int],
    *,
    generator: torch.Generator,
    kind: str,
    steps: int,
    shift: float,
    boundary: float | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Draws noise and solves the ODE: latents (B, C, T, H, W), float32, on the generator's device.

    latents_shape: (B, C, T, H, W). denoise: the model's velocity, possibly with guidance (`guided`). kind: "unipc" or
    "euler". shift: 3 for 480p and 5 for 720p in Wan. boundary: the time in [0, 1] below which "transformer_2" denoises;
    None if the model has one transformer. Raises UnsupportedError for another kind.
    """
    noise = draw_noise(latents_shape, generator)
    return solve(denoise, noise, kind=kind, steps=steps, shift=shift, boundary=boundary, progress=progress)


@torch.no_grad()
def solve(
    denoise: Denoise,
    noise: torch.Tensor,
    *,
    kind: str,
    steps: int,
    shift: float,
    boundary: float | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Solves the ODE from `noise` (B, C, T, H, W), float32: latents of the same shape; arguments as in `sample`."""
    scheduler = make_scheduler(kind, shift)
    scheduler.set_timesteps(steps, device=noise.device)
    scheduler.set_begin_index(0)
    x = noise
    limit = None if boundary is None else boundary * TRAIN_TIMESTEPS
    experts = choose_experts([float(t) for t in scheduler.timesteps], limit)
    for i, (timestep, expert) in enumerate(zip(scheduler.timesteps, experts, strict=True)):
        velocity = denoise(x, timestep.expand(x.shape[0]), expert).float()
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        if progress is not None:
            progress(i + 1, steps)
    return x
