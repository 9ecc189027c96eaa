"""Block-sparse attention with a linear branch (SLA), quantized: the block map's kernels and the whole call.

    score_ij = mean_i(q) . mean_j(k - mean k)       the count largest j of each query block i, ascending, are its list

Six launches: two passes over K and V with a small sum between them (prepare_triton.py), scores of pooled blocks, their
choice, and the dense attention's main kernel over the lists, with the linear branch as its epilogue
(attend_triton.py). Beside K and V in 8 bits nothing larger than the scores (B H, M, N) is written.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from turbocompile.kernels._registry import FUSED
from turbocompile.kernels.attention.attend_triton import AttendConfig, attend, product_format, usable_config
from turbocompile.kernels.attention.prepare_triton import Keys, prepare, strides


@triton.jit(do_not_specialize=["length", "num_heads", "num_q", "num_k"])
def _scores(
    q, pooled, scores,
    q_b, q_l, q_h,
    length, num_heads, num_q, num_k,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Means of ROWS blocks of q, and their products with the pooled keys: scores (B*H, M, N) float32."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    base = q + b * q_b + h * q_h
    total = tl.zeros([ROWS, D], tl.float32)
    for step in range(0, BLOCK_Q, STEP):
        token = (first + r)[:, None] * BLOCK_Q + step + tl.arange(0, STEP)[None, :]
        valid = (token < length)[:, :, None] & (d < HEAD)[None, None, :]
        # (ROWS, STEP, D)
        x = tl.load(base + token.to(tl.int64)[:, :, None] * q_l + d[None, None, :], mask=valid, other=0.0)
        total += tl.sum(x.to(tl.float32), 1)
    rows = tl.minimum(tl.maximum(length - (first + r) * BLOCK_Q, 1), BLOCK_Q)
    qp = (total / rows[:, None]).to(pooled.dtype.element_ty)
    line = scores + (head * num_q + first + r).to(tl.int64)[:, None] * num_k
    live = (first + r < num_q)[:, None]
    for start in range(0, num_k, CHUNK):
        n = start + tl.arange(0, CHUNK)
        # (D, CHUNK)
        kp = tl.load(
            pooled + (head * num_k + n).to(tl.int64)[None, :] * D + d[:, None], mask=(n < num_k)[None, :], other=0.0
        )
        tl.store(line + n[None, :], tl.dot(qp, kp), mask=live & (n < num_k)[None, :])  # scores (ROWS, CHUNK)


@triton.jit(do_not_specialize=["lines", "num_k", "topk"])
def _choose(scores, lut, lines, num_k, topk, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The topk largest of each line of scores, as ascending indices; of equal ones the lower index.

    The k-th largest is found bit by bit, by counts over registers: 32 at most, but some 20 bits tell it from the next.
    One warp holds whole lines, so a count needs no barrier.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    live = (r < lines)[:, None]
    inside = live & (n < num_k)[None, :]
    # (ROWS, WIDTH)
    bits = tl.load(scores + r[:, None] * num_k + n[None, :], mask=inside, other=0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)  # unsigned order = order of the floats
    key = tl.where((n < num_k)[None, :], key, 0)
    bound = tl.zeros([ROWS], tl.uint32)
    count = tl.full([ROWS], WIDTH, tl.int32)  # of keys that are at least the bound
    bit = tl.full([ROWS], 0x80000000, tl.uint32)
    turns = 0
    while turns < 32 and tl.max((count != topk).to(tl.int32), 0) != 0:
        trial = bound | bit
        bit = bit >> 1
        kept = tl.sum((key >= trial[:, None]).to(tl.int32), 1)
        bound = tl.where(kept >= topk, trial, bound)
        count = tl.where(kept >= topk, kept, count)
        turns += 1
    above = (key > bound[:, None]).to(tl.int32)
    equal = (key == bound[:, None]).to(tl.int32)
    need = topk - tl.sum(above, 1)
    chosen = above | (equal & (tl.cumsum(equal, 1) <= need[:, None]).to(tl.int32))
    place = tl.cumsum(chosen, 1) - 1
    tl.store(lut + r[:, None] * topk + place, tl.broadcast_to(n[None, :], [ROWS, WIDTH]), mask=(chosen != 0) & live)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Of each line of scores (lines, N) float32 the places of the count largest, ascending: (lines, count) int32.

    Of equal scores the first are taken.
    """
    lines, n = scores.shape
    found = torch.empty((lines, count), dtype=torch.int32, device=scores.device)
    width = max(64, triton.next_power_of_2(n))
    rows = max(1, 1024 // width)
    _choose[(triton.cdiv(lines, rows),)](
        scores, found, lines, n, count, ROWS=rows, WIDTH=width,
        **FUSED, num_warps=max(1, width // 2048), num_stages=1,
    )  # fmt: skip
    return found


def select_blocks(q: torch.Tensor, pooled: torch.Tensor, count: int, block_q: int) -> torch.Tensor:
    """q (B, L, H, D), pooled keys (B H, N, d) -> lut (B H, ceil(L / block_q), count) int32, ascending."""
    batch, length, heads, head_dim = q.shape
    bh, m, n, d = batch * heads, triton.cdiv(length, block_q), pooled.shape[1], pooled.shape[2]
    scores = torch.empty((bh, m, n), dtype=torch.float32, device=q.device)
    _scores[(triton.cdiv(m, 16), bh)](
        q, pooled, scores, *strides(q), length, heads, m, n,
        HEAD=head_dim, D=d, BLOCK_Q=block_q, ROWS=16, STEP=4, CHUNK=64, **FUSED, num_warps=8, num_stages=2,
    )  # fmt: skip
    return largest(scores.view(bh * m, n), count).view(bh, m, count)


def sla_forward(
    q: torch.Tensor,
    k: torch.Tensor | Keys,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    count: int,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
    config: AttendConfig | None = None,
    lut: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized SLA: q, k, v (B, L, H, D) bf16 or fp16, blocks of 64 or 128 -> (result (B, L, H, D), lut).

    count: key blocks a query block reads. A lut given is used as it is. k may come quantized, with its block means.
    """
    pv = product_format(q.device, pv)
    config = usable_config(config, q.device, pv, block_k, block_q)
    kv = prepare(
        k, v, block_k, pv=pv, permute=config.path == "hopper", pool=lut is None, weight=proj_weight,
        feature_map=feature_map,
    )  # fmt: skip
    if lut is None:
        assert kv.pooled is not None  # `pool` asked for them
        lut = select_blocks(q, kv.pooled, count, block_q)
    out = attend(
        q, kv, q.shape[1], q.shape[-1] ** -0.5, config, kv_heads=q.shape[2], lut=lut, block_q=block_q, bias=proj_bias,
        feature_map=feature_map,
    )  # fmt: skip
    return out, lut
