"""The norms of a block in Triton: modulated, behind a residual, before a quantization, each tensor passed over once.

    r = x + gate * y                          rounded to x's dtype; without y, r is x
    n = norm(r) * weight + bias               layer or RMS over the C channels of a row, float32
    n = n * (1 + scale) + shift               rounded to x's dtype
    data, data_scale of n                     where it is quantized (quantize.py)

These are the ops of adaln.py, residual_norm.py and norm_quantize.py, whose references define them. An operand that an
op does not have is None, and the instructions for it are not compiled. x: (..., L, C), bf16, fp16 or float32; y, gate,
scale, shift and the vectors may have other float dtypes. Strides are free; a last axis that is not contiguous costs a
copy.

A program takes some rows, one behind the other, and holds each as two pieces in registers (_rows.py). It loads the next
row before it computes one. The variance is of the differences from the mean, both over C alone. gate, scale, shift
and the vectors are read again for every row, from the first-level cache, because the same code then serves one vector a
token and one for all, and because holding them would take the registers that keep loads in flight.

int8_block has one scale for 128 rows, more than a multiprocessor holds, so its kernel reads x (and y) twice, the second
time from the second-level cache. One grid has programs of two kinds, in the order of the row blocks of 128: some take
rows and write each row's mean and root, one word; one a tile comes some row blocks later, reads its tile at once, waits
for the words of its rows, writes r and quantizes. A word is 0 until it is written, in one piece, so that no fence and
no atomic operation is needed. With a lag that is long enough the words are there when a tile asks for them, while the
rows between are still in the cache: 15 to 25 MB of 50. A tile waits for programs with smaller ids alone, which start
before it, as single-pass scans assume, too. If one did not, the launch would end in an error after a minute or two.
On an H100: 80% to 90% of a copy's rate at 1536 and 5120 channels.

Bytes an element, 16-bit tensors, and milliseconds at the 3.0 TB/s of a copy:

                                       bytes   32,760 x 1536   75,600 x 5120
    adaln                                  4           0.067           0.516
    adaln, norm _quantize                  3           0.050           0.387
    gated_residual                         6           0.101           0.774
    residual_norm                          8           0.134           1.032
    residual_norm_quantize                 7           0.117           0.903
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import (
    encode,
    encode_held,
    fetch,
    glance,
    hold,
    inside,
    largest,
    largest_held,
    only_before,
    packed,
    place,
    product,
    release,
    rounded,
    sum_of,
    wait,
)
from turbocompile.kernels._registry import FUSED, WIDEST, card, check, check_broadcast, check_channels, choose
from turbocompile.kernels._rows import (
    RowConfig,
    check_input,
    neighbours,
    pieces,
    row_config,
    row_strides,
    view3,
)
from turbocompile.kernels.norms.norm_quantize import NORMS
from turbocompile.kernels.quantize.quantize import BLOCK, FLOOR, LIMIT, empty_quantized

_Optional = torch.Tensor | None
NEAR = tl.constexpr(8)  # neighbours in a thread of a tile: 16 would have each read twice as much of scale and shift


@triton.jit
def _vector(at, mask):
    """Loads elements of a vector that every row needs, as float32; they are the last to leave the caches."""
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _add(x, y, gate_at, mask, DTYPE: tl.constexpr, FTZ: tl.constexpr):
    """x + gate * y, rounded to DTYPE, as float32. The product is rounded to float32 first, as in the reference, so that
    the result equals the reference's bit by bit.
    """
    if gate_at is not None:
        y = product(_vector(gate_at, mask), y, FTZ)
    return rounded(x + y, DTYPE, FTZ)


@triton.jit
def _affine(n, weight_at, bias_at, scale_at, shift_at, columns, mask):
    """n * weight + bias, then * (1 + scale) + shift; an operand whose pointer is None is left out."""
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

    OUT: "residual" (r alone), "normed" (n to out), "int8", "fp8" (its data).
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
    x0 = hold(fetch(x_at + c0, m0))  # (W0,)
    if y is not None:
        y0 = hold(fetch(y_at + c0, m0))  # (W0,)
    if W1 > 0:
        c1 = W0 + tl.max_contiguous(tl.arange(0, W1), NEAR)
        m1 = inside(c1, C, W0 + W1)
        x1 = hold(fetch(x_at + c1, m1))  # (W1,)
        if y is not None:
            y1 = hold(fetch(y_at + c1, m1))  # (W1,)
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
        x0 = hold(fetch(x_at + c0, ahead0))  # (W0,)
        if W1 > 0:
            ahead1 = only_before(m1, row + 1, stop)
            x1 = hold(fetch(x_at + c1, ahead1))  # (W1,)
        if y is not None:
            y_at += y_l
            y0 = hold(fetch(y_at + c0, ahead0))  # (W0,)
            if W1 > 0:
                y1 = hold(fetch(y_at + c1, ahead1))  # (W1,)
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
            n0 = _affine(n0 * root, _at(weight, c0), _at(bias, c0), _at(scale_at, c0), _at(shift_at, c0), m0, m0)
            if W1 > 0:
                n1 = _affine(n1 * root, _at(weight, c1), _at(bias, c1), _at(scale_at, c1), _at(shift_at, c1), m1, m1)
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


@triton.jit
def _again(held, FTZ: tl.constexpr):
    """held, as if it were new. Without this the compiler keeps the unpacked values, in twice as many registers, until
    held is unpacked again.
    """
    if FTZ and held.dtype == tl.int32:
        held = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [held], tl.int32, False, 1)
    return held


@triton.jit
def _rows(p, first, row, length, b_stride, l_stride, C: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr):
    """Where rows first + row (N) of a (B, L, C) tensor begin, (N, 1); None where p is None. FLAT: B is 1. DENSE: rows
    lie one behind the other, at distances that are constants.
    """
    if p is None:
        at = None
    elif DENSE:
        at = p + first.to(tl.int64) * C + (row * C)[:, None]
    else:
        at = p + place(first + row, length, b_stride, l_stride, FLAT)[:, None]
    return at


@triton.jit
def _summed(
    r, v, gate, c, mask, first, row, length, gate_b, gate_l,
    DTYPE: tl.constexpr, C: tl.constexpr, FLAT: tl.constexpr, SHARED: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Some columns of x + gate * y of some rows. SHARED: one gate for all."""
    if SHARED:
        gate_at = _at(gate, c)
    else:
        gate_at = _at(_rows(gate, first, row, length, gate_b, gate_l, C, FLAT, False), c)
    return _add(r, v, gate_at, mask, DTYPE, FTZ)


