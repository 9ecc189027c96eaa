"""Which digit, colour and motion a video of the world of digits shows.

The judge never sees a prompt. It looks at a video and says what it shows, or "none"; whether that is right is then a
comparison of words. What it measures:

* In each frame, the pixels that stand out from the grey ground. They must be one connected thing with the extent of a
  digit, on a ground that is grey; this holds in every frame, or the video shows nothing at all.
* Colour: the mean colour of the digit's core in each frame, the nearest of the palette in CIELAB.
* Digit: the opacity mask that this colour leaves, cropped around its centroid at a fixed scale, classified by two small
  convolutional networks in every frame; log-probabilities are averaged over networks and frames. An eleventh class is
  what is no digit.
* Motion: the path of the centroid, fitted by a straight line at constant speed, with one turn back or without.

The networks' weights are in judge.safetensors beside this file; `train_classifier` makes them, from the scans of
`load_scans(train=True)` alone (examples/train_judge.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from turbocompile.errors import UnsupportedError
from turbocompile.wan_mini import world
from turbocompile.wan_mini.world import COLOURS, DIGITS, DIRECTIONS, FRAMES, GROUND, SIZE, Combination, Scans

WEIGHTS = Path(__file__).with_name("judge.safetensors")
NO_DIGIT = len(DIGITS)  # the classifier's eleventh class

# ---- A frame. It is judged at half resolution: a mean over 2 x 2 pixels takes noise away, and no stroke (12 pixels).
_CELL = 2  # pixels a side of a judged cell
_CELLS = SIZE // _CELL
# Distances are Euclidean in sRGB 0..255. The colour nearest to the ground is green, at 153: half of it tells digit from
# ground, whatever the colour.
_PRESENT = 0.5 * min(math.dist(c, (GROUND,) * 3) for c in COLOURS.values())
# The cells that stand out most must do so by more: green at 60 % of its opacity.
_PEAK = 1.2 * _PRESENT
_PEAK_CELLS = 64  # 256 pixels; the slightest digit covers 15 % of a square of 120 pixels, 2,160
# The ground's own colour may be off by this much (the median over the cells that do not stand out).
_GROUND_ERROR = 0.3 * _PRESENT
# The scans' masks are 0.71 to 0.84 of the square high and 0.23 to 0.71 wide, on squares of 120 to 140 pixels: 85 to 118
# by 28 to 99 pixels. 15 % either way for soft edges and other hands.
_HEIGHT = (0.85 * 85, 1.15 * 118)
_WIDTH = (0.85 * 28, 1.15 * 99)
# Row and column sums are cut at these shares, so that a speck does not count as the digit's end.
_EXTENT_SHARE = 0.01
# Strokes of one digit may lie apart (the bar of a five), by up to 16 pixels in the scans: masks on cells of 4 pixels
# are widened by 2 on each side, which joins over 16 pixels. What is still apart may be a tenth: the scans' largest is
# 7 %.
_LINK = 2
_APART = 0.1
# Cells off the line from ground to colour by this much are of another colour: orange is 70 off yellow's, the least of
# all pairs. Blurred edges of one colour stay on its line; a tenth may be an artefact.
_OFF_LINE = 50.0
_OFF_LINE_SHARE = 0.1

# ---- A video.
_AGREE = 0.8  # of the frames must show the same colour, and the same digit

# ---- Motion, in pixels and frames. Speeds are 2 to 3.4 without a turn and 3 to 4 with one, at frames 10 to 20 of 32:
# the way is at least 64 without a turn, and at least 30 before and 36 after one.
_STEPS = FRAMES - 1
_LEAST_WAY = 0.75 * world.SPEED[False][0] * _STEPS  # 48
_LEAST_LEG = 0.5 * world.SPEED[True][0] * min(world.TURN[0], _STEPS - world.TURN[1])  # 15
_MOST_SPEED = 1.5 * world.SPEED[True][1]  # 6
_TURNS = (0.5 * world.TURN[0], _STEPS - 0.5 * (_STEPS - world.TURN[1]))  # 5 to 26
# The directions are 90 degrees apart; a path within atan(1/4) = 14 degrees of one is that one.
_DRIFT = 0.25
# The root mean square of the path around its fit, as a share of its way: a digit that stands still for a quarter of the
# video and goes at one speed for the rest has 0.060 around the best straight line.
_UNEVEN = 0.06
# Between two frames it may go twice as far as the fastest; farther is a jump.
_JUMP = 2 * world.SPEED[True][1]  # 8

# ---- The classifier's view: a window of 192 pixels around the centroid, in 32 x 32 cells of 6 pixels.
VIEW = 32
_WINDOW = 192
_BATCH = 4  # videos in float32 at once: 4 x 26 MB


@dataclass(frozen=True)
class Verdict:
    """What a video shows.

    digit: 0..9; colour: its name; direction: its name, of the way until the turn. None stands for "none". confidence:
    the classifier's, for its digit, over all frames. reason: what is wrong where something is None, else "". glyph:
    (32, 32), float32 on the CPU, the digit's mask of opacity around its centroid, mean over the frames; zeros where
    there is no digit.
    """

    digit: int | None
    colour: str | None
    direction: str | None
    bounces: bool
    confidence: float
    reason: str = ""
    glyph: torch.Tensor = field(default_factory=lambda: torch.zeros(VIEW, VIEW), repr=False, compare=False)

    def marks(self, wanted: Combination) -> Marks:
        """Which parts of a prompt the video shows."""
        return Marks(
            digit=self.digit == wanted.digit,
            colour=self.colour == wanted.colour,
            motion=(self.direction, self.bounces) == (wanted.direction, wanted.bounces),
        )

    def __str__(self) -> str:
        """In the words of a prompt, as in "a red seven moves left and bounces"; ? for what is none."""
        digit = "?" if self.digit is None else DIGITS[self.digit]
        ending = " and bounces" if self.bounces and self.direction else ""
        return f"{self.colour or '?'} {digit}, {self.direction or '?'}{ending}"


@dataclass(frozen=True)
class Marks:
    """Whether digit, colour and motion of a video are those of its prompt."""

    digit: bool
    colour: bool
    motion: bool

    @property
    def all(self) -> bool:
        return self.digit and self.colour and self.motion


@torch.no_grad()
def judge(videos: torch.Tensor) -> list[Verdict]:
    """A verdict for each video.

    videos: (B, 33, 256, 256, 3) on any device, uint8 sRGB, or floating point in [-1, 1]. Raises UnsupportedError for
    another shape or dtype. A video that is not finite shows nothing.
    """
    if videos.ndim != 5 or tuple(videos.shape[1:]) != (FRAMES, SIZE, SIZE, 3):
        raise UnsupportedError(
            f"the judge looks at videos (B, {FRAMES}, {SIZE}, {SIZE}, 3), not at {tuple(videos.shape)}"
        )
    if videos.dtype != torch.uint8 and not videos.is_floating_point():
        raise UnsupportedError(f"the judge looks at videos in uint8, or floating point in [-1, 1], not {videos.dtype}")
    return [verdict for part in videos.split(_BATCH) for verdict in _judge(part)]


def _judge(videos: torch.Tensor) -> list[Verdict]:
    batch = len(videos)
    pixels = videos.flatten(0, 1).permute(0, 3, 1, 2)
    pixels = pixels.float() if videos.dtype == torch.uint8 else (pixels.float() + 1.0) * 127.5
    seen = look(pixels)

    def by_video(x: torch.Tensor) -> torch.Tensor:
        return x.cpu().unflatten(0, (batch, FRAMES))

    flaw, lab, glyph, path = (by_video(x) for x in (seen.flaw, to_lab(seen.colour), seen.glyph, seen.centroid))
    scores = by_video(classifier(videos.device)(seen.glyph[:, None]))
    return [_verdict(*parts) for parts in zip(flaw, lab, glyph, path, scores, strict=True)]


def _verdict(
    flaw: torch.Tensor, lab: torch.Tensor, glyph: torch.Tensor, path: torch.Tensor, scores: torch.Tensor
) -> Verdict:
    """The verdict on one video, of its frames' flaws (F,), colours (F, 3), masks, centroids (F, 2), scores (F, 11)."""
    if flaw.any():
        first = int(flaw.ne(0).nonzero()[0])
        return Verdict(None, None, None, False, 0.0, f"{_FLAWS[int(flaw[first])]} in frame {first}")
    colour, colour_reason = name_colour(lab)
    direction, bounces, motion_reason = name_motion(path)
    digit, confidence, digit_reason = _name_digit(scores)
    reason = "; ".join(r for r in (digit_reason, colour_reason, motion_reason) if r)
    return Verdict(digit, colour, direction, bounces, confidence, reason, glyph.mean(0))


