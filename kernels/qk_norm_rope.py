"""What stands between the projection of q (or k) and attention: RMSNorm, heads, rotary, layout.

x (B, L, H * D) -> x / sqrt(mean(x^2) + eps) * weight, the mean over all channels (per_head False, weight (H * D)) or over
each head's (per_head True, weight (D)); then heads (B, L, H, D); then rotary (rope.py) unless cos is empty. Everything in
float32 (float64 for float64 inputs), rounded once to x's dtype; the result is contiguous (B, L, H, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from turbocompile.kernels import rope
from turbocompile.kernels._common import compute_dtype, register
from turbocompile.kernels.norm_quantize import normalize


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    per_head: bool,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    interleaved: bool,
) -> torch.Tensor:
    """(B, L, H, D) in x's dtype."""
    y = x.to(compute_dtype(x.dtype))
    if per_head:
        y = normalize(y.unflatten(-1, (num_heads, -1)), weight, None, eps, "rms")
    else:
        y = normalize(y, weight, None, eps, "rms").unflatten(-1, (num_heads, -1))
    if cos:
        y = rope.reference(y, cos, sin, grid, interleaved)
    return y.to(x.dtype).contiguous()


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    per_head: bool,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    interleaved: bool,
) -> torch.Tensor:
    batch, tokens, channels = x.shape
    if channels % num_heads:
        raise ValueError(f"qk_norm_rope: {channels} channels do not split into {num_heads} heads")
    head_dim = channels // num_heads
    if weight is not None and tuple(weight.shape) != ((head_dim,) if per_head else (channels,)):
        raise ValueError(
            f"qk_norm_rope: a weight of {list(weight.shape)} does not fit {num_heads} x {head_dim} channels"
        )
    if cos:
        rope.check_tables(tokens, head_dim, cos, sin, grid)
    return x.new_empty((batch, tokens, num_heads, head_dim))


qk_norm_rope = register(
    "qk_norm_rope",
    "(Tensor x, Tensor? weight, float eps, bool per_head, int num_heads, Tensor[] cos, Tensor[] sin, int[] grid, "
    "bool interleaved) -> Tensor",
    reference,
    _fake,
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops in aten: the references have no branches on data."""
    return {qk_norm_rope: reference}
