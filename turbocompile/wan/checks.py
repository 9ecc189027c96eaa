"""Whether the parts of an opened model belong together: the experts, the VAE, and the recipe's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.recipe.configuration import is_vace
from turbocompile.recipe.presets import Geometry, latent_channels, vae_strides, wrong_latents
from turbocompile.recipe.schema import Recipe

ENCODED = 4  # frames that diffusers' AutoencoderKLWan encodes at a time after the first


def geometry_of(config: Mapping[str, Any], vae: Mapping[str, Any], where: str) -> Geometry:
    try:
        return Geometry(*vae_strides(vae), tuple(config["patch_size"]))
    except ValueError as error:
        raise EngineError(f"{where}: the VAE's configuration cannot be: {error}") from None


def check_channels(
    config: Mapping[str, Any], vae: Mapping[str, Any], task: str, geometry: Geometry, where: str
) -> None:
    """Raises EngineError or UnsupportedError unless the transformer takes latents of the VAE's channels."""
    wrong = wrong_latents(vae)
    if wrong is not None:
        raise EngineError(f"{where}: the VAE's configuration cannot be: {wrong}")
    channels = latent_channels(vae)
    given, made = config["in_channels"], config["out_channels"]
    if made != channels:
        raise EngineError(
            f"{where}: the transformer makes latents of {made} channels (out_channels), and its VAE decodes {channels} "
            "(z_dim), so they are of two models; name the folder of its own VAE as components.source, or build with "
            "components: none"
        )
    if task == "i2v" and given != 2 * channels + geometry.temporal:
        raise UnsupportedError(
            f"{where}: the transformer takes {given} channels (in_channels), and image-to-video is "
            f"{2 * channels + geometry.temporal}: {channels} of noise, {channels} of the first frame and a mask of "
            f"{geometry.temporal}; build with components: none and call the engine in the model's own pipeline"
        )
    if task != "i2v" and given != channels:
        raise UnsupportedError(
            f"{where}: the transformer takes {given} channels (in_channels) and makes {made} (out_channels), and "
            "text-to-video is as many; build with components: none and call the engine in the model's own pipeline"
        )
    control = 2 * channels + geometry.spatial**2
    if is_vace(config) and config["vace_in_channels"] != control:
        raise UnsupportedError(
            f"{where}: the transformer takes {config['vace_in_channels']} channels of control (vace_in_channels), and "
            f"VACE with this VAE has {control}: two latents of {channels}, and a mask of {geometry.spatial} x "
            f"{geometry.spatial} pixels a latent; build with components: none and call the engine in the model's own "
            "pipeline"
        )


def check_task(recipe: Recipe, task: str, geometry: Geometry, where: str) -> None:
    """Raises RecipeError for a field of another task than the model's, UnsupportedError for tokens of many frames."""
    for i, shape in enumerate(recipe.shapes):
        if shape.references and task != "vace":
            raise RecipeError(
                f"shapes.{i}.references belongs to VACE, and {where} takes no reference images; remove it"
            )
    if recipe.model.text_only and task != "ti2v":
        raise RecipeError(
            f"model.text_only belongs to models of text and images (TI2V 5B), and {where} is none; remove it"
        )
    if task in ("ti2v", "vace") and geometry.patch[0] != 1:
        raise UnsupportedError(
            f"{where}: a token has {geometry.patch[0]} latent frames (patch_size), and "
            f"{'the first frame' if task == 'ti2v' else 'a reference image'} needs tokens of its own; build with "
            "components: none and call the engine in the model's own pipeline"
        )


def check_frames(recipe: Recipe, geometry: Geometry, where: str) -> None:
    """Raises UnsupportedError or RecipeError for numbers of frames that diffusers' VAE cannot encode.

    It encodes the first frame, and then four frames at a time whatever its temporal stride.
    """
    if ENCODED % geometry.temporal:
        raise UnsupportedError(
            f"{where}: the VAE makes one latent frame of {geometry.temporal}, and diffusers encodes {ENCODED} at a "
            "time, so that image-to-video cannot encode its first frame; take a VAE of a temporal stride of 1, 2 or 4"
        )
    for i, shape in enumerate(recipe.shapes):
        if (shape.num_frames - 1) % ENCODED:
            raise RecipeError(
                f"shapes.{i}.num_frames must be {ENCODED}k + 1 for image-to-video, not {shape.num_frames}, because "
                f"diffusers' VAE encodes {ENCODED} frames at a time"
            )
