"""Components of an engine's folder (text encoder, VAE, ...), checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turbocompile.runtime.engine import Engine
from turbocompile.runtime.folder import check_files, check_strangers
from turbocompile.wan.components import load_components


def check_component(engine: Engine, name: str) -> Mapping[str, str]:
    """Its row of the manifest. Raises EngineError where one of its files was altered, is gone, or is one too many."""
    assert engine.folder is not None
    row: Mapping[str, str] = engine.manifest["components"][name]
    place = f"components/{row.get('folder', name)}"
    check_files(engine.folder, engine.manifest, [f for f in engine.manifest["files"] if f.startswith(place + "/")])
    check_strangers(engine.folder, engine.manifest, place)
    return row


def component(engine: Engine, name: str) -> Any:
    """A component of the engine's folder on the engine's device, after its files were checked."""
    assert engine.folder is not None
    row = check_component(engine, name)
    return placed(load_components(engine.folder / "components", {name: row})[name], name, engine.device)


def placed(part: Any, name: str, device: torch.device) -> Any:
    """A component on the device.

    On a CPU it computes in float32, whatever its files hold: one that has no instructions for 16 bits took 300 times as
    long for a convolution of Wan's VAE in bfloat16. The text encoder has the dtype that was asked for.
    """
    if not isinstance(part, torch.nn.Module):
        return part
    return part.float() if device.type == "cpu" and name != "text_encoder" else part.to(device)
