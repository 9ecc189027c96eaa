"""Diversity is 1 for real digits and small for copies, whatever their size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbocompile.wan_mini import world
from turbocompile.wan_mini.diversity import diversity, draw_glyphs, shape_distances


@pytest.fixture(scope="module")
def glyphs():
    """Real digits: 30 training scans of each of three digits, none of those that the figure is relative to."""
    scans = world.load_scans(train=True)
    return {d: draw_glyphs(scans.images[(scans.labels == d).nonzero()[64:94, 0]]) for d in (2, 5, 8)}


def resized(glyph: torch.Tensor, scale: float) -> torch.Tensor:
    grid = F.affine_grid(torch.eye(2, 3)[None] / scale, [1, 1, 32, 32], align_corners=False)
    return F.grid_sample(glyph[None, None], grid, align_corners=False)[0, 0]


def test_real_digits_are_as_diverse_as_real_ones(glyphs):
    found = diversity(glyphs)
    assert found.count == 90
    assert 0.85 < found.value < 1.15
    assert found.low < 1.0 < found.high + 0.15
    assert found == diversity(glyphs)


def test_copies_in_many_sizes_are_not_diverse(glyphs):
    copies = {d: torch.stack([resized(g[0], s) for s in (0.9, 0.95, 1.0, 1.05, 1.1)]) for d, g in glyphs.items()}
    found = diversity(copies)
    assert found.high < 0.25


def test_two_shapes_are_half_as_diverse_as_many(glyphs):
    """Of 10 videos, 5 each of two shapes, 20 of 45 pairs are no copies; and a copy is no reason for a zero interval."""
    two = {d: torch.cat((g[:1].expand(10, -1, -1), g[1:2].expand(10, -1, -1))) for d, g in glyphs.items()}
    distance = {d: float(shape_distances(g[:2])[0, 1]) for d, g in glyphs.items()}
    full = diversity({d: g[:2] for d, g in glyphs.items()})
    assert diversity(two).value == pytest.approx(full.value * 100 / 190, rel=1e-3)
    assert all(x > 0.1 for x in distance.values())


def test_without_a_pair_there_is_no_figure(glyphs):
    assert diversity({}) is None
    assert diversity({2: glyphs[2][:1], 5: glyphs[5][:1]}) is None
    assert diversity({2: glyphs[2][:1], 5: glyphs[5][:2]}).count == 2


def test_the_distance_is_that_of_jaccard():
    """Two squares of one size, half over each other, have a third of their union in common."""
    a, b = torch.zeros(2, 32, 32)
    a[8:24, 8:24] = 1
    assert shape_distances(torch.stack((a, a)))[0, 1] == pytest.approx(0, abs=1e-6)
    a, b = torch.zeros(2, 32, 32)
    a[10:22, 8:16] = b[10:22, 12:20] = 1
    c = a.flip(1)  # a's mirror image, 8 columns further
    found = shape_distances(torch.stack((a, c)))
    assert found[0, 1] == pytest.approx(1.0, abs=0.02)
    assert torch.equal(found, found.T)
