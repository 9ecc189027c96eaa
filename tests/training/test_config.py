"""Options are checked when they are set; schedules have the values that their formulas say."""

from __future__ import annotations

import math

import pytest

from turbocompile.errors import RecipeError
from turbocompile.training.config import TrainConfig, ema_weight, learning_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"lr": 0.0}, "lr must be greater than 0.0, not 0.0"),
        ({"lr": math.nan}, "lr must be a finite number, not nan"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers below 1"),
        ({"betas": (0.9,)}, "betas must be two numbers below 1"),
        ({"decay": 1.5}, "decay must be at most 1.0, not 1.5"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"grad_clip": 0.0}, "grad_clip must be greater than 0.0"),
        ({"ema_decay": 0.9, "ema_power": 0.1}, "ema_decay and ema_power exclude each other"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1"),
        ({"ema_power": 0.3}, "ema_power must be at most 0.28"),
        ({"precision": "float16"}, "precision"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"max_seconds": 0.0}, "max_seconds must be greater than 0.0"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(changes, message):
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**{"steps": 10, **changes})


def test_learning_rate_rises_stays_and_falls():
    config = TrainConfig(steps=10, lr=2.0, warmup=4, decay=0.4)
    assert [learning_rate(config, step) for step in range(10)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_learning_rate_is_constant_without_warmup_and_decay():
    config = TrainConfig(steps=10, lr=2.0, warmup=0, decay=0.0)
    assert {learning_rate(config, step) for step in range(10)} == {2.0}


def test_a_decay_over_the_whole_run_is_a_triangle():
    config = TrainConfig(steps=8, lr=8.0, warmup=4, decay=1.0)
    assert [learning_rate(config, step) for step in range(8)] == [2, 4, 6, 5, 4, 3, 2, 1]


def test_moving_average_weights():
    assert ema_weight(TrainConfig(steps=10), 5) == 0
    assert ema_weight(TrainConfig(steps=10, ema_decay=0.75), 5) == 0.25
    power = TrainConfig(steps=10, ema_power=0.1)
    assert ema_weight(power, 0) == 1  # the first step replaces what training began with
    assert ema_weight(power, 9) == pytest.approx(1 - 0.9**7.93720, rel=1e-5)  # the exponent's digits
