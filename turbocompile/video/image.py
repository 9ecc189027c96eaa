"""Image-to-video: the inputs of the transformer that describe the first frame, and the last one where it is given.

Wan's I2V transformers take 36 channels: 16 of noise, a mask of 4 (which pixel frames of a latent frame are given) and
16 of the latent of [image, black frames]. Wan2.1's take CLIP tokens of the image besides. With another VAE the mask has
as many channels as a latent frame has frames, and the latent those of the VAE. TI2V takes no more channels: its first
latent frame is that of the image, whose tokens have the timestep zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from turbocompile.errors import UnsupportedError
from turbocompile.recipe.presets import vae_strides
from turbocompile.video import vae as wan_vae


def image_tensor(image: Any, height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1] of a PIL image, stretched to the size (bilinear, antialiased, on bytes)."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).unsqueeze(0).contiguous()
    resized = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.float() / 127.5 - 1.0


@torch.no_grad()
def image_condition(
    vae: Any, image: torch.Tensor, num_frames: int, last_image: torch.Tensor | None = None
) -> torch.Tensor:
    """The channels beside the noise, (B, 20, T, H / 8, W / 8) in float32: mask of 4, then the images' latent of 16.

    image: (B, 3, H, W) in [-1, 1]; num_frames: 4k + 1 pixel frames. The frames after the first are zeros, as they
    were in training; the mask is 1 on the first latent frame. last_image: as image; the last frame, where the mask's
    channel of the latent frame's last pixel frame is 1. 4, 8 and 16 are those of Wan2.1's VAE.
    """
    batch, channels, height, width = image.shape
    frames = image.new_zeros(batch, channels, num_frames, height, width)
    frames[:, :, 0] = image
    if last_image is not None:
        frames[:, :, -1] = last_image
    latent = wan_vae.encode(vae, frames)
    _, temporal = vae_strides(vae.config)
    mask = latent.new_zeros(batch, temporal, *latent.shape[2:])
    mask[:, :, 0] = 1.0
    if last_image is not None:
        mask[:, -1, -1] = 1.0
    return torch.cat([mask, latent], dim=1)


def token_timesteps(
    timestep: torch.Tensor, latent: tuple[int, int, int], patch: tuple[int, int, int], given: int
) -> Any:
    """(B, tokens): the timestep (B,) of each token, and zero for the tokens of the first `given` latent frames.

    latent: frames, height and width; patch: latents a token has along each.
    """
    frames, height, width = (size // step for size, step in zip(latent, patch, strict=True))
    each = timestep.unsqueeze(1).expand(-1, frames * height * width).clone()
    each[:, : given * height * width] = 0.0
    return each


@torch.no_grad()
def image_embeddings(image_encoder: Any, image_processor: Any, image: Any) -> torch.Tensor:
    """The CLIP tokens (1, tokens, image_dim) of a PIL image: the hidden state before the encoder's last layer.

    Of a list of n images they are (n, tokens, image_dim).
    """
    parameter = next(image_encoder.parameters())
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"]
    output = image_encoder(pixels.to(parameter.device, parameter.dtype), output_hidden_states=True)
    return output.hidden_states[-2]


def open_image(image: Any) -> Any:
    """A PIL image, opened if `image` is a path. Raises UnsupportedError for a file that is no image."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UnsupportedError(f"{image} cannot be read as an image ({error})") from error
