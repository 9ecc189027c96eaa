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

int8_block has one scale for 128 rows, more than a multiprocessor holds, so its kernel reads r twice, the second time
from the second-level cache. One grid has programs of both kinds, in the order of the row blocks of 128: some take rows,
write r and each row's mean and root, 8 bytes a row, and count themselves; one a tile comes some row blocks later,
quantizes its tile if all rows of its row block are counted, and else leaves it to the program that will count the last
of them. Nobody waits, and any order gives the same bits. The lag is meant to leave nearly no tile behind, with 15 to
25 MB of r and data in the cache, which has 50. On an H100: 62% of a copy's rate at 1536 channels, 81% behind a
residual, 56% and 70% at 5120: two programs a multiprocessor do not hide what they wait for.

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
from turbocompile.kernels._common import WIDEST, check, check_broadcast, check_channels, choose
from turbocompile.kernels.norm_quantize import NORMS
from turbocompile.kernels.prepare_triton import _product, processors
from turbocompile.kernels.quantize import BLOCK, FLOOR, LIMIT, empty_quantized
from turbocompile.kernels.quantize_triton import (
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
def _ahead(at, c, real, C: tl.constexpr, K: tl.constexpr, AGAIN: tl.constexpr):
    """Rows in K pieces as they wait for their turn. AGAIN: they are read once more, from the second-level cache."""
    pieces = ()
    SPAN: tl.constexpr = c.shape[1]
    for k in tl.static_range(K):
        mask = real & inside(c + k * SPAN, C, (k + 1) * SPAN)
        if AGAIN:
            piece = tl.load(at + (c + k * SPAN), mask=mask, other=0.0)
        else:
            piece = fetch(at + (c + k * SPAN), mask)
        pieces = pieces + (hold(piece.reshape(piece.shape[0] * SPAN)),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _moments(
    x, y, gate, residual, moments,
    x_b, x_l, y_b, y_l, gate_b, gate_l,
    start, stop, length, eps,
    C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    SHARED: tl.constexpr, RMS: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """r, the means and the roots of rows start to stop, ROWS at once while the next are on their way.

    A row is K pieces of SPAN, which lie alike in the threads: they are added up there before one sum across them.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    c = tl.arange(0, SPAN)[None, :]
    row = start + tl.arange(0, ROWS)
    real = (row < stop)[:, None]
    x_next = _ahead(x + place(row, length, x_b, x_l, FLAT)[:, None], c, real, C, K, residual is None)
    if y is not None:
        y_next = _ahead(y + place(row, length, y_b, y_l, FLAT)[:, None], c, real, C, K, False)
    for _ in range(start, stop, ROWS):
        r = ()
        for k in tl.static_range(K):
            piece = release(x_next[k], DTYPE).reshape(ROWS, SPAN)
            if y is not None:
                m = inside(c + k * SPAN, C, (k + 1) * SPAN)
                gate_at = _at(gate, c + k * SPAN)
                if not SHARED:
                    m = m & real
                    gate_at = _at(gate_at, place(row, length, gate_b, gate_l, FLAT)[:, None])
                piece = _add(piece, release(y_next[k], y.dtype.element_ty).reshape(ROWS, SPAN), gate_at, m, DTYPE, FTZ)
            r = r + (piece,)  # type: ignore[assignment]
        now = row
        here = real
        row += ROWS
        real = (row < stop)[:, None]
        x_next = _ahead(x + place(row, length, x_b, x_l, FLAT)[:, None], c, real, C, K, residual is None)
        if y is not None:
            y_next = _ahead(y + place(row, length, y_b, y_l, FLAT)[:, None], c, real, C, K, False)
        mean = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, SPAN), tl.float32)
        for k in tl.static_range(K):
            total += r[k]
            if residual is not None:
                to = residual + (now.to(tl.int64) * C)[:, None] + (c + k * SPAN)
                tl.store(to, r[k].to(DTYPE), mask=here & inside(c + k * SPAN, C, (k + 1) * SPAN))
        if not RMS:
            # a product with 1 / C would leave constant rows a difference
            mean = tl.div_rn(tl.sum(total, 1), C * 1.0)
            tl.store(moments + 2 * now, mean, mask=now < stop)
        total = tl.zeros((ROWS, SPAN), tl.float32)
        for k in tl.static_range(K):
            piece = r[k]
            if not RMS:
                piece = tl.where(inside(c + k * SPAN, C, (k + 1) * SPAN), piece - mean[:, None], 0.0)
            total += piece * piece
        root = tl.rsqrt(tl.div_rn(tl.sum(total, 1), C * 1.0) + eps)
        tl.store(moments + 2 * now + 1, root, mask=now < stop)


@triton.jit
def _norm_tile(
    r, moments, scale, shift, weight, bias, data, data_scale,
    r_b, r_l, scale_b, scale_l, shift_b, shift_l,
    block, tile, length, rows,
    C: tl.constexpr, EDGE: tl.constexpr, FLAT: tl.constexpr, SHARED: tl.constexpr, RMS: tl.constexpr,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """One EDGE x EDGE tile of a row block, of which the rows' means and roots are known. SHARED: scale and shift are
    the same in all rows. Other multiprocessors wrote what it reads, so it reads past the first-level cache.
    """
    c = tile * EDGE + tl.arange(0, EDGE)[None, :]
    m = inside(c, C, C if C % EDGE == 0 else C + 1)
    row = block * EDGE + tl.arange(0, EDGE)
    there = tl.minimum(row, rows - 1)  # the last row again leaves the largest as it is: no element has to be masked
    v = tl.load(r + place(there, length, r_b, r_l, FLAT)[:, None] + c, mask=m, other=0.0, cache_modifier=".cg")
    n = v.to(tl.float32)
    if not RMS:
        n = n - tl.load(moments + 2 * there, cache_modifier=".cg")[:, None]
    n = n * tl.load(moments + 2 * there + 1, cache_modifier=".cg")[:, None]
    scale_at = _at(scale, c)
    shift_at = _at(shift, c)
    if not SHARED:
        scale_at = _at(scale_at, place(there, length, scale_b, scale_l, FLAT)[:, None])
        shift_at = _at(shift_at, place(there, length, shift_b, shift_l, FLAT)[:, None])
    n = _affine(n, _at(weight, c), _at(bias, c), scale_at, shift_at, m, m)
    n = tl.where(m, rounded(n, r.dtype.element_ty, FTZ), 0.0)
    amax = tl.maximum(tl.max(tl.max(tl.abs(n), 1), 0), FLOOR)
    to = data + (row.to(tl.int64) * C)[:, None] + c
    coded = encode(n, tl.div_rn(LIMIT, amax), data, "int8_block", FTZ)
    tl.store(to, coded, mask=(row < rows)[:, None] & m)
    tl.store(data_scale + block * tl.cdiv(C, EDGE) + tile, tl.div_rn(amax, LIMIT))


@triton.jit(do_not_specialize=["length", "rows", "per", "lag"])
def _norm_blocks(
    x, y, gate, scale, shift, weight, bias, residual, moments, count, data, data_scale,
    x_b, x_l, y_b, y_l, gate_b, gate_l, scale_b, scale_l, shift_b, shift_l,
    length, rows, per, lag, eps,
    C: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr,
    FLAT: tl.constexpr, SHARED_GATE: tl.constexpr, SHARED: tl.constexpr, RMS: tl.constexpr,
    LIMIT: tl.constexpr, FLOOR: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """A program over `per` rows of a row block, or over a tile of the row block that came `lag` before.

    count: zeros, one a row block: 2^16 times its rows' programs that are done, and the tiles' programs that have come.
    """
    TILES: tl.constexpr = (C + EDGE - 1) // EDGE
    parts = tl.cdiv(EDGE, per)
    steps = tl.cdiv(rows, EDGE) - lag  # that have both kinds: before them rows alone, behind them tiles alone
    turn = tl.program_id(0)
    if turn < lag * parts:
        member = TILES + turn % parts
        block = turn // parts
    elif turn < lag * parts + steps * (TILES + parts):
        turn -= lag * parts
        member = turn % (TILES + parts)
        block = turn // (TILES + parts)
        if member >= TILES:
            block += lag
    else:
        turn -= lag * parts + steps * (TILES + parts)
        member = turn % TILES
        block = steps + turn // TILES
    end = tl.minimum((block + 1) * EDGE, rows)
    complete = tl.cdiv(end - block * EDGE, per)
    if member < TILES:
        seen = tl.atomic_add(count + block, 1, sem="acquire", scope="gpu")
        first = seen & 0xFFFF
        stop = first
        if seen >> 16 == complete:
            stop += 1
    else:
        first = 0
        stop = 0
        start = block * EDGE + (member - TILES) * per
        if start < end:
            _moments(
                x, y, gate, residual, moments, x_b, x_l, y_b, y_l, gate_b, gate_l,
                start, tl.minimum(start + per, end), length, eps, C, K, SPAN, ROWS, FLAT, SHARED_GATE, RMS, FTZ,
            )  # fmt: skip
            tl.debug_barrier()  # all threads have stored before one releases
            seen = tl.atomic_add(count + block, 1 << 16, sem="acq_rel", scope="gpu")
            if (seen >> 16) + 1 == complete:
                stop = seen & 0xFFFF
    for tile in range(first, stop):
        if residual is not None:
            _norm_tile(
                residual, moments, scale, shift, weight, bias, data, data_scale,
                length.to(tl.int64) * C, C, scale_b, scale_l, shift_b, shift_l,
                block, tile, length, rows, C, EDGE, FLAT, SHARED, RMS, LIMIT, FLOOR, FTZ,
            )  # fmt: skip
        else:
            _norm_tile(
                x, moments, scale, shift, weight, bias, data, data_scale,
                x_b, x_l, scale_b, scale_l, shift_b, shift_l,
                block, tile, length, rows, C, EDGE, FLAT, SHARED, RMS, LIMIT, FLOOR, FTZ,
            )  # fmt: skip


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


@dataclass(frozen=True)
class BlockConfig:
    """How the kernel over row blocks is launched."""

    warps: int
    rows: int  # of a row block's 128 that a program takes
    elements: int  # of rows a thread computes at once
    registers: int | None = None  # a thread may use at most; float32 x needs more
    lag: int = 4  # programs a multiprocessor takes between a row block's rows and its tiles: two run at a time

    def pieces(self, width: int) -> dict[str, int]:
        """Rows of `width` as a program takes them: ROWS at once, each in K pieces of SPAN, 8 neighbours in a thread."""
        span = triton.next_power_of_2(triton.cdiv(width, max(1, self.elements // 8)))
        span = min(max(span, min(256, triton.next_power_of_2(width))), 256 * self.warps)
        return {"K": triton.cdiv(width, span), "SPAN": span, "ROWS": max(1, min(self.rows, 256 * self.warps // span))}

    def blocks_between(self, rows: int, width: int, device: torch.device) -> int:
        """How many row blocks of `rows` x `width` the tiles are behind the rows."""
        programs = triton.cdiv(BLOCK, self.rows) + triton.cdiv(width, BLOCK)  # a row block
        return min(triton.cdiv(self.lag * processors(device), programs), triton.cdiv(rows, BLOCK))

    def limit(self, x: torch.Tensor) -> dict[str, int]:
        """The limit as a launch takes it."""
        return {} if self.registers is None or x.element_size() > 2 else {"maxnreg": self.registers}


# The declared set, by the widest row: without a sum, and with one. 128 registers a thread are two programs of 8 warps a
# multiprocessor. Rows and lag are the fastest of 18 on an H100.
BLOCK_CONFIGS = {
    2048: (BlockConfig(8, 32, 48, 128), BlockConfig(8, 16, 48, 128, lag=6)),
    8192: (BlockConfig(8, 8, 48, 128, lag=6), BlockConfig(8, 8, 48, 128, lag=6)),
    WIDEST: (BlockConfig(16, 16, 48), BlockConfig(16, 16, 48)),
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
        blocks, programs = triton.cdiv(rows, BLOCK), triton.cdiv(width, BLOCK) + triton.cdiv(BLOCK, config.rows)
        moments = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
        count = torch.zeros(blocks, dtype=torch.int32, device=x.device)  # this call's own: others may run beside it
        _norm_blocks[(blocks * programs,)](
            v, *wide, *narrow, residual, moments, count, out, out_scale, *row_strides(v), *strides,
            v.shape[1], rows, config.rows, config.blocks_between(rows, width, x.device), norm.eps,
            C=width, **config.pieces(width), EDGE=BLOCK, FLAT=v.shape[0] == 1, SHARED_GATE=not any(strides[2:4]),
            SHARED=not any(strides[4:]), RMS=norm.kind == "rms", **limits,
            num_warps=config.warps, num_stages=1, **config.limit(x),
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
        OUT=form, **limits, num_warps=launch.warps, num_stages=1, **limit,
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
