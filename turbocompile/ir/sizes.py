"""Shapes that a file records, bounded in rank and in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from turbocompile.errors import EngineError
from turbocompile.ir import reading

MAX_TENSOR_BYTES = 1 << 40  # an activation larger than this is a mistake or an attack
MAX_RANK = 16


def read_shape(value: Any) -> tuple[int, ...]:
    """The shape that a file records. Raises EngineError unless it is a list of sizes whose product fits in 64 bits."""
    good = isinstance(value, list) and len(value) <= MAX_RANK and all(type(v) is int and v >= 0 for v in value)
    if not good or math.prod(max(v, 1) for v in value) >= reading.INT64:
        raise EngineError(f"the engine has a shape {str(value)[:60]!r} that is none; build it again")
    return tuple(value)


def check_size(shape: Sequence[int], dtype: torch.dtype, where: str) -> None:
    if math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise EngineError(f"{where} declares a tensor of shape {list(shape)}, which is absurdly large; build it again")
