"""SageAttention: softmax(q k^T scale) v with 8-bit products.

    k' = k - mean over tokens of k                      changes no softmax, and takes the channels' bias out of k
    q^ = rne(q * 127 / amax), sq = amax / 127           amax over 128 rows of q, over 64 rows of k', floored at 1e-7
    S  = (q^ k^^T) * (scale log2(e) sq) * sk            an exact integer product
    P  = 2^(S - max S + offset)                         unnormalized
    O  = (round(P) round(v)) / sum P * sv               the sum is of the unrounded P

pv "fp8": offset 8.807, just under log2(448), P to e4m3, v to e4m3 by channel: v * 448 / amax over tokens, amax
floored at 1e-12, sv = amax / 448. pv "fp16": offset 0, P and v / sv to float16, sv = max(amax, 65504) / 65504, which
is 1 unless v leaves float16's range.

q: (B, Lq, H, D), k, v: (B, Lk, Hkv, D), any float dtype, H a multiple of Hkv: head h reads k and v of head h // (H /
Hkv). scale multiplies the scores. is_causal: query i sees keys 0 to i. Output: (B, Lq, H, D) contiguous, q's dtype.
All that is not 8 or 16 bits above is float32 (float64 for float64 inputs). The maximum is that of the whole row; a
kernel that meets the keys block by block rounds P against the maximum so far, which is another rounding of the same
size, as is that of other blocks: the kernels' scales are those of 64 rows of q and 128 of k' (attend_triton.py).

Source: arXiv 2410.02367, 2411.10958, 2505.21136 (per-block INT8, smoothed k, FP8 P v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from turbocompile.kernels._registry import check, choose, compute_dtype, register, register_on_cuda, runs_triton
from turbocompile.kernels.quantize.quantize import quotient

LOG2E = math.log2(math.e)
BLOCK_Q, BLOCK_K = 128, 64  # rows of q and of k that share a scale
QK_LIMIT, QK_FLOOR = 127.0, 1e-7
FP8_LIMIT, V_FLOOR = 448.0, 1e-12
FP16_LIMIT = 65504.0
P_OFFSET = {"none": 0.0, "fp16": 0.0, "fp8": 8.807}  # 2^8.807 = 447.9 is the largest P in e4m3's range
SCORES = 1 << 23  # that the reference holds at a time: 32 MiB of float32
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_CHANNELS = 128
KERNEL_HEADS = 65535  # the second axis of a grid


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x, within 448 of zero, rounded to e4m3, in x's dtype."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def e4m3_in_float(x: torch.Tensor) -> torch.Tensor:
    """e4m3(x) by floating arithmetic alone, for backends without the cast: 3 bits behind the first, from 2^-6 on."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(x / step) * step


