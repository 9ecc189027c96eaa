"""How far numbers are from the truth, and how far a rewrite may move them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Of the largest value, in float64: a result that has one right bit in float32 has a condition number below 2^23, and
# what is left of float64's 2^-53 is 2^-30.
TIGHT = 2.0**-30
# Errors before and after are both chance. Of equally many roundings the largest differs by less than 2 from one draw to
# another, and a rewrite may round in twice as many places. A narrower type is seen: bfloat16 for float16 rounds 8 times
# as much, a 16-bit type for float32 at least 2^13 times.
ALLOWED = 4.0
EXACT = 1e-5  # the floor in float32, of the largest true value: a few dozen roundings of 2^-24
STEP = 1 / 12  # one step of an 8-bit value, of the largest: 1 of 127, or e4m3's 32 of 448
HALF_STEP = 1 / 64  # the mean magnitude of a quarter of the largest value, and a half of 1 / 127 of it: relative L1
NATIVE = "native"


@dataclass(frozen=True)
class Error:
    """How far numbers are from the truth: cosine, relative L1 (sum|a-b| / sum|b|), and max|a-b| / max|b|."""

    cosine: float
    rel_l1: float
    max_abs: float
    max_rel: float

    def to_dict(self) -> dict[str, float]:
        return {"cosine": self.cosine, "rel_l1": self.rel_l1, "max_abs": self.max_abs}


def compare(found: torch.Tensor, truth: torch.Tensor) -> Error:
    """The error of `found`. A NaN or an infinity that the truth lacks makes every figure infinite.

    Where the truth is not finite `found` must be the same, and that place counts no further.
    """
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (found, truth))
    a, b = a.double().flatten(), b.double().flatten()
    finite = b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    if not bool((same | (finite & a.isfinite())).all()):
        return Error(0.0, math.inf, math.inf, math.inf)
    a, b = a[finite], b[finite]
    difference = (a - b).abs()
    total, top = float(b.abs().sum()), float(b.abs().max()) if b.numel() else 0.0
    norm = float(a.norm() * b.norm())
    equal = not bool(difference.any())
    rel_l1 = float(difference.sum()) / total if total else (0.0 if equal else math.inf)
    max_rel = float(difference.max()) / top if top else (0.0 if equal else math.inf)
    return Error(
        cosine=float(a @ b) / norm if norm else float(equal),
        rel_l1=rel_l1,
        max_abs=float(difference.max()) if a.numel() else 0.0,
        max_rel=max_rel,
    )


def floor_of(dtype: torch.dtype) -> Error:
    """What a value of a dtype may be off where the error before is none: one rounding, in float32 a few dozen."""
    if dtype.itemsize == 1:
        return Error(1.0, HALF_STEP, 0.0, STEP)
    if not dtype.is_floating_point:
        return Error(1.0, 0.0, 0.0, 0.0)
    size = TIGHT if dtype == torch.float64 else EXACT if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return Error(1.0, size, 0.0, size)


def differs(after: Error, dtype: torch.dtype, wide: torch.dtype | None) -> str:
    """How far a value computed in `wide` is from what it replaces, where it is not the same function; else empty.

    An 8-bit value may fall on the other side of a tie: rarely, and by one step.
    """
    bound = TIGHT if wide == torch.float64 else floor_of(wide or dtype).max_rel
    if dtype.itemsize == 1:
        right = after.rel_l1 <= 1e-4 and after.max_rel <= STEP
    else:
        right = after.max_rel <= bound
    where = str(wide or dtype).removeprefix("torch.")
    explained = f"and rounding explains {bound:.0e}"
    return (
        "" if right else f"in {where} the largest difference is {after.max_rel:.1e} of the largest value, {explained}"
    )


def rounds_more(after: Error, before: Sequence[Error], dtype: torch.dtype) -> str:
    """How much more a value in the engine's dtype is off than the values before, where it is too much; else empty."""
    floor = floor_of(dtype)
    name = str(dtype).removeprefix("torch.")
    for what in ("max_rel", "rel_l1"):
        found, own = getattr(after, what), max(getattr(e, what) for e in before)
        bound = ALLOWED * own + getattr(floor, what)
        if not found <= bound:
            figure = "the largest error" if what == "max_rel" else "the relative L1"
            return f"in {name} {figure} is {found:.1e}, and {own:.1e} before; rounding explains {bound:.1e}"
    return ""


def worst(errors: list[Error]) -> Error | None:
    """The error of the worst site, by relative L1."""
    return max(errors, key=lambda e: (e.rel_l1, e.max_rel), default=None)
