"""What an engine takes over of a module besides its graph: its configuration and its dtype."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def config_of(model: nn.Module) -> dict[str, Any]:
    """A module's configuration as a dictionary: of diffusers, transformers, dataclasses, namespaces, and other objects
    that have attributes. Empty where there is none.
    """
    config: Any = None
    with contextlib.suppress(Exception):  # a property of the user's may raise anything; without it the engine has none
        config = getattr(model, "config", None)
    found: Any = {}
    if isinstance(config, Mapping):
        found = config
    elif isinstance(config, type):
        found = {}
    elif callable(getattr(config, "to_dict", None)):  # transformers' PretrainedConfig
        found = config.to_dict()
    elif dataclasses.is_dataclass(config):
        found = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(config)}
    elif isinstance(config, tuple) and hasattr(config, "_asdict"):
        found = config._asdict()
    else:
        found = getattr(config, "__dict__", {})
    return {str(k): v for k, v in found.items() if not str(k).startswith("_")} if isinstance(found, Mapping) else {}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The module's own word for its dtype, else that of most of its floating parameters; float32 without any."""
    own = getattr(model, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)
