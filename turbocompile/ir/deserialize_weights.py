"""Reads weight expressions from JSON data that anyone may have written."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any

import torch

from turbocompile.errors import EngineError
from turbocompile.ir import reading, weights
from turbocompile.ir.allowed_ops import parse_dtype
from turbocompile.ir.reading import Unreadable, entry, items, one_of, table, text, whole
from turbocompile.ir.sizes import MAX_RANK, check_size, read_shape
from turbocompile.kernels.quantize.quantize import FORMATS

MAX_EXPR_DEPTH = 32  # of a weight: fused, quantized, with LoRAs it has some ten levels
EXPRESSIONS = {
    c.__name__: c
    for c in (
        weights.Load, weights.Constant, weights.Zeros, weights.Reshape, weights.Cast, weights.Permute, weights.Slice,
        weights.Cat, weights.Mul, *weights.ADAPTERS, weights.Dequantize, weights.Quantize,
    )
}  # fmt: skip
_FIELDS: dict[type, dict[str, Any]] = {
    cls: {f.name: typing.get_type_hints(cls)[f.name] for f in fields(cls)}  # type: ignore[arg-type]
    for cls in EXPRESSIONS.values()
}


def expr_from_json(data: Any, depth: int = 0) -> weights.Expr:
    """The expression that `expr_json` wrote. Raises EngineError or Unreadable for any other data."""
    if depth > MAX_EXPR_DEPTH:
        raise EngineError("a weight of the engine is nested absurdly deep; build it again")
    given = table(data, "a weight")
    cls = EXPRESSIONS[one_of(entry(given, "expr", "a weight"), "the kind of a weight", EXPRESSIONS)]
    values = {
        name: _field(entry(given, name, f"a weight ({cls.__name__})"), kind, f"{name} of a {cls.__name__}", depth)
        for name, kind in _FIELDS[cls].items()
    }
    made = cls(**values)
    _check_expr(made)
    return made


def _field(value: Any, kind: Any, what: str, depth: int) -> Any:
    """A field of a weight expression, read as the type `kind` that its dataclass declares."""
    if isinstance(kind, types.UnionType):
        kind = weights.Expr if isinstance(value, dict) else float
    if kind is weights.Expr:
        return expr_from_json(value, depth + 1)
    if kind is torch.dtype:
        return parse_dtype(value)
    if kind is int:
        return whole(value, what)
    if kind is float:
        return reading.number(value, what)
    if kind is str:
        return text(value, what)
    if kind == tuple[int, ...]:
        return tuple(whole(v, what) for v in items(value, what, MAX_RANK))
    if kind == tuple[weights.Expr, ...]:
        return tuple(expr_from_json(v, depth + 1) for v in items(value, what))
    raise TypeError(f"{what} is declared as {kind}, which no reader knows")


def _check_expr(expr: weights.Expr) -> None:
    """Raises Unreadable unless the parts fit each other, so that the weight has a shape and a dtype."""
    kind = type(expr).__name__
    match expr:
        case weights.Reshape(of, shape):
            good = math.prod(of.shape) == math.prod(shape)
        case weights.Permute(of, dims):
            good = sorted(dims) == list(range(len(of.shape)))
        case weights.Slice(of, dim, start, stop):
            good = 0 <= dim < len(of.shape) and 0 <= start < stop <= of.shape[dim]
        case weights.Cat(of, dim):
            good = bool(of) and 0 <= dim < len(of[0].shape) and all(_alike(e, of[0], dim) for e in of)
        case weights.AddLora(of, a, b):
            good = _multiply(of, a, b)
        case weights.AddDiff(of, diff):
            good = of.shape == diff.shape
        case weights.Dora(of, a, b, magnitude):
            good = _multiply(of, a, b) and magnitude.shape in ((of.shape[0], 1), (1, of.shape[1]))
        case weights.Dequantize(data, _, form):
            good = len(data.shape) == 2 and form in FORMATS
        case weights.Quantize(of, form, part):
            good = len(of.shape) == 2 and form in FORMATS and part in ("data", "scale")
        case _:
            good = True
    if not good:
        raise Unreadable(f"a weight is a {kind} of parts that do not fit")
    check_size(read_shape(list(expr.shape)), expr.dtype, f"a weight ({kind})")


def _multiply(of: weights.Expr, a: weights.Expr, b: weights.Expr) -> bool:
    """Whether `of + b @ a` has a meaning."""
    if not all(len(e.shape) == 2 for e in (of, a, b)):
        return False
    return b.shape[1] == a.shape[0] and (b.shape[0], a.shape[1]) == of.shape


def _alike(expr: weights.Expr, first: weights.Expr, dim: int) -> bool:
    """Whether two shapes differ along `dim` at most."""
    one, other = list(expr.shape), list(first.shape)
    return len(one) == len(other) and one[:dim] + one[dim + 1 :] == other[:dim] + other[dim + 1 :]
