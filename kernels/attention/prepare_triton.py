"""The operands that the quantized attentions make of K and V before their main kernel, in two passes over both.

    1. k_mean, v_scale, and for SLA's linear branch phi_sum = sum phi(k) and folded = phi(k)^T v W^T / phi_sum, by rows
    2. k8 = rne(127 (k - k_mean) / amax), k_scale = amax / 127          amax over a block, floored at 1e-7
       v8 = e4m3(v / v_scale), v_scale = max |v| / 448                  over a channel, floored at 1e-12
       for pv "fp16" instead: v8 = float16(v / v_scale), v_scale = max(max |v|, 65504) / 65504, which is nearly always 1

k, v: (B, L, H, D), bf16 or fp16, D at most 128; the last axis is contiguous, other strides are free. The kernels
compute a head in d = 64 or 128 channels. Blocks are stored back to back, so that each block is one contiguous transfer.
Sums are float32 and added in a fixed order, so that every run gives the same bits. keys_triton.py may already have
quantized K after its norm. The first pass then reads K for the linear branch alone, and the second pass does not read
K.

phi is not negative, so `folded` holds averages of v W^T, which fit 16 bits whatever the length; the main kernel's
factor phi(q) phi_sum / z lies between 0 and 1.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import LOG2E, ROUND, exp2
from turbocompile.kernels._registry import FUSED, card

TINY = tl.constexpr(1e-30)  # the least denominator, so that the division of a row of zeros is finite
QK_LIMIT = tl.constexpr(127.0)  # the largest INT8 code of q and k
QK_FLOOR = tl.constexpr(1e-7)  # the least amax of a block of q or k
FP8_LIMIT = tl.constexpr(448.0)  # e4m3's largest value
V_FLOOR = tl.constexpr(1e-12)  # the least amax of a channel of v
FP16_LIMIT = tl.constexpr(65504.0)  # float16's largest value
LINEAR_EPS = tl.constexpr(1e-5)  # a term of the linear branch's denominator, as in sla_attention.py
OFFSET = tl.constexpr(8.807)  # log2(448), rounded down, so that the largest weight becomes e4m3's largest value
MASKED = tl.constexpr(-2100000)  # an int32 score below every real score, which is at least -127^2 D = -2064512


@triton.jit
def features(x, channel, HEAD: tl.constexpr, D: tl.constexpr, MAP: tl.constexpr, FTZ: tl.constexpr):
    """The feature map phi of x (N, D), float32, as e (N, D) and s (N,) with phi(x) = e / s.

    MAP: "softmax" over channels, "elu" (elu + 1) or "relu". channel (D,): the mask of the HEAD real channels; the
    channels that pad a head to D give 0.
    """
    if MAP == "softmax":
        if HEAD < D:
            x = tl.where(channel[None, :], x, float("-inf"))
        x = x * LOG2E
        e = exp2(x - tl.max(x, 1)[:, None], FTZ)
        s = tl.sum(e, 1)
    else:
        if MAP == "elu":
            e = tl.where(x > 0, x + 1.0, exp2(tl.minimum(x, 0.0) * LOG2E, FTZ))
        else:
            e = tl.maximum(x, 0.0)
        if HEAD < D:
            e = tl.where(channel[None, :], e, 0.0)
        s = tl.full([x.shape[0]], 1.0, tl.float32)
    return e, s


@triton.jit(do_not_specialize=["length", "num_heads", "rows_per_split"])
def _summaries(
    k, v, columns, state,
    k_b, k_l, k_h, v_b, v_l, v_h,
    length, num_heads, rows_per_split,
    HEAD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, LINEAR: tl.constexpr,
    MAP: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Writes partial sums of a range of tokens.

    columns (BH, splits, 3, D): sum k, max |v|, sum phi(k). state (BH, splits, D, D): phi(k)^T v. MEAN: sum k is wanted.
    LINEAR: sum phi(k) and state are wanted. Without MEAN and LINEAR the kernel does not read k.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    member = tl.arange(0, ROWS)
    # 16 rows, because the threads cover 16 rows at a time, so that each thread adds in its own registers.
    k_sum = tl.zeros([16, D], tl.float32)
    v_max = tl.zeros([16, D], tl.float32)
    phi_sum = tl.zeros([16, D], tl.float32)
    if LINEAR:
        kv = tl.zeros([D, D], tl.float32)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, length)
    k_at = k + b * k_b + h * k_h + (start + member).to(tl.int64)[:, None] * k_l + d[None, :]
    v_at = v + b * v_b + h * v_h + (start + member).to(tl.int64)[:, None] * v_l + d[None, :]
    for row in range(start, stop, ROWS):
        real = row + member < stop
        valid = real[:, None] & (d < HEAD)[None, :]
        if MEAN or LINEAR:
            k_tile = tl.load(k_at, mask=valid, other=0.0)  # (ROWS, D)
            k_at += ROWS * k_l
            k_wide = k_tile.to(tl.float32)
        v_tile = tl.load(v_at, mask=valid, other=0.0)  # (ROWS, D)
        v_at += ROWS * v_l
        if MEAN:
            k_sum += tl.sum(tl.reshape(k_wide, [ROWS // 16, 16, D]), 0)
        v_max = tl.maximum(v_max, tl.max(tl.reshape(tl.abs(v_tile.to(tl.float32)), [ROWS // 16, 16, D]), 0))
        if LINEAR:
            e, s = features(k_wide, d < HEAD, HEAD, D, MAP, FTZ)
            phi = e * tl.where(real, 1.0 / s, 0.0)[:, None]
            phi_sum += tl.sum(tl.reshape(phi, [ROWS // 16, 16, D]), 0)
            kv = tl.dot(tl.trans(phi.to(k_tile.dtype)), v_tile, kv)  # (D, D)
    part = (head * tl.num_programs(0) + split).to(tl.int64)
    tl.store(columns + part * 3 * D + d, tl.sum(k_sum, 0))
    tl.store(columns + part * 3 * D + D + d, tl.max(v_max, 0))
    if LINEAR:
        tl.store(columns + part * 3 * D + 2 * D + d, tl.sum(phi_sum, 0))
        tl.store(state + part * D * D + d[:, None] * D + d[None, :], kv)


@triton.jit(do_not_specialize=["length", "splits"])
def _finish(
    columns, state, weight, w_o, w_i, k_mean, v_scale, phi_sum, folded,
    length, splits,
    HEAD: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, LINEAR: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums in order, and writes v_scale, k_mean (unless it is None), phi_sum, and SLICE rows of
    folded.

    LINEAR: phi_sum and folded are wanted. FP8: v_scale is for e4m3, otherwise for float16.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    d = tl.arange(0, D)
    if part == 0:
        total = tl.zeros([D], tl.float32)
        amax = tl.zeros([D], tl.float32)
        phi = tl.zeros([D], tl.float32)
        for split in range(splits):
            base = columns + (head * splits + split).to(tl.int64) * 3 * D
            total += tl.load(base + d)  # (D,)
            amax = tl.maximum(amax, tl.load(base + D + d))  # (D,)
            if LINEAR:
                phi += tl.load(base + 2 * D + d)  # (D,)
        if k_mean is not None:
            tl.store(k_mean + head * D + d, total / length)
        if FP8:
            unit = tl.maximum(amax, V_FLOOR) / FP8_LIMIT
        else:
            unit = tl.maximum(amax, FP16_LIMIT) / FP16_LIMIT
        tl.store(v_scale + head * D + d, unit)
        if LINEAR:
            tl.store(phi_sum + head * D + d, phi)
    if LINEAR:
        row = part * SLICE + tl.arange(0, SLICE)
        kv = tl.zeros([SLICE, D], tl.float32)
        phi = tl.zeros([SLICE], tl.float32)
        for split in range(splits):
            at = (head * splits + split).to(tl.int64) * D
            kv += tl.load(state + at * D + row[:, None] * D + d[None, :])  # (SLICE, D)
            phi += tl.load(columns + at * 3 + 2 * D + row)  # (SLICE,)
        square = (d < HEAD)[:, None] & (d < HEAD)[None, :]
        # (D, D)
        weight_tile = tl.load(weight + d[None, :] * w_o + d[:, None] * w_i, mask=square, other=0.0).to(tl.float32)
        folded_rows = tl.dot(kv / tl.maximum(phi, TINY)[:, None], weight_tile, input_precision="tf32x3")  # (SLICE, D)
        tl.store(
            folded + head.to(tl.int64) * D * D + row[:, None] * D + d[None, :], folded_rows.to(folded.dtype.element_ty)
        )


@triton.jit(do_not_specialize=["length", "num_heads"])
def _quantize_kv(
    k, v, k_mean, v_scale, k8, k_scale, v8, pooled,
    k_b, k_l, k_h, v_b, v_l, v_h,
    length, num_heads,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    POOL: tl.constexpr, PERMUTE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Quantizes one block of keys and values, or of values alone if k is None; rows past the end become zeros.

    POOL: writes the block's mean of k - k_mean. PERMUTE: stores V's tokens in the Hopper kernel's operand order. The
    first program takes the last block, because the end of K and V is still in L2 after the first pass.
    """
    count = tl.num_programs(0)
    block = count - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    member = tl.arange(0, BLOCK)
    channel = d < HEAD
    token = block * BLOCK + member
    valid = (token < length)[:, None] & channel[None, :]
    tile = (head * count + block).to(tl.int64)
    if k is not None:
        # (BLOCK, D)
        k_tile = tl.load(k + b * k_b + h * k_h + token.to(tl.int64)[:, None] * k_l + d[None, :], mask=valid, other=0.0)
        x = tl.where(valid, k_tile.to(tl.float32) - tl.load(k_mean + head * D + d)[None, :], 0.0)  # (BLOCK, D)
        if POOL:
            rows = tl.minimum(length - block * BLOCK, BLOCK)
            tl.store(pooled + tile * D + d, (tl.sum(x, 0) / rows).to(pooled.dtype.element_ty))
        amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), QK_FLOOR)
        codes = (x * (QK_LIMIT / amax) + ROUND).to(tl.int32, bitcast=True).to(tl.int8)  # (BLOCK, D)
        tl.store(k_scale + tile, amax / QK_LIMIT)
        tl.store(k8 + tile * BLOCK * D + member[:, None] * D + d[None, :], codes)
    # PERMUTE: position 16 i + 4 a + 2 b + c holds token 16 i + 8 b + 2 a + c, with a in 0..3, b and c in 0..1.
    if FP8 and PERMUTE:
        source = block * BLOCK + (member // 16) * 16 + (member % 4) // 2 * 8 + (member % 16) // 4 * 2 + member % 2
    else:
        source = token
    valid = (source < length)[:, None] & channel[None, :]
    # (BLOCK, D)
    v_tile = tl.load(v + b * v_b + h * v_h + source.to(tl.int64)[:, None] * v_l + d[None, :], mask=valid, other=0.0)
    v_scaled = v_tile.to(tl.float32) * (1.0 / tl.load(v_scale + head * D + d))[None, :]  # (BLOCK, D)
    if FP8:
        tl.store(
            v8 + tile * BLOCK * D + d[:, None] * BLOCK + member[None, :], tl.trans(v_scaled.to(v8.dtype.element_ty))
        )
    else:
        tl.store(v8 + tile * BLOCK * D + member[:, None] * D + d[None, :], v_scaled.to(v8.dtype.element_ty))


@dataclass(frozen=True)
class Prepared:
    """The main kernel's operands of K and V.

    d is head_dim padded to 64 or 128, BH is batch times heads of K, and N is how many blocks of block_k tokens a head
    has.
    """

    k8: torch.Tensor  # (BH, N, block_k, d) int8
    k_scale: torch.Tensor  # (BH, N) float32
    v8: torch.Tensor  # (BH, N, d, block_k) e4m3 | (BH, N, block_k, d) float16
    v_scale: torch.Tensor  # (BH, d) float32
    pooled: torch.Tensor | None  # (BH, N, d), mean of k - k_mean over each block, dtype of k
    phi_sum: torch.Tensor | None  # (BH, d) float32, sum of phi(k) over the tokens
    folded: torch.Tensor | None  # (BH, d, d), phi(k)^T v W^T / phi_sum, dtype of k
    block_k: int  # tokens of a block
    permuted: bool  # whether v8's tokens are in the Hopper kernel's operand order


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """The strides along B, L and H, in elements, of a (B, L, H, D) tensor, whose last axis is contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)


def padded(head_dim: int) -> int:
    """The channels, 64 or 128, in which the kernels compute a head."""
    return 64 if head_dim <= 64 else 128


def splits_of(length: int, heads: int, device: torch.device, rows: int) -> tuple[int, int]:
    """(splits, tokens of a split), chosen so that two programs run on each multiprocessor.

    heads: batch times heads. rows: the tokens of a split are a multiple of `rows`.
    """
    per = triton.cdiv(triton.cdiv(length, max(1, 2 * card(device).processors // heads)), rows) * rows
    return triton.cdiv(length, per), per


def summarize(
    k: torch.Tensor | None, v: torch.Tensor, feature_map: str | None, mean: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the first pass over k and v (B, L, H, D); returns its partial sums, float32.

    columns (BH, splits, 3, d): sum k, max |v|, sum phi(k). state (BH, splits, d, d): phi(k)^T v. feature_map: phi; with
    None the pass computes neither sum phi(k) nor state. mean: whether to compute sum k. k may be None if both are left
    out.
    """
    batch, length, heads, head_dim = v.shape
    d, bh, rows = padded(head_dim), batch * heads, 32
    splits, per = splits_of(length, bh, v.device, rows)
    columns = torch.empty((bh, splits, 3, d), dtype=torch.float32, device=v.device)
    state = torch.empty((bh, splits, d, d) if feature_map else (1,), dtype=torch.float32, device=v.device)
    k = v if k is None else k
    # With 128 registers a thread, two programs share a multiprocessor, and one computes while the other waits for
    # loads.
    _summaries[(splits, bh)](
        k, v, columns, state, *strides(k), *strides(v), length, heads, per,
        HEAD=head_dim, D=d, ROWS=rows, MEAN=mean, LINEAR=feature_map is not None, MAP=feature_map or "softmax",
        FTZ=v.is_cuda, **FUSED, num_warps=8, num_stages=3, **({"maxnreg": 128} if v.is_cuda else {}),
    )  # fmt: skip
    return columns, state


@dataclass(frozen=True)
class Keys:
    """Quantized keys, which are the half of Prepared that concerns k; k8 has zeros for tokens past the end."""

    k8: torch.Tensor  # (BH, N, block_k, d) int8
    k_scale: torch.Tensor  # (BH, N) float32
    pooled: torch.Tensor | None  # (BH, N, d), mean of k - k_mean over each block, dtype of k
    k: torch.Tensor | None  # (B, L, H, D), for the linear branch


def quantize_blocks(
    k: torch.Tensor | None,
    v: torch.Tensor,
    k_mean: torch.Tensor | None,
    v_scale: torch.Tensor,
    block_k: int,
    *,
    pv: str,
    permute: bool,
    pool: bool,
) -> tuple[Keys | None, torch.Tensor]:
    """Launches the second pass over k and v (B, L, H, D); returns the Keys, or None if k is None, and v8.

    k_mean and v_scale (BH, d), float32: the results of the first pass. permute, pool: as in `prepare`.
    """
    batch, length, heads, head_dim = v.shape
    d, bh, n, dev, fp8 = padded(head_dim), batch * heads, triton.cdiv(length, block_k), v.device, pv == "fp8"
    v_shape = (bh, n, d, block_k) if fp8 else (bh, n, block_k, d)
    v8 = torch.empty(v_shape, dtype=torch.float8_e4m3fn if fp8 else torch.float16, device=dev)
    keys = None
    if k is not None:
        keys = Keys(
            torch.empty((bh, n, block_k, d), dtype=torch.int8, device=dev),
            torch.empty((bh, n), dtype=torch.float32, device=dev),
            torch.empty((bh, n, d), dtype=k.dtype, device=dev) if pool else None,
            k,
        )
    _quantize_kv[(n, bh)](
        k, v, k_mean, v_scale, *((keys.k8, keys.k_scale) if keys else (None, None)), v8, keys.pooled if keys else None,
        *strides(v if k is None else k), *strides(v), length, heads,
        HEAD=head_dim, D=d, BLOCK=block_k, POOL=pool, PERMUTE=permute and fp8, FP8=fp8,
        **FUSED, num_warps=8, num_stages=1,
    )  # fmt: skip
    return keys, v8


def prepare(
    k: torch.Tensor | Keys,
    v: torch.Tensor,
    block_k: int,
    *,
    pv: str,
    permute: bool = False,
    pool: bool = False,
    weight: torch.Tensor | None = None,
    feature_map: str = "softmax",
) -> Prepared:
    """Quantizes k and v (B, L, H, D), bf16 or fp16, in blocks of block_k tokens.

    k may be Keys, which keys_triton.py has quantized; they must hold the block means if `pool`, and k itself if
    `weight`. permute: whether to store V's tokens in the Hopper kernel's operand order (pv "fp8" only). pool: whether
    to make the block means of k - k_mean. weight (D, D): W of the linear branch, whose phi_sum and folded are then
    made, too.
    """
    batch, length, heads, head_dim = v.shape
    d, bh, dev = padded(head_dim), batch * heads, v.device
    linear, fp8 = weight is not None, pv == "fp8"
    done = k if isinstance(k, Keys) else None
    given = k.k if isinstance(k, Keys) else k
    columns, state = summarize(given, v, feature_map if linear else None, mean=done is None)
    v_scale, phi_sum = (torch.empty((bh, d), dtype=torch.float32, device=dev) for _ in range(2))
    k_mean = torch.empty((bh, d), dtype=torch.float32, device=dev) if done is None else None
    folded = torch.empty((bh, d, d) if linear else (1,), dtype=v.dtype, device=dev)
    w = weight if weight is not None else v_scale
    _finish[(bh, d // 32 if linear else 1)](
        columns, state, w, w.stride(0), w.stride(1), k_mean, v_scale, phi_sum, folded, length, columns.shape[1],
        HEAD=head_dim, D=d, SLICE=32, LINEAR=linear, FP8=fp8, **FUSED, num_warps=8, num_stages=2,
    )  # fmt: skip
    made, v8 = quantize_blocks(
        None if done else given, v, k_mean, v_scale, block_k, pv=pv, permute=permute, pool=pool and done is None
    )
    keys = done or made
    assert keys is not None  # k was quantized already, or quantize_blocks has made the keys
    return Prepared(
        keys.k8, keys.k_scale, v8, v_scale, keys.pooled, phi_sum if linear else None, folded if linear else None,
        block_k, permute and fp8,
    )  # fmt: skip
