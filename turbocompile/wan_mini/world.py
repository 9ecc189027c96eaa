"""The world of moving digits: its prompts, and drawn videos that show them.

A scene is one handwritten digit in one of eight colours on a dark grey ground. The digit moves in one of four
directions at constant speed; if the prompt says "and bounces", it reaches the border and comes back. Digits are scans
of scikit-learn's `load_digits` (1,797 images of 8 x 8 by 43 writers: the test set of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0).

One combination of digit, colour and motion in five is held out: no training video shows the combination, but training
videos show each of its pairs (digit and colour, digit and motion, colour and motion). The videos that a model makes for
held-out prompts tell whether the model composes or recalls.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from turbocompile.defaults import EVALUATION_PROMPTS
from turbocompile.errors import UnsupportedError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# sRGB colours in 0..255, which are far from each other in hue, or in saturation (white).
COLOURS = {
    "red": (225, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (235, 220, 60),
    "green": (50, 190, 70),
    "cyan": (60, 210, 220),
    "blue": (65, 95, 240),
    "magenta": (215, 70, 215),
    "white": (235, 235, 235),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
# The ground is dark grey and not black, because a VAE that clamps its output to [-1, 1] gets no gradient from a ground
# at -1.
GROUND = 40

SIZE, FRAMES = 256, 33  # pixels a side, frames of a video
HELD_OUT_SHARE = 5  # one combination in HELD_OUT_SHARE is held out
TRAIN_IMAGES = 1437  # how many of the 1,797 scans serve for training; the rest is held back
_GLYPH = 128  # pixels a side of an enlarged scan
SCALE = (120.0, 140.0)  # side of the drawn square, in pixels, its margin included
SPEED = {False: (2.0, 3.4), True: (3.0, 4.0)}  # pixels a frame, by whether the digit bounces
TURN = (10.0, 20.0)  # the frame at which a bouncing digit turns back


@dataclass(frozen=True)
class Combination:
    """The contents of a prompt: digit 0..9, the name of a colour, the name of a direction, whether the digit
    bounces.
    """

    digit: int
    colour: str
    direction: str
    bounces: bool

    @property
    def prompt(self) -> str:
        """The prompt, for example "an orange seven moves left and bounces"."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        ending = " and bounces" if self.bounces else ""
        return f"{article} {self.colour} {DIGITS[self.digit]} moves {self.direction}{ending}"

    @property
    def index(self) -> int:
        """The combination's place in `combinations()`."""
        motion = list(DIRECTIONS).index(self.direction) + len(DIRECTIONS) * self.bounces
        return (self.digit * len(COLOURS) + list(COLOURS).index(self.colour)) * 2 * len(DIRECTIONS) + motion

    @property
    def held_out(self) -> bool:
        """Whether no training video shows this combination.

        A linear rule modulo 5 holds out combinations, so that every pair of values keeps at least six of its eight (or
        ten) partners.
        """
        motion = list(DIRECTIONS).index(self.direction) + len(DIRECTIONS) * self.bounces
        return (self.digit + 2 * list(COLOURS).index(self.colour) + 3 * motion) % HELD_OUT_SHARE == 0


def combinations() -> list[Combination]:
    """All 640 combinations, in the order of `index`."""
    return [
        Combination(digit, colour, direction, bounces)
        for digit, colour, bounces, direction in itertools.product(
            range(len(DIGITS)), COLOURS, (False, True), DIRECTIONS
        )
    ]


def evaluation_set(count: int = EVALUATION_PROMPTS, seed: int = 0) -> list[Combination]:
    """`count` different combinations, every second of which is held out; the same arguments give the same combinations.

    Raises UnsupportedError unless count is even, at least 2, and at most twice the number of held-out combinations.
    """
    rng = random.Random(seed)
    seen = [c for c in combinations() if not c.held_out]
    unseen = [c for c in combinations() if c.held_out]
    half = count // 2
    if count < 2 or count % 2 or half > len(unseen):
        raise UnsupportedError(f"an evaluation takes an even number of prompts, 2 to {2 * len(unseen)}, not {count}")
    pairs = zip(rng.sample(seen, half), rng.sample(unseen, half), strict=True)
    return [combination for pair in pairs for combination in pair]


# ----------------------------------------------------------------------------------------------------------- the scans


@dataclass(frozen=True)
class Scans:
    """Handwritten digits: images (N, 8, 8), float32 in [0, 1], and labels (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor


def load_scans(train: bool) -> Scans:
    """The scans to train on, or the scans that are held back.

    The scans are ordered by writer, so that other writers wrote the last fifth, which is held back. Raises
    UnsupportedError without scikit-learn, because scikit-learn holds the scans.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnsupportedError('the scans come with scikit-learn: pip install "turbocompile[training]"') from error
    found = load_digits()
    part = slice(0, TRAIN_IMAGES) if train else slice(TRAIN_IMAGES, None)
    images = torch.from_numpy(np.ascontiguousarray(found.images[part])).float() / 16.0
    return Scans(images, torch.from_numpy(np.ascontiguousarray(found.target[part])).long())


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """Masks (N, 1, 128, 128) in [0, 1] from scans (N, 8, 8): enlarged with a margin, and with edges made sharp
    again.
    """
    margin = F.pad(images[:, None], (1, 1, 1, 1))
    large = F.interpolate(margin, size=(_GLYPH, _GLYPH), mode="bicubic", align_corners=False)
    ramp = ((large - 0.3) / 0.3).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


