"""Quantization of activations, and of a GELU's result, in Triton.

    int8, fp8    a program takes some rows, one behind the other: y = act(x), amax |y|, data, scale, all in registers
    int8_block   a program takes one 128 x 128 tile of x seen as (M, K)

act: none, GELU by tanh, or by erf. Formats, scales and rounding are those of quantize.py, y is rounded to x's dtype
first. x: (..., K), bf16, fp16 or float32; a last axis that is not contiguous costs a copy. A NaN is undefined.

Bytes an element, 16-bit x: 2 read + 1 written = 3. At the 3.0 TB/s of a copy: 32,760 x 1536 in 0.050 ms, 75,600 x 5120
in 0.387 ms; behind a GELU 32,760 x 8960 in 0.294 ms, 75,600 x 13,824 in 1.045 ms.

A row is held in pieces (_rows.py). While a row is computed the next row is on its way, two elements a register. In the
time in which a copy moves an element's 3 bytes, a Hopper card can issue some 28 instructions, among them 3.5 of the
kind of which a multiprocessor does 16 a clock; GELU by tanh has two of that kind (2^x, 1 / x).
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import (
    encode,
    encode_held,
    exp2,
    fetch,
    hold,
    inside,
    largest,
    largest_held,
    only_before,
    packed,
    place,
    reciprocal,
    release,
    rounded,
)
from turbocompile.kernels._registry import FUSED, check, choose
from turbocompile.kernels._rows import (
    RowConfig,
    check_input,
    neighbours,
    pieces,
    row_config,
    row_strides,
    view3_of_rows,
)
from turbocompile.kernels.quantize.quantize import BLOCK, FLOOR, LIMIT, empty_quantized

TANH_1 = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) log2 e
TANH_3 = tl.constexpr(-0.1029432395800235)  # the same times 0.044715
# erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), within 1.5e-7 for z >= 0 (Abramowitz and Stegun, 7.1.26)
ERFC_P = tl.constexpr(0.3275911 * 0.7071067811865476)  # of x = sqrt(2) z, as all here
ERFC_1, ERFC_2, ERFC_3 = tl.constexpr(0.254829592), tl.constexpr(-0.284496736), tl.constexpr(1.421413741)
ERFC_4, ERFC_5 = tl.constexpr(-1.453152027), tl.constexpr(1.061405429)
MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)


@triton.jit
def _activate(x, ACT: tl.constexpr, DTYPE: tl.constexpr, FTZ: tl.constexpr):
    """act(x) of float32 x, rounded to DTYPE. x / (1 + exp(-2 u)) is x (1 + tanh u) / 2 without its cancellation."""
    if ACT == "tanh":
        x = x * reciprocal(1.0 + exp2(x * (TANH_1 + TANH_3 * (x * x)), FTZ), FTZ)
    elif ACT == "erf":  # x erfc(|x| / sqrt 2) / 2 is gelu(x) of a negative x, and x less it of a positive one
        t = reciprocal(tl.abs(x) * ERFC_P + 1.0, FTZ)
        sum = ((((t * ERFC_5 + ERFC_4) * t + ERFC_3) * t + ERFC_2) * t + ERFC_1) * t
        part = 0.5 * x * sum * exp2(x * x * MINUS_HALF_LOG2E, FTZ)
        x = tl.where(x > 0, x - part, part)
    return x if ACT == "identity" else rounded(x, DTYPE, FTZ)


@triton.jit(do_not_specialize=["length", "per"])
def _quantize_rows(
    x, data, data_scale,
    x_b, x_l,
    length, per,
    C: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, NEAR: tl.constexpr,
    ACT: tl.constexpr, FORMAT: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Quantizes `per` rows of C channels of one batch item.

    A row is pieces of W0, W1 and W2 elements (0: no such piece), with NEAR neighbours in a thread.
    """
    first = tl.program_id(0) * per
    stop = tl.minimum(first + per, length)
    b = tl.program_id(1).to(tl.int64)
    at = x + b * x_b + first.to(tl.int64) * x_l
    to = data + (b * length + first) * C
    unit = data_scale + b * length
    DTYPE: tl.constexpr = x.dtype.element_ty
    c0 = tl.max_contiguous(tl.arange(0, W0), NEAR)
    m0 = inside(c0, C, W0)
    x0 = hold(fetch(at + c0, m0))  # (W0,)
    if W1 > 0:
        c1 = W0 + tl.max_contiguous(tl.arange(0, W1), NEAR)
        m1 = inside(c1, C, W0 + W1)
        x1 = hold(fetch(at + c1, m1))  # (W1,)
    if W2 > 0:
        c2 = W0 + W1 + tl.max_contiguous(tl.arange(0, W2), NEAR)
        m2 = inside(c2, C, W0 + W1 + W2)
        x2 = hold(fetch(at + c2, m2))  # (W2,)
    for row in range(first, stop):
        at += x_l
        next0 = hold(fetch(at + c0, only_before(m0, row + 1, stop)))  # (W0,)
        y0 = _activate(release(x0, DTYPE), ACT, DTYPE, FTZ)
        y1 = None
        y2 = None
        if W1 > 0:
            next1 = hold(fetch(at + c1, only_before(m1, row + 1, stop)))  # (W1,)
            y1 = _activate(release(x1, DTYPE), ACT, DTYPE, FTZ)
        if W2 > 0:
            next2 = hold(fetch(at + c2, only_before(m2, row + 1, stop)))  # (W2,)
            y2 = _activate(release(x2, DTYPE), ACT, DTYPE, FTZ)
        amax = tl.maximum(tl.max(largest(largest(y0, y1), y2), 0), FLOOR)
        factor = tl.div_rn(LIMIT, amax)
        tl.store(to + c0, encode(y0, factor, data, FORMAT, FTZ), mask=m0)
        x0 = next0
        if W1 > 0:
            tl.store(to + c1, encode(y1, factor, data, FORMAT, FTZ), mask=m1)
            x1 = next1
        if W2 > 0:
            tl.store(to + c2, encode(y2, factor, data, FORMAT, FTZ), mask=m2)
            x2 = next2
        tl.store(unit + row, tl.div_rn(amax, LIMIT))
        to += C


