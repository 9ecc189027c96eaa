"""Linear of 8-bit activations and weights.

    int8, fp8    y = round((data weight^T) * scale * weight_scale^T + bias)
    int8_block   acc = sum over kb of float(I_kb) * (scale[mb, kb] * weight_scale[nb, kb])
                 y = round(round(acc) + bias)

data (..., K), weight (N, K), both int8 or both float8_e4m3fn. bias (N,) or None. y (..., N) in `dtype`, contiguous.

int8, fp8: each row of data has a float32 scale, (..., 1), and each row of weight, (N, 1). The sum over K is exact
(int8) or float32 (fp8).

int8_block is TurboDiffusion's format: each tile of 128 x 128 has a float32 scale, scale (ceil(M / 128), K / 128) and
weight_scale (ceil(N / 128), K / 128). data is read as (M, K), so that a tile may span batch items. I_kb, the int32 sum
over the 128 columns of tile kb, is exact. The two scales are multiplied first, kb runs upwards, and the bias is added
in `dtype`, which rounds a second time. K must be a multiple of 128 and N a multiple of 8, as in every layer of Wan.

For dtype float64, every float32 above is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels._registry import compute_dtype, register, register_kernel, runs_triton
from turbocompile.kernels.linear.operands import check_operands
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS, blocks, spread

# A product of two int8 numbers is at most 2^14, and a sum of 1,024 of them fits the 24 bits of a float32, so that a
# float32 matmul over EXACT_DEPTH columns is exact.
EXACT_DEPTH = 1024
# The reference computes ROWS rows of data with COLUMNS rows of weight at a time, which bounds its memory. The values
# cast to float are then so few that they stay in the cache of a CPU until the product reads them. Both are multiples of
# BLOCK.
ROWS = 1024
COLUMNS = 1024


def reference(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The definition of the op: (..., N) in dtype. Raises ValueError if shapes, dtypes and format do not fit each
    other.
    """
    check_operands(data, scale, weight, weight_scale, bias, format)
    compute = compute_dtype(dtype)
    tiled = format == "int8_block"
    rows, scales = data.reshape(-1, data.shape[-1]), scale if tiled else scale.reshape(-1, 1)
    y = torch.empty(rows.shape[0], weight.shape[0], dtype=dtype, device=data.device)
    for n in range(0, weight.shape[0], COLUMNS):
        columns = slice(n, n + COLUMNS)
        values = weight[columns].to(torch.float32 if weight.dtype == torch.int8 else compute)  # (COLUMNS, K)
        value_scale = weight_scale[n // BLOCK :] if tiled else weight_scale[columns]
        added = None if bias is None else bias[columns].to(dtype if tiled else compute)
        for m in range(0, rows.shape[0], ROWS):
            part = rows[m : m + ROWS].to(values.dtype)  # (ROWS, K)
            if tiled:
                total = _tiled(part, scales[m // BLOCK :], values, value_scale, compute).to(dtype)
            else:
                total = _product(part, values, exact=format == "int8").to(compute)
                total = total * scales[m : m + ROWS].to(compute) * value_scale.T.to(compute)
            y[m : m + ROWS, columns] = total if added is None else total + added
    return y.reshape(*data.shape[:-1], weight.shape[0])


def _product(rows: torch.Tensor, weight: torch.Tensor, exact: bool) -> torch.Tensor:
    """rows (M, K) times weight^T, weight (N, K): (M, N).

    exact: the operands are integers, so the result must be exact; it is float64 if float32 has too few bits.
    """
    k = rows.shape[1]
    if not exact or k <= EXACT_DEPTH:
        return rows @ weight.T
    total = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.float64, device=rows.device)
    for start in range(0, k, EXACT_DEPTH):
        total += rows[:, start : start + EXACT_DEPTH] @ weight[:, start : start + EXACT_DEPTH].T
    return total


def _tiled(
    rows: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, compute: torch.dtype
) -> torch.Tensor:
    """The sum `acc` (M, N) of format int8_block, in the dtype `compute`, from rows (M, K), weight (N, K) and tile
    scales.
    """
    m, n = rows.shape[0], weight.shape[0]
    total = torch.zeros(m, n, dtype=compute, device=rows.device)
    for kb in range(blocks(rows.shape[1])):
        columns = slice(kb * BLOCK, (kb + 1) * BLOCK)
        a, b = (s[:, kb].to(compute).repeat_interleave(BLOCK)[:size] for s, size in ((scale, m), (weight_scale, n)))
        total += (rows[:, columns] @ weight[:, columns].T).to(compute) * (a[:, None] * b)
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
    check_operands(data, scale, weight, weight_scale, bias, format)
    return data.new_empty((*data.shape[:-1], weight.shape[0]), dtype=dtype)


w8a8_linear = register(
    "w8a8_linear",
    "(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str format, "
    "ScalarType dtype) -> Tensor",
    reference,
    _fake,
)


def has_kernel(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> bool:
    """Whether the GPU kernels compute operands of these dtypes and this K, on a card that has the format's arithmetic.

    Whether the operands fit each other is checked later, by the reference or by the kernel's launch.
    """
    if format not in FORMATS or weight.ndim != 2:
        return False
    others = [t for t in (scale, weight, weight_scale, bias) if t is not None]
    if not (all(t.device == data.device for t in others) and runs_triton(data.device)):
        return False
    from turbocompile.kernels.linear import linear_triton  # here, because a machine without a GPU may lack Triton

    return linear_triton.takes(format, dtype, weight.shape[1], data.device)


on_cuda = register_kernel(w8a8_linear, reference, has_kernel, "linear.linear_triton.launch_linear")


def _decomposition(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The op in aten, by one matmul.

    It multiplies the 8-bit values, or, for int8_block, the dequantized values, which gives the same sum in another
    order.
    """
    compute = compute_dtype(dtype)
    if format == "int8_block":
        rows = data.reshape(-1, data.shape[-1])
        x = rows.to(compute) * spread(scale.to(compute), *rows.shape)
        w = weight.to(compute) * spread(weight_scale.to(compute), *weight.shape)
        y = (x @ w.T).reshape(*data.shape[:-1], weight.shape[0]).to(dtype)
        return y if bias is None else y + bias.to(dtype)
    y = torch.matmul(data.to(compute), weight.to(compute).T) * scale.to(compute) * weight_scale.T.to(compute)
    return (y if bias is None else y + bias.to(compute)).to(dtype)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op by aten operators alone, with one floating-point matmul."""
    return {w8a8_linear: _decomposition}
