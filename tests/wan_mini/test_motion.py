"""The motion that a path of centroids shows."""

from __future__ import annotations

import re

import pytest
import torch

from turbocompile.wan_mini import world
from turbocompile.wan_mini.motion import name_motion


def test_every_true_path_is_named(held_back):
    """All 640 combinations, their centroids 1.5 pixels off in each frame, as a wobbling digit's are."""
    scans, _ = held_back
    generator = torch.Generator().manual_seed(0)
    wanted = world.combinations()
    paths = world.draw_scenes(wanted, scans, generator).corners()
    paths = paths + (torch.rand(paths.shape, generator=generator) - 0.5) * 3
    for combination, path in zip(wanted, paths, strict=True):
        assert name_motion(path)[:2] == (combination.direction, combination.bounces), combination.prompt


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (lambda t: torch.stack((200 - 1.2 * t, 0 * t + 128), 1), "far enough"),
        (lambda t: torch.stack((60 + 2.5 * t, 60 + 2.5 * t), 1), "drifts"),
        (lambda t: torch.stack((60 + 7 * t.clamp(max=16), 0 * t + 128), 1), "too fast|constant speed"),
        (lambda t: torch.stack((60 + 4.4 * t.clamp(min=14), 0 * t + 128), 1), "constant speed"),
        (lambda t: torch.stack((128 + 30 * torch.sin(t), 0 * t + 128), 1), "jumps"),
        (lambda t: torch.stack((128 + 30 * torch.sin(t / 4), 0 * t + 128), 1), "constant speed"),
        (lambda t: torch.stack((60 + 3 * (t - 2 * (t - 3).clamp(min=0)).abs(), 0 * t + 128), 1), ""),
    ],
)
def test_paths_that_are_none(path, reason):
    direction, bounces, why = name_motion(path(torch.arange(33.0)))
    assert not bounces
    assert re.search(reason, why)
    assert (direction is None) == bool(reason)
