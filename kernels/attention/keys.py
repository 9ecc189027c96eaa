"""Which keys the kernel of keys_triton.py makes: a predicate on operands, which needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from turbocompile.kernels._registry import takes_rows
from turbocompile.kernels.rotary import qk_norm_rope

HEAD_DIMS = (64, 128)  # that the kernel is made for
LEAST = 4096  # tokens; with fewer, two passes over k cost as little
TOKENS = 1 << 22  # fewer than this are divided among the axes as floats are
PLACES = 1 << 16  # of two neighbouring axes, each a power of two long: one table of the kernel's may hold both
BETWEEN = 3  # columns of an axis that lies between two; with fewer, four neighbouring pairs may turn by all three axes


def takes_keys(
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> bool:
    """Whether the GPU kernel makes k of operands that fit, with a v that the attention's kernel takes.

    v's dtype and device; rows as takes_rows says; HEAD_DIMS channels a head; from LEAST to TOKENS tokens; one to three
    axes, whose tables are not too large (PLACES) nor too narrow (BETWEEN).
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
