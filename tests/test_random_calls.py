"""Random models, called in random ways: the engine is the model, or says why not; and nothing is left changed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

sys.path.insert(0, str(Path(__file__).parent))
from random_calls import STATE, choose, trial

QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
# Of the first 9,000 seeds those, found greedily, whose models hold each two choices together: how an attention is
# written beside how a module is wrapped, and so on. 200 seeds at random miss one pair in fifty.
SEEDS = [
    1, 2, 3, 5, 18, 22, 23, 25, 27, 48, 52, 66, 86, 154, 166, 169, 183, 284, 310, 323, 463, 801, 844, 884, 1038,
    1087, 1165, 1184, 1269, 1272, 1588, 1741, 1814, 1825, 1884, 2015, 2089, 2232, 2490, 2557, 2612, 2623, 2630,
    2789, 2804, 2819, 2969, 3146, 3183, 3360, 3661, 3836, 3943, 3992, 4016, 4056, 4516, 4533, 4549, 4739, 4973,
    4985, 5070, 5544, 5641, 5675, 5764, 5807, 5836, 6210, 6246, 6256, 6725, 6756, 6919, 6948, 6992, 7062, 7249,
    7385, 7425, 7501, 7531, 7583, 7691, 7746, 7786, 7853, 7877, 7882, 8018, 8433,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_an_engine_is_its_model_or_says_why_and_leaves_it_as_it_was(part):
    for seed in SEEDS[part::4]:
        assert trial(seed) == ("state refused" if choose(seed).counting in STATE else "equal")


def test_the_seeds_hold_each_two_choices_together():
    drawn = [choose(seed).pairs() for seed in SEEDS]
    values: dict[str, set[object]] = {}
    for kind, value in {choice for pairs in drawn for pair in pairs if len(pair) == 2 for choice in pair}:
        values.setdefault(kind, set()).add(value)
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]}
    held = {pair for pairs in drawn for pair in pairs}
    assert {pair for pair in wanted if pair not in held and pair[::-1] not in held} == set()
    assert all(len(found) > 1 for found in values.values())
    assert values["attention"] == {"sdpa", "before", "after", "both", "einsum", "baddbmm"}


@pytest.mark.slow
@settings(max_examples=12, **QUIETLY)
@given(strategies.integers(0, 2**32 - 1))
def test_the_same_holds_with_all_rewrites(seed):
    assert trial(seed, passes=True) in ("equal", "state refused")
