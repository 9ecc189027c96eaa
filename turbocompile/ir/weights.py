"""Weights as expressions over checkpoint tensors.

Passes never touch tensor values: a weight in a graph is an expression whose leaves are named tensors of a checkpoint.
`ir.evaluate` computes the values of an expression, and `ir.stored_names` gives the name under which an engine stores
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS

RELATIVE = "."  # the name of a Load or a Constant that starts with it is relative to the prefix of the call


class Expr:
    """One weight. Subclasses are frozen dataclasses with a `shape` and a `dtype`.

    Each expression computes its shape once, because a shape that asked its parts for each axis would take time
    exponential in the depth.
    """

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
    """A tensor that is in no checkpoint (a non-persistent buffer), stored with the program under `key`.

    A key that starts with "." is relative to the call's prefix: each layer has a value of its own.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Zeros(Expr):
    """Zeros, for a weight that a pass adds and the checkpoint lacks (SLA's untuned proj_l)."""

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

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Permute(Expr):
    of: Expr
    dims: tuple[int, ...]

    @cached_property
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

    @cached_property
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

    @cached_property
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

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.by) if isinstance(self.by, Expr) else (self.of,)


@dataclass(frozen=True)
class AddLora(Expr):
    """`of + scale * b @ a`: of (out, in), a (rank, in), b (out, rank); computed in float32, of float64 in float64."""

    of: Expr
    a: Expr
    b: Expr
    scale: float

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.a, self.b)


@dataclass(frozen=True)
class AddDiff(Expr):
    """`of + scale * diff`, of one shape; computed in float32, of float64 in float64, in the dtype of `of`."""

    of: Expr
    diff: Expr
    scale: float

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.diff)


@dataclass(frozen=True)
class Dora(Expr):
    """`magnitude * v / |v|` with `v = of + scale * b @ a`: of (out, in), a (rank, in), b (out, rank).

    magnitude: (out, 1), and |v| is the length of each row; or (1, in), and |v| is that of each column. Computed in
    float32, of float64 in float64, in the dtype of `of`.
    """

    of: Expr
    a: Expr
    b: Expr
    magnitude: Expr
    scale: float

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.of.dtype

    def parts(self) -> tuple[Expr, ...]:
        return (self.of, self.a, self.b, self.magnitude)


ADAPTERS = (AddLora, AddDiff, Dora)  # what adds adapters to the weight `of`


@dataclass(frozen=True)
class Dequantize(Expr):
    """The floating-point weight that the quantized data and scale of a checkpoint encode."""

    data: Expr
    scale: Expr
    format: str
    dtype: torch.dtype

    @cached_property
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

    @cached_property
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


def stacked(expr: Expr) -> list[Load]:
    """The checkpoint tensors whose rows a weight holds, one after the other; empty for a weight of anything else.

    Quantizing, casting, scaling by a number and adding a LoRA keep the rows of a weight.
    """
    match expr:
        case Load():
            return [expr]
        case Cast() | AddLora() | AddDiff() | Dora() | Quantize():
            return stacked(expr.of)
        case Mul():  # a product with a vector holds rows of another linear function
            return stacked(expr.of) if not isinstance(expr.by, Expr) else []
        case Dequantize():
            return stacked(expr.data)
        case Cat(dim=0):
            parts = [stacked(part) for part in expr.of]
            return [load for part in parts for load in part] if all(parts) else []
    return []


def is_adapted(expr: Expr) -> bool:
    """Whether adapters were added to a weight, or to a part of it."""
    return isinstance(expr, ADAPTERS) or any(map(is_adapted, expr.parts()))


def full_name(name: str, prefix: str) -> str:
    """The name of a Load, or the key of a Constant, as a call with this prefix reads it."""
    return prefix + name.removeprefix(RELATIVE) if name.startswith(RELATIVE) else name


def is_relative(expr: Expr) -> bool:
    """Whether the expression differs from call to call, because a leaf is relative to the prefix."""
    names = [leaf.name if isinstance(leaf, Load) else getattr(leaf, "key", "") for leaf in leaves(expr)]
    return any(name.startswith(RELATIVE) for name in names)


def absolute(expr: Expr, prefix: str) -> Expr:
    """The expression with full names, as a call with this prefix reads it."""
    if isinstance(expr, Load):
        return replace(expr, name=full_name(expr.name, prefix))
    if isinstance(expr, Constant):
        return replace(expr, key=full_name(expr.key, prefix))
    values = {f.name: getattr(expr, f.name) for f in fields(expr)}  # type: ignore[arg-type]
    changed = {
        name: absolute(v, prefix) if isinstance(v, Expr) else tuple(absolute(e, prefix) for e in v)
        for name, v in values.items()
        if isinstance(v, Expr) or (isinstance(v, tuple) and v and all(isinstance(e, Expr) for e in v))
    }
    return replace(expr, **changed) if changed else expr  # type: ignore[type-var]


def nbytes(expr: Expr) -> int:
    """Bytes of the emitted tensor."""
    return torch.Size(expr.shape).numel() * expr.dtype.itemsize
