"""The teachers' sampler against diffusers' pipeline, and guidance."""

from __future__ import annotations

import pytest
import torch

from turbocompile.errors import UnsupportedError
from turbocompile.sampling import flow

SHAPE = (1, 16, 2, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def texts():
    generator = seeded(7)
    return torch.randn(2, 1, 16, 32, generator=generator)  # of the prompt and of the negative prompt


def pipeline_latents(model, scheduler, texts, steps, guidance, seed, model_2=None, boundary=None):
    """diffusers' own loop, without text encoder and VAE."""
    from diffusers import AutoencoderKLWan, WanPipeline

    vae = AutoencoderKLWan(base_dim=8, z_dim=16)  # only its scale factors are asked for
    pipe = WanPipeline(None, None, vae, scheduler, transformer=model, transformer_2=model_2, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=32, width=32, num_frames=5,
        num_inference_steps=steps, guidance_scale=guidance, generator=seeded(seed), output_type="latent",
    ).frames  # fmt: skip


def network(texts, *models):
    def denoise(x, timestep, expert, conditional):
        model = models[-1] if expert == "transformer_2" else models[0]
        text = texts[0] if conditional else texts[1]
        return model(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    return denoise


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["unipc", "euler"])
def test_equals_the_diffusers_pipeline_to_the_bit(wan, texts, kind, guidance):
    model = wan()
    expected = pipeline_latents(model, flow.make_scheduler(kind, 3.0), texts, 5, guidance, seed=11)
    denoise = flow.guided(network(texts, model), guidance)
    found = flow.sample(denoise, SHAPE, generator=seeded(11), kind=kind, steps=5, shift=3.0)
    assert torch.equal(found, expected)


def test_two_experts_equal_the_diffusers_pipeline_to_the_bit(wan, texts):
    high, low = wan(seed=0), wan(seed=1)
    scheduler = flow.make_scheduler("unipc", 5.0)
    expected = pipeline_latents(high, scheduler, texts, 6, 3.5, seed=2, model_2=low, boundary=0.9)
    seen = []

    def denoise(x, timestep, expert, conditional):
        seen.append(expert)
        return network(texts, high, low)(x, timestep, expert, conditional)

    guided = flow.guided(denoise, 3.5)
    found = flow.sample(guided, SHAPE, generator=seeded(2), kind="unipc", steps=6, shift=5.0, boundary=0.9)
    assert torch.equal(found, expected)
    assert {"transformer", "transformer_2"} == set(seen)


def test_guidance_goes_from_the_negative_prompt_through_the_prompt():
    def denoise(x, timestep, expert, conditional):
        return torch.full_like(x, 3.0 if conditional else 1.0)

    x, t = torch.zeros(1, 2), torch.zeros(1)
    for guidance, expected in ((1.0, 3.0), (2.0, 5.0), (5.0, 11.0)):
        assert flow.guided(denoise, guidance)(x, t, "transformer").tolist() == [[expected, expected]]


def test_without_guidance_the_network_is_called_once_a_step():
    calls = []

    def denoise(x, timestep, expert, conditional):
        calls.append(conditional)
        return torch.zeros_like(x)

    flow.sample(flow.guided(denoise, 1.0), SHAPE, generator=seeded(), kind="unipc", steps=4, shift=5.0)
    assert calls == [True] * 4


@pytest.mark.parametrize("kind", ["unipc", "euler"])
def test_exact_velocity_gives_the_clean_sample(kind):
    """v = noise - x0 is constant along the flow's straight paths, so that any solver arrives at x0."""
    x0 = torch.randn(SHAPE, generator=seeded(4))
    noise = torch.randn(SHAPE, generator=seeded(8))

    found = flow.sample(lambda x, t, e: noise - x0, SHAPE, generator=seeded(8), kind=kind, steps=8, shift=5.0)
    # Each of 8 steps rounds a state of up to about 5 in float32.
    torch.testing.assert_close(found, x0, rtol=0, atol=8 * 5 * 2**-23)


def test_bfloat16_velocities_leave_the_state_in_float32():
    seen = []

    def denoise(x, timestep, expert):
        seen.append(x.dtype)
        return (0.1 * x).bfloat16()

    found = flow.sample(denoise, SHAPE, generator=seeded(), kind="euler", steps=3, shift=5.0)
    assert {*seen, found.dtype} == {torch.float32}


def test_same_seed_same_bits():
    given = {"kind": "unipc", "steps": 3, "shift": 5.0}
    samples = [flow.sample(lambda x, t, e: torch.tanh(x), SHAPE, generator=seeded(s), **given) for s in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_unknown_solver_is_refused():
    with pytest.raises(UnsupportedError, match="unipc, euler"):
        flow.make_scheduler("heun", 3.0)
