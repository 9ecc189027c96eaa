"""Presets: the published sizes, and tiny models that every pass can work on."""

from __future__ import annotations

import inspect

import pytest
import torch

from turbocompile.recipe.configuration import TRANSFORMER_FIELDS
from turbocompile.recipe.presets import PRESETS, VARIANTS, task_of, tiny_preset
from turbocompile.wan.transformer import build_transformer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the released checkpoints; A14B is one expert
        ("wan2.1-t2v-1.3b", 1_418_996_800),
        ("wan2.1-t2v-14b", 14_288_491_584),
        ("wan2.2-i2v-a14b", 14_288_901_184),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    model = build_transformer(PRESETS[name].transformer, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


def test_recipe_knows_the_fields_of_the_transformer():
    from diffusers import WanTransformer3DModel

    assert set(TRANSFORMER_FIELDS) == set(inspect.signature(WanTransformer3DModel.__init__).parameters) - {"self"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiny_presets_have_linears_of_multiples_of_128_in_their_blocks(variant, head_dim):
    preset = tiny_preset(variant, head_dim)
    assert preset.transformer["attention_head_dim"] == head_dim
    assert preset.task == variant.partition("-")[0].replace("flf2v", "i2v")
    model = build_transformer(preset.transformer, torch.float32)
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == module.out_features % 128 == 0, name


def test_task_follows_the_channels():
    assert task_of({"in_channels": 36, "out_channels": 16}) == "i2v"
    assert task_of({"in_channels": 16, "out_channels": 16}) == "t2v"
