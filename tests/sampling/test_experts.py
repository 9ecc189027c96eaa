"""Which expert denoises when."""

from __future__ import annotations

from turbocompile.sampling import choose_experts


def test_one_transformer_serves_all_times():
    assert choose_experts([1.0, 0.5, 0.0], None) == ["transformer"] * 3


def test_the_boundary_itself_belongs_to_the_high_noise_expert():
    assert choose_experts([0.95, 0.9, 0.8999], 0.9) == ["transformer", "transformer", "transformer_2"]


def test_the_switch_is_for_good():
    assert choose_experts([0.95, 0.8, 0.95], 0.9) == ["transformer", "transformer_2", "transformer_2"]
