"""Quantization of activations and weights to 8 bits.

    int8        per token (weights: per row): scale = max(amax, 1e-8) / 127; data = rne(x / scale)
    fp8         per token (weights: per row): scale = max(amax, 1e-12) / 448; data = e4m3(x / scale), saturating
    int8_block  128 x 128 tiles of x seen as (M, K): scale = max(amax, 1e-8) / 128; data = rne(x / scale), saturating

x: (..., K), any float dtype. data: x's shape, int8 or float8_e4m3fn, contiguous. scale: float32, (..., 1), or
(ceil(M/128), ceil(K/128)) for int8_block. "x / scale" is x * (limit / amax), the product in float32 (float64 for
float64): one rounding of the quotient per row, one of the product per element, and a kernel does the same.

int8_block is the format of TurboDiffusion's checkpoints: +amax saturates to 127, -amax is exact. int8 is ours: it is
symmetric and never saturates. Halves round to even everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from turbocompile.kernels._registry import check, choose, compute_dtype, register, register_kernel, takes_rows

BLOCK = 128  # edge of an int8_block tile
ALIGNED = 16  # bytes: what a tensor descriptor asks of addresses and strides, and a vector load of K
FORMATS = {"int8": torch.int8, "int8_block": torch.int8, "fp8": torch.float8_e4m3fn}  # dtype of the data
LIMIT = {"int8": 127.0, "int8_block": 128.0, "fp8": 448.0}  # what amax maps to; 448 is the largest e4m3
FLOOR = {"int8": 1e-8, "int8_block": 1e-8, "fp8": 1e-12}  # amax of a row of zeros: its data are zeros, not NaN


def check_format(format: str) -> None:
    """ValueError unless `format` is known."""
    choose("the format", format, *FORMATS)


def blocks(n: int) -> int:
    """How many tiles cover n rows or columns."""
    return -(-n // BLOCK)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """int8_block scales (ceil(rows/128), ceil(columns/128)) as one value an element, (rows, columns)."""
    down, right = scale.shape
    wide = scale[:, None, :, None].expand(down, BLOCK, right, BLOCK).reshape(down * BLOCK, right * BLOCK)
    return wide[:rows, :columns]


def _block_amax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each tile of x (M, K): (ceil(M/128), ceil(K/128)). Pads are zeros and change nothing."""
    m, k = x.shape
    down, right = blocks(m), blocks(k)
    padded = F.pad(x, (0, right * BLOCK - k, 0, down * BLOCK - m))
    return padded.reshape(down, BLOCK, right, BLOCK).abs().amax(dim=(1, 3))


def quotient(limit: float, amax: torch.Tensor) -> torch.Tensor:
    """limit / amax with one rounding; written with a number on the left, torch would multiply by the reciprocal."""
    return torch.full_like(amax, limit) / amax


def encode(x: torch.Tensor, format: str) -> torch.Tensor:
    """x, already divided by its scale, rounded and saturated to the data of `format`."""
    if format == "fp8":  # torch's cast to e4m3 overflows to NaN
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return x.round().clamp(-128.0, 127.0).to(torch.int8)


def quantize(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, scale) of x (..., K); the formats stand above. ValueError for an unknown format."""
    check_format(format)
    wide = x.to(compute_dtype(x.dtype))
    if format == "int8_block":
        rows = wide.reshape(-1, x.shape[-1])
        amax = _block_amax(rows).clamp(min=FLOOR[format])
        data = encode(rows * spread(quotient(LIMIT[format], amax), *rows.shape), format).reshape(x.shape)
    else:
        amax = wide.abs().amax(dim=-1, keepdim=True).clamp(min=FLOOR[format])
        data = encode(wide * quotient(LIMIT[format], amax), format)
    return data.contiguous(), (amax / LIMIT[format]).to(torch.float32)


def dequantize(data: torch.Tensor, scale: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
    """The values in `dtype` that (data, scale) stand for, of data's shape (..., K); one rounding."""
    check_format(format)
    wide = compute_dtype(dtype)
    values = data.to(wide)
    if format == "int8_block":
        rows = values.reshape(-1, data.shape[-1])
        return (rows * spread(scale.to(wide), *rows.shape)).reshape(data.shape).to(dtype)
    return (values * scale.to(wide)).to(dtype)


reference = quantize


def empty_quantized(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized (data, scale) for x (..., K): what a fake implementation returns, and a launcher fills."""
    check_format(format)
    if format == "int8_block":
        scale_shape: tuple[int, ...] = (blocks(x.shape[:-1].numel()), blocks(x.shape[-1]))
    else:
        scale_shape = (*x.shape[:-1], 1)
    return x.new_empty(x.shape, dtype=FORMATS[format]), x.new_empty(scale_shape, dtype=torch.float32)


def _fake(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    check(x.ndim >= 1, "quantize: x has no dimension to quantize along")
    return empty_quantized(x, format)


quantize_op = register("quantize", "(Tensor x, str format) -> (Tensor data, Tensor scale)", reference, _fake)

register_kernel(quantize_op, reference, takes_rows, "quantize.quantize_triton.launch_quantize")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op in aten: the reference."""
    return {quantize_op: reference}
