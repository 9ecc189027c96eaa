"""Whether the kernel of keys_triton.py can make an attention's keys: a predicate on operands, which needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from turbocompile.kernels._registry import takes_rows
from turbocompile.kernels.rotary import qk_norm_rope

HEAD_DIMS = (64, 128)  # the head_dims that the kernel is made for
LEAST = 4096  # the fewest tokens for which the kernel is used; with fewer, two passes over k cost as little
TOKENS = 1 << 22  # the kernel takes fewer tokens than this, because it finds a token's positions by float32 division
# The most places of a table. A table may cover two neighbouring axes, whose lengths are rounded up to powers of two.
PLACES = 1 << 16
# The fewest columns of an axis that lies between two others. With fewer, four neighbouring pairs could turn by all
# three axes, and the kernel's tables cover two.
BETWEEN = 3


def takes_keys(
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> bool:
    """Whether the GPU kernel makes k from x (B, L, H * D), for a v (B, L, H, D) that the attention's kernel takes.

    The kernel needs x in v's dtype and on v's device; rows that takes_rows accepts; a head_dim in HEAD_DIMS; LEAST
    tokens or more, and fewer than TOKENS; and one to three axes, whose tables are neither too large (PLACES) nor too
    narrow (BETWEEN).
    """
    sizes = [1 << (n - 1).bit_length() for n in grid]
    places = max([*sizes, *(a * b for a, b in pairwise(sizes))])
    return (
        x.dtype == v.dtype
        and x.device == v.device
        and v.shape[3] in HEAD_DIMS
        and LEAST <= x.shape[1] < TOKENS
        and len(grid) <= qk_norm_rope.AXES
        and places <= PLACES
        and all(c.shape[1] >= BETWEEN for c in cos[1:-1])
        and takes_rows(x, weight, cos, sin)
    )
