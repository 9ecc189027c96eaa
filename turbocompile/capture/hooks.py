"""Hooks of other libraries that a graph cannot hold: offloading, casting in storage, feature caches.

Such a hook changes weights, or decides what to compute, while the model runs. The error names the hook, and what to do
instead of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from turbocompile.errors import CaptureError

AFTERWARDS = "compile the model, and then offload the engine (pipe.enable_model_cpu_offload() takes it)"


DIFFUSERS = {  # part of the hook's name -> what to say of it
    "group_offload": f"which moves weights while the model runs; make the model without group offload, {AFTERWARDS}",
    "layerwise_casting": (
        "which keeps weights in a storage dtype and casts them while the model runs; make the model without layerwise "
        'casting, and quantize its linears instead (recipe={"passes": {"w8a8": "fp8"}})'
    ),
    **dict.fromkeys(
        ("cache", "fbc_", "pyramid_attention"),
        "which skips work by what it kept from the calls before; call model.disable_cache() first, because an engine "
        "computes each call by itself",
    ),
    "guidance": "which changes what blocks compute by the step; compile the model without it",
    "layer_skip": "which leaves out layers by the step; compile the model without it",
    "cp_input": "which splits tensors over processes; compile the model before it is made parallel",
    "cp_output": "which joins tensors of processes; compile the model before it is made parallel",
}


def check_hooks(model: nn.Module) -> None:
    """Raises CaptureError in a sentence for the first hook that moves, casts or skips while the model runs."""
    for path, module in model.named_modules():
        where = f"{type(model).__name__}{f' (in {path})' if path else ''}"
        for hook in _accelerate_hooks(vars(module).get("_hf_hook")):
            kind = type(hook).__name__
            if kind == "CpuOffload" or (kind == "AlignDevicesHook" and hook.offload):
                raise CaptureError(
                    f"{where} has accelerate's offload hook {kind}, which moves weights while the model runs; remove "
                    "the hooks (pipe.remove_all_hooks(), or accelerate.hooks.remove_hook_from_module(model, "
                    f"recurse=True)), {AFTERWARDS}"
                )
        for name, hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).items():
            sentence = next((text for words, text in DIFFUSERS.items() if words in name), None)
            if sentence is not None:
                raise CaptureError(f"{where} has diffusers' hook {name!r} ({type(hook).__name__}), {sentence}")


def _accelerate_hooks(hook: Any) -> list[Any]:
    """A hook, or those of a sequence of hooks."""
    if hook is None:
        return []
    inner = getattr(hook, "hooks", None)
    return [h for one in inner for h in _accelerate_hooks(one)] if isinstance(inner, (list, tuple)) else [hook]
