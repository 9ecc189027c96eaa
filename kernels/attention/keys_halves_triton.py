"""Arithmetic of the keys' kernel on pairs of halves, and its transfers of four words.

A half is a float16. A `word` is a register of 32 bits that holds two halves, or two neighbouring elements of x. Two
neighbouring pairs (x1, x2), (x3, x4) of a head are held as a word of first elements (x1, x3) and a word of second
elements (x2, x4), so that one instruction rotates both pairs.

FTZ: True on a GPU, where each function is PTX; False under the interpreter, which computes the same results with
tensors of halves.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import triton
import triton.language as tl
from turbocompile.kernels._jit import NAP, ROUND

UNSIGNED = tl.constexpr(0x7FFF7FFF)  # a mask of all bits of two halves, except their signs


# LOADS_FIRST keeps rows in the second-level cache until the tiles read them with LOADS_LAST. The results of tiles
# bypass that cache. A kernel that also writes k reached 65% of a copy's rate without these hints, and 94% with them.
_LOAD = (
    "{{ .reg .b64 keep; createpolicy.fractional.L2::{policy}.b64 keep, 1.0; "
    "ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {{$0, $1, $2, $3}}, [$4], keep; }}"
)
LOADS_FIRST, LOADS_LAST = (tl.constexpr(_LOAD.format(policy=p)) for p in ("evict_last", "evict_first"))
LOADS_AGAIN = tl.constexpr("ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];")
GLANCED = tl.constexpr("ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];")
# Reads four words again until none of them is 0, as WAIT of _jit.py does with one word.
WAIT_FOUR = tl.constexpr(
    "{ .reg .pred there; .reg .b32 naps; mov.b32 naps, 0; "
    "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; "
    "again: setp.ne.s32 there, $0, 0; setp.ne.and.s32 there, $1, 0, there; setp.ne.and.s32 there, $2, 0, there; "
    "setp.ne.and.s32 there, $3, 0, there; @there bra done; "
    f"{NAP}ld.relaxed.gpu.global.v4.b32 {{$0, $1, $2, $3}}, [$8]; bra again; done: }}"
)


@triton.jit
def four_words(at, HOW: tl.constexpr, FTZ: tl.constexpr):
    """Loads the four neighbouring words from `at` on, as four tensors of at's shape, in one transfer a thread.

    HOW: LOADS_FIRST and LOADS_LAST for words that are read twice, LOADS_AGAIN for words that many programs read,
    GLANCED for words that another multiprocessor may be writing.
    """
    if FTZ:
        words = tl.inline_asm_elementwise(
            HOW, "=&r,=&r,=&r,=&r,l", [at.to(tl.int64)], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
    else:
        words = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    return words


@triton.jit
def wait_for_four(words, at, FTZ: tl.constexpr):
    """Waits until none of the four words from `at` on is 0, and returns the words.

    words: the four words that `four_words` read with GLANCED. The interpreter runs one program after the other, so that
    the words are already there.
    """
    if FTZ:
        a, b, c, d = words
        words = tl.inline_asm_elementwise(
            WAIT_FOUR, "=&r,=&r,=&r,=&r,r,r,r,r,l", [a, b, c, d, at.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    return words


@triton.jit
def halves(pair):
    """The low and the high half of each word, float16."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def pair_of(low, high):
    """The words that hold two tensors of halves, `low` in their low bits."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def two_floats(words, dtype: tl.constexpr):
    """The low and the high element, of dtype `dtype`, of each word, as float32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = halves(words)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    return low, high


@triton.jit
def two_rounded(low, high, dtype: tl.constexpr, FTZ: tl.constexpr):
    """The inverse of two_floats: the words that hold two float32 tensors, rounded to `dtype`."""
    if FTZ and dtype == tl.bfloat16:
        words = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    elif FTZ:
        words = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        words = pair_of(low.to(dtype), high.to(dtype))
    return words


