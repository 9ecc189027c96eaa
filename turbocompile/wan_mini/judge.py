"""Judges which digit, colour and motion a video of the world of digits shows.

The judge never sees a prompt. It names the digit, colour and motion of a video, or says "none"; an evaluation compares
these names with those of the prompt. The judge measures:

* In each frame, the pixels that stand out from the grey ground. In every frame these pixels must be one connected thing
  with the extent of a digit, on a grey ground; otherwise the video shows nothing.
* Colour: the mean colour of the digit's core in each frame, and the nearest colour of the palette in CIELAB.
* Digit: the opacity mask that this colour gives, cropped around its centroid at a fixed scale. Two small convolutional
  networks classify the mask in every frame, with "no digit" as the eleventh class; log-probabilities are averaged over
  networks and frames.
* Motion: the path of the centroid, fitted by a straight line at constant speed, with one turn back or without.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.wan_mini.classifier import classifier, name_digit
from turbocompile.wan_mini.colour import name_colour, to_lab
from turbocompile.wan_mini.frame import FLAWS, VIEW, look
from turbocompile.wan_mini.motion import name_motion
from turbocompile.wan_mini.world import DIGITS, FRAMES, SIZE, Combination

_BATCH = 4  # how many videos are judged at once, in float32, which take 26 MB each


@dataclass(frozen=True)
class Verdict:
    """The digit, colour and motion that a video shows.

    digit: 0..9; colour: its name; direction: the name of the direction before a turn. None stands for "none". bounces:
    whether the digit turns back. confidence: the classifier's confidence in the digit over all frames, in [0, 1].
    reason: why a part is None, otherwise "". glyph: (32, 32), float32 on the CPU, the digit's mask of opacity around
    its centroid, as a mean over the frames; zeros if a frame has a flaw.
    """

    digit: int | None
    colour: str | None
    direction: str | None
    bounces: bool
    confidence: float
    reason: str = ""
    glyph: torch.Tensor = field(default_factory=lambda: torch.zeros(VIEW, VIEW), repr=False, compare=False)

    def marks(self, wanted: Combination) -> Marks:
        """Which parts of the prompt of `wanted` the video shows."""
        return Marks(
            digit=self.digit == wanted.digit,
            colour=self.colour == wanted.colour,
            motion=(self.direction, self.bounces) == (wanted.direction, wanted.bounces),
        )

    def __str__(self) -> str:
        """The verdict in the words of a prompt, as in "red seven, left and bounces"; "?" stands for None."""
        digit = "?" if self.digit is None else DIGITS[self.digit]
        ending = " and bounces" if self.bounces and self.direction else ""
        return f"{self.colour or '?'} {digit}, {self.direction or '?'}{ending}"


@dataclass(frozen=True)
class Marks:
    """Whether the digit, the colour and the motion of a video are those of its prompt."""

    digit: bool
    colour: bool
    motion: bool

    @property
    def all(self) -> bool:
        return self.digit and self.colour and self.motion


@torch.no_grad()
def judge(videos: torch.Tensor) -> list[Verdict]:
    """Judges videos; returns a verdict for each video.

    videos: (B, 33, 256, 256, 3) on any device, uint8 sRGB, or floating point in [-1, 1]. A video with values that are
    not finite shows nothing. Raises UnsupportedError for another shape or dtype.
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
    """The verdict on one video, from the flaws (F,), colours in CIELAB (F, 3), masks (F, 32, 32), centroids (F, 2) and
    log-probabilities (F, 11) of its F frames.
    """
    if flaw.any():
        first = int(flaw.ne(0).nonzero()[0])
        return Verdict(None, None, None, False, 0.0, f"{FLAWS[int(flaw[first])]} in frame {first}")
    colour, colour_reason = name_colour(lab)
    direction, bounces, motion_reason = name_motion(path)
    digit, confidence, digit_reason = name_digit(scores)
    reason = "; ".join(r for r in (digit_reason, colour_reason, motion_reason) if r)
    return Verdict(digit, colour, direction, bounces, confidence, reason, glyph.mean(0))
