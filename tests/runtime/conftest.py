"""A small Wan's engine, built and saved once for the tests of the runtime."""

from __future__ import annotations

import pytest
import torch

import turbocompile


@pytest.fixture(scope="session")
def model():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, text_dim=32, freq_dim=64, ffn_dim=256,
        num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def call():
    """A function that makes a call of the model: latents of (batch, 16, frames, height, 8)."""

    def made(height=8, frames=2, batch=1, seed=0):
        g = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(batch, 16, frames, height, 8, generator=g),
            "timestep": torch.rand(batch, generator=g) * 1000,
            "encoder_hidden_states": torch.randn(batch, 16, 32, generator=g),
        }

    return made


@pytest.fixture(scope="session")
def engine(model, call):
    """The model's engine for `call()`. Tests leave it as it is."""
    return turbocompile.optimize(model, kwargs=call(), recipe={"passes": "off"})


@pytest.fixture(scope="session")
def saved(engine, tmp_path_factory):
    """The engine's folder. Tests leave it as it is."""
    return engine.save(tmp_path_factory.mktemp("engines") / "engine")