# $0 = n1 cos - n2 sin - centre1, $1 = n2 cos + n1 sin - centre2, each for two pairs. The operands are two words of x
# ($2, $3), the root ($4), the weights of first and second elements ($5, $6), cosines and sines ($7, $8), and minus the
# centre ($9, $10).
_OPEN_BF16 = (
    "{ .reg .f32 a, b, c, d; .reg .b32 p, q, u, v, m; "
    "shl.b32 p, $2, 16; and.b32 q, $2, 0xffff0000; shl.b32 u, $3, 16; and.b32 v, $3, 0xffff0000; "
    "mov.b32 a, p; mov.b32 b, q; mov.b32 c, u; mov.b32 d, v; "
)
_OPEN_FP16 = (
    "{ .reg .f32 a, b, c, d; .reg .b32 p, q, u, v, m; .reg .b16 e, f, g, h; "
    "mov.b32 {e, f}, $2; mov.b32 {g, h}, $3; "
    "cvt.f32.f16 a, e; cvt.f32.f16 b, f; cvt.f32.f16 c, g; cvt.f32.f16 d, h; "
)
_TURN = (
    "mul.f32 a, a, $4; mul.f32 b, b, $4; mul.f32 c, c, $4; mul.f32 d, d, $4; "
    "cvt.rn.f16x2.f32 p, c, a; cvt.rn.f16x2.f32 q, d, b; "
    "mul.rn.f16x2 p, p, $5; mul.rn.f16x2 q, q, $6; neg.f16x2 m, q; "
    "fma.rn.f16x2 u, m, $8, $9; fma.rn.f16x2 $0, p, $7, u; "
    "fma.rn.f16x2 v, p, $8, $10; fma.rn.f16x2 $1, q, $7, v; }"
)
TURN_BF16, TURN_FP16 = tl.constexpr(_OPEN_BF16 + _TURN), tl.constexpr(_OPEN_FP16 + _TURN)


