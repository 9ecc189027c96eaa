"""From a stored weight back to the tensors that it was made of, and forth again with other values of these.

    cat([q, k, v]) * s  ->  {q: ..., k: ..., v: ...}

The tensors that a weight is taken apart into are its units: checkpoint tensors, dequantized ones, sums with adapters.
A value is computed in float32 where it is wide, whatever the dtypes of the expression, so that a weight that will be
quantized is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from turbocompile.errors import UnsupportedError
from turbocompile.ir.weights import (
    ADAPTERS,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Expr,
    Load,
    Mul,
    Permute,
    Reshape,
    Slice,
    Zeros,
)

PARTS = (".qdata", ".scale", ".int8_weight")  # what follows the name of a weight in the names of its 8-bit parts
Factor = Callable[[Expr], torch.Tensor]


def units(expr: Expr) -> list[Expr]:
    """The units of an expression, in order."""
    if isinstance(expr, (Load, Constant, Zeros, Dequantize, *ADAPTERS)):
        return [expr]
    inner = expr.parts()[:1] if isinstance(expr, Mul) else expr.parts()
    return [unit for part in inner for unit in units(part)]


def unit_name(unit: Expr) -> str | None:
    """The name of the checkpoint tensor that a unit is, or that something was added to; None of other units."""
    if isinstance(unit, Load):
        return next((unit.name.removesuffix(end) for end in PARTS[:1] if unit.name.endswith(end)), unit.name)
    if isinstance(unit, Dequantize):
        return unit_name(unit.data)
    if isinstance(unit, (*ADAPTERS, Cast, Reshape)):
        return unit_name(unit.of)
    return None


def factors(expr: Expr) -> list[Expr]:
    """The expressions that an expression multiplies by."""
    own = [expr.by] if isinstance(expr, Mul) and isinstance(expr.by, Expr) else []
    return own + [factor for part in expr.parts() for factor in factors(part)]


def taken_apart(expr: Expr, value: torch.Tensor, factor: Factor) -> dict[Expr, torch.Tensor]:
    """The values of an expression's units, from its own value. factor: gives the values of `factors`.

    Raises UnsupportedError where the value does not say what they are.
    """
    found: dict[Expr, torch.Tensor] = {}
    slices: dict[Expr, list[tuple[Slice, torch.Tensor]]] = {}
    _take_apart(expr, value, factor, found, slices)
    while slices:
        of, pieces = slices.popitem()
        _take_apart(of, _whole(of, pieces), factor, found, slices)
    return found


def _take_apart(
    expr: Expr,
    value: torch.Tensor,
    factor: Factor,
    found: dict[Expr, torch.Tensor],
    slices: dict[Expr, list[tuple[Slice, torch.Tensor]]],
) -> None:
    match expr:
        case Cast():
            return _take_apart(expr.of, value, factor, found, slices)
        case Reshape():
            return _take_apart(expr.of, value.reshape(expr.of.shape), factor, found, slices)
        case Permute():
            back = [expr.dims.index(i) for i in range(len(expr.dims))]
            return _take_apart(expr.of, value.permute(back), factor, found, slices)
        case Mul():
            by = factor(expr.by) if isinstance(expr.by, Expr) else expr.by
            return _take_apart(expr.of, value.float() / by, factor, found, slices)
        case Slice():
            slices.setdefault(expr.of, []).append((expr, value))
            return None
        case Cat():
            start = 0
            for part in expr.of:
                size = part.shape[expr.dim]
                _take_apart(part, value.narrow(expr.dim, start, size), factor, found, slices)
                start += size
            return None
    if [expr] != units(expr):
        raise UnsupportedError(f"a weight is stored as a {type(expr).__name__}, from which it cannot be taken apart")
    found[expr] = value
    return None


def _whole(of: Expr, pieces: list[tuple[Slice, torch.Tensor]]) -> torch.Tensor:
    """The value of an expression of which the pieces along one dimension are known."""
    ordered = sorted(pieces, key=lambda piece: piece[0].start)
    dim, reached = ordered[0][0].dim, 0
    for piece, _ in ordered:
        reached = piece.stop if piece.dim == dim and piece.start == reached else -1
    if reached != of.shape[dim]:
        raise UnsupportedError("the engine stores a part of a weight, and what changes the whole cannot be added to it")
    return torch.cat([value for _, value in ordered], dim)


def put_together(expr: Expr, values: Mapping[Expr, torch.Tensor], factor: Factor, wide: bool = False) -> torch.Tensor:
    """The value of an expression from the values of its units. wide: in float32, without the casts to fewer bits."""

    def of(e: Expr) -> torch.Tensor:
        return put_together(e, values, factor, wide)

    if expr in values:
        return values[expr].float() if wide else values[expr].to(expr.dtype)
    match expr:
        case Cast():
            return of(expr.of) if wide else of(expr.of).to(expr.dtype)
        case Reshape():
            return of(expr.of).reshape(expr.shape)
        case Permute():
            return of(expr.of).permute(expr.dims)
        case Slice():
            return of(expr.of).narrow(expr.dim, expr.start, expr.stop - expr.start)
        case Cat():
            return torch.cat([of(e) for e in expr.of], expr.dim)
        case Mul():
            value = of(expr.of)
            by = factor(expr.by) if isinstance(expr.by, Expr) else expr.by
            return (value.float() * by).to(value.dtype)
    raise UnsupportedError(f"a weight is a {type(expr).__name__}, which cannot be put together again")
