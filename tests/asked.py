"""The options of passes as tests ask for them: what a recipe says, resolved; and measured speeds that decide `auto`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from turbocompile.hardware import AttentionShape, _SageSpeed
from turbocompile.recipe.options import CompileOptions, resolve
from turbocompile.recipe.schema import Settings


def asked(
    passes: Mapping[str, Any] | str | None = None, target: str = "cpu", checkpoint: Iterable[str] = ()
) -> CompileOptions:
    """passes: as in a recipe. checkpoint: the names of its tensors."""
    return resolve(Settings.from_dict({"passes": passes or {}, "target": target}), checkpoint)


def sage_speeds(pv: str, heads: int, head_dim: int, *rows: tuple[int, int, float]) -> tuple[_SageSpeed, ...]:
    """Rows of `hardware._SAGE_SPEEDUP` at (queries, keys, speedup) each."""
    return tuple(_SageSpeed(pv, AttentionShape(q, k, heads, head_dim), s, "measured") for q, k, s in rows)
