"""A range of device memory set to one word, by address: what a memset does, as a kernel (cuda_memsets.py says why)."""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import triton
import triton.language as tl
from turbocompile.kernels._registry import FUSED

WORDS = 1024  # a program's: a memset in a step is of one word, the counter of a library's kernel


@triton.jit(do_not_specialize=["address", "word", "count"])
def _fill(address, word, count, WORDS: tl.constexpr):
    """The `count` words of 32 bits from `address` on become `word`."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    start = address.to(tl.int64).to(tl.pointer_type(tl.int32))
    tl.store(start + at, tl.full([WORDS], 0, tl.int32) + word.to(tl.int32), mask=at < count)


def launch_fill(address: int, word: int, count: int) -> None:
    """Sets the `count` int32 words from `address` of the current device on, a multiple of 4, to `word` (signed)."""
    _fill[(triton.cdiv(count, WORDS),)](address, word, count, WORDS=WORDS, **FUSED, num_warps=4)
