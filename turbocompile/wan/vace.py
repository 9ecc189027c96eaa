"""VACE: Wan's transformer with blocks beside it, whose results are added to those of some of its layers.

`vace_layers` says which layers; their blocks read the control (latents of a video, a mask, reference images). In
diffusers the class is WanVACETransformer3DModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from turbocompile.errors import EngineError

CLASS = "WanVACETransformer3DModel"
SHOWN = 3  # blocks that show what repeats
OF_CONTROL = re.compile(r"vace_blocks\.(\d+)\.(.+)")


def shallow(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with so many layers and, as far as it has them, as many blocks of VACE.

    The first of VACE's blocks has a projection more than the others, and the last a result less, so that three show
    what repeats (SHOWN).
    """
    count = min(layers, len(config["vace_layers"]))
    return {**config, "num_layers": layers, "vace_layers": tuple(range(count))}


def inputs(
    config: Mapping[str, Any], batch: int, latent: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The arguments that VACE's transformer takes besides, on the device meta.

    control_hidden_states (batch, vace_in_channels, frames, height, width); control_hidden_states_scale (blocks,).
    """

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    return {
        "control_hidden_states": empty(batch, config["vace_in_channels"], *latent),
        "control_hidden_states_scale": empty(len(config["vace_layers"])),
    }


def infer(names: Iterable[str], layers: int, channels: int, where: str) -> dict[str, Any]:
    """The fields of VACE of a checkpoint with these names under diffusers' names; {} of a checkpoint without VACE.

    layers: of the transformer. channels: of vace_patch_embedding, 0 without one. As in the published models, every
    n-th layer has a block of VACE. Raises EngineError where that cannot be.
    """
    blocks = [int(m[1]) for m in (OF_CONTROL.match(name) for name in names) if m]
    if not blocks or not channels:
        return {}
    count = max(blocks) + 1
    if layers % count:
        raise EngineError(
            f"{where}: the checkpoint has {count} blocks of VACE for {layers} layers, and which layers they belong to "
            "cannot be told; give the folder with its config.json (vace_layers)"
        )
    return {"vace_layers": tuple(range(0, layers, layers // count)), "vace_in_channels": channels}
