"""Between videos and normalized latents, by Wan's VAE.

A video is (B, 3, F, H, W) in [-1, 1] with F = 4k + 1; its latent is (B, 16, 1 + (F - 1) / 4, H / 8, W / 8), and of
other channels and strides where the VAE's configuration says so (`configs.Geometry`). The
transformer works on z = (mu - mean) / std, with the channels' mean and std over the training videos from the VAE's
configuration and mu the mean of the posterior (nothing is sampled).
"""

from __future__ import annotations

from typing import Any

import torch


def _statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std, (1, z, 1, 1, 1) in float32."""

    def column(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1, 1)

    return column(vae.config.latents_mean), column(vae.config.latents_std)


@torch.no_grad()
def encode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """The normalized latent of a video, in float32."""
    parameter = next(vae.parameters())
    mu = vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae, mu.device)
    return (mu - mean) / std


@torch.no_grad()
def decode(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """The video of a normalized latent, in float32, clamped to [-1, 1]."""
    parameter = next(vae.parameters())
    mean, std = _statistics(vae, parameter.device)
    z = latent.to(parameter.device, torch.float32) * std + mean
    return vae.decode(z.to(parameter.dtype), return_dict=False)[0].float().clamp(-1.0, 1.0)


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """uint8 frames (B, F, H, W, 3) of a video (B, 3, F, H, W) in [-1, 1]."""
    return ((video + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