@triton.jit
def _pieces(at, c, C: tl.constexpr, K: tl.constexpr):
    """Rows in K pieces of columns c (1, SPAN), held by `hold`."""
    SPAN: tl.constexpr = c.shape[1]
    pieces = ()
    for k in tl.static_range(K):
        piece = tl.load(at + k * SPAN, mask=inside(c + k * SPAN, C, (k + 1) * SPAN), other=0.0)  # (ROWS, SPAN)
        pieces = pieces + (hold(piece.reshape(piece.shape[0] * SPAN)),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _words(
    x, y, gate, words,
    x_b, x_l, y_b, y_l, gate_b, gate_l,
    first, length, rows, eps,
    C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
    SHARED_GATE: tl.constexpr, RMS: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """The words of ROWS rows. Behind the last row comes the last again.

    A row is K pieces of SPAN, which lie alike in the threads: they are added up there before one sum across them.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    c = tl.arange(0, SPAN)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), rows - 1 - first)
    at = _rows(x, first, row, length, x_b, x_l, C, FLAT, DENSE) + c
    rs = _pieces(at, c, C, K)
    if y is not None:
        at = _rows(y, first, row, length, y_b, y_l, C, FLAT, DENSE) + c
        ys = _pieces(at, c, C, K)
        sums = ()
        for k in tl.static_range(K):
            r = _summed(
                release(rs[k], DTYPE).reshape(ROWS, SPAN), release(ys[k], y.dtype.element_ty).reshape(ROWS, SPAN),
                gate, c + k * SPAN, inside(c + k * SPAN, C, (k + 1) * SPAN), first, row, length, gate_b, gate_l,
                DTYPE, C, FLAT, SHARED_GATE, FTZ,
            )  # fmt: skip
            sums = sums + (packed(r.reshape(ROWS * SPAN), DTYPE, FTZ),)  # type: ignore[assignment]
        rs = sums
    mean = tl.zeros((ROWS,), tl.float32)
    if not RMS:
        total = release(_again(rs[0], FTZ), DTYPE).reshape(ROWS, SPAN)  # type: ignore[misc]
        for k in tl.static_range(1, K):
            total += release(_again(rs[k], FTZ), DTYPE).reshape(ROWS, SPAN)
        # a product with 1 / C would leave constant rows a difference
        mean = tl.div_rn(tl.sum(total, 1), C * 1.0)
    total = tl.zeros((ROWS, SPAN), tl.float32)
    for k in tl.static_range(K):
        piece = release(_again(rs[k], FTZ), DTYPE).reshape(ROWS, SPAN)
        if not RMS:
            piece = tl.where(inside(c + k * SPAN, C, (k + 1) * SPAN), piece - mean[:, None], 0.0)
        total += piece * piece
    root = tl.rsqrt(tl.div_rn(tl.sum(total, 1), C * 1.0) + eps)
    high = root.to(tl.int32, bitcast=True) + 1  # never 0: a root is not negative, and a GPU's NaN is 0x7FFFFFFF
    word = high.to(tl.int64) << 32 | mean.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(words + first + row, word)


@triton.jit
def _norm_tile(
    x, y, gate, scale, shift, weight, bias, residual, words, data, data_scale,
    x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
    block, tile, length, rows,
    C: tl.constexpr, EDGE: tl.constexpr, WHOLE: tl.constexpr, FLAT: tl.constexpr, DENSE: tl.constexpr,
    SHARED_GATE: tl.constexpr, SHARED: tl.constexpr, RMS: tl.constexpr,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """One EDGE x EDGE tile of a row block. WHOLE: none of its rows is behind the last, for which the last is taken
    again: it leaves the largest as it is. SHARED: scale and shift are the same in all rows.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = block * EDGE
    member = tl.arange(0, EDGE)
    if WHOLE:
        row = member
        real = tl.full((EDGE, 1), 1, tl.int32) > 0
    else:
        row = tl.minimum(member, rows - 1 - first)
        real = (member < rows - first)[:, None]
    c = tl.max_contiguous(tile * EDGE + tl.arange(0, EDGE), NEAR)[None, :]
    m = inside(c, C, C if C % EDGE == 0 else C + 1)
    # (EDGE, EDGE)
    held = hold(fetch(_rows(x, first, row, length, x_b, x_l, C, FLAT, DENSE) + c, m).reshape(EDGE * EDGE))
    at = words + first + row
    word = glance(at, FTZ)
    to = first.to(tl.int64) * C + (member * C)[:, None] + c
    if y is not None:
        # (EDGE, EDGE)
        v = hold(fetch(_rows(y, first, row, length, y_b, y_l, C, FLAT, DENSE) + c, m).reshape(EDGE * EDGE))
        r = _summed(
            release(held, DTYPE).reshape(EDGE, EDGE), release(v, y.dtype.element_ty).reshape(EDGE, EDGE),
            gate, c, m, first, row, length, gate_b, gate_l, DTYPE, C, FLAT, SHARED_GATE, FTZ,
        )  # fmt: skip
        tl.store(residual + to, r.to(DTYPE), mask=real & m)
        held = packed(r.reshape(EDGE * EDGE), DTYPE, FTZ)
    word = wait(word, at, FTZ)
    n = release(_again(held, FTZ), DTYPE).reshape(EDGE, EDGE)
    if not RMS:
        n = n - word.to(tl.int32).to(tl.float32, bitcast=True)[:, None]
    n = n * ((word >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)[:, None]
    scale_at = _at(scale, c)
    shift_at = _at(shift, c)
    if not SHARED:
        scale_at = _at(_rows(scale, first, row, length, scale_b, scale_l, C, FLAT, False), c)
        shift_at = _at(_rows(shift, first, row, length, shift_b, shift_l, C, FLAT, False), c)
    n = _affine(n, _at(weight, c), _at(bias, c), scale_at, shift_at, m, m)
    if C % EDGE != 0:
        n = tl.where(m, n, 0.0)
    held = packed(n.reshape(EDGE * EDGE), DTYPE, FTZ)
    amax = tl.maximum(largest_held(held, DTYPE, FTZ), FLOOR)
    coded = encode_held(held, amax, data, DTYPE, LIMIT, FTZ).reshape(EDGE, EDGE)
    tl.store(data + to, coded, mask=real & m, eviction_policy="evict_first")  # what is read again stays
    tl.store(data_scale + block * tl.cdiv(C, EDGE) + tile, amax * (1 / LIMIT))  # exact: LIMIT is 128


@triton.jit(do_not_specialize=["length", "rows", "lag"])
def _norm_blocks(
    x, y, gate, scale, shift, weight, bias, residual, words, data, data_scale,
    x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
    length, rows, lag, eps,
    C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    FLAT: tl.constexpr, DENSE: tl.constexpr, SHARED_GATE: tl.constexpr, SHARED: tl.constexpr, RMS: tl.constexpr,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """A program over ROWS rows of a row block, or over a tile of the row block that came `lag` (1 at least) before.

    words: zeros, one a row: its mean's float32 bits, and above them 1 + its root's.
    """
    TILES: tl.constexpr = (C + EDGE - 1) // EDGE
    PARTS: tl.constexpr = EDGE // ROWS
    steps = tl.cdiv(rows, EDGE) - lag  # that have both kinds: before them rows alone, behind them tiles alone
    turn = tl.program_id(0)
    if turn < lag * PARTS:
        member = TILES + turn % PARTS
        block = turn // PARTS
    elif turn < lag * PARTS + steps * (TILES + PARTS):
        turn -= lag * PARTS
        member = turn % (TILES + PARTS)
        block = turn // (TILES + PARTS)
        if member >= TILES:
            block += lag
    else:
        turn -= lag * PARTS + steps * (TILES + PARTS)
        member = turn % TILES
        block = steps + turn // TILES
    if member >= TILES:
        first = block * EDGE + (member - TILES) * ROWS
        if first < rows:
            _words(
                x, y, gate, words, x_b, x_l, y_b, y_l, gate_b, gate_l, first, length, rows, eps,
                C, K, SPAN, ROWS, FLAT, DENSE, SHARED_GATE, RMS, FTZ,
            )  # fmt: skip
    elif (block + 1) * EDGE <= rows:
        _norm_tile(
            x, y, gate, scale, shift, weight, bias, residual, words, data, data_scale,
            x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l, block, member, length, rows,
            C, EDGE, True, FLAT, DENSE, SHARED_GATE, SHARED, RMS, LIMIT, FLOOR, FTZ,
        )  # fmt: skip
    else:
        _norm_tile(
            x, y, gate, scale, shift, weight, bias, residual, words, data, data_scale,
            x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l, block, member, length, rows,
            C, EDGE, False, FLAT, DENSE, SHARED_GATE, SHARED, RMS, LIMIT, FLOOR, FTZ,
        )  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """The norm of r, its own vectors (C,), and the modulation, which broadcasts to x."""

    kind: str  # "layer" | "rms"
    eps: float
    weight: _Optional = None
    bias: _Optional = None
    scale: _Optional = None
    shift: _Optional = None

    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError for arguments that the references refuse."""
        choose("the norm", self.kind, *NORMS)
        check_channels(x, weight=self.weight, bias=self.bias)
        check_broadcast(x, scale=self.scale, shift=self.shift)


@dataclass(frozen=True)
class Sum:
    """The sum x + gate * y before the norm: y, gate, and the tensor that receives the sum."""

    y: torch.Tensor
    gate: _Optional
    residual: torch.Tensor


@dataclass(frozen=True)
class BlockConfig:
    """A configuration of the kernel over row blocks."""

    warps: int
    elements: int  # of rows a thread computes at once
    registers: int | None = None  # a thread may use at most; float32 x needs more
    lag: float = 3  # programs that a multiprocessor runs between a row block's rows and its tiles, two at a time

    def pieces(self, width: int) -> dict[str, int]:
        """Rows of `width` as a program takes them: ROWS at once, each in K pieces of SPAN, 8 neighbours in a thread."""
        span = triton.next_power_of_2(triton.cdiv(width, max(1, self.elements // 8)))
        span = min(max(span, min(256, triton.next_power_of_2(width))), 256 * self.warps)
        return {"K": triton.cdiv(width, span), "SPAN": span, "ROWS": min(BLOCK, 256 * self.warps // span)}

    def blocks_between(self, rows: int, programs: int, device: torch.device) -> int:
        """How many row blocks the tiles come behind the rows, 1 at least. programs: of each row block."""
        return min(int(self.lag * card(device).processors) // programs + 1, triton.cdiv(rows, BLOCK))

    def limit(self, x: torch.Tensor) -> dict[str, int]:
        """The limit as a launch takes it."""
        return {} if self.registers is None or x.element_size() > 2 else {"maxnreg": self.registers}


# The declared set, by the widest row: without a sum, and with one, which at 5120 channels does not fit 64 registers.
# Two programs run on a multiprocessor at a time.
BLOCK_CONFIGS = {
    2048: (BlockConfig(16, 48, 64, lag=3), BlockConfig(8, 48, 128, lag=2)),
    8192: (BlockConfig(16, 48, 64, lag=4), BlockConfig(8, 48, 128, lag=2)),
    WIDEST: (BlockConfig(16, 48), BlockConfig(16, 48)),
}


Config: TypeAlias = RowConfig | BlockConfig


def block_config(width: int, summed: bool) -> BlockConfig:
    """The configuration for rows of `width`, which are a sum or not."""
    return next(configs[summed] for widest, configs in BLOCK_CONFIGS.items() if width <= widest)


def norm_into(
    x: torch.Tensor,
    norm: Norm,
    form: str,
    out: torch.Tensor | None,
    out_scale: torch.Tensor | None = None,
    sum: Sum | None = None,
    config: Config | None = None,
) -> None:
    """Fills out (and out_scale) with the norm in a form: "residual" (none: sum.residual alone), "normed", "int8",
    "fp8", "int8_block". Float32 `out` of form "fp8" gets the values before the cast, for machines that do not know it.
    """
    norm.check(x)
    check_input(x, x.shape[-1])
    width, rows = x.shape[-1], x.shape[:-1].numel()
    v = view3(x, x.shape)
    y, gate, residual = (sum.y, sum.gate, sum.residual) if sum else (None, None, None)
    wide = [None if t is None else view3(t, x.shape) for t in (y, gate, norm.scale, norm.shift)]
    narrow = [None if t is None else t.contiguous() for t in (norm.weight, norm.bias)]
    strides = [n for t in wide for n in row_strides(t)]
    limits = {"LIMIT": LIMIT.get(form, 0.0), "FLOOR": FLOOR.get(form, 0.0), "FTZ": x.is_cuda}
    if form == "int8_block":
        config = config or block_config(width, sum is not None)
        if isinstance(config, RowConfig):
            raise ValueError("a norm with int8_block takes a BlockConfig")
        taken = config.pieces(width)
        programs = triton.cdiv(width, BLOCK) + BLOCK // taken["ROWS"]  # a row block
        words = torch.zeros(rows, dtype=torch.int64, device=x.device)  # this call's own: others may run beside it
        _norm_blocks[(triton.cdiv(rows, BLOCK) * programs,)](
            v, *wide, *narrow, residual, words, out, out_scale, *row_strides(v), *strides,
            v.shape[1], rows, config.blocks_between(rows, programs, x.device), norm.eps,
            C=width, **taken, EDGE=BLOCK, FLAT=v.shape[0] == 1,
            DENSE=all(t is None or t.is_contiguous() for t in (v, wide[0])), SHARED_GATE=not any(strides[2:4]),
            SHARED=not any(strides[4:]), RMS=norm.kind == "rms", **limits,
            **FUSED, num_warps=config.warps, num_stages=1, **config.limit(x),
        )  # fmt: skip
        return
    w0, w1 = pieces(max(width, 2))
    wider = 2 if sum and x.element_size() > 2 else 1  # a sum keeps two tensors in flight
    if isinstance(config, BlockConfig):
        raise ValueError(f"a norm with {form} takes a RowConfig")
    launch = config or row_config(min(WIDEST, (w0 + w1) * wider), rows, x.device)
    limit = launch.limit(x) if norm.kind == "layer" else {}
    _norm_rows[(triton.cdiv(v.shape[1], launch.rows), v.shape[0])](
        v, *wide, *narrow, residual, out, out_scale, *row_strides(v), *strides, v.shape[1], launch.rows, norm.eps,
        C=width, W0=w0, W1=w1, NEAR=neighbours((w0, w1), launch.warps, launch.near), RMS=norm.kind == "rms",
        OUT=form, **limits, **FUSED, num_warps=launch.warps, num_stages=1, **limit,
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
    format: str, config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """adaln.py's op: (data, data_scale)."""
    data, data_scale = empty_quantized(x, format)
    norm_into(x, Norm("layer", eps, weight, bias, scale, shift), format, data, data_scale, config=config)
    return data, data_scale


def launch_norm_quantize(
    x: torch.Tensor, weight: _Optional, bias: _Optional, eps: float, norm: str, format: str,
    config: Config | None = None,
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
    bias: _Optional, eps: float, norm: str, format: str, config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual_norm.py's op: (residual, data, data_scale)."""
    sum, (data, data_scale) = _sum(x, y, gate), empty_quantized(x, format)
    norm_into(x, Norm(norm, eps, weight, bias, scale, shift), format, data, data_scale, sum, config)
    return sum.residual, data, data_scale