@triton.jit(do_not_specialize=["length", "rows"])
def _quantize_tiles(
    x, data, data_scale,
    x_b, x_l,
    length, rows,
    C: tl.constexpr, EDGE: tl.constexpr, FLAT: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
    FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Quantizes one EDGE x EDGE tile, which two elements a register hold between activation and largest magnitude."""
    tile = tl.program_id(1)
    row = tile * EDGE + tl.arange(0, EDGE)
    c = tl.program_id(0) * EDGE + tl.arange(0, EDGE)[None, :]
    real = inside(c, C, C if C % EDGE == 0 else C + 1)
    # Behind the last row comes the last again: it leaves the largest as it is, and no row has to be masked.
    at = place(tl.minimum(row, rows - 1), length, x_b, x_l, FLAT)[:, None] + c
    DTYPE: tl.constexpr = x.dtype.element_ty
    held = hold(fetch(x + at, real).reshape(EDGE * EDGE))  # (EDGE, EDGE)
    if ACT != "identity":
        held = packed(_activate(release(held, DTYPE), ACT, DTYPE, FTZ), DTYPE, FTZ)
    amax = tl.maximum(largest_held(held, DTYPE, FTZ), FLOOR)
    to = data + (row.to(tl.int64) * C)[:, None] + c
    coded = encode_held(held, amax, data, DTYPE, LIMIT, FTZ).reshape(EDGE, EDGE)
    tl.store(to, coded, mask=(row < rows)[:, None] & real)
    tl.store(data_scale + tile * tl.num_programs(0) + tl.program_id(0), tl.div_rn(amax, LIMIT))


STORED = 16  # bytes that a thread stores at once
TILE_CONFIG = RowConfig(16, BLOCK, 64)  # of a tile: 32 elements a thread


def quantize_into(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    format: str,
    act: str = "identity",
    config: RowConfig | None = None,
) -> None:
    """Fills data and scale of act(x): "identity", "tanh", "erf". Float32 data of format "fp8" get the values before the
    cast, for machines that do not know it.
    """
    width, rows, gpu = x.shape[-1], x.shape[:-1].numel(), x.is_cuda
    v = view3_of_rows(x)
    limits = {"LIMIT": LIMIT[format], "FLOOR": FLOOR[format]}
    if format == "int8_block":
        check_input(x, 1)
        config = config or TILE_CONFIG
        _quantize_tiles[(triton.cdiv(width, BLOCK), triton.cdiv(rows, BLOCK))](
            v, data, scale, *row_strides(v), v.shape[1], rows,
            C=width, EDGE=BLOCK, FLAT=v.shape[0] == 1, ACT=act, FTZ=gpu, **limits, **FUSED, num_warps=config.warps,
            num_stages=1, **config.limit(x),
        )  # fmt: skip
        return
    check_input(x, width)
    widths = pieces(max(width, 2), count=3)
    config = config or row_config(sum(widths), rows, x.device)
    w0, w1, w2 = widths
    _quantize_rows[(triton.cdiv(v.shape[1], config.rows), v.shape[0])](
        v, data, scale, *row_strides(v), v.shape[1], config.rows,
        C=width, W0=w0, W1=w1, W2=w2, NEAR=neighbours(widths, config.warps, STORED), ACT=act, FORMAT=format, FTZ=gpu,
        **limits, **FUSED, num_warps=config.warps, num_stages=1,
    )  # fmt: skip


def launch_quantize(x: torch.Tensor, format: str, config: RowConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize.py's op: (data, scale)."""
    check(x.ndim >= 1, "quantize: x has no dimension to quantize along")
    data, scale = empty_quantized(x, format)
    quantize_into(x, data, scale, format, config=config)
    return data, scale


def launch_gelu_quantize(
    x: torch.Tensor, approximate: str, format: str, config: RowConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu_quantize.py's op: (data, scale)."""
    choose("gelu_quantize: the approximation", approximate, "tanh", "none")
    data, scale = empty_quantized(x, format)
    quantize_into(x, data, scale, format, "erf" if approximate == "none" else "tanh", config)
    return data, scale
