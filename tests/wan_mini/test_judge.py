"""The judge says what a video shows, and cannot be fooled."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from turbocompile.errors import UnsupportedError
from turbocompile.wan_mini import world
from turbocompile.wan_mini.judge import Verdict, judge
from turbocompile.wan_mini.world import COLOURS, DIRECTIONS, GROUND, Combination

BASE = Combination(4, "blue", "left", False)


def only(video: torch.Tensor) -> Verdict:
    return judge(video[None])[0]


# ------------------------------------------------------------------------------------------------ what is there is seen


@pytest.fixture(scope="module")
def judged(truth):
    """16 combinations, two of each colour and of each motion, drawn with held-back scans; and the verdicts."""
    motions = [(d, b) for b in (False, True) for d in DIRECTIONS]
    wanted = [
        Combination((7 * i + 3 * k) % 10, colour, *motions[(i + 3 * k) % 8])
        for i, colour in enumerate(COLOURS)
        for k in range(2)
    ]
    return wanted, [only(truth(c, seed)) for seed, c in enumerate(wanted)]


def test_colour_and_motion_of_true_videos_are_always_seen(judged):
    wanted, verdicts = judged
    assert [v.colour for v in verdicts] == [c.colour for c in wanted]
    assert [(v.direction, v.bounces) for v in verdicts] == [(c.direction, c.bounces) for c in wanted]


def test_a_blurred_and_noisy_digit_is_still_seen(truth):
    """As a decoder may leave it: edges over 9 pixels, and noise of 6 levels."""
    generator = torch.Generator().manual_seed(0)
    for seed, wanted in enumerate([BASE, Combination(3, "yellow", "up", True), Combination(8, "white", "down", False)]):
        video = truth(wanted, seed).permute(0, 3, 1, 2).float()
        for _ in range(2):
            video = F.avg_pool2d(video, 5, stride=1, padding=2, count_include_pad=False)
        video = video + 6 * torch.randn(video.shape, generator=generator)
        found = only(video.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
        assert found.marks(wanted).all, (found, found.reason)


def test_floating_point_videos_are_judged_alike(truth):
    video = truth(BASE)
    a, b = only(video), only(video.float() / 127.5 - 1)
    assert (a.digit, a.colour, a.direction, a.bounces) == (b.digit, b.colour, b.direction, b.bounces)
    assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


def test_the_same_video_gets_the_same_verdict_in_any_batch(truth):
    videos = torch.stack([truth(BASE, seed) for seed in range(6)])
    together = judge(videos)
    for video, verdict in zip(videos, together, strict=True):
        alone = only(video)
        assert str(alone) == str(verdict)
        assert torch.equal(alone.glyph, verdict.glyph)


# ----------------------------------------------------------------------------------------------------- it is not fooled


def shifted(video: torch.Tensor, x: int, y: int) -> torch.Tensor:
    return video.roll((y, x), (1, 2))


def over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.maximum(a, b)


def blank(video: torch.Tensor) -> torch.Tensor:
    return torch.full_like(video, GROUND)


def noise(video: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, 256, video.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def full_colour(video: torch.Tensor) -> torch.Tensor:
    return torch.tensor(COLOURS["blue"], dtype=torch.uint8).expand(video.shape).clone()


def half_missing(video: torch.Tensor) -> torch.Tensor:
    return torch.cat((video[:17], blank(video[17:])))


def one_missing(video: torch.Tensor) -> torch.Tensor:
    return torch.cat((video[:16], blank(video[:1]), video[17:]))


def with_a_second_digit(video: torch.Tensor) -> torch.Tensor:
    """A copy in the half that the digit does not reach."""
    lower = (video[..., 2] > 150).any(2).any(0).nonzero().float().mean() > 128
    return over(video, shifted(video, 0, -110 if lower else 110))


def with_a_second_digit_late(video: torch.Tensor) -> torch.Tensor:
    return torch.cat((video[:25], with_a_second_digit(video)[25:]))


def inverted(video: torch.Tensor) -> torch.Tensor:
    return 255 - video


def on_a_light_ground(video: torch.Tensor) -> torch.Tensor:
    return video.clamp(min=100)


def faint(video: torch.Tensor) -> torch.Tensor:
    return (GROUND + 0.3 * (video.float() - GROUND)).round().to(torch.uint8)


def a_square(video: torch.Tensor) -> torch.Tensor:
    """A box of a digit's extent that moves like it."""
    made = blank(video)
    for frame in range(len(video)):
        left = 170 - 3 * frame
        made[frame, 80:160, left : left + 60] = torch.tensor(COLOURS["blue"], dtype=torch.uint8)
    return made


def a_stack_of_bars(video: torch.Tensor) -> torch.Tensor:
    made = a_square(video)
    made[:, 92:108], made[:, 126:142] = GROUND, GROUND
    return made


