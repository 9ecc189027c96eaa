"""The world of digits: what its prompts say is what its videos show, and what is held out is never said."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbocompile.errors import UnsupportedError
from turbocompile.wan_mini import world
from turbocompile.wan_mini.world import COLOURS, DIRECTIONS, FRAMES, SIZE, Combination

EVERY = world.combinations()
INDICES = st.integers(0, len(EVERY) - 1)


@pytest.fixture(scope="module")
def drawn(held_back):
    """One scene of each combination."""
    scans, _ = held_back
    return world.draw_scenes(EVERY, scans, torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------- the prompts


def test_a_prompt_says_its_combination_and_no_other():
    assert len({c.prompt for c in EVERY}) == len(EVERY) == 640
    assert [c.index for c in EVERY] == list(range(640))
    assert Combination(7, "orange", "left", True).prompt == "an orange seven moves left and bounces"


def test_a_fifth_is_held_out_and_every_pair_is_left_with_six_partners():
    assert sum(c.held_out for c in EVERY) == 640 // 5
    seen = [c for c in EVERY if not c.held_out]

    def count(*parts):
        pairs = [tuple(part(c) for part in parts) for c in seen]
        return [pairs.count(pair) for pair in set(pairs)]

    digit, colour = (lambda c: c.digit), (lambda c: c.colour)
    motion = lambda c: (c.direction, c.bounces)  # noqa: E731
    for pair, number in (((digit, colour), 80), ((digit, motion), 80), ((colour, motion), 64)):
        counts = count(*pair)
        assert len(counts) == number
        assert min(counts) >= 6


def test_the_evaluation_set_alternates_between_seen_and_held_out():
    wanted = world.evaluation_set()
    assert len(set(wanted)) == 200
    assert [c.held_out for c in wanted] == [False, True] * 100
    assert wanted == world.evaluation_set(200, seed=0)
    assert wanted != world.evaluation_set(200, seed=1)
    for count in (0, 7, -2, 258):
        with pytest.raises(UnsupportedError, match="even number of prompts, 2 to 256"):
            world.evaluation_set(count)


def test_the_training_clips_show_nothing_that_is_held_out():
    from turbocompile.wan_mini.train import Clips

    wanted = Clips(batch=1, side=64, frames=5, device=torch.device("cpu")).wanted
    assert len(wanted) == 512
    assert not any(c.held_out for c in wanted)


# ----------------------------------------------------------------------------------------------------------- the scans


def test_scans_of_the_last_fifth_are_held_back():
    from sklearn.datasets import load_digits

    training, held_back = world.load_scans(train=True), world.load_scans(train=False)
    assert (len(training.labels), len(held_back.labels)) == (1437, 360)
    every = torch.from_numpy(load_digits().images).float() / 16
    assert torch.equal(torch.cat((training.images, held_back.images)), every)
    assert set(held_back.labels.tolist()) == set(range(10))


def test_enlarging_keeps_a_scan_in_its_place(held_back):
    """A mask averaged over its 8 x 8 inner cells looks like its scan: they correlate, and with no other place more."""
    scans, masks = held_back
    cells = torch.nn.functional.avg_pool2d(masks, 128 // 10, stride=128 // 10)[:, 0, 1:9, 1:9]
    assert masks.shape == (360, 1, 128, 128)
    assert masks.min() >= 0
    assert masks.max() <= 1

    def correlation(a, b):
        return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]

    right = correlation(cells, scans.images)
    assert right > 0.8
    for shift, axis in itertools.product((-1, 1), (1, 2)):
        assert correlation(cells, scans.images.roll(shift, axis)) < right


# ---------------------------------------------------------------------------------------------------------- the scenes


def walk(start: float, velocity: float, room: float, frames: int) -> list[float]:
    """Positions by small steps and reflections, as one would write it by hand."""
    place, found = start, [start]
    for _ in range(frames - 1):
        place += velocity
        if place < 0 or place > room:
            place = -place if place < 0 else 2 * room - place
            velocity = -velocity
        found.append(place)
    return found


@settings(deadline=None, max_examples=50)
@given(st.floats(*world.SCALE), st.floats(0, 1), st.floats(0, 1), st.floats(-6, 6), st.floats(-6, 6))
def test_corners_are_those_of_a_ball_between_walls(size, x, y, vx, vy):
    room = SIZE - size
    scenes = world.Scenes(
        scan=torch.zeros(1, dtype=torch.long),
        colour=torch.zeros(1, 3),
        size=torch.tensor([size]),
        start=torch.tensor([[x * room, y * room]]),
        velocity=torch.tensor([[vx, vy]]),
    )
    known = [walk(place * room, speed, room, FRAMES) for place, speed in ((x, vx), (y, vy))]
    # positions up to 2 * 156 + 6 * 32 are rounded to float32 some four times
    assert torch.allclose(scenes.corners()[0], torch.tensor(known).T, atol=4 * 512 * 2**-23)


def test_digits_stay_within_the_frame_and_move_as_said(drawn):
    corners = drawn.corners()
    room = (SIZE - drawn.size)[:, None, None]
    assert ((corners >= 0) & (corners <= room)).all()
    steps = corners.diff(dim=1)
    for combination, path in zip(EVERY, steps, strict=True):
        unit = torch.tensor(DIRECTIONS[combination.direction], dtype=torch.float32)
        along, across = path @ unit, path @ unit.flip(0)
        assert across.abs().max() < 1e-3
        assert along[0] > 1.9
        if combination.bounces:
            turn = int((along < 0).nonzero()[0])
            assert 9 <= turn <= 20
            assert (along[turn + 1 :] < -2.9).all()
        else:
            assert (along > 1.9).all()


def test_scenes_show_the_digit_and_colour_of_their_combination(drawn, held_back):
    scans, _ = held_back
    assert scans.labels[drawn.scan].tolist() == [c.digit for c in EVERY]
    colours = ((drawn.colour + 1) * 127.5).round().int().tolist()
    assert [tuple(c) for c in colours] == [COLOURS[c.colour] for c in EVERY]


def pick(scenes: world.Scenes, index: int) -> world.Scenes:
    return world.Scenes(**{name: value[index : index + 1] for name, value in vars(scenes).items()})


@settings(deadline=None, max_examples=10)
@given(INDICES, st.integers(0, FRAMES - 1))
def test_a_frame_shows_the_mask_at_its_corner(held_back, drawn, index, frame):
    """The drawn centroid is the corner plus the mask's own centroid times the size, to a twentieth of a pixel."""
    _, masks = held_back
    scenes = pick(drawn, index)
    video = world.render(scenes, masks, frames=torch.tensor([[frame]]))
    ground = world.GROUND / 127.5 - 1
    channel = int((scenes.colour[0] - ground).abs().argmax())
    opacity = (video[0, channel, 0] - ground) / (scenes.colour[0, channel] - ground)
    mask = masks[scenes.scan[0], 0]

    def centroid(image: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(image)) + 0.5
        return torch.stack(((image.sum(0) * places).sum(), (image.sum(1) * places).sum())) / image.sum()

    expected = scenes.corners()[0, frame] + centroid(mask) / 128 * scenes.size
    assert torch.allclose(centroid(opacity), expected, atol=0.05)
    # a pixel covers (128 / size)^2 of the mask's cells
    assert opacity.sum() == pytest.approx(float(mask.sum() * (scenes.size[0] / 128) ** 2), rel=0.01)
    assert video.amin() >= -1
    assert torch.allclose(video[:, :, 0, :2, :2].amin(), torch.tensor(ground), atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(INDICES, st.integers(0, 256 - 96), st.integers(0, 256 - 96), st.sampled_from([32, 64, 96]))
def test_a_window_is_the_cut_out_of_the_whole(held_back, drawn, index, x, y, side):
    _, masks = held_back
    scenes, frames = pick(drawn, index), torch.tensor([[3, 29]])
    whole = world.render(scenes, masks, frames)
    part = world.render(scenes, masks, frames, torch.tensor([[x, y]]), side)
    assert part.shape == (1, 3, 2, side, side)
    # a corner is rounded anew, by 256 * 2^-24 pixels; a mask's edge rises by at most 1 (2 in [-1, 1]) a pixel
    assert torch.allclose(part, whole[..., y : y + side, x : x + side], atol=1e-3)


def test_the_same_generator_draws_the_same_scenes(held_back):
    scans, _ = held_back
    a, b, c = (world.draw_scenes(EVERY[:5], scans, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.corners(), b.corners())
    assert not torch.equal(a.corners(), c.corners())
