"""SLA's trainable path in 16 bits, without quantization: forward and backward.

Products take the inputs' bf16 or fp16. Sums are float32 and added in a fixed order, so that every run gives the same
bits. The backward pass, with ks = sum phi(k), G = phi(k)^T v W^T = ks folded, z = phi(q) . ks + 1e-5, i = 1 / z,
y = dO G^T and a = (phi(q) . y) i = (linear output) . dO:

    linear, q   dphi(q) = y i - a i ks;  X = (phi(q) i)^T dO;  d ks = -sum a i phi(q);  db = sum dO
    linear, k   dKV = X W;  dW = sum_heads X^T KV;  dphi(k) = v dKV^T + d ks;  dv += phi(k) dKV
    phi         softmax: dx = phi (dphi - phi . dphi);  elu + 1: dx = dphi min(phi, 1);  relu: dx = dphi [x > 0]
    sparse      delta = O_s . dO = (O - b) . dO - a;  P = 2^(s - lse);  dS = P (dO v^T - delta)
                dq = scale dS (k - mean k);  dk = scale dS^T q;  dv = P^T dO

No gradient flows through the block map. Between the passes only the operands and the result are kept, because the
backward pass computes the map, the linear branch's state and lse again (lse together with dq).
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import LOG2E, exp2
from turbocompile.kernels._registry import FUSED, card
from turbocompile.kernels.attention.attend_triton import LARGE_SHARED
from turbocompile.kernels.attention.prepare_triton import (
    LINEAR_EPS,
    TINY,
    features,
    padded,
    splits_of,
    strides,
    summarize,
)
from turbocompile.kernels.attention.sla_triton import select_blocks


@triton.jit(do_not_specialize=["length", "num_heads"])
def _pool(
    k, mean, pooled, k_b, k_l, k_h, length, num_heads,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the mean of k - mean over each block of BLOCK tokens: pooled (BH, N, D)."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    token = block * BLOCK + tl.arange(0, BLOCK)
    valid = (token < length)[:, None] & (d < HEAD)[None, :]
    # (BLOCK, D)
    x = tl.load(k + b * k_b + h * k_h + token.to(tl.int64)[:, None] * k_l + d[None, :], mask=valid, other=0.0)
    x = tl.where(valid, x.to(tl.float32) - tl.load(mean + head * D + d)[None, :], 0.0)  # (BLOCK, D)
    rows = tl.minimum(length - block * BLOCK, BLOCK)
    tl.store(
        pooled + (head * tl.num_programs(0) + block).to(tl.int64) * D + d,
        (tl.sum(x, 0) / rows).to(pooled.dtype.element_ty),
    )


@triton.jit(do_not_specialize=["length", "num_heads", "num_k", "topk"])
def _forward(
    q, k, v, out, lut, folded, phi_sum, bias,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, o_b, o_l, o_h,
    length, num_heads, num_k, topk, scale,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
    MAP: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Computes one query block over its list of key blocks, and adds the linear branch."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    col = tl.arange(0, BLOCK_K)
    inside = (row < length)[:, None] & (d < HEAD)[None, :]
    # (BLOCK_Q, D)
    x = tl.load(q + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_l + d[None, :], mask=inside, other=0.0)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    high = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    line = lut + (head * tl.num_programs(0) + tile).to(tl.int64) * topk
    c = scale * LOG2E
    for j in range(topk):
        index = tl.load(line + j)
        token = index * BLOCK_K + col
        valid = (token < length)[:, None] & (d < HEAD)[None, :]
        k_tile = tl.load(k + token.to(tl.int64)[:, None] * k_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_K, D)
        s = tl.dot(x, k_tile.T)  # (BLOCK_Q, BLOCK_K)
        if RAGGED and index == num_k - 1:
            s = tl.where((token < length)[None, :], s, float("-inf"))
        new = tl.maximum(high, tl.max(s, 1))
        # The difference comes before the factor c, because it is exact for neighbouring scores, however large they are.
        p = exp2((s - new[:, None]) * c, FTZ)
        alpha = exp2((high - new) * c, FTZ)
        norm = norm * alpha + tl.sum(p, 1)
        v_tile = tl.load(v + token.to(tl.int64)[:, None] * v_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_K, D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])  # (BLOCK_Q, D)
        high = new
    acc = acc * (1.0 / norm)[:, None]
    e, s = features(x.to(tl.float32), d < HEAD, HEAD, D, MAP, FTZ)
    e = e * tl.load(phi_sum + head * D + d)[None, :]  # (1, D)
    z = tl.sum(e, 1) + LINEAR_EPS * s
    state = tl.load(folded + head.to(tl.int64) * D * D + d[:, None] * D + d[None, :])  # (D, D)
    acc = tl.dot((e * (1.0 / z)[:, None]).to(state.dtype), state, acc)  # (BLOCK_Q, D)
    acc += tl.load(bias + d, mask=d < HEAD, other=0.0).to(tl.float32)[None, :]  # (1, D)
    o_at = out + b * o_b + h * o_h + row.to(tl.int64)[:, None] * o_l + d[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _through_map(x, phi, dphi, MAP: tl.constexpr):
    """dx, the gradient with respect to x, from x, phi = phi(x) and dphi, all (N, D)."""
    if MAP == "softmax":
        dx = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    elif MAP == "elu":
        dx = dphi * tl.minimum(phi, 1.0)  # below zero elu + 1 is exp, which is its own derivative
    else:
        dx = tl.where(x > 0, dphi, 0.0)
    return dx


@triton.jit(do_not_specialize=["length", "num_heads", "rows_per_split"])
def _linear_q(
    q, out, grad, folded, phi_sum, bias, dq, delta, cross, columns,
    q_b, q_l, q_h, o_b, o_l, o_h, g_b, g_l, g_h, dq_b, dq_l, dq_h,
    length, num_heads, rows_per_split,
    HEAD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Writes the linear branch's dq (B, L, H, D), delta (BH, L), and partial sums of a range of tokens.

    cross (BH, splits, D, D): ks X. columns (BH, splits, 2, D): d ks and db.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    member = tl.arange(0, ROWS)
    ks = tl.load(phi_sum + head * D + d)  # (D,)
    bias_row = tl.load(bias + d, mask=d < HEAD, other=0.0).to(tl.float32)  # (D,)
    folded_t = tl.load(folded + head.to(tl.int64) * D * D + d[None, :] * D + d[:, None])  # (D, D)
    total = tl.zeros([D, D], tl.float32)
    dsum = tl.zeros([16, D], tl.float32)
    dbias = tl.zeros([16, D], tl.float32)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, length)
    for at in range(start, stop, ROWS):
        row = at + member
        real = row < stop
        inside = real[:, None] & (d < HEAD)[None, :]
        row64 = row.to(tl.int64)[:, None]
        # (ROWS, D)
        x = tl.load(q + b * q_b + h * q_h + row64 * q_l + d[None, :], mask=inside, other=0.0).to(tl.float32)
        # (ROWS, D)
        result = tl.load(out + b * o_b + h * o_h + row64 * o_l + d[None, :], mask=inside, other=0.0).to(tl.float32)
        do = tl.load(grad + b * g_b + h * g_h + row64 * g_l + d[None, :], mask=inside, other=0.0)  # (ROWS, D)
        e, s = features(x, d < HEAD, HEAD, D, MAP, FTZ)
        phi = e * tl.where(real, 1.0 / s, 0.0)[:, None]
        inv = 1.0 / (tl.sum(phi * ks[None, :], 1) + LINEAR_EPS)
        y = tl.dot(do, folded_t) * ks[None, :]  # (ROWS, D)
        do_wide = do.to(tl.float32)
        inner = tl.sum(phi * y, 1) * inv  # linear output . dO
        tl.store(
            delta + head.to(tl.int64) * length + row,
            tl.sum((result - bias_row[None, :]) * do_wide, 1) - inner,
            mask=real,
        )
        dz = tl.where(real, -inner * inv, 0.0)
        dphi = y * inv[:, None] + dz[:, None] * ks[None, :]
        dx = _through_map(x, phi, dphi, MAP)
        tl.store(dq + b * dq_b + h * dq_h + row64 * dq_l + d[None, :], dx.to(dq.dtype.element_ty), mask=inside)
        dsum += tl.sum(tl.reshape(dz[:, None] * phi, [ROWS // 16, 16, D]), 0)
        dbias += tl.sum(tl.reshape(do_wide, [ROWS // 16, 16, D]), 0)
        share = phi * ks[None, :] * inv[:, None]  # at most 1, so that it fits 16 bits whatever the length
        total = tl.dot(tl.trans(share.to(do.dtype)), do, total)  # (D, D)
    part = (head * tl.num_programs(0) + split).to(tl.int64)
    tl.store(cross + part * D * D + d[:, None] * D + d[None, :], total)
    tl.store(columns + part * 2 * D + d, tl.sum(dsum, 0))
    tl.store(columns + part * 2 * D + D + d, tl.sum(dbias, 0))


@triton.jit(do_not_specialize=["length", "num_heads", "num_k", "topk"])
def _grad_q(
    q, k, v, grad, lse, delta, lut, k_mean, dq,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, g_b, g_l, g_h, dq_b, dq_l, dq_h,
    length, num_heads, num_k, topk, scale,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
    FTZ: tl.constexpr,
):  # fmt: skip
    """Adds scale dS (k - mean k) over the listed blocks to dq, with dS = P (dO v^T - delta), and writes lse (BH, L).

    lse is the base-2 logarithm of the sums that normalize P. P is normalized last, as in the forward pass, so that lse
    needs no pass of its own and need not be kept between the passes. The mean of k is subtracted because the rows of dS
    sum to zero only before they are rounded: the rounding error times mean k would otherwise reach dq.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    col = tl.arange(0, BLOCK_K)
    row64 = row.to(tl.int64)[:, None]
    inside = (row < length)[:, None] & (d < HEAD)[None, :]
    x = tl.load(q + b * q_b + h * q_h + row64 * q_l + d[None, :], mask=inside, other=0.0)  # (BLOCK_Q, D)
    do = tl.load(grad + b * g_b + h * g_h + row64 * g_l + d[None, :], mask=inside, other=0.0)  # (BLOCK_Q, D)
    delta_rows = tl.load(delta + head.to(tl.int64) * length + row, mask=row < length, other=0.0)  # (BLOCK_Q,)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    high = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    rest = tl.zeros([BLOCK_Q], tl.float32)
    line = lut + (head * tl.num_programs(0) + tile).to(tl.int64) * topk
    c = scale * LOG2E
    for j in range(topk):
        index = tl.load(line + j)
        token = index * BLOCK_K + col
        valid = (token < length)[:, None] & (d < HEAD)[None, :]
        k_tile = tl.load(k + token.to(tl.int64)[:, None] * k_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_K, D)
        v_tile = tl.load(v + token.to(tl.int64)[:, None] * v_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_K, D)
        s = tl.dot(x, k_tile.T)  # (BLOCK_Q, BLOCK_K)
        if RAGGED and index == num_k - 1:
            s = tl.where((token < length)[None, :], s, float("-inf"))
        new = tl.maximum(high, tl.max(s, 1))
        p = exp2((s - new[:, None]) * c, FTZ)
        alpha = exp2((high - new) * c, FTZ)
        norm = norm * alpha + tl.sum(p, 1)
        ds = (p * (tl.dot(do, v_tile.T) - delta_rows[:, None])).to(k_tile.dtype)  # (BLOCK_Q, BLOCK_K)
        rest = rest * alpha + tl.sum(ds.to(tl.float32), 1)
        acc = tl.dot(ds, k_tile, acc * alpha[:, None])  # (BLOCK_Q, D)
        high = new
    tl.store(lse + head.to(tl.int64) * length + row, high * c + tl.log2(norm), mask=row < length)
    at = dq + b * dq_b + h * dq_h + row64 * dq_l + d[None, :]
    acc -= rest[:, None] * tl.load(k_mean + head * D + d)[None, :]  # (1, D)
    acc = acc * (scale / norm)[:, None] + tl.load(at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_Q, D)
    tl.store(at, acc.to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "num_heads", "num_q"])