def scattered(video: torch.Tensor) -> torch.Tensor:
    """Twelve dots, 20 pixels apart, over the extent of a digit."""
    made = blank(video)
    for frame in range(len(video)):
        for row in range(4):
            for column in range(3):
                left, top = 170 - 3 * frame + 28 * column, 80 + 28 * row
                made[frame, top : top + 8, left : left + 8] = torch.tensor(COLOURS["blue"], dtype=torch.uint8)
    return made


def tiny(video: torch.Tensor) -> torch.Tensor:
    small = F.avg_pool2d(video.permute(0, 3, 1, 2).float(), 4).round().to(torch.uint8).permute(0, 2, 3, 1)
    made = blank(video)
    made[:, 96:160, 96:160] = small
    return made


NOTHING = [
    blank, noise, full_colour, half_missing, one_missing, with_a_second_digit, with_a_second_digit_late, inverted,
    on_a_light_ground, faint, scattered, tiny,
]  # fmt: skip


@pytest.mark.parametrize("change", NOTHING, ids=lambda f: f.__name__)
def test_what_is_no_single_digit_on_the_ground_is_wrong_in_everything(truth, change):
    base = truth(BASE)
    assert only(base).marks(BASE).all
    found = only(change(base))
    assert (found.digit, found.colour, found.direction, found.bounces) == (None, None, None, False)
    assert found.reason
    assert not found.glyph.any()


@pytest.mark.parametrize("change", [a_square, a_stack_of_bars], ids=lambda f: f.__name__)
def test_a_shape_that_is_no_digit_has_none(truth, change):
    found = only(change(truth(BASE)))
    assert (found.digit, found.colour, found.direction) == (None, "blue", "left")


def test_a_video_that_is_not_finite_shows_nothing(truth):
    video = truth(BASE).float() / 127.5 - 1
    video[20, 5, 5, 0] = math.nan
    assert "not finite in frame 20" in only(video).reason


def test_a_digit_that_stands_still_does_not_move(truth):
    found = only(truth(BASE)[:1].expand(33, -1, -1, -1))
    assert (found.digit, found.colour) == (BASE.digit, BASE.colour)
    assert found.direction is None
    assert "far enough" in found.reason


def test_time_turned_round_inverts_the_direction(truth):
    found = only(truth(BASE).flip(0))
    assert (found.digit, found.colour, found.direction, found.bounces) == (BASE.digit, "blue", "right", False)
    assert not found.marks(BASE).motion


def test_frames_in_disorder_have_no_motion(truth):
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert only(truth(BASE)[order]).direction is None


def test_a_digit_that_jumps_has_no_motion(truth):
    """Right for half of the way, from the start again, and on."""
    video = truth(BASE)
    assert only(torch.cat((video[:17], video[:16]))).direction is None


def test_a_colour_that_changes_midway_is_none(truth):
    swapped = truth(BASE)
    swapped[17:] = swapped[17:].flip(-1)  # blue to an orange-red
    found = only(swapped)
    assert found.colour is None
    assert "colour changes" in found.reason
    assert (found.digit, found.direction) == (BASE.digit, BASE.direction)


def test_a_digit_of_two_colours_is_wrong(truth):
    video = truth(BASE)
    rows = (video[..., 2] > 150).any(2)[0].nonzero()
    middle = int(rows.float().mean())
    video[:, :middle] = video[:, :middle].flip(-1)
    assert not only(video).marks(BASE).colour


def test_a_digit_that_becomes_another_is_none(held_back, truth):
    """Half of the frames a four, half an eight at the same place."""
    scans, masks = held_back
    generator = torch.Generator().manual_seed(0)
    scenes = world.draw_scenes([BASE], scans, generator)
    four = world.render(scenes, masks)
    other = int((scans.labels == 8).nonzero()[0, 0])
    eight = world.render(world.Scenes(**{**vars(scenes), "scan": torch.tensor([other])}), masks)
    mixed = torch.cat((four[:, :, :17], eight[:, :, 17:]), dim=2).permute(0, 2, 3, 4, 1)
    assert judge(mixed)[0].digit is None


def test_a_right_video_of_another_prompt_is_wrong(truth):
    found = only(truth(BASE))
    for other in (Combination(9, "blue", "left", False), Combination(4, "cyan", "left", False)):
        assert not found.marks(other).all
    for motion in (("right", False), ("up", False), ("down", False), ("left", True)):
        assert not found.marks(Combination(4, "blue", *motion)).motion


def test_another_shape_is_refused():
    with pytest.raises(UnsupportedError, match=r"not at \(1, 5, 64, 64, 3\)"):
        judge(torch.zeros(1, 5, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(UnsupportedError, match="int64"):
        judge(torch.zeros(1, 33, 256, 256, 3, dtype=torch.int64))


@pytest.mark.gpu
def test_a_gpu_sees_the_same(truth):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    videos = torch.stack([truth(BASE, seed) for seed in range(4)])
    assert [str(v) for v in judge(videos.cuda())] == [str(v) for v in judge(videos)]
