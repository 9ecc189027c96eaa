"""Latents and videos."""

from __future__ import annotations

import pytest
import torch

from turbocompile.recipe.presets import LATENTS_MEAN, LATENTS_STD
from turbocompile.recipe.schema import Recipe
from turbocompile.video import vae as wan_vae
from turbocompile.wan.source import open_source


@pytest.fixture(scope="module")
def vae():
    source = open_source(Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": "cpu"}))
    return source.components.load()["vae"]


def test_encode_normalizes_the_mean_of_the_posterior(vae):
    video = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mu = vae.encode(video).latent_dist.mean
    latent = wan_vae.encode(vae, video)
    assert latent.shape == (1, 16, 2, 2, 3)
    for channel in range(16):
        expected = (mu[:, channel] - LATENTS_MEAN[channel]) / LATENTS_STD[channel]
        torch.testing.assert_close(latent[:, channel], expected)


def test_decode_undoes_the_normalization_and_clamps(vae):
    latent = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(1)) * 3
    mean, std = (torch.tensor(v).reshape(1, 16, 1, 1, 1) for v in (LATENTS_MEAN, LATENTS_STD))
    with torch.no_grad():
        expected = vae.decode(latent * std + mean).sample.clamp(-1, 1)
    video = wan_vae.decode(vae, latent)
    assert video.shape == (1, 3, 5, 16, 24)
    assert torch.equal(video, expected)
    assert video.abs().max() <= 1


def test_frames_are_bytes_over_the_whole_range():
    video = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1, 1)
    frames = wan_vae.to_frames(video)
    assert frames.shape == (1, 1, 1, 1, 3)
    assert frames.flatten().tolist() == [0, 128, 255]  # 127.5 rounds to even