def _grad_kv(
    q, k, v, grad, lse, delta, back, counts, dkv, unit, dsum, dk, dv,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, g_b, g_l, g_h, dk_b, dk_l, dk_h, dv_b, dv_l, dv_h,
    length, num_heads, num_q, scale,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MAP: tl.constexpr,
    FTZ: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of one key block: the sum over the query blocks that list it, and the linear branch's share.

    back (BH, N, M), counts (BH, N): the query blocks that list each key block, and how many they are. dkv (BH, D, D):
    dKV / unit, in 16 bits; unit (BH,), float32. dsum (BH, D): d ks.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    d = tl.arange(0, D)
    token = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    member = tl.arange(0, BLOCK_Q)
    token64 = token.to(tl.int64)[:, None]
    inside = (token < length)[:, None] & (d < HEAD)[None, :]
    k_tile = tl.load(k + b * k_b + h * k_h + token64 * k_l + d[None, :], mask=inside, other=0.0)  # (BLOCK_K, D)
    v_tile = tl.load(v + b * v_b + h * v_h + token64 * v_l + d[None, :], mask=inside, other=0.0)  # (BLOCK_K, D)
    q += b * q_b + h * q_h
    grad += b * g_b + h * g_h
    lse += head.to(tl.int64) * length
    delta += head.to(tl.int64) * length
    place = (head * tl.num_programs(0) + tile).to(tl.int64)
    acc_k = tl.zeros([BLOCK_K, D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, D], tl.float32)
    c = scale * LOG2E
    for j in range(tl.load(counts + place)):
        row = tl.load(back + place * num_q + j) * BLOCK_Q + member  # (BLOCK_Q,)
        valid = (row < length)[:, None] & (d < HEAD)[None, :]
        x = tl.load(q + row.to(tl.int64)[:, None] * q_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_Q, D)
        do = tl.load(grad + row.to(tl.int64)[:, None] * g_l + d[None, :], mask=valid, other=0.0)  # (BLOCK_Q, D)
        lse_rows = tl.load(lse + row, mask=row < length, other=float("inf"))  # (BLOCK_Q,)
        delta_rows = tl.load(delta + row, mask=row < length, other=0.0)  # (BLOCK_Q,)
        p = exp2(tl.minimum(tl.dot(k_tile, x.T) * c - lse_rows[None, :], 0.0), FTZ)  # (BLOCK_K, BLOCK_Q)
        acc_v = tl.dot(p.to(do.dtype), do, acc_v)  # (BLOCK_K, D)
        ds = p * (tl.dot(v_tile, do.T) - delta_rows[None, :])  # (BLOCK_K, BLOCK_Q)
        acc_k = tl.dot(ds.to(x.dtype), x, acc_k)  # (BLOCK_K, D)
    k_wide = k_tile.to(tl.float32)
    e, s = features(k_wide, d < HEAD, HEAD, D, MAP, FTZ)
    phi = e * (1.0 / s)[:, None]
    state = tl.load(dkv + head.to(tl.int64) * D * D + d[:, None] * D + d[None, :])  # (D, D)
    size = tl.load(unit + head)
    dphi = tl.dot(v_tile, state.T) * size + tl.load(dsum + head * D + d)[None, :]  # (BLOCK_K, D)
    acc_k = acc_k * scale + _through_map(k_wide, phi, dphi, MAP)
    acc_v += tl.dot(phi.to(state.dtype), state) * size  # (BLOCK_K, D)
    tl.store(dk + b * dk_b + h * dk_h + token64 * dk_l + d[None, :], acc_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + b * dv_b + h * dv_h + token64 * dv_l + d[None, :], acc_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_q", "num_k"])
def _invert(keep, back, counts, num_q, num_k, WIDTH: tl.constexpr):
    """Writes the query blocks that list one key block, ascending, and how many they are.

    keep (BH, M, N) int8: whether a query block lists a key block.
    """
    key_block = tl.program_id(0)
    head = tl.program_id(1)
    query_block = tl.arange(0, WIDTH)
    # (WIDTH,)
    kept = tl.load(
        keep + head.to(tl.int64) * num_q * num_k + query_block * num_k + key_block, mask=query_block < num_q, other=0
    ).to(tl.int32)
    place = (head * num_k + key_block).to(tl.int64)
    tl.store(back + place * num_q + tl.cumsum(kept, 0) - 1, query_block, mask=kept != 0)
    tl.store(counts + place, tl.sum(kept, 0))


@dataclass(frozen=True)
class TrainConfig:
    """(warps, stages) of each kernel that loops over lists."""

    forward: tuple[int, int] = (4, 2)
    grad_q: tuple[int, int] = (4, 2)
    grad_kv: tuple[int, int] = (4, 2)  # with 8 warps the kernel took 1.8 times as long
    wide: tuple[int, int] = (8, 2)  # of all three kernels if block_q or block_k is 128


# The declared set; a GPU with less than 160 KiB of shared memory takes the last configuration.
TRAIN_CONFIGS = (
    TrainConfig(),
    TrainConfig(forward=(4, 3)),
    TrainConfig(forward=(4, 1), grad_q=(4, 1), grad_kv=(4, 1), wide=(8, 1)),
)


@dataclass(frozen=True)
class _State:
    """The tensors that the forward pass and the backward pass each compute from the operands."""

    lut: torch.Tensor  # (BH, M, count) int32
    folded: torch.Tensor  # (BH, d, d) phi(k)^T v W^T / phi_sum, dtype of q
    phi_sum: torch.Tensor  # (BH, d) float32
    k_mean: torch.Tensor  # (BH, d) float32
    products: torch.Tensor  # (BH, d, d) float32, KV = phi(k)^T v
    weight: torch.Tensor  # (d, d) float32, W padded with zeros


@dataclass(frozen=True)
class Blocks:
    """The sizes of blocks, how many key blocks a query block reads, and the feature map."""

    count: int  # how many key blocks a query block reads
    block_q: int  # tokens of a query block
    block_k: int  # tokens of a key block
    feature_map: str  # "softmax", "elu" or "relu"


def train_configs(device: torch.device) -> tuple[TrainConfig, ...]:
    """The declared configurations that a device runs."""
    return TRAIN_CONFIGS if card(device).shared >= LARGE_SHARED else TRAIN_CONFIGS[-1:]


def default_train_config(device: torch.device) -> TrainConfig:
    """The default configuration for a device."""
    return train_configs(device)[0]


def _launch(pair: tuple[int, int]) -> dict[str, int]:
    return {"num_warps": pair[0], "num_stages": pair[1], **FUSED}


def _state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    blocks: Blocks,
    lut: torch.Tensor | None,
) -> _State:
    batch, length, heads, head_dim = q.shape
    d, bh, n = padded(head_dim), batch * heads, triton.cdiv(length, blocks.block_k)
    columns, partial = summarize(k, v, blocks.feature_map)
    products, sums = partial.sum(1), columns.sum(1)
    phi_sum, k_mean = sums[:, 2].contiguous(), sums[:, 0] / length
    weight = torch.zeros((d, d), dtype=torch.float32, device=q.device)
    weight[:head_dim, :head_dim] = proj_weight
    folded = ((products / phi_sum.clamp(min=TINY.value)[:, :, None]) @ weight.T).to(q.dtype)
    if lut is None:
        pooled = torch.empty((bh, n, d), dtype=q.dtype, device=q.device)
        _pool[(n, bh)](
            k, k_mean, pooled, *strides(k), length, heads, HEAD=head_dim, D=d, BLOCK=blocks.block_k,
            **FUSED, num_warps=4,
        )  # fmt: skip
        lut = select_blocks(q, pooled, blocks.count, blocks.block_q)
    return _State(lut, folded, phi_sum, k_mean, products, weight)


def sla_train_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    blocks: Blocks,
    config: TrainConfig | None = None,
    lut: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SLA in 16 bits: q, k, v (B, L, H, D), bf16 or fp16 -> (result (B, L, H, D), lut (BH, M, count) int32).

    config: None is the default. lut: the lists of key blocks to use; None makes them.
    """
    config = config or default_train_config(q.device)
    batch, length, heads, head_dim = q.shape
    state = _state(q, k, v, proj_weight, blocks, lut)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wide = max(blocks.block_q, blocks.block_k) > 64
    _forward[(triton.cdiv(length, blocks.block_q), batch * heads)](
        q, k, v, out, state.lut, state.folded, state.phi_sum, proj_bias, *strides(q), *strides(k), *strides(v),
        *strides(out), length, heads, triton.cdiv(length, blocks.block_k), state.lut.shape[-1], head_dim**-0.5,
        HEAD=head_dim, D=state.folded.shape[-1], BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k,
        RAGGED=length % blocks.block_k != 0, MAP=blocks.feature_map, FTZ=q.is_cuda,
        **_launch(config.wide if wide else config.forward),
    )  # fmt: skip
    return out, state.lut


def sla_train_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    blocks: Blocks,
    config: TrainConfig | None = None,
    lut: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v (B, L, H, D), in their dtype, and of proj_weight (D, D) and proj_bias (D,), float32.

    grad, out (B, L, H, D): the gradient of the result, and the result. config: None is the default. lut: the lists of
    the forward pass; None makes them again.
    """
    config = config or default_train_config(q.device)
    state = _state(q, k, v, proj_weight, blocks, lut)
    dq, delta, cross, sums = _linear_backward(grad, out, q, proj_bias, state, blocks.feature_map)
    head_dim = q.shape[-1]
    dweight = (cross.transpose(1, 2) @ state.products).sum(0)[:head_dim, :head_dim]
    lse = _sparse_grad_q(grad, q, k, v, delta, state, blocks, config, dq)
    dk, dv = _grads_of_keys(grad, q, k, v, lse, delta, state, blocks, config, cross @ state.weight, sums[:, 0])
    return dq, dk, dv, dweight, sums[:, 1].sum(0)[:head_dim]


def _linear_backward(
    grad: torch.Tensor, out: torch.Tensor, q: torch.Tensor, proj_bias: torch.Tensor, state: _State, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The linear branch's dq (B, L, H, D), delta (BH, L), X (BH, d, d), and a tensor (BH, 2, d) of d ks and db."""
    batch, length, heads, head_dim = q.shape
    d, bh, rows, dev = state.folded.shape[-1], batch * heads, 32, q.device
    splits, per = splits_of(length, bh, dev, rows)
    dq = torch.empty(q.shape, dtype=q.dtype, device=dev)
    delta = torch.empty((bh, length), dtype=torch.float32, device=dev)
    cross = torch.empty((bh, splits, d, d), dtype=torch.float32, device=dev)
    columns = torch.empty((bh, splits, 2, d), dtype=torch.float32, device=dev)
    _linear_q[(splits, bh)](
        q, out, grad, state.folded, state.phi_sum, proj_bias, dq, delta, cross, columns,
        *strides(q), *strides(out), *strides(grad), *strides(dq), length, heads, per,
        HEAD=head_dim, D=d, ROWS=rows, MAP=feature_map, FTZ=q.is_cuda, **FUSED, num_warps=8, num_stages=1,
    )  # fmt: skip
    return dq, delta, cross.sum(1) / state.phi_sum.clamp(min=TINY.value)[:, :, None], columns.sum(1)


def _sparse_grad_q(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    delta: torch.Tensor,
    state: _State,
    blocks: Blocks,
    config: TrainConfig,
    dq: torch.Tensor,
) -> torch.Tensor:
    """Adds the sparse branch's share to dq, in place; returns lse (BH, L) float32, base-2 logarithms of softmax
    sums.
    """
    batch, length, heads, head_dim = q.shape
    lse = torch.empty_like(delta)
    wide = max(blocks.block_q, blocks.block_k) > 64
    _grad_q[(triton.cdiv(length, blocks.block_q), batch * heads)](
        q, k, v, grad, lse, delta, state.lut, state.k_mean, dq, *strides(q), *strides(k), *strides(v), *strides(grad),
        *strides(dq), length, heads, triton.cdiv(length, blocks.block_k), state.lut.shape[-1], head_dim**-0.5,
        HEAD=head_dim, D=state.folded.shape[-1], BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k,
        RAGGED=length % blocks.block_k != 0, FTZ=q.is_cuda, **_launch(config.wide if wide else config.grad_q),
    )  # fmt: skip
    return lse


def _grads_of_keys(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    state: _State,
    blocks: Blocks,
    config: TrainConfig,
    dproducts: torch.Tensor,
    dsum: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv (B, L, H, D) of both branches together; dproducts (BH, d, d) = dKV, dsum (BH, d) = d ks, float32."""
    batch, length, heads, head_dim = q.shape
    bh, dev = batch * heads, q.device
    m, n = triton.cdiv(length, blocks.block_q), triton.cdiv(length, blocks.block_k)
    keep = torch.zeros((bh, m, n), dtype=torch.int8, device=dev).scatter_(2, state.lut.long(), 1)
    back = torch.empty((bh, n, m), dtype=torch.int32, device=dev)
    counts = torch.empty((bh, n), dtype=torch.int32, device=dev)
    _invert[(n, bh)](keep, back, counts, m, n, WIDTH=max(64, triton.next_power_of_2(m)), **FUSED, num_warps=4)
    # dKV is divided by its largest magnitude, because it shrinks with the length until fp16 rounds it to zero.
    unit = dproducts.abs().amax((1, 2)).clamp(min=TINY.value)
    dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=dev) for _ in range(2))
    wide = max(blocks.block_q, blocks.block_k) > 64
    _grad_kv[(n, bh)](
        q, k, v, grad, lse, delta, back, counts, (dproducts / unit[:, None, None]).to(q.dtype), unit, dsum.contiguous(),
        dk, dv, *strides(q), *strides(k), *strides(v), *strides(grad), *strides(dk), *strides(dv), length, heads, m,
        head_dim**-0.5, HEAD=head_dim, D=state.folded.shape[-1], BLOCK_Q=blocks.block_q, BLOCK_K=blocks.block_k,
        MAP=blocks.feature_map, FTZ=q.is_cuda, **_launch(config.wide if wide else config.grad_kv),
    )  # fmt: skip
    return dk, dv
