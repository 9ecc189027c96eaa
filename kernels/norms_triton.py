"""The norms of a block in Triton: modulated, behind a residual, before a quantization, each tensor passed over once.

    r = x + gate * y                          rounded to x's dtype; without y, r is x
    n = norm(r) * weight + bias               layer or RMS over the C channels of a row, float32
    n = n * (1 + scale) + shift               rounded to x's dtype
    data, data_scale of n                     where it is quantized (quantize.py)

These are the ops of adaln.py, residual_norm.py and norm_quantize.py, whose references define them; what an op lacks is
None here and leaves the code. x: (..., L, C), bf16, fp16 or float32; y, gate, scale, shift and the vectors may have
other float dtypes. Strides are free; a last axis that is not contiguous costs a copy.

A program takes some rows, one behind the other, each as two pieces in registers (quantize_triton.py), and loads the
next before it computes one. The variance is of the differences from the mean, both over C alone. gate, scale, shift
and the vectors are read again for every row, from the first-level cache: per token or per batch is then one code, and
holding them would take the registers that keep loads in flight.

int8_block has one scale for 128 rows, more than a multiprocessor holds: the first kernel writes r and each row's mean
and root, 8 bytes a row, and a second reads r again, tile by tile, the last rows first: those are still in L2. It costs
most of one more read, so that it stays at 60 to 75% of a copy's rate.

Bytes an element, 16-bit tensors, and milliseconds at the 3.0 TB/s of a copy:

                                       bytes   32,760 x 1536   75,600 x 5120
    adaln                                  4           0.067           0.516
    adaln, norm _quantize, a row           3           0.050           0.387
    gated_residual                         6           0.101           0.774
    residual_norm                          8           0.134           1.032
    residual_norm_quantize, a row          7           0.117           0.903
    int8_block: 2 more than a row's: 5, 5 and 9
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from turbocompile.kernels._common import WIDEST, check, check_broadcast, check_channels, choose
from turbocompile.kernels.norm_quantize import NORMS
from turbocompile.kernels.prepare_triton import _product
from turbocompile.kernels.quantize import BLOCK, FLOOR, LIMIT, empty_quantized
from turbocompile.kernels.quantize_triton import (
    TILE_WARPS,
    RowConfig,
    check_input,
    encode,
    fetch,
    hold,
    inside,
    largest,
    neighbours,
    only_before,
    pieces,
    place,
    release,
    rounded,
    row_config,
    row_strides,
    store_tile,
    sum_of,
    view3,
)

_Optional = torch.Tensor | None


@triton.jit
def _vector(at, mask):
    """Part of a vector that every row needs, in float32: the last to leave the caches."""
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _add(x, y, gate_at, mask, DTYPE: tl.constexpr, FTZ: tl.constexpr):
    """x + gate * y rounded to DTYPE, in float32, the product rounded to float32 as in the reference: r is the same bit
    by bit.
    """
    if gate_at is not None:
        y = _product(_vector(gate_at, mask), y, FTZ)
    return rounded(x + y, DTYPE, FTZ)


@triton.jit
def _affine(n, weight_at, bias_at, scale_at, shift_at, columns, mask):
    """n * weight + bias, then * (1 + scale) + shift. What is None is left out."""
    if weight_at is not None:
        n = n * _vector(weight_at, columns)
    if bias_at is not None:
        n = n + _vector(bias_at, columns)
    if scale_at is not None:
        n = n * (1.0 + _vector(scale_at, mask))
    if shift_at is not None:
        n = n + _vector(shift_at, mask)
    return n


@triton.jit
def _at(p, offset):
    """p + offset, or None where p is None."""
    if p is None:
        at = None
    else:
        at = p + offset
    return at


@triton.jit(do_not_specialize=["length", "per"])
def _norm_rows(
    x, y, gate, scale, shift, weight, bias, residual, out, out_scale,
    x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
    length, per, eps,
    C: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, NEAR: tl.constexpr, RMS: tl.constexpr,
    OUT: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """`per` rows of C channels of one batch item, in pieces of W0 and W1 (0: none), NEAR neighbours in a thread.

    OUT: "residual" (r alone), "moments" (r; mean and root to out), "normed" (n to out), "int8", "fp8" (its data).
    """
    start = tl.program_id(0) * per
    stop = tl.minimum(start + per, length)
    b = tl.program_id(1).to(tl.int64)
    first = start.to(tl.int64)
    x_at = x + b * x_b + first * x_l
    y_at = _at(y, b * y_b + first * y_l)
    gate_at = _at(gate, b * gate_b + first * gate_l)
    scale_at = _at(scale, b * scale_b + first * scale_l)
    shift_at = _at(shift, b * shift_b + first * shift_l)
    to = (b * length + first) * C
    DTYPE: tl.constexpr = x.dtype.element_ty
    c0 = tl.max_contiguous(tl.arange(0, W0), NEAR)
    m0 = inside(c0, C, W0)
    x0 = hold(fetch(x_at + c0, m0))
    if y is not None:
        y0 = hold(fetch(y_at + c0, m0))
    if W1 > 0:
        c1 = W0 + tl.max_contiguous(tl.arange(0, W1), NEAR)
        m1 = inside(c1, C, W0 + W1)
        x1 = hold(fetch(x_at + c1, m1))
        if y is not None:
            y1 = hold(fetch(y_at + c1, m1))
    for row in range(start, stop):
        r0 = release(x0, DTYPE)
        r1 = None
        if W1 > 0:
            r1 = release(x1, DTYPE)
        if y is not None:
            r0 = _add(r0, release(y0, y.dtype.element_ty), _at(gate_at, c0), m0, DTYPE, FTZ)
            if W1 > 0:
                r1 = _add(r1, release(y1, y.dtype.element_ty), _at(gate_at, c1), m1, DTYPE, FTZ)
        ahead0 = only_before(m0, row + 1, stop)
        x_at += x_l
        x0 = hold(fetch(x_at + c0, ahead0))
        if W1 > 0:
            ahead1 = only_before(m1, row + 1, stop)
            x1 = hold(fetch(x_at + c1, ahead1))
        if y is not None:
            y_at += y_l
            y0 = hold(fetch(y_at + c0, ahead0))
            if W1 > 0:
                y1 = hold(fetch(y_at + c1, ahead1))
        if residual is not None:
            tl.store(residual + to + c0, r0.to(DTYPE), mask=m0)
            if W1 > 0:
                tl.store(residual + to + c1, r1.to(DTYPE), mask=m1)  # type: ignore[union-attr]
        if OUT != "residual":
            n0 = r0
            n1 = r1
            mean = 0.0
            if not RMS:
                # a product with 1 / C would leave constant rows a difference
                mean = tl.div_rn(sum_of(n0, n1), C * 1.0)
                n0 = tl.where(m0, n0 - mean, 0.0)
                if W1 > 0:
                    n1 = tl.where(m1, n1 - mean, 0.0)
            square0 = n0 * n0
            square1 = None
            if W1 > 0:
                square1 = n1 * n1  # type: ignore[operator]
            root = tl.rsqrt(tl.div_rn(sum_of(square0, square1), C * 1.0) + eps)
            if OUT == "moments":
                tl.store(out + 2 * (b * length + row), mean)
                tl.store(out + 2 * (b * length + row) + 1, root)
            else:
                n0 = _affine(n0 * root, _at(weight, c0), _at(bias, c0), _at(scale_at, c0), _at(shift_at, c0), m0, m0)
                if W1 > 0:
                    n1 = _affine(
                        n1 * root, _at(weight, c1), _at(bias, c1), _at(scale_at, c1), _at(shift_at, c1), m1, m1
                    )
                if OUT == "normed":
                    tl.store(out + to + c0, n0.to(DTYPE), mask=m0)
                    if W1 > 0:
                        tl.store(out + to + c1, n1.to(DTYPE), mask=m1)  # type: ignore[union-attr]
                else:
                    n0 = rounded(n0, DTYPE, FTZ)
                    if W1 > 0:
                        n1 = rounded(n1, DTYPE, FTZ)
                    amax = tl.maximum(tl.max(largest(n0, n1), 0), FLOOR)
                    factor = tl.div_rn(LIMIT, amax)
                    tl.store(out + to + c0, encode(n0, factor, out, OUT, FTZ), mask=m0)
                    if W1 > 0:
                        tl.store(out + to + c1, encode(n1, factor, out, OUT, FTZ), mask=m1)
                    tl.store(out_scale + b * length + row, tl.div_rn(amax, LIMIT))
        if gate is not None:
            gate_at += gate_l
        if scale is not None:
            scale_at += scale_l
        if shift is not None:
            shift_at += shift_l
        to += C


@triton.jit(do_not_specialize=["length", "rows"])
def _norm_tiles(
    x, moments, scale, shift, weight, bias, data, data_scale,
    x_b, x_l, scale_b, scale_l, shift_b, shift_l,
    length, rows,
    C: tl.constexpr, EDGE: tl.constexpr, FLAT: tl.constexpr, SHARED: tl.constexpr, LIMIT: tl.constexpr,
    FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """One EDGE x EDGE tile of the norm, of which the rows' means and roots are known. SHARED: scale and shift are the
    same in all rows.
    """
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile * EDGE + tl.arange(0, EDGE)
    column = tl.program_id(0) * EDGE + tl.arange(0, EDGE)
    c = column[None, :]
    real = row < rows
    mask = real[:, None] & (c < C)
    v = fetch(x + place(row, length, x_b, x_l, FLAT)[:, None] + c, mask).to(tl.float32)
    mean = tl.load(moments + 2 * row, mask=real, other=0.0)
    root = tl.load(moments + 2 * row + 1, mask=real, other=0.0)
    n = (v - mean[:, None]) * root[:, None]
    if SHARED:
        n = _affine(n, _at(weight, c), _at(bias, c), _at(scale, c), _at(shift, c), c < C, c < C)
    else:
        scale_at = _at(scale, place(row, length, scale_b, scale_l, FLAT)[:, None] + c)
        shift_at = _at(shift, place(row, length, shift_b, shift_l, FLAT)[:, None] + c)
        n = _affine(n, _at(weight, c), _at(bias, c), scale_at, shift_at, c < C, mask)
    n = tl.where(mask, rounded(n, x.dtype.element_ty, FTZ), 0.0)
    store_tile(n, tile, row, column, mask, data, data_scale, C, LIMIT, FLOOR, FTZ)


@dataclass(frozen=True)
class Norm:
    """What is done to r: the norm, its own vectors (C,), and the modulation, which broadcasts to x."""

    kind: str  # "layer" | "rms"
    eps: float
    weight: _Optional = None
    bias: _Optional = None
    scale: _Optional = None
    shift: _Optional = None

    def check(self, x: torch.Tensor) -> None:
        """ValueError for what the references refuse."""
        choose("the norm", self.kind, *NORMS)
        check_channels(x, weight=self.weight, bias=self.bias)
        check_broadcast(x, scale=self.scale, shift=self.shift)


@dataclass(frozen=True)
class Sum:
    """What is added to x before its norm, and where x + gate * y goes."""

    y: torch.Tensor
    gate: _Optional
    residual: torch.Tensor


def norm_into(
    x: torch.Tensor,
    norm: Norm,
    form: str,
    out: torch.Tensor | None,
    out_scale: torch.Tensor | None = None,
    sum: Sum | None = None,
    config: RowConfig | None = None,
) -> None:
    """Fills out (and out_scale) with the norm in a form: "residual" (none: sum.residual alone), "normed", "int8",
    "fp8", "int8_block". Float32 `out` of form "fp8" gets the values before the cast, for machines that do not know it.
    """
    norm.check(x)
    check_input(x, x.shape[-1])
    width, rows, tiles = x.shape[-1], x.shape[:-1].numel(), form == "int8_block"
    v = view3(x, x.shape)
    y, gate, residual = (sum.y, sum.gate, sum.residual) if sum else (None, None, None)
    wide = [None if t is None else view3(t, x.shape) for t in (y, gate, norm.scale, norm.shift)]
    narrow = [None if t is None else t.contiguous() for t in (norm.weight, norm.bias)]
    strides = [n for t in wide for n in row_strides(t)]
    moments = torch.empty((rows, 2), dtype=torch.float32, device=x.device) if tiles else out
    limits = {"LIMIT": LIMIT.get(form, 0.0), "FLOOR": FLOOR.get(form, 0.0), "FTZ": x.is_cuda}
    w0, w1 = pieces(max(width, 2))
    wider = 2 if sum and x.element_size() > 2 else 1  # a sum keeps two tensors in flight
    config = config or row_config(min(WIDEST, (w0 + w1) * wider), rows, x.device)
    limit = config.limit(x) if norm.kind == "layer" else {}
    _norm_rows[(triton.cdiv(v.shape[1], config.rows), v.shape[0])](
        v, *wide, *narrow, residual, moments, out_scale, *row_strides(v), *strides, v.shape[1], config.rows, norm.eps,
        C=width, W0=w0, W1=w1, NEAR=neighbours((w0, w1), config.warps, config.near), RMS=norm.kind == "rms",
        OUT="moments" if tiles else form, **limits, num_warps=config.warps, num_stages=1, **limit,
    )  # fmt: skip
    if tiles:
        r = v if residual is None else view3(residual, x.shape)
        _norm_tiles[(triton.cdiv(width, BLOCK), triton.cdiv(rows, BLOCK))](
            r, moments, *wide[2:], *narrow, out, out_scale, *row_strides(r), *strides[4:], v.shape[1], rows,
            C=width, EDGE=BLOCK, FLAT=v.shape[0] == 1, SHARED=not any(strides[4:]), **limits,
            num_warps=TILE_WARPS, num_stages=1,
        )  # fmt: skip


def launch_adaln(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: _Optional, bias: _Optional, eps: float,
    config: RowConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """adaln.py's op."""
    out = x.new_empty(x.shape)
    norm_into(x, Norm("layer", eps, weight, bias, scale, shift), "normed", out, config=config)
    return out


