"""Components of an engine's folder (text encoder, VAE, ...), checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turbocompile.runtime.engine import Engine
from turbocompile.runtime.folder import check_files, check_strangers
from turbocompile.wan.components import folder_name, load_components


def check_component(engine: Engine, name: str) -> Mapping[str, str]:
    """The row of a component in the manifest.

    Raises EngineError where a file of the component was altered, is gone, or is not listed.
    """
    assert engine.folder is not None
    row: Mapping[str, str] = engine.manifest["components"][name]
    folder = f"components/{folder_name(name, row)}"
    check_files(engine.folder, engine.manifest, [f for f in engine.manifest["files"] if f.startswith(folder + "/")])
    check_strangers(engine.folder, engine.manifest, folder)
    return row


def component(engine: Engine, name: str) -> Any:
    """A component of the engine's folder on the engine's device, after its files were checked."""
    assert engine.folder is not None
    row = check_component(engine, name)
    return placed(load_components(engine.folder / "components", {name: row})[name], name, engine.device)


def placed(part: Any, name: str, device: torch.device) -> Any:
    """The component on the device.

    On a CPU the component computes in float32, whatever dtype its files hold, because a CPU without instructions for
    16 bits took 300 times as long for a convolution of Wan's VAE in bfloat16. The text encoder keeps the dtype that the
    recipe asks for.
    """
    if not isinstance(part, torch.nn.Module):
        return part
    return part.float() if device.type == "cpu" and name != "text_encoder" else part.to(device)
