"""The values of weight expressions: where named tensors are read from, and the evaluator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from turbocompile.errors import EngineError
from turbocompile.ir.weights import (
    AddDiff,
    AddLora,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Dora,
    Expr,
    Load,
    Mul,
    Permute,
    Quantize,
    Reshape,
    Slice,
    Zeros,
    full_name,
)
from turbocompile.kernels.quantize.quantize import dequantize, quantize


class TensorSource(Protocol):
    """Named tensors, read one at a time: a checkpoint, a module's state, or synthetic weights."""

    def keys(self) -> Iterable[str]:
        """The names of the tensors."""

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it; KeyError where there is none."""

    def get(self, name: str) -> torch.Tensor:
        """The values, on the CPU."""


@dataclass(frozen=True)
class WithVectors:
    """A source, and tensors that a build computed (the scales of smoothed linears), by their full names."""

    source: TensorSource
    vectors: Mapping[str, torch.Tensor]

    def keys(self) -> Iterable[str]:
        return [*self.source.keys(), *self.vectors]

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        found = self.vectors.get(name)
        return self.source.spec(name) if found is None else (tuple(found.shape), found.dtype)

    def get(self, name: str) -> torch.Tensor:
        return self.vectors[name] if name in self.vectors else self.source.get(name)


class Evaluator:
    """Computes expressions from a source. Values are read and freed one at a time.

    device: where the sums are computed, which the results leave for the CPU again; None: where the source's values are.

    The result of the last quantization is kept, because callers ask for its data and then for its scale.
    """

    def __init__(
        self, source: TensorSource, constants: Mapping[str, torch.Tensor], device: torch.device | None = None
    ) -> None:
        self.source = source
        self.constants = constants
        self.device = device
        self._last: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, expr: Expr, prefix: str = "") -> torch.Tensor:
        """The values of `expr`, on the CPU, contiguous. Raises EngineError where the source differs from the graph."""
        value = self._value(expr, prefix)
        if tuple(value.shape) != expr.shape or value.dtype != expr.dtype:
            raise EngineError(
                f"a weight is {list(value.shape)} {value.dtype} where the graph expects {list(expr.shape)} "
                f"{expr.dtype}; the checkpoint is of another model"
            )
        value = value.resolve_conj().contiguous()
        return value if self.device is None else value.cpu()

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.device is None else value.to(self.device)

    def _value(self, expr: Expr, prefix: str) -> torch.Tensor:
        def of(e: Expr) -> torch.Tensor:
            return self._value(e, prefix)

        match expr:
            case Load():
                return self._load(expr, prefix)
            case Constant():
                return self._placed(self.constants[full_name(expr.key, prefix)])
            case Zeros():
                return self._placed(torch.zeros(expr.shape, dtype=expr.dtype))
            case Reshape():
                return of(expr.of).reshape(expr.shape)
            case Cast():
                return of(expr.of).to(expr.dtype)
            case Permute():
                return of(expr.of).permute(expr.dims)
            case Slice():
                return of(expr.of).narrow(expr.dim, expr.start, expr.stop - expr.start)
            case Cat():
                return torch.cat([of(e) for e in expr.of], expr.dim)
            case Mul():
                value = of(expr.of)
                by = of(expr.by).float() if isinstance(expr.by, Expr) else expr.by
                return (value.float() * by).to(value.dtype)
            case AddLora():
                return _sum(of(expr.of), of(expr.a), of(expr.b), expr.scale).to(expr.dtype)
            case AddDiff():
                value = of(expr.of)
                wide = torch.promote_types(value.dtype, torch.float32)
                return torch.add(value.to(wide), of(expr.diff).to(wide), alpha=expr.scale).to(value.dtype)
            case Dora():
                v = _sum(of(expr.of), of(expr.a), of(expr.b), expr.scale)
                length = torch.linalg.vector_norm(v, dim=1 if expr.magnitude.shape[1] == 1 else 0, keepdim=True)
                factor = torch.where(length > 0, of(expr.magnitude).to(v.dtype) / length, 0.0)
                return (v * factor).to(expr.dtype)
            case Dequantize():
                return dequantize(of(expr.data), of(expr.scale), expr.format, expr.dtype)
            case Quantize():
                return self._quantize(expr, prefix)
        raise EngineError(f"a weight is a {type(expr).__name__}, which is no weight expression")

    def _load(self, expr: Load, prefix: str) -> torch.Tensor:
        name = full_name(expr.name, prefix)
        try:
            value = self.source.get(name)
        except KeyError:
            raise EngineError(f"the checkpoint has no tensor {name!r}; it is of another model, or incomplete") from None
        if tuple(value.shape) != expr.shape:
            raise EngineError(
                f"the checkpoint's {name!r} has shape {list(value.shape)}, and the model's {list(expr.shape)}; "
                "it is of another model"
            )
        return self._placed(value).to(expr.dtype)

    def _quantize(self, expr: Quantize, prefix: str) -> torch.Tensor:
        key = (expr.of, expr.format, prefix)
        if self._last is None or self._last[0] != key:
            data, scale = quantize(self._value(expr.of, prefix), expr.format)
            self._last = (key, data, scale)
        return self._last[1] if expr.part == "data" else self._last[2]


def _sum(value: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """value + scale * b @ a, in float32; of float64 in float64."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide) + scale * (b.to(wide) @ a.to(wide))
