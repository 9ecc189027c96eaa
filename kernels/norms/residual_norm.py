"""A residual and the norm behind it.

r = x + gate * y (gate None: x + y), rounded to x's dtype; n = norm(r) with weight and bias (norm_quantize.py), and
where scale is given n * (1 + scale) + shift. Everything in float32 (float64 where x is); r and n have x's shape and
dtype, are contiguous, and each is rounded once. The norm reads the rounded r, as it would from memory. y may differ
from x in dtype only; gate, scale and shift broadcast against x (..., L, C), usually (B, 1, C). `gated_residual` is r
alone; `residual_norm_quantize` gives the rounded n quantized (quantize.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels._registry import (
    check,
    check_broadcast,
    check_channels,
    choose,
    compute_dtype,
    register,
    register_kernel,
    takes_rows,
)
from turbocompile.kernels.norms.adaln import modulate
from turbocompile.kernels.norms.norm_quantize import NORMS, normalize
from turbocompile.kernels.quantize.quantize import empty_quantized, quantize

_Optional = torch.Tensor | None


def gated(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> torch.Tensor:
    """x + gate * y, in x's dtype."""
    _check_sum(x, y, gate)
    dtype = compute_dtype(x.dtype)
    product = y.to(dtype) if gate is None else gate.to(dtype) * y.to(dtype)
    return (x.to(dtype) + product).to(x.dtype).contiguous()


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
    check_broadcast(x, scale=scale, shift=shift)
    r = gated(x, y, gate)
    n = normalize(r.to(compute_dtype(x.dtype)), weight, bias, eps, norm)
    return r, modulate(n, scale, shift).to(x.dtype)


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


def _check_sum(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> None:
    check(x.shape == y.shape, f"a residual of {list(x.shape)} is added to {list(y.shape)}")
    check_broadcast(x, gate=gate)


def _fake_gated(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> torch.Tensor:
    _check_sum(x, y, gate)
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
    choose("the norm", norm, *NORMS)
    check_channels(x, weight=weight, bias=bias)
    check_broadcast(x, scale=scale, shift=shift)
    return _fake_gated(x, y, gate), x.new_empty(x.shape)


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

register_kernel(gated_residual, gated, takes_rows, "norms.norms_triton.launch_gated_residual")
register_kernel(residual_norm, reference, takes_rows, "norms.norms_triton.launch_residual_norm")
register_kernel(
    residual_norm_quantize, reference_quantize, takes_rows, "norms.norms_triton.launch_residual_norm_quantize"
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {gated_residual: gated, residual_norm: reference, residual_norm_quantize: reference_quantize}
