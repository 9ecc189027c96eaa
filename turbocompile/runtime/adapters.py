"""What an engine says to those who would change its weights by adapters (LoRA), as pipelines of diffusers do.

`pipe.fuse_lora()`, `disable_lora()`, `delete_adapters()` and the like ask each component whether it is a model of
diffusers or transformers, and pass over anything else without a word; the picture would then be that of other weights.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from turbocompile.errors import UnsupportedError

METHODS = frozenset(
    {
        "add_adapter", "delete_adapters", "disable_adapters", "disable_lora", "enable_adapters", "enable_lora",
        "fuse_lora", "load_lora_adapter", "set_adapter", "set_adapters", "unfuse_lora", "unload_lora",
        "unload_lora_weights",
    }
)  # fmt: skip
_ASKS = ("diffusers.loaders", "diffusers.pipelines")


def refuse(name: str, engine: Any) -> NoReturn:
    """Raises UnsupportedError: what was asked for, and what to do instead."""
    raise UnsupportedError(
        f"{name} cannot change {engine.model_name}, which is an engine: its adapters became part of its weights when "
        "it was compiled; change the adapters of the model that it was compiled from, and compile that again"
    )


class FixedWeights:
    """Mixed into what stands for a model in a pipeline. `model_name`: what messages call it."""

    def __getattribute__(self, name: str) -> Any:
        if name in METHODS:
            return lambda *args, **kwargs: refuse(name, self)
        if name == "__class__":
            asking = sys._getframe(1)
            place = asking.f_globals.get("__name__", "")
            if asking.f_code.co_name in METHODS and str(place).startswith(_ASKS):
                refuse(f"{asking.f_code.co_name}()", self)
        return super().__getattribute__(name)
