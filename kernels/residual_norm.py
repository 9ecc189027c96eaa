"""A residual and the norm behind it.

r = x + gate * y (gate None: x + y), rounded to x's dtype; n = norm(r) with weight and bias (norm_quantize.py), and where
scale is given n * (1 + scale) + shift. Everything in float32 (float64 for float64 inputs); r and n each rounded once. The
norm reads the rounded r, as it would from memory. gate, scale and shift broadcast against x (B, L, C), usually (B, 1, C).
`gated_residual` is r alone; `residual_norm_quantize` gives n quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels._common import compute_dtype, register
from turbocompile.kernels.norm_quantize import NORMS, normalize
from turbocompile.kernels.quantize import empty_quantized, quantize

_Optional = torch.Tensor | None


def gated(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> torch.Tensor:
    """x + gate * y, in x's dtype."""
    dtype = compute_dtype(x.dtype)
    product = y.to(dtype) if gate is None else gate.to(dtype) * y.to(dtype)
    return (x.to(dtype) + product).to(x.dtype)


def reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Optional,
    scale: _Optional,
    shift: _Optional,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    norm: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, normed), both of x's shape and dtype."""
    r = gated(x, y, gate)
    n = normalize(r.to(compute_dtype(x.dtype)), weight, bias, eps, norm)
    if scale is not None:
        n = n * (1 + scale.to(n.dtype))
    if shift is not None:
        n = n + shift.to(n.dtype)
    return r, n.to(x.dtype)


def reference_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Optional,
    scale: _Optional,
    shift: _Optional,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    norm: str,
    format: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, data, data_scale)."""
    r, n = reference(x, y, gate, scale, shift, weight, bias, eps, norm)
    return (r, *quantize(n, format))


def _check(x: torch.Tensor, y: torch.Tensor, *broadcast: _Optional) -> None:
    if x.shape != y.shape:
        raise ValueError(f"residual: x is {list(x.shape)} and y is {list(y.shape)}")
    for t in broadcast:
        if t is not None and torch.broadcast_shapes(x.shape, t.shape) != x.shape:
            raise ValueError(f"residual: a gate, scale or shift of {list(t.shape)} does not fit {list(x.shape)}")


def _fake_gated(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> torch.Tensor:
    _check(x, y, gate)
    return x.new_empty(x.shape)


def _fake(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Optional,
    scale: _Optional,
    shift: _Optional,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    norm: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, y, gate, scale, shift)
    if norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, not {norm!r}")
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_quantize(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Optional,
    scale: _Optional,
    shift: _Optional,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    norm: str,
    format: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r, n = _fake(x, y, gate, scale, shift, weight, bias, eps, norm)
    return (r, *empty_quantized(n, format))


_ARGUMENTS = (
    "Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, str norm"
)
gated_residual = register("gated_residual", "(Tensor x, Tensor y, Tensor? gate) -> Tensor", gated, _fake_gated)
residual_norm = register("residual_norm", f"({_ARGUMENTS}) -> (Tensor residual, Tensor normed)", reference, _fake)
residual_norm_quantize = register(
    "residual_norm_quantize",
    f"({_ARGUMENTS}, str format) -> (Tensor residual, Tensor data, Tensor data_scale)",
    reference_quantize,
    _fake_quantize,
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {gated_residual: gated, residual_norm: reference, residual_norm_quantize: reference_quantize}
