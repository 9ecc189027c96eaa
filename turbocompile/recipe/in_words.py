"""Every field of a recipe in words: the page docs/recipe.md."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from turbocompile.recipe.fields import fields_of, section_of
from turbocompile.recipe.schema import Recipe


def reference() -> str:
    """Every field of a recipe as Markdown list items: name, type, default, meaning."""
    return "\n".join(_reference(Recipe, ""))


def _reference(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in fields_of(cls):
        kind, item = section_of(hints[f.name])
        name = f"{prefix}{f.name}"
        if kind:
            yield f"- `{name}`: {f.metadata['help']}"
            yield from _reference(kind, f"{name}[]." if item else f"{name}.")
            continue
        if f.default is f.default_factory:  # MISSING: it has to be given
            yield f"- `{name}`: {f.metadata['help']}."
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        choices = f.metadata.get("choices")
        values = f" One of {', '.join(map(str, choices))}." if choices else ""
        yield f"- `{name}` (default {_yaml(default)}): {f.metadata['help']}.{values}"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none given" if value is None else str(value)
