"""Quantization of activations, and of a GELU's result, in Triton, and what all kernels over rows share.

    int8, fp8    a program takes some rows, one behind the other: y = act(x), amax |y|, data, scale, all in registers
    int8_block   a program takes one 128 x 128 tile of x seen as (M, K)

act: none, GELU by tanh, or by erf. Formats, scales and rounding are those of quantize.py, y is rounded to x's dtype
first. x: (..., K), bf16, fp16 or float32; a last axis that is not contiguous costs a copy. A NaN is undefined.

Bytes an element, 16-bit x: 2 read + 1 written = 3. At the 3.0 TB/s of a copy: 32,760 x 1536 in 0.050 ms, 75,600 x 5120
in 0.387 ms; behind a GELU 32,760 x 8960 in 0.294 ms, 75,600 x 13,824 in 1.045 ms.

A row is held as two or three pieces whose widths are powers of two, 5120 = 4096 + 1024: as one of 8192 three eighths of
the arithmetic would be on padding. While a row is computed the next one is on its way, two elements a register. A
Hopper card can issue some 28 instructions for the 3 bytes of an element, and 3.5 of those of which a multiprocessor
does 16 a clock; GELU by tanh has two of these (2^x, 1 / x).
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from turbocompile.kernels._common import FUSED, ROW_DTYPES, WIDEST, check, choose
from turbocompile.kernels.attention.prepare_triton import ROUND, _exp2, _product, processors
from turbocompile.kernels.quantize.quantize import BLOCK, FLOOR, LIMIT, empty_quantized

from turbocompile.errors import UnsupportedError

TANH_1 = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) log2 e
TANH_3 = tl.constexpr(-0.1029432395800235)  # the same times 0.044715
# erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), within 1.5e-7 for z >= 0 (Abramowitz and Stegun, 7.1.26)
ERFC_P = tl.constexpr(0.3275911 * 0.7071067811865476)  # of x = sqrt(2) z, as all here
ERFC_1, ERFC_2, ERFC_3 = tl.constexpr(0.254829592), tl.constexpr(-0.284496736), tl.constexpr(1.421413741)
ERFC_4, ERFC_5 = tl.constexpr(-1.453152027), tl.constexpr(1.061405429)
MINUS_HALF_LOG2E = tl.constexpr(-0.7213475204444817)
CUT = tl.constexpr(127.25 / 128)  # of amax, near which bfloat16s are 1/2 to 1 apart in units of amax / 128


@triton.jit
def place(row, length, b_stride, l_stride, FLAT: tl.constexpr):
    """Where rows of a (B, L, C) tensor start, in elements; FLAT: B is 1, and there is nothing to divide."""
    if FLAT:
        at = row.to(tl.int64) * l_stride
    else:
        at = (row // length).to(tl.int64) * b_stride + (row % length).to(tl.int64) * l_stride
    return at


@triton.jit
def inside(c, C: tl.constexpr, END: tl.constexpr):
    """c < C, as a constant where all columns before END are real: the mask then leaves the code."""
    if END <= C:
        mask = tl.full(c.shape, 1, tl.int32) > 0
    else:
        mask = c < C
    return mask


@triton.jit
def only_before(mask, row, stop):
    """mask, if row < stop. (A scalar condition on a mask would do, but the interpreter makes integers of it.)"""
    return mask & (tl.full(mask.shape, 0, tl.int32) + row < stop)


@triton.jit
def fetch(at, mask):
    """What is read once: the first to leave the first-level cache, where vectors that every row needs stay."""
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def hold(x):
    """x (W) as it waits for its turn: two 16-bit elements a register. Left to itself each takes one."""
    if x.dtype.primitive_bitwidth == 16:
        low, high = tl.split(x.to(tl.int16, bitcast=True).reshape(x.shape[0] // 2, 2))
        x = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return x


@triton.jit
def release(held, dtype: tl.constexpr):
    """What `hold` was given, of dtype, in float32."""
    if held.dtype.is_floating():
        x = held.to(tl.float32)
    elif dtype == tl.bfloat16:
        low = (held << 16).to(tl.float32, bitcast=True)
        high = (held & -65536).to(tl.float32, bitcast=True)
        x = tl.join(low, high).reshape(2 * held.shape[0])
    else:
        low = held.to(tl.int16).to(tl.float16, bitcast=True)
        high = (held >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        x = tl.join(low, high).reshape(2 * held.shape[0]).to(tl.float32)
    return x


@triton.jit
def encode(y, factor, data, FORMAT: tl.constexpr, FTZ: tl.constexpr):
    """y * factor, rounded, as an element of data. Its magnitude is at most the format's limit and an ulp, which rounds
    to the limit, so int8_block's +128 alone has to be cut.
    """
    v = _product(y, factor, FTZ)  # a multiply-add with what rounds to integers would move a quotient near a half
    if FORMAT == "fp8":
        coded = v.to(data.dtype.element_ty)
    else:
        if FORMAT == "int8_block":
            v = tl.minimum(v, 127.0)
        coded = (v + ROUND).to(tl.int32, bitcast=True).to(data.dtype.element_ty)
    return coded


@triton.jit
def rounded(x, dtype: tl.constexpr, FTZ: tl.constexpr):
    """x, float32, rounded to dtype and still float32. On a GPU two at a time to bfloat16: a cast whose result is not
    stored compiles to one conversion each, of which a multiprocessor does 16 a clock, as of exponentials.
    """
    if FTZ and dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f", [x], tl.int32, True, 2,
        )  # fmt: skip
        y = bits.to(tl.float32, bitcast=True)
    else:
        y = x.to(dtype).to(tl.float32)
    return y


@triton.jit
def packed(x, dtype: tl.constexpr, FTZ: tl.constexpr):
    """x, float32, rounded to dtype, as `hold` holds it. On a GPU two at a time to bfloat16, as in `rounded`."""
    if FTZ and dtype == tl.bfloat16:
        low, high = tl.split(x.reshape(x.shape[0] // 2, 2))
        held = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        held = hold(x.to(dtype))
    return held


@triton.jit
def _larger(a, b):
    """The larger of two times two bfloat16 that are not negative, two a register."""
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def largest_held(held, dtype: tl.constexpr, FTZ: tl.constexpr):
    """The largest magnitude of all that `hold` was given; of bfloat16 on a GPU two at a time."""
    if FTZ and dtype == tl.bfloat16:
        pair = tl.reduce(held & 0x7FFF7FFF, 0, _larger)
        most = tl.maximum((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    else:
        most = tl.max(tl.abs(release(held, dtype)), 0)
    return most


@triton.jit
def encode_held(held, amax, data, dtype: tl.constexpr, LIMIT: tl.constexpr, FTZ: tl.constexpr):
    """What `hold` was given, magnitudes up to amax, as elements of data of format int8_block.

    On a GPU it is two bfloat16 at a time that are cut, before they are scaled: what rounds to 128, amax and its
    predecessor at most, becomes the largest that rounds to 127, and nothing else that does not round to it changes.
    """
    factor = tl.div_rn(LIMIT, amax)
    if FTZ and dtype == tl.bfloat16:
        most = ((amax * CUT).to(tl.int32, bitcast=True) >> 16) * 0x10001
        held = tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [held, most], tl.int32, True, 1)
        coded = encode(release(held, dtype), factor, data, "int8", FTZ)
    else:
        coded = encode(release(held, dtype), factor, data, "int8_block", FTZ)
    return coded


@triton.jit
def sum_of(a, b):
    """The sum of a row in two pieces (b None: one), added up in the threads first: one sum across them, not two."""
    if b is not None:
        a = tl.sum(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0) + b
    return tl.sum(a, 0)


@triton.jit
def largest(a, b):
    """The largest magnitudes of a and b, where a is longer (b None: of a): one an element of b."""
    a = tl.abs(a)
    if b is not None:
        a = tl.maximum(tl.max(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0), tl.abs(b))
    return a


@triton.jit
def _reciprocal(x, FTZ: tl.constexpr):
    """1 / x within an ulp; FTZ, on a GPU, in one instruction."""
    if FTZ:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def _activate(x, ACT: tl.constexpr, DTYPE: tl.constexpr, FTZ: tl.constexpr):
    """act(x) of float32 x, rounded to DTYPE. x / (1 + exp(-2 u)) is x (1 + tanh u) / 2 without its cancellation."""
    if ACT == "tanh":
        x = x * _reciprocal(1.0 + _exp2(x * (TANH_1 + TANH_3 * (x * x)), FTZ), FTZ)
    elif ACT == "erf":  # x erfc(|x| / sqrt 2) / 2 is gelu(x) of a negative x, and x less it of a positive one
        t = _reciprocal(tl.abs(x) * ERFC_P + 1.0, FTZ)
        sum = ((((t * ERFC_5 + ERFC_4) * t + ERFC_3) * t + ERFC_2) * t + ERFC_1) * t
        part = 0.5 * x * sum * _exp2(x * x * MINUS_HALF_LOG2E, FTZ)
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
    """`per` rows of C channels of one batch item, in pieces of W0, W1 and W2 (0: none), NEAR neighbours in a thread."""
    first = tl.program_id(0) * per
    stop = tl.minimum(first + per, length)
    b = tl.program_id(1).to(tl.int64)
    at = x + b * x_b + first.to(tl.int64) * x_l
    to = data + (b * length + first) * C
    unit = data_scale + b * length
    DTYPE: tl.constexpr = x.dtype.element_ty
    c0 = tl.max_contiguous(tl.arange(0, W0), NEAR)
    m0 = inside(c0, C, W0)
    x0 = hold(fetch(at + c0, m0))
    if W1 > 0:
        c1 = W0 + tl.max_contiguous(tl.arange(0, W1), NEAR)
        m1 = inside(c1, C, W0 + W1)
        x1 = hold(fetch(at + c1, m1))
    if W2 > 0:
        c2 = W0 + W1 + tl.max_contiguous(tl.arange(0, W2), NEAR)
        m2 = inside(c2, C, W0 + W1 + W2)
        x2 = hold(fetch(at + c2, m2))
    for row in range(first, stop):
        at += x_l
        next0 = hold(fetch(at + c0, only_before(m0, row + 1, stop)))
        y0 = _activate(release(x0, DTYPE), ACT, DTYPE, FTZ)
        y1 = None
        y2 = None
        if W1 > 0:
            next1 = hold(fetch(at + c1, only_before(m1, row + 1, stop)))
            y1 = _activate(release(x1, DTYPE), ACT, DTYPE, FTZ)
        if W2 > 0:
            next2 = hold(fetch(at + c2, only_before(m2, row + 1, stop)))
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
    """One EDGE x EDGE tile, held two elements a register between its activation and its largest magnitude."""
    tile = tl.program_id(1)
    row = tile * EDGE + tl.arange(0, EDGE)
    c = tl.program_id(0) * EDGE + tl.arange(0, EDGE)[None, :]
    real = inside(c, C, C if C % EDGE == 0 else C + 1)
    # Behind the last row comes the last again: it leaves the largest as it is, and no row has to be masked.
    at = place(tl.minimum(row, rows - 1), length, x_b, x_l, FLAT)[:, None] + c
    DTYPE: tl.constexpr = x.dtype.element_ty
    held = hold(fetch(x + at, real).reshape(EDGE * EDGE))
    if ACT != "identity":
        held = packed(_activate(release(held, DTYPE), ACT, DTYPE, FTZ), DTYPE, FTZ)
    amax = tl.maximum(largest_held(held, DTYPE, FTZ), FLOOR)
    to = data + (row.to(tl.int64) * C)[:, None] + c
    coded = encode_held(held, amax, data, DTYPE, LIMIT, FTZ).reshape(EDGE, EDGE)
    tl.store(to, coded, mask=(row < rows)[:, None] & real)
    tl.store(data_scale + tile * tl.num_programs(0) + tl.program_id(0), tl.div_rn(amax, LIMIT))


@dataclass(frozen=True)
class RowConfig:
    """How a kernel over rows is launched."""

    warps: int
    rows: int  # a program takes
    registers: int | None = None  # a thread may use at most, for a layer norm of 16-bit x: the others need less
    near: int = 8  # neighbours in a thread at most, where it reads float32 vectors: 16, 64 bytes, are served 2 a clock

    def limit(self, x: torch.Tensor) -> dict[str, int]:
        """The limit as a launch takes it; float32 x needs more. What needs less would fill them, too."""
        return {} if self.registers is None or x.element_size() > 2 else {"maxnreg": self.registers}


# The declared set, by the widest row: 32 to 48 elements a thread, so that little is spent on sums across threads (none
# across warps at 1536), while 16 warps a multiprocessor fit, which 128 registers a thread allow.
ROW_CONFIGS = {
    1536: RowConfig(1, 8, 128),
    3072: RowConfig(2, 8, 128),
    6144: RowConfig(4, 8, 128),
    14336: RowConfig(8, 8, 128),
    WIDEST: RowConfig(16, 8),
}
STORED = 16  # bytes that a thread stores at once
TILE_CONFIG = RowConfig(16, BLOCK, 64)  # of a tile: 32 elements a thread


@functools.cache
def _processors(device: torch.device) -> int:
    return processors(device)


def row_config(width: int, rows: int, device: torch.device) -> RowConfig:
    """The configuration for rows held in `width` places: fewer a program where they would not fill the card."""
    config = next(config for widest, config in ROW_CONFIGS.items() if width <= widest)
    return replace(config, rows=max(1, min(config.rows, rows // (16 * _processors(device)))))


def pieces(width: int, least: int = 256, count: int = 2) -> tuple[int, ...]:
    """`count` powers of two, the last perhaps 0, that hold `width`: the fewest in sum, but what is below `least`, or an
    eighth of the width, is not split.
    """
    whole = triton.next_power_of_2(width)
    least = max(least, whole // 8)
    if whole > least and count > 1:
        rest = pieces(width - whole // 2, least, count - 1)
        if sum(rest) < whole // 2:
            return (whole // 2, *rest)
    return (whole, *[0] * (count - 1))


def neighbours(widths: tuple[int, ...], warps: int, most: int) -> int:
    """How many neighbours a thread holds in pieces of these widths, so that all pieces lie alike in the threads."""
    return max(1, min(most, min(w for w in widths if w) // (32 * warps)))


def view3(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """t, broadcast to shape (..., L, C), as (B, L, C) with a contiguous last axis: a view nearly always."""
    t = t.reshape(1) if t.ndim == 0 else t
    t = t.expand(*t.shape[:-1], shape[-1])
    if t.stride(-1) != 1:
        t = t.contiguous()
    t = t.expand(shape)
    while t.ndim < 3:
        t = t[None]
    return t.flatten(0, -3)


def view3_of_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (1, M, C) where a view is enough, otherwise as (B, L, C)."""
    v = view3(x, x.shape)
    return v.view(1, -1, v.shape[-1]) if v.shape[0] * v.shape[1] and v.stride(0) == v.shape[1] * v.stride(1) else v


def row_strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Strides of the first two axes of a (B, L, C) view; 0 for an axis of one, so that it compiles nothing anew."""
    if t is None:
        return 0, 0
    return (0 if t.shape[0] == 1 else t.stride(0)), (0 if t.shape[1] == 1 else t.stride(1))


def check_input(x: torch.Tensor, width: int) -> None:
    """UnsupportedError for what the kernels over rows do not take: another dtype, or a row too wide for registers."""
    if x.dtype not in ROW_DTYPES:
        raise UnsupportedError(f"the kernel takes bfloat16, float16 and float32, not {x.dtype}: use the reference")
    if width > WIDEST:
        raise UnsupportedError(f"a row of {width} channels is wider than the kernel's {WIDEST}: use the reference")


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