def launch_adaln_quantize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: _Optional, bias: _Optional, eps: float,
    format: str, config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """adaln.py's op: (data, data_scale)."""
    data, data_scale = empty_quantized(x, format)
    norm_into(x, Norm("layer", eps, weight, bias, scale, shift), format, data, data_scale, config=config)
    return data, data_scale


def launch_norm_quantize(
    x: torch.Tensor, weight: _Optional, bias: _Optional, eps: float, norm: str, format: str,
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """norm_quantize.py's op: (data, data_scale)."""
    data, data_scale = empty_quantized(x, format)
    norm_into(x, Norm(norm, eps, weight, bias), format, data, data_scale, config=config)
    return data, data_scale


def _sum(x: torch.Tensor, y: torch.Tensor, gate: _Optional) -> Sum:
    check(x.shape == y.shape, f"a residual of {list(x.shape)} is added to {list(y.shape)}")
    check_broadcast(x, gate=gate)
    return Sum(y, gate, x.new_empty(x.shape))


def launch_gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: _Optional, config: RowConfig | None = None
) -> torch.Tensor:
    """residual_norm.py's op x + gate * y."""
    sum = _sum(x, y, gate)
    norm_into(x, Norm("rms", 0.0), "residual", None, sum=sum, config=config)
    return sum.residual


def launch_residual_norm(
    x: torch.Tensor, y: torch.Tensor, gate: _Optional, scale: _Optional, shift: _Optional, weight: _Optional,
    bias: _Optional, eps: float, norm: str, config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual_norm.py's op: (residual, normed)."""
    sum, out = _sum(x, y, gate), x.new_empty(x.shape)
    norm_into(x, Norm(norm, eps, weight, bias, scale, shift), "normed", out, sum=sum, config=config)
    return sum.residual, out


def launch_residual_norm_quantize(
    x: torch.Tensor, y: torch.Tensor, gate: _Optional, scale: _Optional, shift: _Optional, weight: _Optional,
    bias: _Optional, eps: float, norm: str, format: str, config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual_norm.py's op: (residual, data, data_scale)."""
    sum, (data, data_scale) = _sum(x, y, gate), empty_quantized(x, format)
    norm_into(x, Norm(norm, eps, weight, bias, scale, shift), format, data, data_scale, sum, config)
    return sum.residual, data, data_scale
