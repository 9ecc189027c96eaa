"""Adaptive layer norm: layer_norm(x) * (1 + scale) + shift, and the same followed by quantization.

x (B, L, C); scale and shift broadcast against it, usually (B, 1, C); weight and bias (C) or None. Mean and variance over C
in float32, y = (x - mean) / sqrt(var + eps), everything in float32 (float64 for float64 inputs), rounded once to x's
dtype. Source: DiT (arXiv 2212.09748); the variance is the true one (a padded row must not count its pads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from turbocompile.kernels._common import compute_dtype, register
from turbocompile.kernels.quantize import empty_quantized, quantize


def reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Same shape and dtype as x."""
    dtype = compute_dtype(x.dtype)
    w, b = (None if t is None else t.to(dtype) for t in (weight, bias))
    n = F.layer_norm(x.to(dtype), x.shape[-1:], w, b, eps)
    return (n * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)


def reference_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    format: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """data and scale of the modulated norm, rounded to x's dtype first, as the two ops in turn would."""
    return quantize(reference(x, scale, shift, weight, bias, eps), format)


def _fake(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *rest: object) -> torch.Tensor:
    if torch.broadcast_shapes(x.shape, scale.shape, shift.shape) != x.shape:
        raise ValueError(f"adaln: scale {list(scale.shape)} and shift {list(shift.shape)} do not fit {list(x.shape)}")
    return x.new_empty(x.shape)


def _fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    format: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_quantized(_fake(x, scale, shift), format)


_ARGUMENTS = "Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps"
adaln = register("adaln", f"({_ARGUMENTS}) -> Tensor", reference, _fake)
adaln_quantize = register(
    "adaln_quantize",
    f"({_ARGUMENTS}, str format) -> (Tensor data, Tensor data_scale)",
    reference_quantize,
    _fake_quantize,
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {adaln: reference, adaln_quantize: reference_quantize}
