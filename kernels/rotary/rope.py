"""Rotary position embedding with one table per axis.

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin

x: (B, L, H, D), any float dtype, last axis contiguous. The tokens run row-major over `grid`, for a video (frames,
height, width). Axis i has tables cos[i], sin[i] of shape (grid[i], d_i), with sum d_i = D/2 and prod(grid) = L. For
Wan's 32,760 tokens these tables take 17 KB, where one table over all tokens would take 17 MB. Pair p of a head turns by
column p of the tables laid side by side. interleaved True: the pairs are (x[2p], x[2p+1]), the complex form of Wan and
Flux. False: the pairs are (x[p], x[p+D/2]), called rotate-half.

The op computes in float32 (float64 for float64 inputs) and rounds once to x's dtype. Source: arXiv 2104.09864; the
split of D into axes is Wan's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from turbocompile.kernels._registry import check, compute_dtype, register


def angles(tables: Sequence[torch.Tensor], grid: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One table over all tokens, (L, 1, D/2) in `dtype`, from the tables of all axes; it broadcasts to (B, L, H,
    D/2).
    """
    wide = []
    for axis, table in enumerate(tables):
        shape = [1] * len(grid) + [table.shape[1]]
        shape[axis] = grid[axis]
        wide.append(table.to(dtype).reshape(shape).expand(*grid, table.shape[1]))
    return torch.cat(wide, dim=-1).reshape(math.prod(grid), 1, -1)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x (..., D) with its pairs turned by the tables cos and sin, which broadcast to (..., D/2); x's dtype."""
    half = x.shape[-1] // 2
    if interleaved:
        x1, x2 = x.reshape(*x.shape[:-1], half, 2).unbind(-1)
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).reshape(x.shape)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def check_tables(
    tokens: int, head_dim: int, cos: Sequence[torch.Tensor], sin: Sequence[torch.Tensor], grid: Sequence[int]
) -> None:
    """Raises ValueError unless the tables fit `grid`, and cover `tokens` tokens and heads of `head_dim` channels."""
    check(len(cos) == len(sin) == len(grid), f"rope: {len(cos)} cos and {len(sin)} sin tables for {len(grid)} axes")
    for axis, (c, s, n) in enumerate(zip(cos, sin, grid, strict=True)):
        shapes = f"{tuple(c.shape)} and {tuple(s.shape)}"
        check(c.ndim == 2 and c.shape == s.shape and c.shape[0] == n, f"rope: axis {axis} of {n} has tables {shapes}")
    columns = sum(c.shape[1] for c in cos)
    check(
        2 * columns == head_dim, f"rope: the tables have {columns} columns, and heads of {head_dim} need half of that"
    )
    check(math.prod(grid) == tokens, f"rope: the grid {list(grid)} does not hold {tokens} tokens")


def reference(
    x: torch.Tensor,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    interleaved: bool,
) -> torch.Tensor:
    """The definition of the op: x (B, L, H, D) rotated, contiguous, x's dtype.

    Raises ValueError if the tables do not fit x.
    """
    check_tables(x.shape[1], x.shape[3], cos, sin, grid)
    wide = compute_dtype(x.dtype)
    return turn(x.to(wide), angles(cos, grid, wide), angles(sin, grid, wide), interleaved).to(x.dtype)


def _fake(
    x: torch.Tensor, cos: list[torch.Tensor], sin: list[torch.Tensor], grid: list[int], interleaved: bool
) -> torch.Tensor:
    check(x.ndim == 4, f"rope: x is (B, L, H, D), and has {x.ndim} dimensions")
    check_tables(x.shape[1], x.shape[3], cos, sin, grid)
    return x.new_empty(x.shape)


rope = register(
    "rope", "(Tensor x, Tensor[] cos, Tensor[] sin, int[] grid, bool interleaved) -> Tensor", reference, _fake
)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op by aten operators alone, which is the reference, because it does not write to views or branch on data."""
    return {rope: reference}
