"""SageAttention: softmax(q k^T scale) v with 8-bit products.

    k' = k - mean over tokens of k                      changes no softmax, and removes the channels' bias from k
    q^ = rne(q * 127 / amax), sq = amax / 127           k^, sk likewise of k'; amax over 128 rows of q, over 64 rows of
                                                        k', floored at 1e-7
    S  = (q^ k^^T) * (scale log2(e) sq) * sk            an exact integer product
    P  = 2^(S - max S + offset)                         unnormalized
    O  = (round(P) round(v)) / sum P * sv               the sum is of the unrounded P

pv "fp8": offset is 8.807, just under log2(448). P is rounded to e4m3, and v to e4m3 by channel: v * 448 / amax, amax
over tokens, floored at 1e-12, sv = amax / 448. pv "fp16": offset is 0. P and v / sv are rounded to float16, with sv =
max(amax, 65504) / 65504, which is 1 unless v leaves float16's range.

q: (B, Lq, H, D), k, v: (B, Lk, Hkv, D), any float dtype, H a multiple of Hkv: head h reads k and v of head
h // (H / Hkv). scale multiplies the scores. is_causal: query i sees keys 0 to i. Output: (B, Lq, H, D), contiguous, q's
dtype. Every value above that is not in 8 or 16 bits is float32 (float64 for float64 inputs).

The reference takes the maximum over the whole row. A kernel visits the keys block by block and rounds P against the
maximum so far, so that its rounding errors differ, but are of the same size. The same holds for the scales, which the
kernels take over 64 rows of q and 128 rows of k' (attend_triton.py).

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
BLOCK_Q, BLOCK_K = 128, 64  # how many rows of q, and of k, share a scale
QK_LIMIT, QK_FLOOR = 127.0, 1e-7  # the largest INT8 code; the least amax of a block
FP8_LIMIT, V_FLOOR = 448.0, 1e-12  # e4m3's largest value; the least amax of a channel of v
FP16_LIMIT = 65504.0  # float16's largest value
P_OFFSET = {"none": 0.0, "fp16": 0.0, "fp8": 8.807}  # 2^8.807 = 447.9: the largest P just fits e4m3's range
SCORES = 1 << 23  # how many scores the reference holds at a time, which are 32 MiB of float32
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_CHANNELS = 128  # the largest head_dim that the kernels compute
KERNEL_HEADS = 65535  # the most batch items times heads, which are the second axis of a launch's grid


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x, whose magnitudes are at most 448, rounded to e4m3, in x's dtype."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def e4m3_in_float(x: torch.Tensor) -> torch.Tensor:
    """e4m3(x) by floating-point arithmetic alone, for backends without a cast to e4m3.

    e4m3 has 3 bits of mantissa and no normal number below 2^-6.
    """
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(x / step) * step


def quantize_rows(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x (..., L, D): integers -127..127 in x's dtype (..., L, D), and the scale of each row (..., L).

    `rows` rows share a scale; the last rows may be fewer.
    """
    length = x.shape[-2]
    blocks = -(-length // rows)
    padded = F.pad(x, (0, 0, 0, blocks * rows - length))
    amax = padded.reshape(*x.shape[:-2], blocks, rows * x.shape[-1]).abs().amax(-1, keepdim=True).clamp(min=QK_FLOOR)
    wide = amax.expand(*amax.shape[:-1], rows).reshape(*x.shape[:-2], blocks * rows)[..., :length]
    return torch.round(x * quotient(QK_LIMIT, wide)[..., None]), wide / QK_LIMIT


def round_values(
    v: torch.Tensor, pv: str, fp8: Callable[[torch.Tensor], torch.Tensor] = e4m3
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """v (..., L, D), rounded to the format pv, in v's dtype, and the channels' scale (..., 1, D).

    With pv "none" v stays as it is, and the scale is None.
    """
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
    """The softmax of scores (..., R, L) times the values v (..., L, D): (..., R, D).

    scores: base-2 logarithms (the scores times log2 e), -inf where masked. v, v_scale: the results of round_values.
    """
    p = torch.exp2(scores - (scores.amax(-1, keepdim=True) - P_OFFSET[pv]))
    total = p.sum(-1, keepdim=True)
    if pv == "fp8":
        p = fp8(p)
    elif pv == "fp16":
        p = p.to(torch.float16).to(p.dtype)
    out = (p @ v) / total
    return out if v_scale is None else out * v_scale


def _causal(scores: torch.Tensor, first: int) -> torch.Tensor:
    """The scores (..., R, L) of the queries from `first` on, with -inf where the key comes after the query."""
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
    """Yields the attention of q (..., G, Lq, D) on k, v (..., 1, Lk, D), in their dtype, for `rows` queries at a
    time.
    """
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
    """The definition of the op: (B, Lq, H, D) in q's dtype.

    It holds at most SCORES scores at a time, or those of 128 rows of one group of heads if these are more. Raises
    ValueError if the operands do not fit each other.
    """
    check_operands(q, k, v, pv)
    wide = compute_dtype(q.dtype)
    group, tokens = q.shape[2] // k.shape[2], k.shape[1]
    heads = max(1, SCORES // (group * min(BLOCK_Q, q.shape[1]) * tokens))  # how many heads of k and v at a time
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
    """Whether the GPU kernels compute these operands; the reference computes all others.

    The kernels need one dtype for q, k and v, bf16 or fp16; at most 128 channels; no empty axis; and compute capability
    8.0 or later.
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
    """x, or a copy of x if its last axis is not contiguous, because the kernels read contiguous channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, pv: str, config: Any = None
) -> torch.Tensor:
    """The op on CUDA: the kernels compute the operands that they take, and the reference all others.

    The kernels need a scale that is not negative, because they take the largest integer product for the largest score.
    config: an AttendConfig of attend_triton.py for the main kernel; None is the default.
    """
    check_operands(q, k, v, pv)
    if not (scale >= 0 and has_kernel(q, k, v)):
        return reference(q, k, v, scale, is_causal, pv)
    # Imported here, because a machine without a GPU may lack Triton.
    from turbocompile.kernels.attention.attend_triton import sage_forward

    q, k, v = (rows_of_channels(t) for t in (q, k, v))
    with torch.cuda.device(q.device):
        return sage_forward(q, k, v, scale, is_causal, pv, config)


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pv: str) -> None:
    """Raises ValueError unless q (B, Lq, H, D) fits k and v, both (B, Lk, Hkv, D), and pv is "fp8" or "fp16"."""
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
    """The op in aten, for all rows and heads at once, with e4m3 by floating-point arithmetic."""
    check_operands(q, k, v, pv)
    wide = compute_dtype(q.dtype)
    keys, values = (t.to(wide).permute(0, 2, 1, 3).unsqueeze(2) for t in (k, v))
    grouped = q.to(wide).permute(0, 2, 1, 3).reshape(q.shape[0], k.shape[2], -1, q.shape[1], q.shape[3])
    (out,) = _by_heads(grouped, keys, values, scale, is_causal, pv, q.shape[1], e4m3_in_float)
    return out.flatten(1, 2).permute(0, 2, 1, 3).to(q.dtype).contiguous()


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op by aten operators alone."""
    return {sage_attention: _decomposition}
