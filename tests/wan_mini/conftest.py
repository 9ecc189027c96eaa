"""Videos that show what their prompts say."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from turbocompile.video.vae import to_frames
from turbocompile.wan_mini import world


@pytest.fixture(scope="session")
def held_back() -> tuple[world.Scans, torch.Tensor]:
    """The held-back writers' scans and their masks."""
    scans = world.load_scans(train=False)
    return scans, world.enlarge(scans.images)


@pytest.fixture(scope="session")
def truth(held_back):
    """A function that draws a combination with a scan of a held-back writer: uint8 (33, 256, 256, 3)."""
    scans, masks = held_back

    @lru_cache(maxsize=8)
    def drawn(wanted: world.Combination, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return to_frames(world.render(world.draw_scenes([wanted], scans, generator), masks))[0]

    return lambda wanted, seed=0: drawn(wanted, seed).clone()
