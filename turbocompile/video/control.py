"""VACE: the control that its blocks read beside the noise, made of a video, a mask and reference images.

Its channels are two latents and a mask: of the pixels that stay (mask below a half), of those that are made anew, and
the mask of each latent's pixels, 8 x 8 of them with Wan2.1's VAE. Reference images are latent frames before the video.
The numbers are those of diffusers' WanVACEPipeline, for a video of the engine's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from turbocompile.recipe.presets import vae_strides
from turbocompile.recipe.schema import Shape
from turbocompile.video import vae as wan_vae
from turbocompile.video.given import Given
from turbocompile.video.image import image_tensor


@torch.no_grad()
def control_condition(vae: Any, given: Given, size: Shape, device: torch.device) -> torch.Tensor:
    """(1, 2 z + stride ** 2, references + T, H, W) in float32, for a video of a size: the latent's T, H and W.

    Without a control all pixels are made anew.
    """
    pixels = video_tensor(given.control, size).to(device)
    mask = mask_tensor(given.mask, size).to(device)
    anew = (mask > 0.5).float()
    latents = torch.cat([wan_vae.encode(vae, pixels * (1 - anew)), wan_vae.encode(vae, pixels * anew)], dim=1)
    for image in given.references:
        one = wan_vae.encode(vae, fitted(image, size).unsqueeze(2).to(device))
        latents = torch.cat([torch.cat([one, torch.zeros_like(one)], dim=1), latents], dim=2)
    masks = mask_channels(mask[:, :1], *vae_strides(vae.config)).to(latents)
    before = masks.new_zeros(*masks.shape[:2], len(given.references), *masks.shape[3:])
    return torch.cat([latents, torch.cat([before, masks], dim=2)], dim=1)


def video_tensor(frames: Sequence[Any] | None, size: Shape) -> torch.Tensor:
    """(1, 3, F, H, W) in [-1, 1] of PIL images; zeros without any."""
    if not frames:
        return torch.zeros(1, 3, size.num_frames, size.height, size.width)
    return torch.stack([image_tensor(frame, size.height, size.width) for frame in frames], dim=2)


def mask_tensor(frames: Sequence[Any] | None, size: Shape) -> torch.Tensor:
    """(1, 3, F, H, W) in [0, 1] of PIL images, white where pixels are made anew; ones without any."""
    return ((video_tensor(frames, size) + 1) / 2).clamp(0, 1) if frames else torch.ones_like(video_tensor(None, size))


def mask_channels(mask: torch.Tensor, spatial: int, temporal: int) -> torch.Tensor:
    """(B, spatial ** 2, T, H / spatial, W / spatial): each latent's pixels, of a mask (B, 1, F, H, W)."""
    batch, _, frames, height, width = mask.shape
    split = mask.reshape(batch, frames, height // spatial, spatial, width // spatial, spatial)
    channels = split.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
    latent = ((frames + temporal - 1) // temporal, height // spatial, width // spatial)
    return functional.interpolate(channels, size=latent, mode="nearest-exact")


def fitted(image: Any, size: Shape) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]: the whole image in the middle of a white one of the video's size."""
    own = image_tensor(image, image.height, image.width)
    scale = min(size.height / image.height, size.width / image.width)
    height, width = int(image.height * scale), int(image.width * scale)
    top, left = (size.height - height) // 2, (size.width - width) // 2
    made = torch.ones(1, 3, size.height, size.width)
    made[:, :, top : top + height, left : left + width] = functional.interpolate(
        own, size=(height, width), mode="bilinear", align_corners=False
    )
    return made
