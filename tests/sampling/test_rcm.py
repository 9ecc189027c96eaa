"""The rCM sampler against the published schedule and against networks whose velocity is known."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from turbocompile.errors import UnsupportedError
from turbocompile.recipe.schema import RCM_MID_STEPS
from turbocompile.sampling import SamplingWarning, rcm

SHAPE = (2, 4, 3, 6, 5)
TIMES_80 = [0.9876543, 0.9337811, 0.8528954, 0.6089790, 0.0]
TIMES_200 = [0.9950249, 0.9337811, 0.8528954, 0.6089790, 0.0]


def schedule(steps, sigma_max=80.0, mid_steps=RCM_MID_STEPS):
    return rcm.schedule(steps, sigma_max, mid_steps)


def sample(denoise, shape, *, steps=4, sigma_max=80.0, mid_steps=RCM_MID_STEPS, **more):
    return rcm.sample(denoise, shape, steps=steps, sigma_max=sigma_max, mid_steps=mid_steps, **more)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Network:
    """The exact velocity towards x0, v = (x - x0) / t, that remembers what it was called with."""

    def __init__(self, x0: torch.Tensor, times: list[float]) -> None:
        self.x0, self.times = x0, times
        self.calls: list[tuple[torch.Tensor, torch.Tensor, str]] = []

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, expert: str) -> torch.Tensor:
        time = self.times[len(self.calls)]
        self.calls.append((x, timestep, expert))
        return (x - self.x0) / time


def smooth(x: torch.Tensor, timestep: torch.Tensor, expert: str) -> torch.Tensor:
    """Some network that depends on all its inputs."""
    return torch.tanh(x) * (0.3 + timestep.reshape(-1, 1, 1, 1, 1).double() / 2000) + 0.1 * x.roll(1, dims=3)


@pytest.mark.parametrize(("sigma_max", "expected"), [(80.0, TIMES_80), (200.0, TIMES_200)])
def test_schedule_is_the_published_one(sigma_max, expected):
    assert schedule(4, sigma_max) == pytest.approx(expected, abs=5e-8)  # seven digits are published


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_fewer_steps_use_the_first_mid_times(steps):
    assert schedule(steps) == pytest.approx([*TIMES_80[:steps], 0.0], abs=5e-8)


def test_first_time_is_sigma_over_one_plus_sigma():
    for sigma in (1600.0, 80.0, 14.2):  # above tan(1.5), which is the first mid time
        assert schedule(4, sigma)[0] == pytest.approx(sigma / (1 + sigma), rel=1e-14)
    assert math.atan(80.0) == pytest.approx(1.5582970, abs=5e-8)


def test_other_mid_steps_are_taken():
    older = schedule(4, 80.0, (1.3, 1.0, 0.6))
    assert older[1:4] == pytest.approx([math.tan(t) / (1 + math.tan(t)) for t in (1.3, 1.0, 0.6)])


@pytest.mark.parametrize(
    ("time", "expected"),
    [(0.9876543, 988), (0.9950249, 996), (0.9337811, 932), (0.8528954, 852), (0.6089790, 608), (1.0, 1000)],
)
def test_timestep_is_rounded_to_bfloat16(time, expected):
    timestep = rcm.network_timestep(time, 3, torch.device("cpu"))
    assert timestep.dtype == torch.float32
    assert timestep.tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, "1 to 4 steps"),
        ({"steps": 5}, "1 to 4 steps"),
        ({"steps": 4, "mid_steps": (1.5,)}, "need 3 mid steps"),
        ({"steps": 3, "mid_steps": (1.4, 1.5)}, "must fall"),
        ({"steps": 2, "sigma_max": 1.0}, "must fall"),
    ],
)
def test_impossible_schedules_are_refused(arguments, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        schedule(**arguments)


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_exact_velocity_gives_the_clean_sample(steps, ode):
    x0 = torch.randn(SHAPE, generator=seeded(9), dtype=torch.float64)
    network = Network(x0, schedule(steps))
    found = sample(network, SHAPE, generator=seeded(), steps=steps, ode=ode)
    assert len(network.calls) == steps
    # The state is float64 and the result is rounded to float32 once.
    torch.testing.assert_close(found, x0.float(), rtol=2**-23, atol=1e-12)


def test_state_is_float64_and_the_result_float32():
    network = Network(torch.zeros(SHAPE, dtype=torch.float64), schedule(2))
    found = sample(network, SHAPE, generator=seeded(), steps=2)
    assert {x.dtype for x, *_ in network.calls} == {torch.float64}
    assert found.dtype == torch.float32


def test_one_step_is_noise_minus_velocity():
    noise = torch.randn(SHAPE, generator=seeded(5)).double()
    time = schedule(1)[0]
    x = noise * time
    expected = x - time * smooth(x, rcm.network_timestep(time, 2, x.device), "transformer")
    assert torch.equal(sample(smooth, SHAPE, generator=seeded(5), steps=1), expected.float())


def test_sde_step_is_written_out():
    generator = seeded(3)
    times = schedule(2)
    x = torch.randn(SHAPE, generator=generator).double() * times[0]
    clean = x - times[0] * smooth(x, rcm.network_timestep(times[0], 2, x.device), "")
    x = (1 - times[1]) * clean + torch.randn(SHAPE, generator=generator) * times[1]
    x = x - times[1] * smooth(x, rcm.network_timestep(times[1], 2, x.device), "")
    assert torch.equal(sample(smooth, SHAPE, generator=seeded(3), steps=2), x.float())


def test_ode_is_euler_in_flow_time():
    times = schedule(4)
    x = torch.randn(SHAPE, generator=seeded(3)).double() * times[0]
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * smooth(x, rcm.network_timestep(now, 2, x.device), "")
    found = sample(smooth, SHAPE, generator=seeded(3), ode=True)
    torch.testing.assert_close(found, x.float(), rtol=2**-22, atol=1e-12)


@pytest.mark.parametrize(("ode", "draws"), [(False, 5), (True, 1)])
def test_generator_ends_where_the_released_sampler_leaves_it(ode, draws):
    """The SDE draws at every step, the last included; the ODE draws the first state alone."""
    used, expected = seeded(), seeded()
    sample(smooth, SHAPE, generator=used, steps=4, ode=ode)
    for _ in range(draws):
        torch.randn(SHAPE, generator=expected)
    assert torch.equal(torch.rand(8, generator=used), torch.rand(8, generator=expected))


def test_same_seed_same_bits_and_another_seed_another_sample():
    one, same, other = (sample(smooth, SHAPE, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)


def test_experts_switch_below_the_boundary():
    network = Network(torch.zeros(SHAPE, dtype=torch.float64), schedule(4, 200.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(network, SHAPE, generator=seeded(), sigma_max=200.0, boundary=0.9)
    assert [expert for *_, expert in network.calls] == ["transformer", "transformer", "transformer_2", "transformer_2"]


@pytest.mark.parametrize("steps", [1, 2])
def test_warns_where_the_low_noise_expert_is_never_reached(steps):
    with pytest.warns(SamplingWarning, match="low-noise expert is never used"):
        sample(smooth, SHAPE, generator=seeded(), steps=steps, sigma_max=200.0, boundary=0.9)


def test_progress_counts_steps():
    seen: list[tuple[int, int]] = []
    sample(smooth, SHAPE, generator=seeded(), steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