@triton.jit
def turned(a, b, root, w1, w2, cos, sin, less1, less2, dtype: tl.constexpr, FTZ: tl.constexpr):
    """Norms and rotates two pairs and subtracts the centre; returns the words of first and of second elements.

    a, b: words of x, each of one pair. root: float32. w1, w2, cos, sin: words of two halves. less1, less2: minus the
    centre of first and second elements, words of two halves.
    """
    if FTZ:
        TEXT: tl.constexpr = TURN_BF16 if dtype == tl.bfloat16 else TURN_FP16
        first, second = tl.inline_asm_elementwise(
            TEXT, "=&r,=&r,r,r,f,r,r,r,r,r,r", [a, b, root, w1, w2, cos, sin, less1, less2],
            (tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        a1, a2 = two_floats(a, dtype)
        b1, b2 = two_floats(b, dtype)
        a3, b3 = halves(w1)
        a4, b4 = halves(w2)
        a1 = (a1 * root).to(tl.float16) * a3
        a2 = (a2 * root).to(tl.float16) * a4
        b1 = (b1 * root).to(tl.float16) * b3
        b2 = (b2 * root).to(tl.float16) * b4
        ac, bc = halves(cos)
        as_, bs = halves(sin)
        al1, bl1 = halves(less1)
        al2, bl2 = halves(less2)
        first = pair_of(a1 * ac + (al1 - a2 * as_), b1 * bc + (bl1 - b2 * bs))
        second = pair_of(a2 * ac + (a1 * as_ + al2), b2 * bc + (b1 * bs + bl2))
    return first, second


@triton.jit
def _larger(a, b):
    """The larger magnitudes of two words of halves, element by element; the signs of the result mean nothing."""
    return tl.inline_asm_elementwise("max.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger_plain(a, b):
    """Computes _larger on compute capability 8.0, which lacks the instruction of _larger."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u, v; and.b32 u, $1, 0x7fff7fff; and.b32 v, $2, 0x7fff7fff; max.f16x2 $0, u, v; }",
        "=r,r,r", [a, b], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def raised(most, a, SIGNED: tl.constexpr, FTZ: tl.constexpr):
    """The larger magnitudes of the words `most` and a, element by element. SIGNED: the card runs _larger."""
    if FTZ and SIGNED:
        most = _larger(most, a)
    elif FTZ:
        most = _larger_plain(most, a)
    else:
        low, high = halves(a)
        least_low, least_high = halves(most)
        most = pair_of(tl.maximum(least_low, tl.abs(low)), tl.maximum(least_high, tl.abs(high)))
    return most


@triton.jit
def top_of(most, SIGNED: tl.constexpr, FTZ: tl.constexpr):
    """The largest magnitude of all halves in the words `most` (N,), float32."""
    if FTZ and SIGNED:
        most = tl.reduce(most, 0, _larger)
    elif FTZ:
        most = tl.reduce(most, 0, _larger_plain)
    low, high = two_floats(most & UNSIGNED, tl.float16)
    if not FTZ:
        low = tl.max(low, 0)
        high = tl.max(high, 0)
    return tl.maximum(low, high)


@triton.jit
def factor_of(most, FTZ: tl.constexpr):
    """A word that holds 127 / most twice, as halves rounded down, so that no magnitude times it exceeds 127."""
    if FTZ:  # the reciprocal may be off by 2^-23, which gives 127.00002, and that rounds to 127
        pair = tl.inline_asm_elementwise(
            "{ .reg .f32 f; .reg .b16 h; max.f32 f, $1, 0f33d6bf95; rcp.approx.ftz.f32 f, f; mul.f32 f, f, 0f42fe0000; "
            "min.f32 f, f, 0f477fe000; cvt.rz.f16.f32 h, f; mov.b32 $0, {h, h}; }",
            "=r,f", [most], tl.int32, True, 1,
        )  # fmt: skip
    else:
        f = tl.minimum(127.0 / tl.maximum(most, 1e-7), 65504.0)
        half = (f * (1 - 2.0**-11)).to(tl.float16)  # at most f, however the cast rounds
        pair = pair_of(half, half)
    return pair


@triton.jit
def four_codes(first, second, factor, FTZ: tl.constexpr):
    """Two pairs times the factor, rounded to integers, as four bytes in the order of the channels."""
    if FTZ:
        bytes = tl.inline_asm_elementwise(
            "{ .reg .b32 u, v, m; mov.b32 m, 0x66006600; fma.rn.f16x2 u, $1, $3, m; fma.rn.f16x2 v, $2, $3, m; "
            "prmt.b32 $0, u, v, 0x6240; }",
            "=r,r,r,r", [first, second, factor], tl.int32, True, 1,
        )  # fmt: skip
    else:
        f, _ = halves(factor)
        a1, b1 = halves(first)
        a2, b2 = halves(second)
        bytes = code_of(a1, f) | code_of(a2, f) << 8 | code_of(b1, f) << 16 | code_of(b2, f) << 24
    return bytes


@triton.jit
def code_of(x, f):
    """The integer nearest to x f, as a byte. It is computed in float32, because the interpreter rounds a product of
    halves.
    """
    return (x.to(tl.float32) * f.to(tl.float32) + ROUND).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def sum_of_halves(a, b, MINUS: tl.constexpr, FTZ: tl.constexpr):
    """The sums of two words of halves, element by element, or, with MINUS, the differences."""
    if FTZ:
        TEXT: tl.constexpr = "sub.rn.f16x2 $0, $1, $2;" if MINUS else "add.rn.f16x2 $0, $1, $2;"
        both = tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        a1, a2 = halves(a)
        b1, b2 = halves(b)
        both = pair_of(a1 - b1, a2 - b2) if MINUS else pair_of(a1 + b1, a2 + b2)
    return both


@triton.jit
def eight_sums(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    """The eight sums a0 + b0 to a7 + b7."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def put_four(at, a, b, c, d, real, WHOLE: tl.constexpr, FTZ: tl.constexpr):
    """Stores four neighbouring words, in one transfer a thread, where `real` is true, or, with WHOLE, everywhere."""
    if FTZ and WHOLE:
        tl.inline_asm_elementwise(
            "st.global.cs.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,l,r,r,r,r",
            [at.to(tl.int64), a, b, c, d], tl.int32, False, 1,
        )  # fmt: skip
    elif FTZ:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.cs.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
            "=r,l,r,r,r,r,r", [at.to(tl.int64), a, b, c, d, real.to(tl.int32)], tl.int32, False, 1,
        )  # fmt: skip
    else:
        real = real | (at.to(tl.int64) == 0)  # broadcasts `real` to the shape of `at`
        tl.store(at, a, mask=real)
        tl.store(at + 1, b, mask=real)
        tl.store(at + 2, c, mask=real)
        tl.store(at + 3, d, mask=real)


@triton.jit
def put_two(at, a, b, FTZ: tl.constexpr):
    """Stores two neighbouring words, in one transfer a thread."""
    if FTZ:
        tl.inline_asm_elementwise(
            "st.global.cs.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0;", "=r,l,r,r",
            [at.to(tl.int64), a, b], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(at, a)
        tl.store(at + 1, b)
