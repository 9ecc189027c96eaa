"""GELU followed by quantization: gelu(x) in float32, rounded to x's dtype, then quantized (quantize.py).

approximate: "tanh" or "none" (erf). x (..., C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from turbocompile.kernels._registry import choose, compute_dtype, register, register_kernel, takes_rows
from turbocompile.kernels.quantize.quantize import empty_quantized, quantize


def reference(x: torch.Tensor, approximate: str, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """data (..., C) and its scale."""
    return quantize(F.gelu(x.to(compute_dtype(x.dtype)), approximate=approximate).to(x.dtype), format)


def _fake(x: torch.Tensor, approximate: str, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    choose("gelu_quantize: the approximation", approximate, "tanh", "none")
    return empty_quantized(x, format)


gelu_quantize = register(
    "gelu_quantize", "(Tensor x, str approximate, str format) -> (Tensor data, Tensor data_scale)", reference, _fake
)

register_kernel(gelu_quantize, reference, takes_rows, "quantize.quantize_triton.launch_gelu_quantize")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op in aten: the reference has no branches on data."""
    return {gelu_quantize: reference}
