"""Weights as expressions over checkpoint tensors.

Passes never touch tensor values: a weight in a graph is an expression whose leaves are named tensors of a checkpoint.
`evaluate` computes one expression from a `TensorSource`; `emit` walks all of them, tensor by tensor, and writes
safetensors shards in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch


FORMATS: dict[str, torch.dtype] = {"int8": torch.int8, "int8_block": torch.int8, "fp8": torch.float8_e4m3fn}
BLOCK = 128  # rows and columns of an int8_block tile
RELATIVE = "."  # a Load name that starts with it is relative to the prefix of the call


class TensorSource(Protocol):
    """Named tensors, read one at a time: a checkpoint, a module's state, or synthetic weights."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it; KeyError where there is none."""

    def get(self, name: str) -> torch.Tensor:
        """The values, on the CPU."""


class Expr:
    """One weight. Subclasses are frozen dataclasses with a `shape` and a `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def parts(self) -> tuple[Expr, ...]:
        """The expressions that this one reads."""
        return ()


@dataclass(frozen=True)
class Load(Expr):
    """A tensor of the checkpoint, cast to `dtype`; a name that starts with "." is relative to the call's prefix."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Constant(Expr):
    """A tensor that is in no checkpoint (a non-persistent buffer), stored with the program under `key`."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Zeros(Expr):
    """Zeros: what a pass adds and the checkpoint lacks (SLA's untuned proj_l)."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Reshape(Expr):
    of: Expr
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Cast(Expr):
    of: Expr
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Permute(Expr):
    of: Expr
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.of.shape[d] for d in self.dims)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Slice(Expr):
    """`of` from start to stop along dim; 0 <= start < stop <= size."""

    of: Expr
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        s = list(self.of.shape)
        s[self.dim] = self.stop - self.start
        return tuple(s)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Cat(Expr):
    of: tuple[Expr, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        s = list(self.of[0].shape)
        s[self.dim] = sum(e.shape[self.dim] for e in self.of)
        return tuple(s)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of[0].dtype

    def parts(self) -> tuple[Expr, ...]:
        return self.of


@dataclass(frozen=True)
class Mul(Expr):
    """`of * by`, computed in float32, in the dtype of `of`."""

    of: Expr
    by: Expr | float

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.by) if isinstance(self.by, Expr) else (self.of,)


@dataclass(frozen=True)
class AddLora(Expr):
    """`of + scale * b @ a`: of (out, in), a (rank, in), b (out, rank); computed in float32."""

    of: Expr
    a: Expr
    b: Expr
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.a, self.b)


@dataclass(frozen=True)
class Dequantize(Expr):
    """The floating weight that quantized data and scale of a checkpoint stand for."""

    data: Expr
    scale: Expr
    format: str
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.data.shape

    def parts(self) -> tuple[Expr, ...]:
        return (self.data, self.scale)


@dataclass(frozen=True)
class Quantize(Expr):
    """One part, "data" or "scale", of a quantized (out, in) weight: "int8" and "fp8" per row, "int8_block" by tiles."""

    of: Expr
    format: str
    part: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        n, k = self.of.shape
        if self.part == "data":
            return (n, k)
        return (-(-n // BLOCK), -(-k // BLOCK)) if self.format == "int8_block" else (n, 1)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return FORMATS[self.format] if self.part == "data" else torch.float32

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


def leaves(expr: Expr) -> list[Expr]:
    """The Load, Constant and Zeros leaves, in order."""
    parts = expr.parts()
    return [expr] if not parts else [leaf for part in parts for leaf in leaves(part)]


def is_relative(expr: Expr) -> bool:
    """Whether the expression differs from call to call, because a leaf is relative to the prefix."""
    return any(isinstance(leaf, Load) and leaf.name.startswith(RELATIVE) for leaf in leaves(expr))


def nbytes(expr: Expr) -> int:
    """Bytes of the emitted tensor."""
    return torch.Size(expr.shape).numel() * expr.dtype.itemsize
