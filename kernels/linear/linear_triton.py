"""Triton kernel of w8a8_linear for its three formats, its configurations, and the library's products beside it.

A persistent program computes tiles of block_m x block_n of y = data weight^T, walking K in steps of block_k:

    int8, fp8    acc += a b^T                                    int32, or float32 in the tensor cores or, `promote`,
                                                                 outside them once a step
                 y = round(acc scale weight_scale^T + bias)
    int8_block   acc = fma(float(a b^T), scale[mb, kb] weight_scale[nb, kb], acc);  y = round(round(acc) + bias)
    then         y = round(gelu(y)),  y = round(residual + gate y), where asked for; int8 and fp8 round at the end only

data (M, K), weight (N, K), y (M, N), all row-major; scales as in w8a8_linear.py.

Tensor cores of Hopper add products of e4m3 to a sum with few bits and cut the rest off: 8,192 products of one sign came
out 10% short on an H100. Of random signs, as activations times weights are, the cuts hardly add up: at K = 13,824 the
relative error of N(0, 1) data is 0.0265 with them and without, so they are below 0.0017 beside e4m3's own roundings,
less than bf16's of the result. So the default leaves them, as the libraries do; `promote` adds each block_k of K in
float32, at the cost below. Measured on an H100 at its sustained clock, over bf16 F.linear at six shapes of Wan
(benchmarks/RESULTS.md): promoted 1.16-1.40, cut 1.70-2.13, cuBLAS with cut sums 1.60-1.88; int8 1.58-1.88; int8_block
1.06-1.40.

What int8_block costs on Hopper, in clocks of a multiprocessor for 128 x 128 x 128: 512 of wgmma (4,096 int8
multiply-adds a clock), which reads 48 KiB of shared memory while 32 KiB arrive: 640 at 128 bytes a clock. Of ordinary
instructions a thread has 64 conversions (I2FP, half rate), 64 FFMA and, as compiled, 82 others: 210, 420 clocks of the
issue slots for the 8 warps. Two warpgroups in step do one after the other: 512 + 420, and 100 for the last wgmma's
latency: 1,030, so at most 0.9 POP/s at 1.7 GHz. Two such programs a multiprocessor hide each other's conversions: 640
a step, the limit of FP8 too, where the kernel reached 60-72% of the card's rate. They have 128 registers a thread, 128
of which the two sums would fill: some 16 spills a step are the price. Three programs of 64 x 128 spill nothing, but
read 24 KiB for 2.1 MOP: 0.6 POP/s are 7 TB/s, about what L2 gives. Tiles twice as wide hold 256 registers of sums. So
the default is two programs of 128 x 128: 0.78-0.90 POP/s where one (no spills) reached 0.63-0.73. FP8 with `promote` is
the same loop with 64 FADD for the 128 instructions.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from turbocompile.kernels._registry import FUSED, Card, card, check
from turbocompile.kernels.linear import w8a8_linear
from turbocompile.kernels.linear.w8a8_linear import ALIGNED
from turbocompile.kernels.quantize.quantize import BLOCK

from turbocompile.errors import UnsupportedError

GELU_LINEAR = tl.constexpr(2.302208198)  # 2 log2(e) sqrt(2 / pi): gelu(x) = x / (1 + 2^-(GELU_LINEAR x + ... x^3))
GELU_CUBIC = tl.constexpr(0.1029432397)  # GELU_LINEAR 0.044715
MAGIC = tl.constexpr(0x4B400000)  # bits of 1.5 * 2^23: plus |I| < 2^22, those of 1.5 * 2^23 + I
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def _place(tile, down, right, GROUP: tl.constexpr):
    """Row and column of the tile: GROUP rows of tiles are walked column by column, so that L2 holds what they share."""
    first = tile // (GROUP * right) * GROUP
    rows = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * right)
    return first + within % rows, within // rows


@triton.jit
def _finish(
    acc, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
    BM: tl.constexpr, BN: tl.constexpr, TILED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Scales, bias, options and the store of BM x BN elements at (row0, col0)."""
    row = row0 + tl.arange(0, BM)
    col = col0 + tl.arange(0, BN)
    at = row.to(tl.int64)[:, None] * n + col[None, :]
    inside = (row < rows)[:, None] & (col < n)[None, :]
    y = acc.to(tl.float32)
    if TILED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    else:
        y *= tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        y *= tl.load(weight_scale + col, mask=col < n, other=0.0)[None, :]
    if BIAS:
        b = tl.load(bias + col, mask=col < n, other=0.0)
        if TILED:
            b = b.to(out.dtype.element_ty)
        y += b.to(tl.float32)[None, :]
    if GELU:
        if TILED:
            y = y.to(out.dtype.element_ty).to(tl.float32)
        y = y / (1.0 + tl.exp2(-y * (GELU_LINEAR + GELU_CUBIC * y * y)))
    if RESIDUAL:
        if TILED:
            y = y.to(out.dtype.element_ty).to(tl.float32)
        if GATE:
            y *= tl.load(gate + (row // span).to(tl.int64)[:, None] * n + col[None, :], mask=inside, other=0.0)
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if DESCRIPTOR:
        out_tiles.store([row0, col0], y.to(out.dtype.element_ty))
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns, in the registers where they are."""
    return acc.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()


@triton.jit
def _two_parts(
    acc, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
    BM: tl.constexpr, BN: tl.constexpr, TILED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """_finish of both halves."""
    low, high = _halves(acc, BM, BN)
    _finish(
        low, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
        BM, BN // 2, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
    )  # fmt: skip
    _finish(
        high, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0 + BN // 2, rows, n, span,
        BM, BN // 2, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "span"])
def _linear(
    data, weight, out, out_tiles, scale, weight_scale, bias, residual, gate, data_m, weight_n, rows, n, k, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TILED: tl.constexpr,
    INTEGER: tl.constexpr, PROMOTE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE: tl.constexpr, ADDED: tl.constexpr, DESCRIPTOR: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """ADDED: int32 becomes float32 by an addition (compute capability 8.0 converts 16 a clock, and adds 64).

    Tiles program_id, program_id + programs, ... DESCRIPTOR: data, weight and out_tiles are tensor descriptors.
    """
    down = tl.cdiv(rows, BM)
    right = tl.cdiv(n, BN)
    steps = tl.cdiv(k, BK)
    for tile in tl.range(tl.program_id(0), down * right, tl.num_programs(0), flatten=FLATTEN):
        m, c = _place(tile, down, right, GROUP)
        row0 = m * BM
        col0 = c * BN
        acc = tl.zeros([BM, BN], tl.int32 if INTEGER and not TILED else tl.float32)
        if not DESCRIPTOR:
            # rows beyond the end read the last one again, and are not stored
            row = tl.minimum(row0 + tl.arange(0, BM), rows - 1).to(tl.int64)
            col = tl.minimum(col0 + tl.arange(0, BN), n - 1).to(tl.int64)
            inner = tl.arange(0, BK)
            a_at = data + row[:, None] * data_m + inner[None, :]
            b_at = weight + col[:, None] * weight_n + inner[None, :]
        for step in range(steps):
            if DESCRIPTOR:
                a = data.load([row0, step * BK])
                b = weight.load([col0, step * BK])
            else:
                a = tl.load(a_at + step * BK, mask=(inner < k - step * BK)[None, :], other=0.0)
                b = tl.load(b_at + step * BK, mask=(inner < k - step * BK)[None, :], other=0.0)
            if TILED:  # BK is a tile's edge, BM and BN divide it: two scalars a step, under way while wgmma runs
                s = tl.load(scale + (row0 // BK) * steps + step)
                t = tl.load(weight_scale + (col0 // BK) * steps + step)
                part = tl.dot(a, b.T)  # at most 2^21
                if ADDED:
                    part = (part + MAGIC).to(tl.float32, bitcast=True) - ROUND
                acc += part.to(tl.float32) * (s * t)
            elif INTEGER:
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
            elif PROMOTE:
                acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=BK)  # where the hardware's sums are short
            else:
                acc = tl.dot(a, b.T, acc)
        if PARTS == 4:
            low, high = _halves(acc, BM, BN)
            _two_parts(
                low, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
                BM, BN // 2, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
            )  # fmt: skip
            _two_parts(
                high, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0 + BN // 2, rows, n, span,
                BM, BN // 2, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
            )  # fmt: skip
        elif PARTS == 2:
            _two_parts(
                acc, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
                BM, BN, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
            )  # fmt: skip
        else:
            _finish(
                acc, out, out_tiles, scale, weight_scale, bias, residual, gate, row0, col0, rows, n, span,
                BM, BN, TILED, BIAS, GELU, RESIDUAL, GATE, DESCRIPTOR,
            )  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """How the kernel is launched."""

    path: str  # "descriptor" (Hopper and later) | "pointer" | "library": torch's product, of which only promote speaks
    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    warps: int = 8
    stages: int = 3
    programs: int = 1  # a multiprocessor, as registers and shared memory allow
    registers: int | None = None  # a thread may use at most; two programs of 8 warps share 65,536
    promote: bool = True  # fp8: add each block_k of K outside the tensor cores
    parts: int = 1  # 1, 2 or 4 in which a tile of 16 bits is stored: the shared memory for the way out holds one
    group: int = 8  # rows of tiles walked together: 8 of data's and the 16 of weight's in flight fit L2 at Wan's K
    flatten: bool = False  # one loop over tiles and K: the next tile's loads start before this one is stored

    def __post_init__(self) -> None:
        check(self.path in ("descriptor", "pointer", "library"), f"there is no path {self.path!r} of the linear kernel")

    def fits(self, format: str) -> bool:
        """Whether the kernel computes `format` so."""
        sizes = self.block_m <= BLOCK and self.block_n <= BLOCK and self.block_k == BLOCK
        others = self.promote and self.path != "library"
        return sizes and others if format == "int8_block" else format == "fp8" or others


# The declared sets: a saved choice is one of these. 128 bytes of K are one swizzled row of shared memory.
PAIR = LinearConfig("descriptor", 128, 128, programs=2, registers=128, parts=2)  # the docstring's count
SINGLE = LinearConfig("descriptor", 128, 128, stages=4)  # no spills, and nothing hides the conversions
TRIPLE = LinearConfig("descriptor", 64, 128, warps=4, stages=2, programs=3, registers=168)  # 64 KiB a program
SMALL = LinearConfig("descriptor", 64, 128, warps=4, stages=4, programs=2)  # few rows: tiles for all multiprocessors
# 3 stages and half a tile: 176 KiB, one program, whose way out nothing hides unless the loops are one. Square tiles
# have a third more to read. Left out: a tile stored in one part (2% slower where it is not equal, and with a residual
# beyond shared memory), 16 rows of tiles walked together (slower at five of Wan's six shapes), warp specialization
# (Triton 3.6 and 3.9 ignore it with 8 warps, fail with 4).
WIDE = LinearConfig("descriptor", 128, 256, parts=2)
WIDE_FLAT = LinearConfig("descriptor", 128, 256, parts=2, flatten=True)
FAST = LinearConfig("descriptor", 128, 256, promote=False, parts=2)  # in FP8 with sums cut short, 0.94-1.13x cuBLAS
FAST_FLAT = LinearConfig("descriptor", 128, 256, promote=False, parts=2, flatten=True)
# Elsewhere 100 KiB a multiprocessor: 64 bytes of K, so that four stages fit beside the tile on its way out.
AMPERE = LinearConfig("pointer", 128, 128, 64, stages=4)
AMPERE_SMALL = LinearConfig("pointer", 64, 128, 64, warps=4, stages=4, programs=2)
AMPERE_TILES = LinearConfig("pointer", 128, 128, stages=3)  # int8_block needs 128 of K a step: 64 KiB in flight
AMPERE_TILES_SMALL = LinearConfig("pointer", 64, 128, warps=4, stages=3, programs=2)
LIBRARY = {"fp8": (LinearConfig("library"), LinearConfig("library", promote=False))}  # row-wise _scaled_mm
CONFIGS = {
    "fp8": (PAIR, SINGLE, SMALL, FAST, FAST_FLAT, AMPERE, AMPERE_SMALL),
    "int8": (WIDE, WIDE_FLAT, PAIR, SINGLE, SMALL, AMPERE, AMPERE_SMALL),
    "int8_block": (PAIR, SINGLE, TRIPLE, SMALL, AMPERE_TILES, AMPERE_TILES_SMALL),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = 2048  # of K: below it a tile's way out is worth to be overlapped in int8
MIDDLE = 8192  # of K: below it a tile's way out is worth to be overlapped, beyond it the plain loop is faster
LARGE_SHARED = 200 << 10  # bytes a multiprocessor
DEEP = 1 << 17  # of K: sums of int8 products, at most 2^14 each, fit int32 below it


def _large(on: Card) -> bool:
    """Whether the configurations with tensor descriptors run: 12.0 has descriptors, and 100 KiB."""
    return on.capability >= (9, 0) and on.shared >= LARGE_SHARED


def configs(format: str, device: torch.device) -> tuple[LinearConfig, ...]:
    """The declared configurations for the format that the device runs; none for FP8 before 8.9."""
    on = card(device)
    if format == "fp8" and on.capability < (8, 9):
        return ()
    return tuple(c for c in CONFIGS[format] if c.path == "pointer" or _large(on))


def takes(format: str, dtype: torch.dtype, k: int, device: torch.device) -> bool:
    """Whether the kernel computes linears of K into dtype there."""
    return dtype in DTYPES and 0 < k < DEEP and k % ALIGNED == 0 and bool(configs(format, device))


def library(format: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[LinearConfig, ...]:
    """The library's products that give a plain linear (..., N) of K in dtype there: no other options, bf16, N and K
    multiples of 16.
    """
    fits = dtype == torch.bfloat16 and n % ALIGNED == 0 and k % ALIGNED == 0 and device.type == "cuda"
    return LIBRARY.get(format, ()) if fits and card(device).capability >= (9, 0) else ()


def candidates(format: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[LinearConfig, ...]:
    """The declared configurations that compete for a plain linear of K to N into dtype there."""
    described = n * dtype.itemsize % ALIGNED == 0
    kernels = tuple(c for c in configs(format, device) if described or c.path != "descriptor")
    best = "descriptor" if any(c.path == "descriptor" for c in kernels) else "pointer"
    return tuple(c for c in kernels if c.path == best) + library(format, n, k, dtype, device)


def default_config(
    format: str,
    rows: int,
    n: int,
    k: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> LinearConfig:
    """The configuration by shape: large tiles where they fill the card, else small ones. It serves where nothing was
    measured (linear_choice.py).
    """
    on = card(device)
    few = triton.cdiv(rows, 128) * triton.cdiv(n, 128) < on.processors
    described = n * dtype.itemsize % ALIGNED == 0
    if not (described and _large(on)):
        if format == "int8_block":
            return AMPERE_TILES_SMALL if few else AMPERE_TILES
        return AMPERE_SMALL if few else AMPERE
    if few:
        return SMALL
    # A wide tile's step takes 1,150 clocks of shared memory and two square ones' 1,280; its way out, which two programs
    # hide from each other, some 2,000: 16 steps.
    wide = triton.cdiv(rows, 128) * triton.cdiv(n, 256) >= on.processors
    if format == "fp8" and wide:
        return FAST_FLAT if k < MIDDLE else FAST
    if format == "int8" and wide:
        return WIDE_FLAT if k < LONG else WIDE
    return PAIR


def launch_linear(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    config: LinearConfig | None = None,
    *,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """w8a8_linear (..., N) in dtype; then GELU (tanh); then residual (..., N) + gate y, gate (N,) or (B, 1, ..., N).

    ValueError where shapes do not fit each other, K is no multiple of 16 below 2^17, dtype is not of DTYPES, or config
    is not one for this format and these strides; UnsupportedError for FP8 on a card without it.
    """
    w8a8_linear.check_operands(data, scale, weight, weight_scale, bias, format)
    n, k = weight.shape
    check(
        0 < k < DEEP and k % ALIGNED == 0,
        f"the linear kernel needs K to be a multiple of {ALIGNED} below {DEEP}, and it is {k}",
    )
    check(dtype in DTYPES, f"the linear kernel writes bfloat16, float16 and float32, not {dtype}")
    on = card(data.device)
    if not configs(format, data.device):
        raise UnsupportedError(f"compute capability {on.capability} has no {format} arithmetic; quantize to int8")
    out = torch.empty(*data.shape[:-1], n, dtype=dtype, device=data.device)
    if out.numel() == 0:
        return out
    rows, described = data.shape[:-1].numel(), n * dtype.itemsize % ALIGNED == 0
    plain = not gelu and residual is None
    config = config or default_config(format, rows, n, k, data.device, dtype)
    check(config.fits(format), f"{config} is not for {format}")
    if config.path == "library":
        check(plain and bool(library(format, n, k, dtype, data.device)), f"torch has no such product: {config}")
        return launch_library(data, scale, weight, weight_scale, bias, format, dtype, not config.promote)
    descriptor = config.path == "descriptor"
    check(not descriptor or described, f"tensor descriptors need rows of 16 bytes, and N is {n}")
    flat, y = _aligned(data.reshape(-1, k)), out.view(rows, n)
    weight = _aligned(weight)
    gates = _gate(gate, residual, data, n)
    if residual is not None:
        check(residual.shape == out.shape, f"a residual of {list(residual.shape)} is added to {list(out.shape)}")
        residual = residual.contiguous()
    parts = min(4, config.parts * max(1, dtype.itemsize // 2))
    width = config.block_n // parts
    operands: tuple[object, ...] = flat, weight, y, y
    if descriptor:
        operands = (
            TensorDescriptor.from_tensor(flat, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]), y,
            TensorDescriptor.from_tensor(y, [config.block_m, width]),
        )  # fmt: skip
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(n, config.block_n)
    limit = {} if config.registers is None else {"maxnreg": config.registers}
    _linear[(min(tiles, on.processors * config.programs),)](
        *operands, scale.contiguous(), weight_scale.contiguous(), y if bias is None else bias.contiguous(),
        y if residual is None else residual, y if gates is None else gates,
        flat.stride(0), weight.stride(0), rows, n, k, rows // gates.shape[0] if gates is not None else 1,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP=config.group, TILED=format == "int8_block",
        INTEGER=format != "fp8", PROMOTE=config.promote, BIAS=bias is not None, GELU=gelu,
        RESIDUAL=residual is not None, GATE=gates is not None, ADDED=on.capability == (8, 0), DESCRIPTOR=descriptor,
        PARTS=parts, FLATTEN=config.flatten,
        **FUSED, num_warps=config.warps, num_stages=config.stages, **limit,
    )  # fmt: skip
    return out


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """rows (R, K) of bytes, copied unless K is contiguous and all rows start at multiples of 16."""
    fits = rows.stride(1) == 1 and rows.stride(0) % ALIGNED == 0 and rows.data_ptr() % ALIGNED == 0
    return rows if fits and rows.stride(0) >= rows.shape[1] else rows.clone(memory_format=torch.contiguous_format)


def _gate(gate: torch.Tensor | None, residual: torch.Tensor | None, data: torch.Tensor, n: int) -> torch.Tensor | None:
    """The gate as float32 (G, N), one row for each M / G rows of data."""
    if gate is None:
        return None
    check(residual is not None, "a gate needs a residual to add the gated linear to")
    whole = tuple(gate.shape) == (n,) or gate.numel() == n
    batched = gate.ndim == data.ndim and tuple(gate.shape) == (data.shape[0], *[1] * (data.ndim - 2), n)
    check(whole or batched, f"the gate is {list(gate.shape)}; it has to be (N,) or (B, 1, ..., N)")
    return gate.reshape(-1, n).to(torch.float32).contiguous()


def launch_library(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """The same by torch's own products: row-wise _scaled_mm (fast: sums cut short), or _int_mm and its scaling."""
    w8a8_linear.check_operands(data, scale, weight, weight_scale, bias, format)
    check(format != "int8_block", "no library product has a scale for each tile")
    rows, weight = _aligned(data.reshape(-1, data.shape[-1])), _aligned(weight)
    scales, weight_scale = scale.reshape(-1, 1).contiguous(), weight_scale.contiguous()
    if format == "fp8":
        y = torch._scaled_mm(
            rows, weight.t(), scale_a=scales, scale_b=weight_scale.t(), out_dtype=dtype, use_fast_accum=fast,
            bias=None if bias is None else bias.to(dtype),
        )  # fmt: skip
    else:
        y = torch._int_mm(rows, weight.t()) * scales * weight_scale.t()
        y = (y if bias is None else y + bias).to(dtype)
    return y.reshape(*data.shape[:-1], weight.shape[0])
