"""Adaptive layer norm: layer_norm(x) * (1 + scale) + shift, and the same followed by quantization.

x (..., L, C); scale and shift broadcast against it: (B, 1, C), (1, 1, C) or (C,), or one a token (B, L, C); weight
and bias (C,), the LayerNorm's own, or None. All float inputs may differ in dtype; y = layer_norm(x) * (1 + scale) +
shift in float32 (float64 where x is), rounded once to x's dtype, contiguous; adaln_quantize quantizes (quantize.py)
the rounded y, as the two ops in turn would. Source: DiT (arXiv 2212.09748), Wan's norm1 and norm2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels._registry import (
    check_broadcast,
    check_channels,
    compute_dtype,
    register,
    register_kernel,
    takes_rows,
)
from turbocompile.kernels.norms.norm_quantize import normalize
from turbocompile.kernels.quantize.quantize import empty_quantized, quantize


def modulate(n: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    """n * (1 + scale) + shift, in n's dtype; what is None is left out."""
    n = n if scale is None else n * (1 + scale.to(n.dtype))
    return n if shift is None else n + shift.to(n.dtype)


def reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Same shape and dtype as x."""
    check_broadcast(x, scale=scale, shift=shift)
    n = normalize(x.to(compute_dtype(x.dtype)), weight, bias, eps, "layer")
    return modulate(n, scale, shift).to(x.dtype)


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


def _fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    check_channels(x, weight=weight, bias=bias)
    check_broadcast(x, scale=scale, shift=shift)
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
    return empty_quantized(_fake(x, scale, shift, weight, bias, eps), format)


_ARGUMENTS = "Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps"
adaln = register("adaln", f"({_ARGUMENTS}) -> Tensor", reference, _fake)
adaln_quantize = register(
    "adaln_quantize",
    f"({_ARGUMENTS}, str format) -> (Tensor data, Tensor data_scale)",
    reference_quantize,
    _fake_quantize,
)

register_kernel(adaln, reference, takes_rows, "norms.norms_triton.launch_adaln")
register_kernel(adaln_quantize, reference_quantize, takes_rows, "norms.norms_triton.launch_adaln_quantize")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {adaln: reference, adaln_quantize: reference_quantize}