# ----------------------------------------------------------------------------------------------------------- one frame

_FLAWS = (
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
    """N frames.

    flaw: (N,) int64, the number in `_FLAWS` of the first that a frame has. colour: (N, 3), sRGB 0..255, of the core.
    centroid: (N, 2), (x, y) in pixels. glyph: (N, 32, 32), the mask around it, in [0, 1].
    """

    flaw: torch.Tensor
    colour: torch.Tensor
    centroid: torch.Tensor
    glyph: torch.Tensor


def look(pixels: torch.Tensor) -> Look:
    """What is in frames (N, 3, 256, 256), float32 in 0..255."""
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
    # A third of the opacity and less is taken for ground: its noise over 15,000 cells would pull the centroid.
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
    centroid = _centroid(alpha)
    return Look(flaw, colour, centroid * _CELL, _crop(alpha, centroid))


def _extent(sums: torch.Tensor) -> torch.Tensor:
    """In cells, the length between the shares of 1 and 99 % of sums (N, 128) along an axis."""
    share = sums.cumsum(1) / sums.sum(1, keepdim=True).clamp(min=1)
    return ((share > _EXTENT_SHARE) & (share < 1 - _EXTENT_SHARE)).sum(1) + 1


def _share_apart(present: torch.Tensor) -> torch.Tensor:
    """The share (N,) of the cells present (N, 128, 128) that is not linked to the largest thing.

    The largest is looked for from the place that is most densely covered, and, where that was not most of it, once more
    in what is left.
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
    """What is connected, in masks (N, 1, C, C) of 0 and 1, with the most densely covered place."""
    start = (F.avg_pool2d(linked, 5, stride=1, padding=2) * linked).flatten(1).argmax(1)
    reached = torch.zeros_like(linked)
    reached.flatten(1).scatter_(1, start[:, None], 1.0)
    reached = reached * linked
    while True:
        wider = reached
        for _ in range(8):  # a look at the result stops a GPU, so not after each step
            wider = F.max_pool2d(wider, 3, stride=1, padding=1) * linked
        if torch.equal(wider, reached):
            return reached
        reached = wider


def _centroid(alpha: torch.Tensor) -> torch.Tensor:
    """(N, 2): (x, y) in cells of masks (N, C, C); the middle where a mask is empty."""
    places = torch.arange(alpha.shape[-1], device=alpha.device, dtype=torch.float32) + 0.5
    mass = alpha.sum((1, 2))
    x = (alpha.sum(1) * places).sum(1) / mass
    y = (alpha.sum(2) * places).sum(1) / mass
    return torch.stack((x, y), dim=1).nan_to_num(alpha.shape[-1] / 2)


def _crop(alpha: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """(N, 32, 32): a window of 192 pixels of masks (N, 128, 128) around their centroids (N, 2), in cells."""
    side = _WINDOW // _CELL
    offsets = torch.arange(side, device=alpha.device, dtype=torch.float32) + 0.5 - side / 2
    places = (centroid[:, :, None] + offsets) * (2.0 / _CELLS) - 1.0  # (N, 2, side)
    x, y = places[:, 0, None, :].expand(-1, side, -1), places[:, 1, :, None].expand(-1, -1, side)
    window = F.grid_sample(alpha[:, None], torch.stack((x, y), dim=-1), align_corners=False)
    return F.avg_pool2d(window, side // VIEW)[:, 0]


# -------------------------------------------------------------------------------------------------------------- colour


def to_lab(colour: torch.Tensor) -> torch.Tensor:
    """CIELAB (N, 3) of sRGB (N, 3) in 0..255: IEC 61966-2-1 to linear light, and CIE 1976 under white D65."""
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
# A colour farther than this from all of the palette is none: half the least distance between two of them, so that what
# is taken for one colour would never be taken for another.
MOST_COLOUR_DISTANCE = 0.5 * min(math.dist(a, b) for a, b in itertools.combinations(_PALETTE.tolist(), 2))


def name_colour(lab: torch.Tensor) -> tuple[str | None, str]:
    """The colour's name, or None and why, of colours (F, 3) in CIELAB."""
    distances = (lab[:, None] - _PALETTE).square().sum(-1).sqrt()  # (F, 8)
    nearest = distances.min(1)
    named = nearest.indices.masked_fill(nearest.values > MOST_COLOUR_DISTANCE, len(COLOURS))
    votes = named.bincount(minlength=len(COLOURS) + 1)
    best = int(votes.argmax())
    if best == len(COLOURS):
        return None, "its colour is none of the palette"
    if votes[best] < _AGREE * len(lab):
        return None, "its colour changes"
    return list(COLOURS)[best], ""


# -------------------------------------------------------------------------------------------------------------- motion


def name_motion(path: torch.Tensor) -> tuple[str | None, bool, str]:
    """Direction and whether it bounces, or None, False and why, of centroids (33, 2) in pixels.

    Along the axis with more way, the position is fitted by p0 + v t, and by p0 + v (t - 2 max(0, t - T)), least squares
    over p0, v, and T on a grid of quarter frames: it bounces where the second is closer, and both legs were gone.
    """
    steps = path.diff(dim=0).abs()
    span = path.amax(0) - path.amin(0)
    axis = int(span.argmax())
    if steps.max() > _JUMP:
        return None, False, "it jumps"
    line = path[:, axis].double()
    time = torch.arange(len(line), dtype=torch.float64)
    turns = torch.arange(_TURNS[0], _TURNS[1] + 0.125, 0.25, dtype=torch.float64)
    folded = time - 2 * (time - turns[:, None]).clamp(min=0)  # (T, F)
    speeds, errors = _fit(folded, line)
    best = int(errors.argmin())
    speed, error, turn = float(speeds[best]), float(errors[best]), float(turns[best])
    (straight,), (straight_error,) = _fit(time[None], line)
    corner = line[round(turn)]
    legs = torch.stack((corner - line[0], corner - line[-1])) * math.copysign(1, speed)
    bounces = error < float(straight_error) and bool((legs >= _LEAST_LEG).all())
    if not bounces:
        speed, error = float(straight), float(straight_error)
    way = abs(speed) * _STEPS
    if way < _LEAST_WAY:
        return None, False, "it does not move far enough"
    if abs(speed) > _MOST_SPEED:
        return None, False, "it moves too fast"
    if float(span[1 - axis]) > _DRIFT * way:
        return None, False, "it drifts across"
    if error > _UNEVEN * way:
        return None, False, "it does not move at a constant speed"
    velocity = [0, 0]
    velocity[axis] = 1 if speed > 0 else -1
    name = next(name for name, unit in DIRECTIONS.items() if unit == tuple(velocity))
    return name, bounces, ""


def _fit(abscissa: torch.Tensor, line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes and root mean square errors (T,) of the least-squares lines over abscissa (T, F) to line (F,)."""
    u = abscissa - abscissa.mean(1, keepdim=True)
    p = line - line.mean()
    slope = (u * p).sum(1) / u.square().sum(1)
    return slope, (p - slope[:, None] * u).square().mean(1).sqrt()


# --------------------------------------------------------------------------------------------------------------- digit


def _name_digit(scores: torch.Tensor) -> tuple[int | None, float, str]:
    """The digit, or None and why, of log-probabilities (F, 11)."""
    mean = scores.mean(0).softmax(0)
    confidence, best = (float(x) for x in mean.max(0))
    if best == NO_DIGIT:
        return None, confidence, "its shape is that of no digit"
    if (scores.argmax(1) == best).float().mean() < _AGREE:
        return None, confidence, "its digit changes"
    return int(best), confidence, ""


class Network(nn.Module):
    """Scores (N, 11) of masks (N, 1, 32, 32): three convolutions and a linear layer; 34,571 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(widths[-1] * (VIEW // 8) ** 2, NO_DIGIT + 1)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        return self.last(self.dropout(self.convolutions(masks).flatten(1)))


class Classifier(nn.Module):
    """Log-probabilities (N, 11) of masks (N, 1, 32, 32): the geometric mean of two networks."""

    def __init__(self, networks: Sequence[Network] | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks or [Network() for _ in range(2)])

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        scores = [network(masks).log_softmax(1) for network in self.networks]
        return torch.stack(scores).mean(0).log_softmax(1)


@cache
def classifier(device: torch.device | str = "cpu") -> Classifier:
    """The shipped classifier, in float32, on a device."""
    from safetensors.torch import load_file

    found = Classifier()
    found.load_state_dict(load_file(WEIGHTS))
    return found.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------------------ training


def train_classifier(
    scans: Scans,
    steps: int = 1500,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Classifier:
    """A classifier trained on views of scans, each network from a seed of its own.

    The same arguments give the same weights, to the bit, on one kind of CPU and number of threads. With the defaults it
    takes two and a half minutes on one core.
    """
    glyphs = F.avg_pool2d(world.enlarge(scans.images), 2)
    networks = []
    with torch.random.fork_rng(devices=[]):
        for member in range(2):
            torch.manual_seed(2 * seed + member)
            told = (lambda f, m=member: progress((m + f) / 2)) if progress is not None else None
            networks.append(_train_network(glyphs, scans.labels, steps, batch, told))
    return Classifier(networks).eval().requires_grad_(False)


def _train_network(
    glyphs: torch.Tensor, labels: torch.Tensor, steps: int, batch: int, progress: Callable[[float], None] | None
) -> Network:
    """A network trained on glyphs (N, 1, 64, 64), by torch's global generator.

    A view is a glyph as the judge would crop it, changed as hands and decoders change digits (`distort`). One in eight
    is of no digit (`no_digits`). AdamW with a one-cycle rate; the weights are moving averages over some 200 steps.
    """
    net = Network().train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    strangers = batch // 8
    for step in range(steps):
        chosen = torch.randint(len(glyphs), (batch - strangers,))
        views = distort(torch.cat((glyphs[chosen], no_digits(glyphs, strangers))))
        wanted = F.pad(labels[chosen], (0, strangers), value=NO_DIGIT)
        loss = F.cross_entropy(net(views), wanted, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average.update_parameters(net)
        if progress is not None:
            progress((step + 1) / steps)
    found = Network()
    found.load_state_dict(average.module.state_dict())
    return found


def distort(glyphs: torch.Tensor) -> torch.Tensor:
    """Views (N, 1, 32, 32) of glyphs (N, 1, 64, 64), each distorted in its own way, by torch's global generator.

    Turned by up to 12 degrees, slanted, scaled as the world does and 8 % besides, bent smoothly, strokes thicker or
    thinner, blurred, faded, noisy.
    """
    n = len(glyphs)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape)

    # where each cell of a view lies on the glyph: turned, slanted, scaled, around the centroid as the judge crops
    angle, slant = uniform(-0.21, 0.21), uniform(-0.2, 0.2)
    side = uniform(*world.SCALE) / _WINDOW
    x, y = 1 / (side * uniform(0.92, 1.08)), 1 / (side * uniform(0.92, 1.08))
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack((cos * x, (slant * cos - sin) * y, sin * x, (slant * sin + cos) * y), dim=1).unflatten(1, (2, 2))
    centre = _centroid(glyphs[:, 0]) * (2.0 / glyphs.shape[-1]) - 1.0 + uniform(-0.04, 0.04, 2)
    grid = F.affine_grid(torch.cat((rows, centre[:, :, None]), dim=2), [n, 1, 64, 64], align_corners=False)
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=(64, 64), mode="bilinear", align_corners=False)
    views = F.grid_sample(glyphs, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    views = F.avg_pool2d(views, 2)
    blurred = views
    for _ in range(2):
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1)
    rewritten = ((blurred - uniform(0.3, 0.62, 1, 1, 1)) * uniform(2, 6, 1, 1, 1) + 0.5).clamp(0, 1)
    views = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, rewritten, views)
    views = views.lerp(blurred, uniform(0, 1, 1, 1, 1).square()) * uniform(0.85, 1.0, 1, 1, 1)
    return (views + uniform(0, 0.08, 1, 1, 1) * torch.randn(views.shape)).clamp(0, 1)


def no_digits(glyphs: torch.Tensor, count: int) -> torch.Tensor:
    """Masks (count, 1, 64, 64) of no digit: two over each other, boxes, ellipses, and blobs, as many of each."""
    kinds = torch.arange(count) % 4
    places = (torch.arange(64) + 0.5) / 32 - 1
    x, y = places[None, None, None, :], places[None, None, :, None]
    cx, cy = (torch.rand(count, 1, 1, 1) * 0.4 - 0.2 for _ in range(2))
    rx, ry = (torch.rand(count, 1, 1, 1) * 0.4 + 0.35 for _ in range(2))
    box = (((x - cx).abs() < rx) & ((y - cy).abs() < ry)).float()
    ellipse = (((x - cx) / rx).square() + ((y - cy) / ry).square() < 1).float()
    coarse = torch.rand(count, 1, 5, 5)
    smooth = F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False)
    blob = ((smooth - 0.5) * 8 * (x.abs() < 0.8) * (y.abs() < 0.8)).clamp(0, 1)
    one, other = (glyphs[torch.randint(len(glyphs), (count,))] for _ in range(2))
    shift = int(torch.randint(8, 20, (1,)))
    pair = torch.maximum(one.roll(shift, -1), other.roll(-shift, -1))
    return torch.where(
        (kinds == 0)[:, None, None, None],
        pair,
        torch.where(
            (kinds == 1)[:, None, None, None], box, torch.where((kinds == 2)[:, None, None, None], ellipse, blob)
        ),
    )
