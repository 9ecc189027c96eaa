"""Block-sparse attention with a linear branch (SLA), quantized: the block map's kernels and the whole call.

    score_ij = mean_i(q) . mean_j(k - mean k)       the list of query block i holds the `count` largest j, ascending

A call launches six kernels: two passes over K and V with a small sum between them (prepare_triton.py), the scores of
pooled blocks, the choice of the largest scores, and the main kernel of the dense attention over the lists, which adds
the linear branch last (attend_triton.py). Beside K and V in 8 bits, the largest tensor that a call writes is the scores
(B * H, M, N).
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
    """Writes the products of the means of ROWS query blocks with the pooled keys: scores (B * H, M, N), float32.

    q's tokens are loaded STEP at a time, pooled keys CHUNK at a time.
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    b = (head // num_heads).to(tl.int64)
    h = (head % num_heads).to(tl.int64)
    member = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    base = q + b * q_b + h * q_h
    total = tl.zeros([ROWS, D], tl.float32)
    for step in range(0, BLOCK_Q, STEP):
        token = (first + member)[:, None] * BLOCK_Q + step + tl.arange(0, STEP)[None, :]
        valid = (token < length)[:, :, None] & (d < HEAD)[None, None, :]
        # (ROWS, STEP, D)
        x = tl.load(base + token.to(tl.int64)[:, :, None] * q_l + d[None, None, :], mask=valid, other=0.0)
        total += tl.sum(x.to(tl.float32), 1)
    rows = tl.minimum(tl.maximum(length - (first + member) * BLOCK_Q, 1), BLOCK_Q)
    q_mean = (total / rows[:, None]).to(pooled.dtype.element_ty)
    line = scores + (head * num_q + first + member).to(tl.int64)[:, None] * num_k
    live = (first + member < num_q)[:, None]
    for start in range(0, num_k, CHUNK):
        key_block = start + tl.arange(0, CHUNK)
        # (D, CHUNK)
        k_mean = tl.load(
            pooled + (head * num_k + key_block).to(tl.int64)[None, :] * D + d[:, None],
            mask=(key_block < num_k)[None, :],
            other=0.0,
        )
        # scores (ROWS, CHUNK)
        tl.store(line + key_block[None, :], tl.dot(q_mean, k_mean), mask=live & (key_block < num_k)[None, :])


@triton.jit(do_not_specialize=["lines", "num_k", "topk"])
def _choose(scores, lut, lines, num_k, topk, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the indices of the topk largest scores of each line, ascending; of equal scores the first are taken.

    The kernel finds the topk-th largest score bit by bit, by counting the scores that are at least a trial value. It
    takes at most 32 counts; some 20 bits usually tell this score from the next. One warp holds whole lines, so that a
    count needs no barrier.
    """
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, WIDTH)
    live = (line < lines)[:, None]
    inside = live & (index < num_k)[None, :]
    # (ROWS, WIDTH)
    bits = tl.load(scores + line[:, None] * num_k + index[None, :], mask=inside, other=0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)  # integers without sign, in the order of the scores
    key = tl.where((index < num_k)[None, :], key, 0)
    bound = tl.zeros([ROWS], tl.uint32)
    count = tl.full([ROWS], WIDTH, tl.int32)  # how many keys are at least the bound
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
    tl.store(
        lut + line[:, None] * topk + place, tl.broadcast_to(index[None, :], [ROWS, WIDTH]), mask=(chosen != 0) & live
    )


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the `count` largest scores of each line of scores (lines, N) float32, ascending.

    Of equal scores the first are taken. Returns (lines, count) int32.
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
    """The lists of key blocks, ascending: q (B, L, H, D), pooled keys (B * H, N, d) -> lut (B * H, M, count) int32.

    M = ceil(L / block_q) is how many query blocks a head has.
    """
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
    """Quantized SLA: q, k, v (B, L, H, D), bf16 or fp16 -> (result (B, L, H, D) in q's dtype, lut).

    k may be Keys with block means, which are quantized already. count: how many key blocks a query block reads.
    block_q, block_k: 64 or 128 tokens. config: None is the default. lut (B * H, M, count) int32: the lists to use; None
    makes them.
    """
    pv = product_format(q.device, pv)
    config = usable_config(config, q.device, pv, block_k, block_q)
    kv = prepare(
        k, v, block_k, pv=pv, permute=config.path == "hopper", pool=lut is None, weight=proj_weight,
        feature_map=feature_map,
    )  # fmt: skip
    if lut is None:
        assert kv.pooled is not None  # because of `pool`
        lut = select_blocks(q, kv.pooled, count, block_q)
    out = attend(
        q, kv, q.shape[1], q.shape[-1] ** -0.5, config, kv_heads=q.shape[2], lut=lut, block_q=block_q, bias=proj_bias,
        feature_map=feature_map,
    )  # fmt: skip
    return out, lut