# ---------------------------------------------------------------------------------------------------------- the scenes


@dataclass(frozen=True)
class Scenes:
    """B scenes, on one device.

    scan: (B,) int64, the index of the scan that is drawn. colour: (B, 3) in [-1, 1]. size: (B,), the side of the drawn
    square in pixels. start: (B, 2), the corner (x, y) of the square in frame 0, in pixels. velocity: (B, 2), pixels a
    frame. The corner turns back at 0 and at 256 - size.
    """

    scan: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    start: torch.Tensor
    velocity: torch.Tensor

    def __len__(self) -> int:
        return len(self.scan)

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def corners(self, frames: int = FRAMES) -> torch.Tensor:
        """The corner (x, y) of the square in each frame, in pixels, reflected at the borders: (B, frames, 2)."""
        time = torch.arange(frames, device=self.start.device, dtype=torch.float32)
        free = self.start[:, None] + self.velocity[:, None] * time[None, :, None]
        room = (SIZE - self.size)[:, None, None]
        return room - (free.remainder(2 * room) - room).abs()


def draw_scenes(wanted: list[Combination], scans: Scans, generator: torch.Generator) -> Scenes:
    """Scenes that show the given combinations; the generator draws writer, size, speed and place."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(wanted), generator=generator)

    draws = torch.rand(len(wanted), generator=generator)
    by_digit = [(scans.labels == digit).nonzero()[:, 0] for digit in range(len(DIGITS))]
    chosen = [
        by_digit[c.digit][int(draw * len(by_digit[c.digit]))] for c, draw in zip(wanted, draws.tolist(), strict=True)
    ]
    size = uniform(*SCALE)
    room = SIZE - size
    bounces = torch.tensor([c.bounces for c in wanted])
    speed = torch.where(bounces, uniform(*SPEED[True]), uniform(*SPEED[False]))
    # The way to the border ahead. A bouncing digit reaches the border in the middle of the video, and any other digit
    # not before the last frame.
    ahead = speed * uniform(*TURN)
    longest = speed * (FRAMES - 1)
    ahead = torch.where(bounces, ahead, longest + (room - longest) * torch.rand(len(wanted), generator=generator))
    across = room * torch.rand(len(wanted), generator=generator)
    direction = torch.tensor([DIRECTIONS[c.direction] for c in wanted], dtype=torch.float32)
    along = direction.abs()
    forward = direction.sum(1)
    place = torch.where(forward > 0, room - ahead, ahead)
    return Scenes(
        scan=torch.stack(chosen),
        colour=torch.tensor([COLOURS[c.colour] for c in wanted], dtype=torch.float32) / 127.5 - 1.0,
        size=size,
        start=along * place[:, None] + (1 - along) * across[:, None],
        velocity=direction * speed[:, None],
    )


def render(
    scenes: Scenes,
    masks: torch.Tensor,
    frames: torch.Tensor | None = None,
    window: torch.Tensor | None = None,
    side: int = SIZE,
) -> torch.Tensor:
    """Draws videos (B, 3, F, side, side) in [-1, 1], float32, on the device of scenes and masks (see `enlarge`).

    frames: (B, F), the numbers of the frames, by default all 33. window: (B, 2), the corner (x, y) in pixels of a
    cut-out of side x side pixels, which alone is drawn; by default the corner of the frame.
    """
    batch, device = len(scenes), masks.device
    corners = scenes.corners()
    if frames is not None:
        corners = corners.gather(1, frames[..., None].expand(-1, -1, 2))
    if window is not None:
        corners = corners - window[:, None]
    count = corners.shape[1]
    pixels = torch.arange(side, device=device, dtype=torch.float32) + 0.5
    scale = 2.0 / scenes.size[:, None, None]
    x = (pixels - corners[..., :1]) * scale - 1.0  # (B, F, side): where each column lies on the glyph, in [-1, 1]
    y = (pixels - corners[..., 1:]) * scale - 1.0
    grid = torch.stack(
        (x[:, :, None, :].expand(-1, -1, side, -1), y[:, :, :, None].expand(-1, -1, -1, side)), dim=-1
    ).reshape(batch, count * side, side, 2)
    mask = F.grid_sample(masks[scenes.scan], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mask = mask.reshape(batch, 1, count, side, side)
    ground = GROUND / 127.5 - 1.0
    return ground + mask * (scenes.colour[:, :, None, None, None] - ground)
