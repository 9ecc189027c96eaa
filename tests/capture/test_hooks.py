"""Hooks that move, cast or skip while a model runs are named with what to do instead; the model is left as it was."""

from __future__ import annotations

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook, add_hook_to_module

import turbocompile
from turbocompile.errors import CaptureError

CPU = torch.device("cpu")
GROUPS = {"onload_device": CPU, "offload_device": CPU}
CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d+\.attn1$"]
    ),
}
HOOKS = {
    "model offload": (lambda m: add_hook_to_module(m, CpuOffload(CPU)), "offload hook CpuOffload.*offload the engine"),
    "sequential offload": (lambda m: accelerate.cpu_offload(m, execution_device=CPU), "offload hook AlignDevicesHook"),
    "several hooks": (
        lambda m: add_hook_to_module(m, SequentialHook(AlignDevicesHook(), CpuOffload(CPU))),
        "offload hook CpuOffload",
    ),
    "of a part": (lambda m: add_hook_to_module(m.blocks[1], CpuOffload(CPU)), r"\(in blocks\.1\) has accelerate's"),
    "leaf groups": (lambda m: m.enable_group_offload(offload_type="leaf_level", **GROUPS), "without group offload"),
    "block groups": (
        lambda m: m.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **GROUPS),
        "without group offload",
    ),
    "casting": (
        lambda m: m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        "without layerwise casting, and quantize its linears instead",
    ),
    **{name: (lambda m, make=make: m.enable_cache(make()), r"disable_cache\(\)") for name, make in CACHES.items()},
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_named_with_the_mend_and_the_model_still_runs(name, wan, wan_call):
    model, call = wan(), {**wan_call(), "return_dict": False}
    prepare, message = HOOKS[name]
    prepare(model)
    hooks = [sorted(vars(module)) for module in model.modules()]

    def run():
        torch.manual_seed(0)
        with model.cache_context("cond"):
            return model(**call)[0]

    with pytest.raises(CaptureError, match=message):
        turbocompile.optimize(model, kwargs=call)
    assert [sorted(vars(module)) for module in model.modules()] == hooks
    assert bool(run().isfinite().all())


def test_a_hook_that_moves_nothing_is_part_of_the_model(wan, wan_call):
    model, call = wan(), {**wan_call(), "return_dict": False}
    add_hook_to_module(model, AlignDevicesHook(execution_device=CPU))
    engine = turbocompile.optimize(model, kwargs=call, recipe={"passes": "off"})
    assert torch.equal(engine(**call)[0], model(**call)[0])


def test_without_the_hooks_it_compiles(wan, wan_call):
    model, call = wan(), {**wan_call(), "return_dict": False}
    expected = model(**call)[0]
    model.enable_cache(CACHES["first block"]())
    model.disable_cache()
    accelerate.hooks.remove_hook_from_module(add_hook_to_module(model, CpuOffload(CPU)), recurse=True)
    engine = turbocompile.optimize(model, kwargs=call, recipe={"passes": "off"})
    assert torch.equal(engine(**call)[0], expected)
