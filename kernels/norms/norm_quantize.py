"""LayerNorm or RMSNorm over the channels, followed by quantization.

norm "layer": (x - mean) / sqrt(var + eps); "rms": x / sqrt(mean(x^2) + eps); times weight (C), plus bias (C), either
may be None. Computed in float32 (float64 for float64 inputs), rounded to x's dtype, then quantized (quantize.py): what
the two ops give in turn. The variance is that of the C channels alone (TurboDiffusion's counts its padding as well).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from turbocompile.kernels._registry import check_channels, choose, compute_dtype, register, register_kernel, takes_rows
from turbocompile.kernels.quantize.quantize import empty_quantized, quantize

NORMS = ("layer", "rms")


def normalize(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str
) -> torch.Tensor:
    """The norm in the dtype of x, float32 or wider. ValueError for another norm, or vectors that do not fit."""
    choose("the norm", norm, *NORMS)
    check_channels(x, weight=weight, bias=bias)
    w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], w, b, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if w is None else y * w
    return y if b is None else y + b


def reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """data (..., C) and its scale."""
    return quantize(normalize(x.to(compute_dtype(x.dtype)), weight, bias, eps, norm).to(x.dtype), format)


def _fake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, norm: str, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    choose("the norm", norm, *NORMS)
    check_channels(x, weight=weight, bias=bias)
    return empty_quantized(x, format)


norm_quantize = register(
    "norm_quantize",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str norm, str format) -> (Tensor data, Tensor data_scale)",
    reference,
    _fake,
)

register_kernel(norm_quantize, reference, takes_rows, "norms.norms_triton.launch_norm_quantize")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op in aten: the reference has no branches on data."""
    return {norm_quantize: reference}
