"""Random models, called in random ways: the engine is the model, or says why not; and nothing is left changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

sys.path.insert(0, str(Path(__file__).parent))
from random_calls import trial

SEEDS = strategies.integers(0, 2**32 - 1)
QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_an_engine_is_its_model_or_says_why_and_leaves_it_as_it_was(part):
    @settings(max_examples=50, **QUIETLY)
    @given(SEEDS)
    def trials(seed):
        assert trial(4 * seed + part) in ("equal", "state refused")

    trials()


@pytest.mark.slow
@settings(max_examples=12, **QUIETLY)
@given(SEEDS)
def test_the_same_holds_with_all_rewrites(seed):
    assert trial(seed, passes=True) in ("equal", "state refused")
