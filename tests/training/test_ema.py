"""Moving averages: the exponents of power EMAs, and one update after another against the definition."""

from __future__ import annotations

import pytest
import torch

from turbocompile.training.config import TrainConfig, ema_weight
from turbocompile.training.ema import Ema, power_gamma

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("width", "gamma"), [(0.1, 6.93720), (0.05, 16.97220)])
def test_gamma_of_the_published_widths(width, gamma):
    assert power_gamma(width) == pytest.approx(gamma, abs=5e-6)  # half of the last digit


@pytest.mark.parametrize("gamma", [0.1, 1.0, 6.94, 16.97, 100.0])
def test_gamma_is_the_exponent_of_a_profile_of_that_width(gamma):
    """The profile t^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    width = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert power_gamma(width) == pytest.approx(gamma, rel=1e-9)


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"ema_power": 0.2}])
def test_updates_follow_the_definition(options):
    config = TrainConfig(steps=20, **options)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.rand(3, 4, generator=generator)), torch.nn.Parameter(torch.rand(5))]
    ema = Ema(parameters)
    wanted = [p.detach().double() for p in parameters]
    for step in range(config.steps):
        for i, p in enumerate(parameters):
            p.data = torch.rand(p.shape, generator=generator)
            weight = ema_weight(config, step)
            wanted[i] = (1 - weight) * wanted[i] + weight * p.detach().double()
        ema.weight.fill_(ema_weight(config, step))
        ema.update()
    # A step rounds a difference, a product and a sum of numbers up to 1, by half an eps each; earlier errors shrink.
    tolerance = config.steps * 1.5 * EPS
    for average, exact in zip(ema.averages, wanted, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=0, atol=tolerance)


def test_a_power_average_forgets_where_it_began():
    weight = torch.nn.Parameter(torch.full((2,), 100.0))
    ema = Ema([weight])
    weight.data = torch.ones(2)
    ema.weight.fill_(ema_weight(TrainConfig(steps=2, ema_power=0.1), 0))
    ema.update()
    torch.testing.assert_close(ema.averages[0], torch.ones(2), rtol=0, atol=100 * EPS)  # 1 - 100 rounds in units of 100
    assert not ema.averages[0].requires_grad
