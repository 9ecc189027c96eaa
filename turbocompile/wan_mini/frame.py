"""Finds the digit that stands out from the ground in a frame: its flaw, colour, centroid and mask of opacity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turbocompile.wan_mini.world import COLOURS, GROUND, SIZE

# The classifier sees a window of 192 pixels around the centroid, in 32 x 32 cells of 6 pixels.
VIEW = 32
WINDOW = 192
AGREE = 0.8  # the share of a video's frames that must show the same colour and the same digit

# A frame is judged at half resolution, because a mean over 2 x 2 pixels removes noise and keeps every stroke (12
# pixels).
_CELL = 2  # pixels a side of a judged cell
_CELLS = SIZE // _CELL
# Distances are Euclidean in sRGB 0..255. The colour nearest to the ground is green, at a distance of 153. Half of that
# tells a digit from the ground, whatever the digit's colour.
_PRESENT = 0.5 * min(math.dist(c, (GROUND,) * 3) for c in COLOURS.values())
# The cells that stand out most must stand out by more than this, which is green at 60 % of its opacity.
_PEAK = 1.2 * _PRESENT
_PEAK_CELLS = 64  # 256 pixels; the slightest digit covers 15 % of a square of 120 pixels, 2,160
# The most by which the ground's colour may be off (as the median over the cells that do not stand out).
_GROUND_ERROR = 0.3 * _PRESENT
# The scans' masks are 0.71 to 0.84 of the square high and 0.23 to 0.71 wide, on squares of 120 to 140 pixels: 85 to 118
# by 28 to 99 pixels. The bounds leave 15 % on either side for soft edges and other handwritings.
_HEIGHT = (0.85 * 85, 1.15 * 118)
_WIDTH = (0.85 * 28, 1.15 * 99)
# An extent ignores this share of the mass at each end, so that a speck does not count as the digit's end.
_EXTENT_SHARE = 0.01
# Strokes of one digit may lie apart (the bar of a five), by up to 16 pixels in the scans. Therefore masks on cells of 4
# pixels are widened by 2 cells on each side, which joins strokes over 16 pixels. At most a tenth of the cells may still
# be apart; in the scans at most 7 % are.
_LINK = 2
_APART = 0.1
# A cell shows another colour if it is farther than this from the line between the ground and the digit's colour. Orange
# is 70 from yellow's line, the least of all pairs. Blurred edges of one colour stay on its line. At most a tenth of the
# cells may be off the line, as artefacts are.
_OFF_LINE = 50.0
_OFF_LINE_SHARE = 0.1

FLAWS = (
    "",
    "values that are not finite",
    "nothing stands out from the ground",
    "the ground is not grey",
    "what stands out has not the extent of a digit",
    "more than one thing stands out",
    "more than one colour",
)


@dataclass(frozen=True)
class Look:
    """The digits of N frames.

    flaw: (N,) int64, the index in `FLAWS` of a frame's first flaw; 0 for a frame without a flaw. colour: (N, 3), the
    sRGB colour in 0..255 of the digit's core. centroid: (N, 2), (x, y) in pixels. glyph: (N, 32, 32), the mask of
    opacity around the centroid, in [0, 1].
    """

    flaw: torch.Tensor
    colour: torch.Tensor
    centroid: torch.Tensor
    glyph: torch.Tensor


def look(pixels: torch.Tensor) -> Look:
    """Finds the digits of frames (N, 3, 256, 256), float32 in 0..255."""
    finite = pixels.flatten(1).isfinite().all(1)
    cells = F.avg_pool2d(pixels.nan_to_num(GROUND, GROUND, GROUND), _CELL)
    difference = cells - GROUND
    distance = difference.square().sum(1).sqrt()  # (N, 128, 128)
    peak = distance.flatten(1).topk(_PEAK_CELLS, dim=1).values[:, -1]
    present = distance > _PRESENT

    core = distance > 0.85 * peak[:, None, None].clamp(min=_PRESENT)
    count = core.sum((1, 2)).clamp(min=1)
    colour = (cells * core[:, None]).sum((2, 3)) / count[:, None]
    line = colour - GROUND
    alpha = (difference * line[:, :, None, None]).sum(1) / line.square().sum(1).clamp(min=1.0)[:, None, None]
    off_line = (difference - alpha[:, None] * line[:, :, None, None]).square().sum(1).sqrt()
    # Cells of at most a third of the opacity count as ground, because the noise of 15,000 such cells would pull the
    # centroid.
    alpha = alpha.clamp(0.0, 1.0)
    alpha = torch.where(alpha > 1 / 3, alpha, 0.0)

    area = present.sum((1, 2)).clamp(min=1)
    ground = torch.where(present, torch.nan, distance).flatten(1).nanmedian(1).values
    width, height = (_CELL * _extent(present.sum(axis)) for axis in (1, 2))
    flaws = (
        ~finite,
        ~(peak > _PEAK),
        ~(ground < _GROUND_ERROR),
        ~((height > _HEIGHT[0]) & (height < _HEIGHT[1]) & (width > _WIDTH[0]) & (width < _WIDTH[1])),
        ~(_share_apart(present) < _APART),
        ~((present & (off_line > _OFF_LINE)).sum((1, 2)) / area < _OFF_LINE_SHARE),
    )
    flaw = torch.zeros_like(area)
    for number, wrong in reversed(list(enumerate(flaws, start=1))):
        flaw = torch.where(wrong, number, flaw)
    centroid = centroid_of(alpha)
    return Look(flaw, colour, centroid * _CELL, _crop(alpha, centroid))


def _extent(sums: torch.Tensor) -> torch.Tensor:
    """The extent (N,) in cells of masks whose sums over one axis are `sums` (N, 128): between 1 and 99 % of the
    mass.
    """
    share = sums.cumsum(1) / sums.sum(1, keepdim=True).clamp(min=1)
    return ((share > _EXTENT_SHARE) & (share < 1 - _EXTENT_SHARE)).sum(1) + 1


def _share_apart(present: torch.Tensor) -> torch.Tensor:
    """The share (N,) of the cells in `present` (N, 128, 128) that is not linked to the largest connected thing.

    The search for the largest thing starts at the most densely covered cell. If the search finds less than half of the
    cells, it runs once more on the remaining cells.
    """
    coarse = F.max_pool2d(present[:, None].float(), 2)
    linked = F.max_pool2d(coarse, 2 * _LINK + 1, stride=1, padding=_LINK)
    total = coarse.sum((1, 2, 3)).clamp(min=1)
    first = _reach(linked)
    share = (coarse * first).sum((1, 2, 3)) / total
    if (share < 0.5).any():
        second = _reach(linked - first)
        share = torch.maximum(share, (coarse * second).sum((1, 2, 3)) / total)
    return 1 - share


def _reach(linked: torch.Tensor) -> torch.Tensor:
    """The cells of masks (N, 1, C, C), 0 or 1, that are connected with the most densely covered cell, as such masks."""
    start = (F.avg_pool2d(linked, 5, stride=1, padding=2) * linked).flatten(1).argmax(1)
    reached = torch.zeros_like(linked)
    reached.flatten(1).scatter_(1, start[:, None], 1.0)
    reached = reached * linked
    while True:
        wider = reached
        for _ in range(8):  # the comparison below synchronizes a GPU, so it follows eight steps
            wider = F.max_pool2d(wider, 3, stride=1, padding=1) * linked
        if torch.equal(wider, reached):
            return reached
        reached = wider


def centroid_of(alpha: torch.Tensor) -> torch.Tensor:
    """The centroids (N, 2), (x, y) in cells, of masks (N, C, C); the middle of an empty mask."""
    places = torch.arange(alpha.shape[-1], device=alpha.device, dtype=torch.float32) + 0.5
    mass = alpha.sum((1, 2))
    x = (alpha.sum(1) * places).sum(1) / mass
    y = (alpha.sum(2) * places).sum(1) / mass
    return torch.stack((x, y), dim=1).nan_to_num(alpha.shape[-1] / 2)


def _crop(alpha: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """The windows of 192 pixels of masks (N, 128, 128) around their centroids (N, 2), in cells: (N, 32, 32)."""
    side = WINDOW // _CELL
    offsets = torch.arange(side, device=alpha.device, dtype=torch.float32) + 0.5 - side / 2
    places = (centroid[:, :, None] + offsets) * (2.0 / _CELLS) - 1.0  # (N, 2, side)
    x, y = places[:, 0, None, :].expand(-1, side, -1), places[:, 1, :, None].expand(-1, -1, side)
    window = F.grid_sample(alpha[:, None], torch.stack((x, y), dim=-1), align_corners=False)
    return F.avg_pool2d(window, side // VIEW)[:, 0]
