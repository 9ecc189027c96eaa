"""How much PyTorch's caching allocator takes from a card for a sequence of allocations.

Memory that was freed is kept in blocks, and a block that fits is split: so a run reserves more than is alive at once.
The rules are those of c10/cuda/CUDACachingAllocator.cpp (the default settings): sizes are rounded up to 512 bytes; up
to 1 MiB come from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, larger ones have segments of their own in
steps of 2 MiB; the smallest free block that fits is taken; what is left of it becomes a free block if it is larger than
1 MiB (512 bytes in small segments); a freed block joins its free neighbours. With expandable segments
(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) there is one segment for small and one for large requests, which
grows at its end by 2 and 20 MiB at a time.
"""

from __future__ import annotations

import os
from bisect import insort
from collections.abc import Iterable

from turbocompile.ir.memory import Allocation

MIB = 1 << 20
ROUND = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB  # requests up to SMALL share segments of SMALL_SEGMENT
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB


def rounded(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def segment_bytes(size: int) -> int:
    """The memory that is taken from the card for a request that no free block fits."""
    size = rounded(size, ROUND)
    if size <= SMALL:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if size < MIDDLE else rounded(size, SMALL_SEGMENT)


def has_expandable_segments() -> bool:
    """Whether the process has the allocator use expandable segments."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in s.replace(" ", "").lower() for s in settings)


class _Block:
    __slots__ = ("address", "after", "before", "size", "small")

    def __init__(self, size: int, address: int, small: bool) -> None:
        self.size, self.address, self.small = size, address, small
        self.before: _Block | None = None
        self.after: _Block | None = None

    def __lt__(self, other: _Block) -> bool:
        return (self.size, self.address) < (other.size, other.address)


class CudaAllocator:
    """The allocator's blocks. reserved: bytes taken from the card; allocated: bytes in use; the peaks of both."""

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._free: dict[bool, list[_Block]] = {True: [], False: []}
        self._used: dict[int, _Block] = {}
        self._next = 0
        self._tail: dict[bool, _Block | None] = {True: None, False: None}  # the last block of an expandable segment

    def run(self, events: Iterable[Allocation]) -> CudaAllocator:
        """Follows the events. Returns itself."""
        for event in events:
            if event.bytes:
                self.allocate(event.id, event.bytes)
            else:
                self.free(event.id)
        return self

    def allocate(self, key: int, size: int) -> None:
        """Takes a block for `key`."""
        size = rounded(size, ROUND)
        small = size <= SMALL
        block = next((b for b in self._free[small] if b.size >= size), None)
        if block is None:
            block = self._segment(size, small)
        else:
            self._free[small].remove(block)
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            self._split(block, size)
        self._used[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: int) -> None:
        """Gives the block of `key` back."""
        block = self._used.pop(key)
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other in self._free[block.small]:
                self._free[block.small].remove(other)
                block = self._joined(*sorted((block, other), key=lambda b: b.address))
        insort(self._free[block.small], block)

    def _segment(self, size: int, small: bool) -> _Block:
        """A new block that is free, of at least `size` bytes."""
        tail = self._tail[small] if self.expandable else None
        free = tail is not None and tail in self._free[small]
        step = SMALL_SEGMENT if small else MIDDLE_SEGMENT
        grown = rounded(size - (tail.size if free and tail else 0), step) if self.expandable else segment_bytes(size)
        self.reserved += grown
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        made = _Block(grown, self._next, small)
        self._next += grown
        if self.expandable:
            made.before, self._tail[small] = tail, made
            if tail is not None:
                made.address, tail.after = tail.address + tail.size, made
            if free and tail is not None:
                self._free[small].remove(tail)
                return self._joined(tail, made)
        return made

    def _split(self, block: _Block, size: int) -> None:
        """Leaves the first `size` bytes to the block, and makes a free block of the rest."""
        rest = _Block(block.size - size, block.address + size, block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if self._tail[block.small] is block:
            self._tail[block.small] = rest
        insort(self._free[block.small], rest)

    def _joined(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._tail[first.small] is second:
            self._tail[first.small] = first
        return first
