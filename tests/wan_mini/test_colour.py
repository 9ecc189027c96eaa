"""The colour that a digit is called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbocompile.wan_mini.colour import name_colour, to_lab
from turbocompile.wan_mini.world import COLOURS, GROUND


def test_cielab_of_known_colours():
    """White, black, and sRGB's primaries; B. Lindbloom's calculator, D65."""
    srgb = torch.tensor([[255.0, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    known = [[100.0, 0, 0], [0, 0, 0], [53.241, 80.093, 67.203], [87.735, -86.183, 83.179], [32.297, 79.188, -107.860]]
    assert torch.allclose(to_lab(srgb), torch.tensor(known), atol=0.02)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(COLOURS)), st.floats(0.85, 1.0), st.integers(0, 1000))
def test_a_paler_colour_keeps_its_name(name, opacity, seed):
    """Down to 85 % of its opacity, where the judge takes the core to end, and noise of 3 levels."""
    full = torch.tensor(COLOURS[name], dtype=torch.float32)
    noise = torch.randn(33, 3, generator=torch.Generator().manual_seed(seed))
    assert name_colour(to_lab(GROUND + opacity * (full - GROUND) + 3 * noise))[0] == name


@pytest.mark.parametrize("colour", [(40, 40, 40), (128, 128, 128), (140, 90, 60), (120, 60, 160)])
def test_a_colour_outside_of_the_palette_is_none(colour):
    assert name_colour(to_lab(torch.tensor([colour] * 33)))[0] is None
