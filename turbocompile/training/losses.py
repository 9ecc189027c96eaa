"""Objectives: flow matching for the diffusion transformer, reconstruction and KL for the autoencoder.

Flow matching is that of rectified flow (Liu et al., arXiv 2209.03003), which Wan and SD3 use. With data x0, noise
e ~ N(0, 1) and a time t in (0, 1):

    x_t = (1 - t) x0 + t e,        the network learns        v(x_t, 1000 t) = dx_t/dt = e - x0

A time u is drawn from a uniform or a logit-normal distribution (Esser et al., arXiv 2403.03206, section 3.1), and is
then shifted towards noise, further for larger pictures: t = shift u / (1 + (shift - 1) u).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbocompile.errors import RecipeError

TIMESTEPS = 1000.0  # the network's timestep at time t = 1, as in diffusers


def draw_times(
    count: int,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
    logit_normal: bool = False,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Draws times t, float32 (count,), on the generator's device.

    u is uniform, or, with logit_normal, sigmoid(mean + std N(0, 1)); t is u shifted. Raises RecipeError unless shift
    and std are above 0.
    """
    if shift <= 0 or std <= 0:
        raise RecipeError(f"shift and std must be greater than 0, not {shift} and {std}")
    if logit_normal:
        u = torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=generator.device))
    else:
        u = torch.rand(count, generator=generator, device=generator.device)
    return shift * u / (1.0 + (shift - 1.0) * u)


def flow_matching_batch(
    latents: torch.Tensor,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
    logit_normal: bool = False,
    mean: float = 0.0,
    std: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Draws times and noise for `latents` (B, ...), on the generator's device, where the latents must be, too.

    Returns float32 `latents` (B, ...), `noise` (B, ...), `noisy` = x_t (B, ...) and `timestep` = 1000 t (B,). The draws
    depend only on the generator and the shape; the times are drawn before the noise. Raises RecipeError as draw_times.
    """
    t = draw_times(len(latents), generator, shift=shift, logit_normal=logit_normal, mean=mean, std=std)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    latents = latents.float()
    wide = t.reshape(-1, *[1] * (latents.ndim - 1))
    noisy = (1.0 - wide) * latents + wide * noise
    return {"latents": latents, "noise": noise, "noisy": noisy, "timestep": TIMESTEPS * t}


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The mean of (velocity - (noise - latents))^2 over all elements, a float32 scalar; all three are (B, ...).

    Raises RecipeError if velocity and latents differ in shape.
    """
    _same_shape("velocity", velocity, latents)
    return F.mse_loss(velocity.float(), noise.float() - latents.float())


def vae_loss(
    reconstruction: torch.Tensor,
    video: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    *,
    kl_weight: float = 1e-6,
    l1_weight: float = 1.0,
    mse_weight: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An autoencoder's loss and its parts, float32 scalars, each a mean over elements.

    The loss is l1_weight |r - x| + mse_weight (r - x)^2 + kl_weight KL(N(mean, exp(logvar)) || N(0, 1)), where the KL
    of an element is (mean^2 + exp(logvar) - 1 - logvar) / 2 nats (Kingma and Welling, arXiv 1312.6114, appendix B).
    reconstruction r and video x have one shape (B, ...), mean and logvar another shape. Returns the loss, and `l1`,
    `mse`, `kl` by name. Raises RecipeError if the shapes differ.
    """
    _same_shape("reconstruction", reconstruction, video)
    _same_shape("logvar", logvar, mean)
    difference = reconstruction.float() - video.float()
    mean, logvar = mean.float(), logvar.float()
    parts = {
        "l1": difference.abs().mean(),
        "mse": difference.square().mean(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(),
    }
    return l1_weight * parts["l1"] + mse_weight * parts["mse"] + kl_weight * parts["kl"], parts


def _same_shape(name: str, value: torch.Tensor, other: torch.Tensor) -> None:
    if value.shape != other.shape:  # broadcasting would average over pairs that do not belong together
        raise RecipeError(
            f"{name} has shape {tuple(value.shape)}, and its target {tuple(other.shape)}; make them equal"
        )
