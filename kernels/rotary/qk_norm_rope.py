"""The steps between the projection of q (or k) and attention: RMSNorm, split into heads, rotary, attention's layout.

    n = x / sqrt(mean(x^2) + eps) * weight      over all H * D channels, or, with per_head, over the D channels of a
    head y = n, split into heads, rotated            rope.py; not rotated if cos is empty

x: (B, L, H * D), any float dtype. weight: (H * D,), or (D,) with per_head, or None, which leaves the factor out. cos,
sin, grid, interleaved: as in rope.py; empty cos and sin leave the rotation out, as for the keys of a cross-attention.
The op computes in float32 (float64 for float64 inputs) and rounds once to x's dtype. y: (B, L, H, D), contiguous.

Source: RMSNorm, arXiv 1910.07467; RoPE, arXiv 2104.09864; the order of the steps is that of Wan's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from turbocompile.kernels._registry import check, compute_dtype, register, register_kernel, takes_rows
from turbocompile.kernels.norms.norm_quantize import normalize
from turbocompile.kernels.rotary import rope

AXES = 3  # the most axes by whose tables the kernel turns


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
    """The definition of the op: (B, L, H, D) in x's dtype. Raises ValueError if the operands do not fit each other."""
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
    """Raises ValueError unless x, the weight, the tables and the grid fit each other; shapes as in the module."""
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
    """Whether the GPU kernel computes these operands: takes_rows accepts them, and at most AXES axes turn the pairs."""
    _, _, _, cos, sin, *_ = others
    return len(cos) <= AXES and takes_rows(x, weight, cos, sin)


register_kernel(qk_norm_rope, reference, has_kernel, "rotary.rotary_triton.launch_qk_norm_rope")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op by aten operators alone, which is the reference, because it does not branch on data."""
    return {qk_norm_rope: reference}
