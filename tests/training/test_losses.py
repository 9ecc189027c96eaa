"""The objectives against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from turbocompile.errors import RecipeError
from turbocompile.training import flow_matching_batch, flow_matching_loss, vae_loss
from turbocompile.training.losses import draw_times

EPS = torch.finfo(torch.float32).eps
MANY = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noisy_latents_lie_on_the_line_from_data_to_noise():
    latents = torch.randn(4, 3, 2, 5, 5, generator=seeded(1))
    batch = flow_matching_batch(latents, seeded(2), shift=3.0)
    t = (batch["timestep"].double() / 1000).reshape(4, 1, 1, 1, 1)
    wanted = (1 - t) * latents.double() + t * batch["noise"].double()
    # t from 1000 t, 1 - t, two products, their sum: five roundings of numbers no larger than the operands.
    bound = 5 * EPS * max(latents.abs().max(), batch["noise"].abs().max()).item()
    torch.testing.assert_close(batch["noisy"].double(), wanted, rtol=0, atol=bound)
    assert batch["timestep"].shape == (4,)
    assert torch.equal(batch["latents"], latents)


def test_the_draws_depend_on_the_generator_alone():
    zeros, ones = (flow_matching_batch(x, seeded(5)) for x in (torch.zeros(3, 7), torch.ones(3, 7)))
    other = flow_matching_batch(torch.zeros(3, 7), seeded(6))
    for name in ("noise", "timestep"):
        assert torch.equal(zeros[name], ones[name])
        assert not torch.equal(zeros[name], other[name])


def test_half_precision_latents_become_float32():
    batch = flow_matching_batch(torch.ones(2, 3, dtype=torch.bfloat16), seeded())
    assert {value.dtype for value in batch.values()} == {torch.float32}


def test_uniform_times_are_uniform():
    t = draw_times(MANY, seeded())
    assert t.min() >= 0
    assert t.max() < 1
    assert abs(t.mean() - 0.5) < 5 * math.sqrt(1 / 12 / MANY)  # five standard errors
    assert abs((t < 0.25).float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / MANY)


def test_logit_normal_times_have_a_normal_logit():
    t = draw_times(MANY, seeded(), logit_normal=True, mean=0.5, std=2.0).double()
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 5 * 2.0 / math.sqrt(MANY)
    assert abs(logit.std() - 2.0) < 5 * 2.0 / math.sqrt(2 * MANY)


@pytest.mark.parametrize("logit_normal", [False, True])
def test_shift_moves_times_towards_noise(logit_normal):
    plain = draw_times(100, seeded(), logit_normal=logit_normal).double()
    shifted = draw_times(100, seeded(), shift=3.0, logit_normal=logit_normal).double()
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=4 * EPS, atol=0)  # four roundings


@pytest.mark.parametrize("options", [{"shift": 0.0}, {"std": -1.0}])
def test_a_shift_or_spread_that_makes_no_sense_is_refused(options):
    with pytest.raises(RecipeError, match="must be greater than 0"):
        draw_times(3, seeded(), **options)


def test_loss_is_zero_for_the_velocity_and_the_mean_square_elsewhere():
    latents, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])
    velocity = torch.tensor([[3.0, -4.0]])
    assert flow_matching_loss(velocity, latents, noise) == 0
    assert flow_matching_loss(velocity + torch.tensor([[1.0, 3.0]]), latents, noise) == 5  # (1 + 9) / 2
    assert flow_matching_loss(velocity.bfloat16(), latents, noise).dtype == torch.float32


def test_a_loss_of_other_shapes_is_refused():
    with pytest.raises(RecipeError, match=r"velocity has shape \(2, 1\), and its target \(2, 3\)"):
        flow_matching_loss(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(RecipeError, match="reconstruction has shape"):
        vae_loss(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(1), torch.zeros(1))


def test_vae_loss_against_torch():
    video, other, mean, logvar = (torch.randn(2, 3, 4, generator=seeded(i)) for i in range(4))
    loss, parts = vae_loss(other, video, mean, logvar, kl_weight=0.1, l1_weight=2.0, mse_weight=3.0)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    l1, mse = (other - video).abs().mean(), (other - video).square().mean()
    # Means of 24 numbers below 20 in magnitude, each with a few roundings: well under 20 * 8 eps.
    for found, wanted in (
        (parts["kl"], kl),
        (parts["l1"], l1),
        (parts["mse"], mse),
        (loss, 2 * l1 + 3 * mse + 0.1 * kl),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=160 * EPS)


def test_vae_loss_has_no_kl_at_the_prior():
    video = torch.ones(1, 2)
    loss, parts = vae_loss(video, video, torch.zeros(1, 4), torch.zeros(1, 4), kl_weight=1.0)
    assert (loss, parts["kl"]) == (0, 0)
