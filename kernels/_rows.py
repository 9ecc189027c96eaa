"""Rows of activations as the kernels over rows take them: views, pieces in registers, configurations.

A row of C channels is held as two or three pieces whose widths are powers of two, 5120 = 4096 + 1024, because as one
piece of 8192 three eighths of the arithmetic would be on padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from turbocompile.kernels._registry import ROW_DTYPES, WIDEST, card

from turbocompile.errors import UnsupportedError


@dataclass(frozen=True)
class RowConfig:
    """A configuration of a kernel over rows."""

    warps: int
    rows: int  # that a program takes
    registers: int | None = (
        None  # a thread may use at most, for a layer norm of 16-bit x, because other norms need less
    )
    near: int = (
        8  # neighbouring elements in a thread at most: 16 float32 of a vector, 64 bytes, would be served 2 a clock
    )

    def limit(self, x: torch.Tensor) -> dict[str, int]:
        """The limit of registers as a launch takes it; none for float32 x, which needs more registers."""
        return {} if self.registers is None or x.element_size() > 2 else {"maxnreg": self.registers}


# The declared set, by the widest row that each takes. A thread has 32 to 48 elements of a row, so that sums across
# threads cost little (at 1536 none is across warps) and the 16 warps fit that 128 registers a thread allow.
ROW_CONFIGS = {
    1536: RowConfig(1, 8, 128),
    3072: RowConfig(2, 8, 128),
    6144: RowConfig(4, 8, 128),
    14336: RowConfig(8, 8, 128),
    WIDEST: RowConfig(16, 8),
}


def row_config(width: int, rows: int, device: torch.device) -> RowConfig:
    """The configuration for `rows` rows whose pieces hold `width` elements.

    A program takes fewer rows where else there were too few programs for the card.
    """
    config = next(config for widest, config in ROW_CONFIGS.items() if width <= widest)
    return replace(config, rows=max(1, min(config.rows, rows // (16 * card(device).processors))))


def pieces(width: int, least: int = 256, count: int = 2) -> tuple[int, ...]:
    """`count` powers of two (the last ones may be 0) whose sum is the least that holds `width`.

    A remainder below `least`, or below an eighth of the width, is not split.
    """
    whole = triton.next_power_of_2(width)
    least = max(least, whole // 8)
    if whole > least and count > 1:
        rest = pieces(width - whole // 2, least, count - 1)
        if sum(rest) < whole // 2:
            return (whole // 2, *rest)
    return (whole, *[0] * (count - 1))


def neighbours(widths: tuple[int, ...], warps: int, most: int) -> int:
    """How many neighbouring elements a thread holds, `most` at most, so that pieces of all widths use all threads."""
    return max(1, min(most, min(w for w in widths if w) // (32 * warps)))


def view3(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """t, broadcast to shape (..., L, C), as (B, L, C) with a contiguous last axis: a view nearly always."""
    t = t.reshape(1) if t.ndim == 0 else t
    t = t.expand(*t.shape[:-1], shape[-1])
    if t.stride(-1) != 1:
        t = t.contiguous()
    t = t.expand(shape)
    while t.ndim < 3:
        t = t[None]
    return t.flatten(0, -3)


def view3_of_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (1, M, C) where a view is enough, otherwise as (B, L, C)."""
    v = view3(x, x.shape)
    return v.view(1, -1, v.shape[-1]) if v.shape[0] * v.shape[1] and v.stride(0) == v.shape[1] * v.stride(1) else v


def row_strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Strides of the first two axes of a (B, L, C) view; 0 for an axis of length one, so that its stride never makes
    Triton compile again.
    """
    if t is None:
        return 0, 0
    return (0 if t.shape[0] == 1 else t.stride(0)), (0 if t.shape[1] == 1 else t.stride(1))


def check_input(x: torch.Tensor, width: int) -> None:
    """Raises UnsupportedError for a dtype that the kernels over rows do not take, or a row too wide for registers."""
    if x.dtype not in ROW_DTYPES:
        raise UnsupportedError(f"the kernel takes bfloat16, float16 and float32, not {x.dtype}: use the reference")
    if width > WIDEST:
        raise UnsupportedError(f"a row of {width} channels is wider than the kernel's {WIDEST}: use the reference")
