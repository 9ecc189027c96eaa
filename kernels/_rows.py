"""Rows of activations for the kernels over rows: views of tensors, pieces in registers, configurations.

A program holds a row of C channels as two or three pieces whose widths are powers of two, for example
5120 = 4096 + 1024, because with one piece of 8192 three eighths of the arithmetic would be on padding.
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
    rows: int  # how many rows a program computes
    # The most registers that a thread may use; None: no limit. The limit is for a layer norm of 16-bit x, because other
    # norms need fewer registers.
    registers: int | None = None
    # The most neighbouring elements that a thread holds. With 16 float32 elements of a vector, which are 64 bytes, the
    # cache would serve only 2 a clock.
    near: int = 8

    def limit(self, x: torch.Tensor) -> dict[str, int]:
        """The limit of registers as keyword arguments of a launch; none for float32 x, which needs more registers."""
        return {} if self.registers is None or x.element_size() > 2 else {"maxnreg": self.registers}


# The declared set, by the widest row that each configuration takes. A thread holds 32 to 48 elements of a row, so that
# sums across threads cost little (at 1536 no sum crosses warps), and so that 128 registers a thread are enough, with
# which 16 warps fit a multiprocessor.
ROW_CONFIGS = {
    1536: RowConfig(1, 8, 128),
    3072: RowConfig(2, 8, 128),
    6144: RowConfig(4, 8, 128),
    14336: RowConfig(8, 8, 128),
    WIDEST: RowConfig(16, 8),
}


def row_config(width: int, rows: int, device: torch.device) -> RowConfig:
    """The configuration for `rows` rows whose pieces together hold `width` elements.

    A program takes fewer rows than declared if there would otherwise be too few programs for the card.
    """
    config = next(config for widest, config in ROW_CONFIGS.items() if width <= widest)
    return replace(config, rows=max(1, min(config.rows, rows // (16 * card(device).processors))))


def pieces(width: int, least: int = 256, count: int = 2) -> tuple[int, ...]:
    """`count` powers of two, the last of which may be 0, with the smallest sum that is at least `width`.

    A remainder of at most `least`, or of at most an eighth of the width's power of two, is not split further.
    """
    whole = triton.next_power_of_2(width)
    least = max(least, whole // 8)
    if whole > least and count > 1:
        rest = pieces(width - whole // 2, least, count - 1)
        if sum(rest) < whole // 2:
            return (whole // 2, *rest)
    return (whole, *[0] * (count - 1))


def neighbours(widths: tuple[int, ...], warps: int, most: int) -> int:
    """How many neighbouring elements a thread holds: at most `most`, and so few that each piece uses all threads."""
    return max(1, min(most, min(w for w in widths if w) // (32 * warps)))


def view3(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """t, broadcast to shape (..., L, C), as (B, L, C) with a contiguous last axis: nearly always a view."""
    t = t.reshape(1) if t.ndim == 0 else t
    t = t.expand(*t.shape[:-1], shape[-1])
    if t.stride(-1) != 1:
        t = t.contiguous()
    t = t.expand(shape)
    while t.ndim < 3:
        t = t[None]
    return t.flatten(0, -3)


def view3_of_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (1, M, C) if its strides allow such a view, otherwise as (B, L, C)."""
    v = view3(x, x.shape)
    return v.view(1, -1, v.shape[-1]) if v.shape[0] * v.shape[1] and v.stride(0) == v.shape[1] * v.stride(1) else v


def row_strides(t: torch.Tensor | None) -> tuple[int, int]:
    """The strides of the first two axes of a (B, L, C) view, in elements; (0, 0) if t is None.

    The stride of an axis of length one counts as 0, because Triton would otherwise compile again for another stride.
    """
    if t is None:
        return 0, 0
    return (0 if t.shape[0] == 1 else t.stride(0)), (0 if t.shape[1] == 1 else t.stride(1))


def check_input(x: torch.Tensor, width: int) -> None:
    """Raises UnsupportedError if x has a dtype that the kernels over rows do not take, or if `width` channels are too
    many for a program's registers.
    """
    if x.dtype not in ROW_DTYPES:
        raise UnsupportedError(f"the kernel takes bfloat16, float16 and float32, not {x.dtype}: use the reference")
    if width > WIDEST:
        raise UnsupportedError(f"a row of {width} channels is wider than the kernel's {WIDEST}: use the reference")
