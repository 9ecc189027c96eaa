"""The classifier of digits, as shipped."""

from __future__ import annotations

import torch

from turbocompile.wan_mini import world
from turbocompile.wan_mini.classifier import WEIGHTS, classifier
from turbocompile.wan_mini.frame import look
from turbocompile.wan_mini.world import COLOURS


def test_digits_of_other_writers_are_seen(held_back):
    """97 % of the 360 scans that neither the judge nor a model was trained on, in sizes from least to largest."""
    scans, masks = held_back
    count = len(scans.labels)
    scenes = world.Scenes(
        scan=torch.arange(count),
        colour=torch.tensor(COLOURS["green"]).expand(count, 3) / 127.5 - 1,
        size=torch.linspace(*world.SCALE, count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))],
        start=torch.full((count, 2), 63.3),
        velocity=torch.zeros(count, 2),
    )
    frames = world.render(scenes, masks, frames=torch.zeros(count, 1, dtype=torch.long))[:, :, 0]
    seen = look((frames + 1) * 127.5)
    assert not seen.flaw.any()
    found = classifier()(seen.glyph[:, None]).argmax(1)
    assert (found == scans.labels).float().mean() >= 0.97


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size < 300_000
