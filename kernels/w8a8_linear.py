"""Linear of 8-bit activations and weights.

y = (data weight^T) * scale * weight_scale^T + bias, data (..., K), weight (N, K), both of one 8-bit type.

int8, fp8: one scale a row of data (..., 1) and of weight (N, 1); accumulated exactly (int8) or in float32 (fp8), bias added
in float32, rounded once. int8_block, TurboDiffusion's: scales for 128 x 128 tiles; for each 128 of K the int32 product
is exact, times (scale * weight_scale), added in float32; rounded to dtype, and the bias added in dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels._common import compute_dtype, register
from turbocompile.kernels.quantize import BLOCK, FORMATS


def reference(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(..., N) in dtype. float64 as dtype computes the products and sums in float64."""
    compute = compute_dtype(dtype)
    rows = data.reshape(-1, data.shape[-1])
    if format == "int8_block":
        y = _blocks(rows, scale, weight, weight_scale, compute).to(dtype)
        y = y if bias is None else y + bias.to(dtype)
    else:
        # |sum| of int8 products stays under 2^24 up to K = 1040; beyond, float64 keeps it exact.
        exact = torch.float64 if format == "int8" and rows.shape[1] > 1040 else compute
        y = (rows.to(exact) @ weight.to(exact).T).to(compute)
        y = y * scale.reshape(-1, 1).to(compute) * weight_scale.reshape(1, -1).to(compute)
        y = (y if bias is None else y + bias.to(compute)).to(dtype)
    return y.reshape(*data.shape[:-1], weight.shape[0])


def _blocks(
    rows: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, compute: torch.dtype
) -> torch.Tensor:
    m, k = rows.shape
    n = weight.shape[0]
    total = torch.zeros(m, n, dtype=compute, device=rows.device)
    for block in range(-(-k // BLOCK)):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        # 128 products of at most 2^14 sum to at most 2^21, which float32 holds exactly.
        product = rows[:, columns].to(compute) @ weight[:, columns].to(compute).T
        a = scale[:, block].repeat_interleave(BLOCK)[:m].to(compute)
        b = weight_scale[:, block].repeat_interleave(BLOCK)[:n].to(compute)
        total = total + product * (a[:, None] * b[None, :])
    return total


def _fake(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    if format not in FORMATS or data.dtype != FORMATS[format] or weight.dtype != FORMATS[format]:
        raise ValueError(f"w8a8_linear: format {format!r} does not fit {data.dtype} data and {weight.dtype} weights")
    if data.shape[-1] != weight.shape[1]:
        raise ValueError(f"w8a8_linear: data of {data.shape[-1]} channels, weight of {weight.shape[1]}")
    if format == "int8_block" and (weight.shape[1] % BLOCK or weight.shape[0] % 8):
        raise ValueError(
            f"w8a8_linear: int8_block needs K % 128 == 0 and N % 8 == 0, and the weight is {list(weight.shape)}"
        )
    return data.new_empty((*data.shape[:-1], weight.shape[0]), dtype=dtype)


w8a8_linear = register(
    "w8a8_linear",
    "(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str format, "
    "ScalarType dtype) -> Tensor",
    reference,
    _fake,
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {w8a8_linear: reference}
