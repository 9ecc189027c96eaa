"""Attention in the form that every runtime of ONNX computes alike: out = softmax(scale q k^T + bias) v.

torch's scaled_dot_product_attention broadcasts its mask and its batches, takes tensors of any rank and any scale, and
returns zeros for a query that may attend to no key. ONNX's Attention defines fewer of these cases, and its runtimes
take fewer still: onnxruntime needs a mask of full size in both directions and a scale above zero, computes a float64
attention in float32, and gives a query without a key zeros, a mean or NaN, by version. So this module writes these
cases in plain operators around an attention of rank 4, with a mask of full size and a key for each query.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """aten.scaled_dot_product_attention, to be traced: (..., H, Lq, D), (..., H, Lk, D), (..., H, Lk, Dv) of any rank.

    attn_mask: bool (True: attend) or floating point (added), of any shape that broadcasts to (..., H, Lq, Lk).
    dropout_p: must be 0, because a dropout is random and no ONNX file can hold it.
    """
    if enable_gqa:
        k, v = (_repeat_heads(t, q) for t in (k, v)) if k.shape[-3] != v.shape[-3] else (k, v)
    mask = attn_mask
    grouped = enable_gqa and k.shape[-3] != q.shape[-3]
    lead = _broadcast_lead(q, k, v, grouped)
    out_shape = (*lead, q.shape[-2], v.shape[-1])
    lengths = (q.shape[-2], k.shape[-2])
    if is_causal and lengths[0] != lengths[1]:  # runtimes differ in the corner that the triangle starts from
        mask, is_causal = _causal(lengths, q.device), False
    q = _of_rank_4(q, lead)
    k, v = (_of_rank_4(t, (*lead[:-1], t.shape[-3]) if grouped else lead) for t in (k, v))
    if scale is not None and scale <= 0:
        q, scale = q * scale, 1.0
    if mask is None:
        return _attend(q, k, v, None, is_causal, scale).reshape(out_shape)
    bias, seen = _whole(mask, q.dtype)
    bias = _of_rank_4(bias.expand(*bias.shape[:-2], *lengths), lead, keep=True)
    out = _attend(q, k, v, bias, False, scale).reshape(out_shape)
    return torch.where(seen, out, 0.0)


def _repeat_heads(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """k or v with as many heads as q has, each repeated for the heads of its group."""
    return t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3)


def _broadcast_lead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> tuple[int, ...]:
    """The batches and heads of the result. With grouped heads q's count, because k and v have fewer."""
    if not grouped:
        return tuple(torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v))))
    return (*torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v))), q.shape[-3])


def _of_rank_4(t: torch.Tensor, lead: tuple[int, ...], keep: bool = False) -> torch.Tensor:
    """(..., M, N) expanded to the batches and heads of `lead`, as (batch, heads, M, N).

    keep: batches or heads that are all 1 stay 1, as a mask may have them.
    """
    *given, rows, columns = t.shape
    given = [1] * (len(lead) - len(given)) + given
    heads = lead[-1] if lead else 1
    batch = lead[:-1]
    if keep:
        heads = given[-1] if given else 1
        batch = batch if any(n != 1 for n in given[:-1]) else (1,) * len(batch)
    wanted = (*batch, heads) if lead else ()
    return t.expand(*wanted, rows, columns).reshape(math.prod(batch), heads, rows, columns)


def _causal(lengths: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A mask (Lq, Lk) that lets query i attend to the keys 0 to i. It takes the place of is_causal, never of a mask."""
    return torch.ones(lengths, dtype=torch.bool, device=device).tril()


def _whole(mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of rank 2 or more that leaves every row a finite sum, and whether each row had a key: (..., 1) bool.

    A finite bias becomes at least half of the lowest number. Masks are often written with lowest numbers: a row of them
    hides no key, and their sum with a score must not be the infinity, or a number that onnxruntime takes for it.
    """
    while mask.dim() < 2:
        mask = mask.unsqueeze(0)
    if mask.dtype == torch.bool:
        return mask, mask.any(-1, keepdim=True)
    hidden = mask == -torch.inf
    seen = ~hidden.all(-1, keepdim=True)
    if dtype == torch.float64:
        return mask.to(dtype), seen
    lowest, finite = torch.finfo(dtype).min, mask
    if dtype == torch.float16:  # torch adds in float32, where a score still changes a sum with the lowest float16
        finite = mask.float()
        top = torch.where(hidden, torch.finfo(torch.float32).min, finite).amax(-1, keepdim=True)
        finite = torch.where(top > -(2.0**24), finite - top, finite)  # with a number this low it does not
    finite = finite.clamp(min=lowest / 2)
    return torch.where(hidden, lowest, finite).to(dtype), seen


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """ONNX's Attention; in float64 its definition in plain operators, because onnxruntime computes it in float32."""
    if q.dtype != torch.float64:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = _causal((q.shape[-2], k.shape[-2]), q.device)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v
