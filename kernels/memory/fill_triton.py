"""A kernel that does the work of a memset: it sets a range of device memory, given by its address, to one word.

runtime/cuda_memsets.py puts this kernel in the place of memsets in CUDA graphs.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import triton
import triton.language as tl
from turbocompile.kernels._registry import FUSED

WORDS = 1024  # how many words a program fills; a typical memset sets one word, the counter of a library's kernel


@triton.jit(do_not_specialize=["address", "word", "count"])
def _fill(address, word, count, WORDS: tl.constexpr):
    """Sets the `count` words of 32 bits from `address` on to `word`."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    start = address.to(tl.int64).to(tl.pointer_type(tl.int32))
    tl.store(start + at, tl.full([WORDS], 0, tl.int32) + word.to(tl.int32), mask=at < count)


def launch_fill(address: int, word: int, count: int) -> None:
    """Sets the `count` int32 words from `address` on to `word`, a signed 32-bit integer.

    address: an address in the current device's memory, a multiple of 4.
    """
    _fill[(triton.cdiv(count, WORDS),)](address, word, count, WORDS=WORDS, **FUSED, num_warps=4)