def quantize_rows(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., L, D) as integers -127..127 in x's dtype, and the rows' scales (..., L); `rows` of them share one."""
    length = x.shape[-2]
    blocks = -(-length // rows)
    padded = F.pad(x, (0, 0, 0, blocks * rows - length))
    amax = padded.reshape(*x.shape[:-2], blocks, rows * x.shape[-1]).abs().amax(-1, keepdim=True).clamp(min=QK_FLOOR)
    wide = amax.expand(*amax.shape[:-1], rows).reshape(*x.shape[:-2], blocks * rows)[..., :length]
    return torch.round(x * quotient(QK_LIMIT, wide)[..., None]), wide / QK_LIMIT


def round_values(
    v: torch.Tensor, pv: str, fp8: Callable[[torch.Tensor], torch.Tensor] = e4m3
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """v (..., L, D) as the products with P take it, in v's dtype, and the channels' scale (..., 1, D) or None."""
    if pv == "none":
        return v, None
    amax = v.abs().amax(-2, keepdim=True).clamp(min=V_FLOOR)
    if pv == "fp16":
        v_scale = amax.clamp(min=FP16_LIMIT) / FP16_LIMIT
        return (v / v_scale).to(torch.float16).to(v.dtype), v_scale
    return fp8((v * quotient(FP8_LIMIT, amax)).clamp(-FP8_LIMIT, FP8_LIMIT)), amax / FP8_LIMIT


def softmax_values(
    scores: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor | None,
    pv: str,
    fp8: Callable[[torch.Tensor], torch.Tensor] = e4m3,
) -> torch.Tensor:
    """softmax of scores (..., R, L), in bits, -inf where masked, times what round_values gives: (..., R, D)."""
    p = torch.exp2(scores - (scores.amax(-1, keepdim=True) - P_OFFSET[pv]))
    total = p.sum(-1, keepdim=True)
    if pv == "fp8":
        p = fp8(p)
    elif pv == "fp16":
        p = p.to(torch.float16).to(p.dtype)
    out = (p @ v) / total
    return out if v_scale is None else out * v_scale


def _causal(scores: torch.Tensor, first: int) -> torch.Tensor:
    """scores (..., R, L) of the queries from `first` on, with -inf where the key comes later than the query."""
    rows, columns = scores.shape[-2:]
    query = torch.arange(first, first + rows, device=scores.device)[:, None]
    return scores.masked_fill(torch.arange(columns, device=scores.device) > query, -math.inf)


def _by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    is_causal: bool,
    pv: str,
    rows: int,
    fp8: Callable[[torch.Tensor], torch.Tensor] = e4m3,
) -> Iterator[torch.Tensor]:
    """Attention of q (..., G, Lq, D) on k, v (..., 1, Lk, D), in their dtype; `rows` queries at a time."""
    q, q_scale = quantize_rows(q, BLOCK_Q)
    k, k_scale = quantize_rows(k - k.mean(-2, keepdim=True), BLOCK_K)
    v, v_scale = round_values(v, pv, fp8)
    q_scale = q_scale * (scale * LOG2E)
    for first in range(0, q.shape[-2], rows):
        part = slice(first, first + rows)
        scores = (q[..., part, :] @ k.transpose(-1, -2)) * q_scale[..., part, None] * k_scale[..., None, :]
        scores = _causal(scores, first) if is_causal else scores
        yield softmax_values(scores, v, v_scale, pv, fp8)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, pv: str
) -> torch.Tensor:
    """(B, Lq, H, D) in q's dtype; never more than SCORES scores (or 128 rows of one head group) at a time."""
    check_operands(q, k, v, pv)
    wide = compute_dtype(q.dtype)
    group, tokens = q.shape[2] // k.shape[2], k.shape[1]
    heads = max(1, SCORES // (group * min(BLOCK_Q, q.shape[1]) * tokens))  # of k and v at a time
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for batch in range(q.shape[0]):
        for head in range(0, k.shape[2], heads):
            some = slice(head, head + heads)
            queries = slice(head * group, (head + heads) * group)
            keys, values = (t[batch, :, some].to(wide).permute(1, 0, 2).unsqueeze(1) for t in (k, v))
            grouped = q[batch, :, queries].to(wide).permute(1, 0, 2).unflatten(0, (-1, group))
            rows = max(1, SCORES // (grouped.shape[0] * group * tokens * BLOCK_Q)) * BLOCK_Q
            parts = _by_heads(grouped, keys, values, scale, is_causal, pv, rows)
            out[batch, :, queries] = torch.cat(list(parts), dim=-2).flatten(0, 1).permute(1, 0, 2).to(q.dtype)
    return out


def has_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the GPU kernels compute these operands; the reference does where they don't.

    One dtype for all three, bf16 or fp16; at most 128 channels; no empty axis; compute capability 8.0 or later.
    """
    return (
        q.dtype in KERNEL_DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] <= KERNEL_CHANNELS
        and q.shape[0] * q.shape[2] <= KERNEL_HEADS
        and min(*q.shape, *k.shape) > 0
        and q.device == k.device == v.device
        and runs_triton(q.device)
    )


def rows_of_channels(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last axis, as the kernels read it: a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, pv: str, config: Any = None
) -> torch.Tensor:
    """The kernels where they serve: they take the largest integer for the largest score, so scale is not negative.

    config: an AttendConfig of attend_triton.py for the main kernel; None is its default.
    """
    check_operands(q, k, v, pv)
    if not (scale >= 0 and has_kernel(q, k, v)):
        return reference(q, k, v, scale, is_causal, pv)
    from turbocompile.kernels.attention.attend_triton import (
        sage_forward,  # here: a machine without a GPU may lack Triton
    )

    q, k, v = (rows_of_channels(t) for t in (q, k, v))
    with torch.cuda.device(q.device):
        return sage_forward(q, k, v, scale, is_causal, pv, config)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pv: str) -> None:
    """ValueError unless q (B, Lq, H, D) fits k and v, both (B, Lk, Hkv, D), and there is such a pv."""
    choose("sage_attention: pv", pv, "fp8", "fp16")
    check(q.ndim == k.ndim == v.ndim == 4, "sage_attention: q, k and v are (B, L, H, D)")
    check(k.shape == v.shape, f"sage_attention: k is {list(k.shape)} and v {list(v.shape)}")
    check(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0,
        f"sage_attention: q of {list(q.shape)} does not fit k of {list(k.shape)}",
    )


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, pv: str) -> torch.Tensor:
    check_operands(q, k, v, pv)
    return q.new_empty(q.shape)


sage_attention = register(
    "sage_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, bool is_causal, str pv) -> Tensor",
    reference,
    _fake,
)
register_on_cuda(sage_attention, on_cuda)


def _decomposition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, pv: str
) -> torch.Tensor:
    """All rows and heads at once, and e4m3 by floating arithmetic."""
    check_operands(q, k, v, pv)
    wide = compute_dtype(q.dtype)
    keys, values = (t.to(wide).permute(0, 2, 1, 3).unsqueeze(2) for t in (k, v))
    grouped = q.to(wide).permute(0, 2, 1, 3).reshape(q.shape[0], k.shape[2], -1, q.shape[1], q.shape[3])
    (out,) = _by_heads(grouped, keys, values, scale, is_causal, pv, q.shape[1], e4m3_in_float)
    return out.flatten(1, 2).permute(0, 2, 1, 3).to(q.dtype).contiguous()


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op in aten, in one piece."""
    return {sage_attention: _decomposition}
