"""What stands between the projection of q (or k) and attention: RMSNorm, heads, rotary, layout.

x (B, L, H * D) -> x / sqrt(mean(x^2) + eps) * weight, the mean over all channels (per_head False, weight (H * D)) or
over each head's (per_head True, weight (D)), weight or None; then heads (B, L, H, D); then rotary (rope.py) unless
cos is empty, as for the keys of a cross-attention. Everything in float32 (float64 for float64 inputs), rounded once
to x's dtype; the result is contiguous (B, L, H, D), attention's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from turbocompile.kernels._registry import check, compute_dtype, register, register_kernel, takes_rows
from turbocompile.kernels.norms.norm_quantize import normalize
from turbocompile.kernels.rotary import rope

AXES = 3  # by whose tables the kernel turns


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
    check_operands(x, weight, per_head, num_heads, cos, sin, grid)
    y = x.to(compute_dtype(x.dtype))
    if per_head:
        y = normalize(y.unflatten(-1, (num_heads, -1)), weight, None, eps, "rms")
    else:
        y = normalize(y, weight, None, eps, "rms").unflatten(-1, (num_heads, -1))
    if cos:
        y = rope.reference(y, cos, sin, grid, interleaved)
    return y.to(x.dtype).contiguous()


def check_operands(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    per_head: bool,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> None:
    check(x.ndim == 3, f"qk_norm_rope: x is (B, L, H * D), and has {x.ndim} dimensions")
    channels = x.shape[2]
    check(num_heads > 0 and channels % num_heads == 0, f"qk_norm_rope: {channels} channels, {num_heads} heads")
    width = channels // num_heads if per_head else channels
    fits = weight is None or (weight.ndim == 1 and weight.shape[0] == width)
    check(fits, f"qk_norm_rope: the weight is not a vector of {width} channels")
    if cos or sin:
        rope.check_tables(x.shape[1], channels // num_heads, cos, sin, grid)


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
    check_operands(x, weight, per_head, num_heads, cos, sin, grid)
    return x.new_empty((x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads))


qk_norm_rope = register(
    "qk_norm_rope",
    "(Tensor x, Tensor? weight, float eps, bool per_head, int num_heads, Tensor[] cos, Tensor[] sin, int[] grid, "
    "bool interleaved) -> Tensor",
    reference,
    _fake,
)


def has_kernel(x: torch.Tensor, weight: torch.Tensor | None, *others: Any) -> bool:
    """Whether the GPU kernel computes these operands: rows as takes_rows says, turned by at most three axes."""
    _, _, _, cos, sin, *_ = others
    return len(cos) <= AXES and takes_rows(x, weight, cos, sin)


register_kernel(qk_norm_rope, reference, has_kernel, "rotary.rotary_triton.launch_qk_norm_rope")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op in aten: the reference has no branches on data."""
    return {qk_norm_rope: reference}
