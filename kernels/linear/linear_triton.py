"""Triton kernel of w8a8_linear for its three formats, its configurations, and the library's products beside it.

A persistent program computes tiles of block_m x block_n of y = data weight^T, walking K in steps of block_k:

    int8, fp8    acc += a b^T                                    int32, or float32 in the tensor cores or, `promote`,
                                                                 outside them once a step
                 y = round(acc scale weight_scale^T + bias)
    int8_block   acc = fma(float(a b^T), scale[mb, kb] weight_scale[nb, kb], acc);  y = round(round(acc) + bias)

data (M, K), weight (N, K), y (M, N), all row-major; scales as in w8a8_linear.py.

Tensor cores of Hopper add products of e4m3 to a sum of few bits and cut off the rest: on an H100, a sum of 8,192
products of one sign came out 10% short. Products of random signs, such as activations times weights, hardly let the
cuts add up: at K = 13,824 the relative error of N(0, 1) data is 0.0265 with the cuts and without them. The cuts are
therefore below 0.0017 beside e4m3's own roundings, and less than the rounding of the result to bf16. So the default
accepts the cuts, as the libraries do; `promote` adds each block_k of K in float32, at the cost below. Speedups over
bf16 F.linear, measured on an H100 at its sustained clock at six shapes of Wan (benchmarks/RESULTS.md): promoted
1.16-1.40, cut 1.70-2.13, cuBLAS with cut sums 1.60-1.88; int8 1.58-1.88; int8_block 1.06-1.40.

The cost of int8_block on Hopper, in clocks of a multiprocessor for a step of 128 x 128 x 128: wgmma takes 512 (4,096
int8 multiply-adds a clock). It reads 48 KiB of shared memory while 32 KiB arrive, which takes 640 at 128 bytes a clock.
A thread executes 64 conversions (I2FP, half rate), 64 FFMA and, as compiled, 82 other instructions. These count as 210,
or 420 clocks of the issue slots for the 8 warps. Two warpgroups that run in step do the product and the instructions
one after the other, which takes 512 + 420, and 100 for the last wgmma's latency: 1,030 clocks, so at most 0.9 POP/s at
1.7 GHz.

Two such programs a multiprocessor run the conversions of one under the product of the other. A step then takes 640
clocks, which limits FP8, too, where the kernel reached 60-72% of the card's rate. The price is some 16 spills a step,
because a thread has 128 registers, and the two sums alone would fill 128. Three programs of 64 x 128 spill nothing, but
read 24 KiB for 2.1 MOP, so that 0.6 POP/s need 7 TB/s, about the most that L2 delivers. Tiles twice as wide need 256
registers for sums. So the default is two programs of 128 x 128, which reached 0.78-0.90 POP/s, where one program
(without spills) reached 0.63-0.73. FP8 with `promote` runs the same loop, with 64 FADD instead of the 128 instructions.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from turbocompile.kernels._jit import ROUND, ROUND_BITS
from turbocompile.kernels._registry import FUSED, Card, card, check
from turbocompile.kernels.linear.operands import check_operands
from turbocompile.kernels.quantize.quantize import ALIGNED, BLOCK

from turbocompile.errors import UnsupportedError


@triton.jit
def _tile_place(tile, tiles_down, tiles_right, GROUP: tl.constexpr):
    """The row and the column of tile number `tile` among the tiles.

    The tiles of GROUP rows are taken column by column, because L2 then holds the rows of data and weight that they
    share.
    """
    first = tile // (GROUP * tiles_right) * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    within = tile % (GROUP * tiles_right)
    return first + within % height, within // height


@triton.jit
def _store_tile(
    acc, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILED: tl.constexpr, BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Scales the sums acc (BLOCK_M, BLOCK_N), adds the bias, rounds, and stores the result at (first_row,
    first_column).
    """
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    p_out = row.to(tl.int64)[:, None] * n + column[None, :]  # (BLOCK_M, BLOCK_N)
    m_out = (row < rows)[:, None] & (column < n)[None, :]
    y = acc.to(tl.float32)
    if TILED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    else:
        y *= tl.load(scale + row, mask=row < rows, other=0.0)[:, None]  # (BLOCK_M, 1)
        y *= tl.load(weight_scale + column, mask=column < n, other=0.0)[None, :]  # (1, BLOCK_N)
    if BIAS:
        b = tl.load(bias + column, mask=column < n, other=0.0)  # (BLOCK_N,)
        if TILED:
            b = b.to(out.dtype.element_ty)
        y += b.to(tl.float32)[None, :]
    if DESCRIPTOR:
        out_tiles.store([first_row, first_column], y.to(out.dtype.element_ty))
    else:
        tl.store(out + p_out, y.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns of acc, each (BLOCK_M, BLOCK_N / 2), without moving registers."""
    return acc.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()


@triton.jit
def _store_halves(
    acc, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILED: tl.constexpr, BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Calls _store_tile for the left and then for the right half of the columns."""
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    _store_tile(
        left, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
        BLOCK_M, BLOCK_N // 2, TILED, BIAS, DESCRIPTOR,
    )  # fmt: skip
    _store_tile(
        right, out, out_tiles, scale, weight_scale, bias, first_row, first_column + BLOCK_N // 2, rows, n,
        BLOCK_M, BLOCK_N // 2, TILED, BIAS, DESCRIPTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _linear(
    data, weight, out, out_tiles, scale, weight_scale, bias, data_m, weight_n, rows, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TILED: tl.constexpr,
    INTEGER: tl.constexpr, PROMOTE: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """A program computes the tiles program_id, program_id + programs, ... of out (rows, n).

    data_m, weight_n: elements between the rows of data (rows, k) and of weight (n, k). TILED: format int8_block.
    ADDED: int32 becomes float32 by an addition, because compute capability 8.0 converts 16 a clock and adds 64.
    DESCRIPTOR: data, weight and out_tiles are tensor descriptors. PARTS: pieces in which a tile is stored.
    """
    tiles_down = tl.cdiv(rows, BLOCK_M)
    tiles_right = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_right, tl.num_programs(0), flatten=FLATTEN):
        down, right = _tile_place(tile, tiles_down, tiles_right, GROUP)
        first_row = down * BLOCK_M
        first_column = right * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER and not TILED else tl.float32)
        if not DESCRIPTOR:
            # Rows past the end load the last row again, and are not stored.
            row = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
            column = tl.minimum(first_column + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
            inner = tl.arange(0, BLOCK_K)
            p_a = data + row[:, None] * data_m + inner[None, :]  # (BLOCK_M, BLOCK_K)
            p_b = weight + column[:, None] * weight_n + inner[None, :]  # (BLOCK_N, BLOCK_K)
        for step in range(steps):
            if DESCRIPTOR:
                a = data.load([first_row, step * BLOCK_K])  # (BLOCK_M, BLOCK_K)
                b = weight.load([first_column, step * BLOCK_K])  # (BLOCK_N, BLOCK_K)
            else:
                # (BLOCK_M, BLOCK_K) and (BLOCK_N, BLOCK_K)
                a = tl.load(p_a + step * BLOCK_K, mask=(inner < k - step * BLOCK_K)[None, :], other=0.0)
                b = tl.load(p_b + step * BLOCK_K, mask=(inner < k - step * BLOCK_K)[None, :], other=0.0)
            if TILED:
                # BLOCK_K is a tile's edge, and BLOCK_M and BLOCK_N divide it, so that a step needs two scalars. Their
                # loads run while wgmma runs.
                s_a = tl.load(scale + (first_row // BLOCK_K) * steps + step)
                s_b = tl.load(weight_scale + (first_column // BLOCK_K) * steps + step)
                part = tl.dot(a, b.T)  # (BLOCK_M, BLOCK_N) int32, at most 2^21
                if ADDED:
                    part = (part + ROUND_BITS).to(tl.float32, bitcast=True) - ROUND
                acc += part.to(tl.float32) * (s_a * s_b)
            elif INTEGER:
                acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)  # (BLOCK_M, BLOCK_N)
            elif PROMOTE:  # sums of BLOCK_K products are added outside the tensor cores, because these cut sums short
                acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=BLOCK_K)  # (BLOCK_M, BLOCK_N)
            else:
                acc = tl.dot(a, b.T, acc)  # (BLOCK_M, BLOCK_N)
        if PARTS == 4:
            left, right_half = _halves(acc, BLOCK_M, BLOCK_N)
            _store_halves(
                left, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
                BLOCK_M, BLOCK_N // 2, TILED, BIAS, DESCRIPTOR,
            )  # fmt: skip
            _store_halves(
                right_half, out, out_tiles, scale, weight_scale, bias, first_row, first_column + BLOCK_N // 2, rows, n,
                BLOCK_M, BLOCK_N // 2, TILED, BIAS, DESCRIPTOR,
            )  # fmt: skip
        elif PARTS == 2:
            _store_halves(
                acc, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
                BLOCK_M, BLOCK_N, TILED, BIAS, DESCRIPTOR,
            )  # fmt: skip
        else:
            _store_tile(
                acc, out, out_tiles, scale, weight_scale, bias, first_row, first_column, rows, n,
                BLOCK_M, BLOCK_N, TILED, BIAS, DESCRIPTOR,
            )  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """A configuration of the kernel's launch, or a product of the library."""

    path: str  # "descriptor" (Hopper and later) | "pointer" | "library": torch's product, which only uses `promote`
    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    warps: int = 8
    stages: int = 3
    programs: int = 1  # how many programs a multiprocessor runs; registers and shared memory bound them
    registers: int | None = None  # the most registers that a thread may use; two programs of 8 warps share 65,536
    promote: bool = True  # fp8: add each block_k of K outside the tensor cores
    # In how many parts (1, 2 or 4) a 16-bit tile is stored. The shared memory for the store holds one part at a time.
    parts: int = 1
    # How many rows of tiles are taken together. 8 tiles of data's rows and the 16 of weight's rows that are in flight
    # fit L2 at Wan's K.
    group: int = 8
    flatten: bool = False  # one loop over tiles and K, in which the next tile's loads start before this tile is stored

    def __post_init__(self) -> None:
        check(self.path in ("descriptor", "pointer", "library"), f"there is no path {self.path!r} of the linear kernel")

    def fits(self, format: str) -> bool:
        """Whether this configuration computes the format."""
        sizes = self.block_m <= BLOCK and self.block_n <= BLOCK and self.block_k == BLOCK
        others = self.promote and self.path != "library"
        return sizes and others if format == "int8_block" else format == "fp8" or others


# The declared sets: a saved choice is one of these. 128 bytes of K are one swizzled row of shared memory.
PAIR = LinearConfig(
    "descriptor", 128, 128, programs=2, registers=128, parts=2
)  # the module's docstring counts its clocks
SINGLE = LinearConfig("descriptor", 128, 128, stages=4)  # does not spill, and does not hide the conversions
TRIPLE = LinearConfig("descriptor", 64, 128, warps=4, stages=2, programs=3, registers=168)  # 64 KiB a program
SMALL = LinearConfig("descriptor", 64, 128, warps=4, stages=4, programs=2)  # for few rows: enough tiles for the card
# A wide tile takes 3 stages and half a tile, 176 KiB, so that a multiprocessor runs one program. Nothing then hides the
# store of a tile, unless `flatten` makes the loops one. Square tiles read a third more. Three variants were left out: a
# tile stored in one part is at best as fast (2% slower elsewhere, and with a residual beyond shared memory); 16 rows of
# tiles taken together are slower at five of Wan's six shapes; warp specialization is ignored by Triton 3.6 and 3.9 with
# 8 warps, and fails with 4.
WIDE = LinearConfig("descriptor", 128, 256, parts=2)
WIDE_FLAT = LinearConfig("descriptor", 128, 256, parts=2, flatten=True)
FAST = LinearConfig("descriptor", 128, 256, promote=False, parts=2)  # FP8 with sums cut short, 0.94-1.13 times cuBLAS's
FAST_FLAT = LinearConfig("descriptor", 128, 256, promote=False, parts=2, flatten=True)
# Other cards have 100 KiB a multiprocessor. With 64 bytes of K, four stages fit beside the tile that is stored.
AMPERE = LinearConfig("pointer", 128, 128, 64, stages=4)
AMPERE_SMALL = LinearConfig("pointer", 64, 128, 64, warps=4, stages=4, programs=2)
AMPERE_TILES = LinearConfig("pointer", 128, 128, stages=3)  # int8_block needs steps of 128 of K, with 64 KiB in flight
AMPERE_TILES_SMALL = LinearConfig("pointer", 64, 128, warps=4, stages=3, programs=2)
LIBRARY = {"fp8": (LinearConfig("library"), LinearConfig("library", promote=False))}  # row-wise _scaled_mm
CONFIGS = {
    "fp8": (PAIR, SINGLE, SMALL, FAST, FAST_FLAT, AMPERE, AMPERE_SMALL),
    "int8": (WIDE, WIDE_FLAT, PAIR, SINGLE, SMALL, AMPERE, AMPERE_SMALL),
    "int8_block": (PAIR, SINGLE, TRIPLE, SMALL, AMPERE_TILES, AMPERE_TILES_SMALL),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONG = 2048  # a K: in int8, `flatten` is faster below it, because it overlaps the store of a tile with the next loads
MIDDLE = 8192  # a K: in fp8, `flatten` is faster below it, and the plain loop is faster from it on
LARGE_SHARED = 200 << 10  # bytes of shared memory of a multiprocessor that the tensor descriptors' configurations need
DEEP = 1 << 17  # a K: sums of fewer int8 products, which are at most 2^14 each, fit int32


def _large(on: Card) -> bool:
    """Whether the card runs the configurations with tensor descriptors; 12.0 does not, because it has only 100 KiB."""
    return on.capability >= (9, 0) and on.shared >= LARGE_SHARED


def configs(format: str, device: torch.device) -> tuple[LinearConfig, ...]:
    """The declared configurations for the format that the device runs; none for FP8 before compute capability 8.9."""
    on = card(device)
    if format == "fp8" and on.capability < (8, 9):
        return ()
    return tuple(c for c in CONFIGS[format] if c.path == "pointer" or _large(on))


def takes(format: str, dtype: torch.dtype, k: int, device: torch.device) -> bool:
    """Whether the kernel computes linears of K channels into dtype on the device."""
    return dtype in DTYPES and 0 < k < DEEP and k % ALIGNED == 0 and bool(configs(format, device))


def library(format: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[LinearConfig, ...]:
    """The library's products that compute a linear from K to N channels into dtype on the device.

    The library needs dtype bf16, N and K that are multiples of 16, and compute capability 9.0.
    """
    fits = dtype == torch.bfloat16 and n % ALIGNED == 0 and k % ALIGNED == 0 and device.type == "cuda"
    return LIBRARY.get(format, ()) if fits and card(device).capability >= (9, 0) else ()


def candidates(format: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[LinearConfig, ...]:
    """The declared configurations that compete for a linear from K to N channels into dtype on the device."""
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
    """The configuration for a shape that linear_choice.py has not measured: large tiles if there are enough to fill the
    card, otherwise small tiles.
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
    # A step of a wide tile takes 1,150 clocks of shared memory, and the same step of two square tiles 1,280. The store
    # of a wide tile, which two programs would hide from each other, takes some 2,000 clocks, as much as 16 steps gain.
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
) -> torch.Tensor:
    """The op of w8a8_linear.py: (..., N) in dtype. config: None is the default.

    Raises ValueError if shapes do not fit each other, if K is no multiple of 16 below 2^17, if dtype is not one of
    DTYPES, or if config does not compute this format and these strides; UnsupportedError for FP8 on a card without FP8.
    """
    check_operands(data, scale, weight, weight_scale, bias, format)
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
    config = config or default_config(format, rows, n, k, data.device, dtype)
    check(config.fits(format), f"{config} is not for {format}")
    if config.path == "library":
        check(bool(library(format, n, k, dtype, data.device)), f"torch has no such product: {config}")
        return _library_product(data, scale, weight, weight_scale, bias, dtype, fast=not config.promote)
    descriptor = config.path == "descriptor"
    check(not descriptor or described, f"tensor descriptors need rows of 16 bytes, and N is {n}")
    flat, y = _aligned(data.reshape(-1, k)), out.view(rows, n)
    weight = _aligned(weight)
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
        flat.stride(0), weight.stride(0), rows, n, k,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=config.group,
        TILED=format == "int8_block", INTEGER=format != "fp8", PROMOTE=config.promote, BIAS=bias is not None,
        ADDED=on.capability == (8, 0), DESCRIPTOR=descriptor, PARTS=parts, FLATTEN=config.flatten,
        **FUSED, num_warps=config.warps, num_stages=config.stages, **limit,
    )  # fmt: skip
    return out


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """rows (R, K) of 8-bit elements, copied unless K is contiguous and all rows start at addresses that 16 divides."""
    fits = rows.stride(1) == 1 and rows.stride(0) % ALIGNED == 0 and rows.data_ptr() % ALIGNED == 0
    return rows if fits and rows.stride(0) >= rows.shape[1] else rows.clone(memory_format=torch.contiguous_format)


def _library_product(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    """The fp8 linear by torch's row-wise _scaled_mm. fast: allows the tensor cores to cut sums short."""
    y = torch._scaled_mm(
        _aligned(data.reshape(-1, data.shape[-1])), _aligned(weight).t(), scale_a=scale.reshape(-1, 1).contiguous(),
        scale_b=weight_scale.contiguous().t(), out_dtype=dtype, use_fast_accum=fast,
        bias=None if bias is None else bias.to(dtype),
    )  # fmt: skip
    return y.reshape(*data.shape[:-1], weight.shape[0])
