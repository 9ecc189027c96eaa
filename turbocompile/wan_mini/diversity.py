"""Measures how much the shapes differ that a model draws for one digit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from turbocompile.wan_mini import world
from turbocompile.wan_mini.frame import look
from turbocompile.wan_mini.statistics import RESAMPLES, Mean


def diversity(glyphs: Mapping[int, Sequence[torch.Tensor]]) -> Mean | None:
    """How much the shapes of one digit differ, relative to how much the shapes of real digits differ.

    glyphs: for each digit, the glyphs (32, 32) of the videos whose prompt names the digit and which show it (see
    `Verdict`). Videos of a wrong digit must be left out, because they would raise the figure.

    All glyphs are scaled to one size, so that a large and a small copy of a shape count as equal. Two glyphs a, b
    differ by the Jaccard distance of masks, 1 - sum min(a, b) / sum max(a, b). For each digit the mean over all pairs
    of videos is divided by the same mean over the digit's training scans. The result is the mean over the digits that
    have a pair. A model that draws one shape for each digit gets 0.1; a model that draws like the writers gets 1.

    The interval resamples videos, and never pairs a video with itself. Returns None if no digit has a pair.
    """
    distances = {d: shape_distances(torch.stack(list(g))) for d, g in glyphs.items() if len(g) > 1}
    if not distances:
        return None
    generator = torch.Generator().manual_seed(0)
    ratios = torch.stack([_bootstrap(m, generator) / real_distances()[digit] for digit, m in distances.items()])
    found = ratios.nanmean(0)
    low, high = found[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Mean(float(found[0]), low, high, sum(map(len, distances.values())))


def _bootstrap(distances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Means over all pairs of distances (N, N): (2001,), first of the videos, then of 2,000 resamples of the videos.

    A resample without a pair of different videos gives NaN.
    """
    n = len(distances)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    times = torch.zeros(RESAMPLES + 1, n, dtype=torch.float64)
    times[0] = 1
    times[1:].scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    pairs = times.sum(1).square() - times.square().sum(1)  # how many pairs are of different videos
    return ((times @ distances) * times).sum(1) / pairs


def shape_distances(glyphs: torch.Tensor) -> torch.Tensor:
    """The distances (N, N), float64, between glyphs (N, 32, 32) that are scaled to one size; see `diversity`."""
    shapes = _one_size(glyphs).flatten(1)
    rows = [1 - torch.minimum(row, shapes).sum(1) / torch.maximum(row, shapes).sum(1).clamp(min=1e-6) for row in shapes]
    return torch.stack(rows).double().fill_diagonal_(0.0)


def _one_size(glyphs: torch.Tensor) -> torch.Tensor:
    """The glyphs (N, 32, 32), scaled around the middle to a root mean square radius of 8 cells."""
    side = glyphs.shape[-1]
    places = torch.arange(side, dtype=torch.float32) + 0.5 - side / 2
    square = places.square()[:, None] + places.square()
    mass = glyphs.sum((1, 2)).clamp(min=1e-6)
    radius = ((glyphs * square).sum((1, 2)) / mass).sqrt().clamp(min=1.0)
    matrix = (radius / 8.0)[:, None, None] * torch.eye(2, 3)
    grid = F.affine_grid(matrix, [len(glyphs), 1, side, side], align_corners=False)
    return F.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]


@cache
def real_distances(scans: int = 64) -> tuple[float, ...]:
    """For each digit, the mean distance between the glyphs of the first `scans` of its training scans."""
    training = world.load_scans(train=True)
    found = []
    for digit in range(len(world.DIGITS)):
        chosen = (training.labels == digit).nonzero()[:scans, 0]
        matrix = shape_distances(draw_glyphs(training.images[chosen]))
        found.append(float(matrix.sum()) / (len(chosen) * (len(chosen) - 1)))
    return tuple(found)


def draw_glyphs(images: torch.Tensor) -> torch.Tensor:
    """The glyphs (N, 32, 32) of scans (N, 8, 8), each drawn in the middle of a frame, in white, at the middle size."""
    n = len(images)
    size = sum(world.SCALE) / 2
    scenes = world.Scenes(
        scan=torch.arange(n),
        colour=torch.tensor(world.COLOURS["white"]).expand(n, 3) / 127.5 - 1.0,
        size=torch.full((n,), size),
        start=torch.full((n, 2), (world.SIZE - size) / 2),
        velocity=torch.zeros(n, 2),
    )
    drawn = world.render(scenes, world.enlarge(images), frames=torch.zeros(n, 1, dtype=torch.long))[:, :, 0]
    return look((drawn + 1.0) * 127.5).glyph
