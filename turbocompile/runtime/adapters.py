"""Refuses adapters (LoRA) that a pipeline of diffusers would put into an engine, or take out of it.

`pipe.fuse_lora()`, `disable_lora()`, `delete_adapters()` and the like ask each component whether it is a model of
diffusers or transformers, and skip any other component without a word. The picture would then come from other weights
than the user asked for. So an engine raises an error when one of these methods looks at it.
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
_ASKS = ("diffusers.loaders", "diffusers.pipelines")  # the packages whose methods of these names ask


def refuse(name: str, engine: Any) -> NoReturn:
    """Raises UnsupportedError. name: the method that was called; engine: the object that it would change."""
    raise UnsupportedError(
        f"{name} cannot change {engine.model_name}, which is an engine: its adapters became part of its weights when "
        "it was compiled; put further ones in by engine.set_lora(path), or compile the model again with others"
    )


class FixedWeights:
    """A base of the objects that stand for a model in a pipeline. Messages call them by their `model_name`."""

    def __getattribute__(self, name: str) -> Any:
        if name in METHODS:
            return lambda *args, **kwargs: refuse(name, self)
        if name == "__class__":
            asking = sys._getframe(1)
            module = asking.f_globals.get("__name__", "")
            if asking.f_code.co_name in METHODS and str(module).startswith(_ASKS):
                refuse(f"{asking.f_code.co_name}()", self)
        return super().__getattribute__(name)
