"""The arguments of a call in the order of its operator's schema."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from turbocompile.errors import TurbocompileError


@functools.cache
def parameters(target: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    """(name, has_default, default) of an overload's arguments."""
    return tuple((a.name, a.has_default_value(), a.default_value) for a in target._schema.arguments)


def arguments(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments in the order of the schema, defaults filled in."""
    found = list(args)
    for name, has_default, default in parameters(target)[len(args) :]:
        if name not in kwargs and not has_default:
            raise TurbocompileError(f"{target} lacks its argument {name!r}")
        found.append(kwargs.get(name, default))
    return found
