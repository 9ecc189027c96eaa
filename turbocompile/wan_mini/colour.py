"""Names the colour of a digit: the nearest colour of the palette in CIELAB."""

from __future__ import annotations

import itertools
import math

import torch

from turbocompile.wan_mini.frame import AGREE
from turbocompile.wan_mini.world import COLOURS


def to_lab(colour: torch.Tensor) -> torch.Tensor:
    """CIELAB (N, 3), float32, from sRGB (N, 3) in 0..255.

    IEC 61966-2-1 gives linear light, and CIE 1976 with the white D65 gives CIELAB.
    """
    srgb = colour.float() / 255.0
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = (linear[..., None, :] * to_xyz).sum(-1) / linear.new_tensor([0.95047, 1.0, 1.08883])
    delta = 6 / 29
    f = torch.where(xyz > delta**3, xyz.clamp(min=1e-12) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-1)


_PALETTE = to_lab(torch.tensor(list(COLOURS.values())))
# A colour has no name if it is farther than this from every colour of the palette. The bound is half the least distance
# between two colours of the palette, so that no colour has two names.
MOST_COLOUR_DISTANCE = 0.5 * min(math.dist(a, b) for a, b in itertools.combinations(_PALETTE.tolist(), 2))


def name_colour(lab: torch.Tensor) -> tuple[str | None, str]:
    """The name of a video's colour, from the colours (F, 3) of its F frames in CIELAB.

    Returns the name and "", or None and the reason why there is no name.
    """
    distances = (lab[:, None] - _PALETTE).square().sum(-1).sqrt()  # (F, 8)
    nearest = distances.min(1)
    named = nearest.indices.masked_fill(nearest.values > MOST_COLOUR_DISTANCE, len(COLOURS))
    votes = named.bincount(minlength=len(COLOURS) + 1)
    best = int(votes.argmax())
    if best == len(COLOURS):
        return None, "its colour is none of the palette"
    if votes[best] < AGREE * len(lab):
        return None, "its colour changes"
    return list(COLOURS)[best], ""
