"""Fixtures that several folders of tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def _load(name):
    """tests/<name>.py as the module `name`, which tests import."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


for shared in ("zoo", "asked", "products", "videos", "original_wan", "wan_files"):
    if shared not in sys.modules:
        _load(shared)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors run faster on one thread, and tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def wan():
    """A function that makes a small WanTransformer3DModel with seeded weights: wan(num_layers=3, ...)."""

    def make(seed: int = 0, **changes):
        from diffusers import WanTransformer3DModel

        torch.manual_seed(seed)
        model = WanTransformer3DModel(**{**WAN, **changes}).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "scale_shift_table" in name or "norm" in name:  # far from their initial zeros and ones
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def wan_call():
    """A function that makes keyword arguments of a Wan call: wan_call(dtype=..., frames=3, height=8, ...)."""

    def make(batch=1, frames=3, height=8, width=8, channels=16, text=16, text_dim=32, dtype=torch.float32, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(batch, channels, frames, height, width, generator=generator).to(dtype),
            "timestep": torch.rand(batch, generator=generator) * 1000,
            "encoder_hidden_states": torch.randn(batch, text, text_dim, generator=generator).to(dtype),
        }

    return make


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A function that gives the pipeline folder of a tiny variant, written once; tests must not change it."""
    from turbocompile.wan.example import write_example

    made = {}

    def folder(variant: str = "t2v", head_dim: int = 64):
        key = (variant, head_dim)
        if key not in made:
            target = tmp_path_factory.mktemp("example") / f"{variant}-{head_dim}"
            write_example(target, variant, head_dim)
            made[key] = target
        return made[key]

    return folder


@pytest.fixture
def tiny():
    """zoo.Plain with seeded weights."""
    import zoo

    torch.manual_seed(0)
    return zoo.Plain().eval().requires_grad_(False)
