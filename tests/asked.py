"""The options of passes as tests ask for them: what a recipe says, resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from turbocompile.recipe.options import CompileOptions, resolve
from turbocompile.recipe.schema import Settings


def asked(
    passes: Mapping[str, Any] | str | None = None, target: str = "cpu", checkpoint: Iterable[str] = ()
) -> CompileOptions:
    """passes: as in a recipe. checkpoint: the names of its tensors."""
    return resolve(Settings.from_dict({"passes": passes or {}, "target": target}), checkpoint)
