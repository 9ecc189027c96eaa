"""Keys between their projection and a quantized attention in Triton: RMSNorm, rotation, INT8 blocks, one pass.

    n = x / sqrt(mean(x^2) + eps) * weight                       over all channels of a token
    k = (n1 cos - n2 sin, n2 cos + n1 sin)                       for the pairs of each head
    k8 = rne(127 (k - centre) / amax), k_scale = amax / 127      amax over a block of tokens of a head
    pooled = mean of k - centre over a block

x: (B, L, H * D), bf16 or fp16, D 64 or 128, pairs interleaved, tables as in rope.py for at most three axes. This is
qk_norm_rope.py's op and the half of prepare_triton.py that concerns k, without k in between; where SLA's linear branch
needs k, it is written, too. Any constant may be taken from k, for it changes no softmax: centre is the mean of a batch
item's SAMPLES tokens here and there, so that nothing waits for a pass over all.

A block has one scale and a norm needs the whole row, so x is read twice, the second time from the second-level cache,
as int8_block's norms do (norms_triton.py): programs over rows write a word a row, its root and where its token stands
in the tables; tiles, one a block and head, come some blocks later and wait for their words. The first programs make the
centres, one a head, for which the head's tiles wait. A small launch before (`lay_out`) writes the words of the tokens
here and there and lays out the tables.

What made it fast is arithmetic on pairs of halves, for 38 instructions an element are all that a Hopper card issues in
the time of a copy's 3 bytes. A float32 version had 27, this has 11. Two neighbouring pairs of a head are a register of
first and a register of second elements, so that a rotation is four multiply-adds of both; a fifth rounds to integers
(1536 added to |x| <= 127 leaves the integer in the low byte), and one permutation packs four. A weight is divided by
the power of two below its head's largest (`unit`), so that the halves never overflow: |k| <= 2 sqrt(2 C) units. Errors
are below those of a k rounded to bf16. Four pairs' cosines and sines are one load of 16 bytes: `tables` lays them out
by the positions that they depend on. The sums of squares are taken by tensor cores: a quad of threads' own elements as
both operands, whose product has them on its diagonal.

Bytes an element: 2 read + 1 written, 2 more with k. At the 3.0 TB/s of a copy: 32,760 x 1536 in 0.050 ms, 75,600 x 5120
in 0.387 ms.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from turbocompile.kernels._registry import FUSED
from turbocompile.kernels.attention.norm_attention import PLACES, TOKENS
from turbocompile.kernels.attention.prepare_triton import Keys, processors
from turbocompile.kernels.norms.norms_triton import NAP, _glance, _wait
from turbocompile.kernels.quantize.quantize_triton import _reciprocal, row_strides, view3
from turbocompile.kernels.rotary.qk_norm_rope import AXES

SAMPLES = 64  # tokens whose mean is the centre: off the mean of all by an eighth of k's deviation
EVERY_ONE = tl.constexpr(0x7FFF7FFF)  # of two halves, all but their signs


# Rows are kept in the second-level cache until tiles have read them, whose own results pass it by: 65% -> 94% with k.
_LOAD = (
    "{{ .reg .b64 keep; createpolicy.fractional.L2::{policy}.b64 keep, 1.0; "
    "ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {{$0, $1, $2, $3}}, [$4], keep; }}"
)
LOADS_FIRST, LOADS_LAST = (tl.constexpr(_LOAD.format(policy=p)) for p in ("evict_last", "evict_first"))
LOADS_AGAIN = tl.constexpr("ld.global.nc.L1::evict_last.v4.b32 {$0, $1, $2, $3}, [$4];")
GLANCED = tl.constexpr("ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];")
# As WAIT of norms_triton.py.
WAIT_FOUR = tl.constexpr(
    "{ .reg .pred there; .reg .b32 naps; mov.b32 naps, 0; "
    "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; "
    "again: setp.ne.s32 there, $0, 0; setp.ne.and.s32 there, $1, 0, there; setp.ne.and.s32 there, $2, 0, there; "
    "setp.ne.and.s32 there, $3, 0, there; @there bra done; "
    f"{NAP}ld.relaxed.gpu.global.v4.b32 {{$0, $1, $2, $3}}, [$8]; bra again; done: }}"
)


@triton.jit
def _four(at, HOW: tl.constexpr, FTZ: tl.constexpr):
    """Four neighbouring words as four tensors, one transfer a thread. HOW: of what is read a first and a last time, or
    by many, or may have been written by another multiprocessor.
    """
    if FTZ:
        words = tl.inline_asm_elementwise(
            HOW, "=&r,=&r,=&r,=&r,l", [at.to(tl.int64)], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
    else:
        words = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    return words


@triton.jit
def _wait_four(words, at, FTZ: tl.constexpr):
    """words, which were read GLANCED at `at`, or what is there once none of the four is 0. The interpreter runs one
    program after the other: it is there.
    """
    if FTZ:
        a, b, c, d = words
        words = tl.inline_asm_elementwise(
            WAIT_FOUR, "=&r,=&r,=&r,=&r,r,r,r,r,l", [a, b, c, d, at.to(tl.int64)],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    return words


@triton.jit
def _halves(pair):
    """The low and the high half of a register of two, float16."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _pair(low, high):
    """Two tensors of halves in one register each."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _released(words, dtype: tl.constexpr):
    """Two neighbours of dtype in a word, as float32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = _halves(words)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    return low, high


@triton.jit
def _kept(low, high, dtype: tl.constexpr, FTZ: tl.constexpr):
    """The inverse of _released, rounded."""
    if FTZ and dtype == tl.bfloat16:
        words = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    elif FTZ:
        words = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        words = _pair(low.to(dtype), high.to(dtype))
    return words


# Operands: two words of x, the root, the weights of first and second elements, cosines and sines, and minus the centre.
# $0 = n1 cos - n2 sin - centre1, $1 = n2 cos + n1 sin - centre2, each of two pairs.
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
def _turned(a, b, root, w1, w2, cos, sin, less1, less2, dtype: tl.constexpr, FTZ: tl.constexpr):
    """Two pairs, words a and b of x: normed, turned, and minus the centre, as (firsts, seconds) of two halves each."""
    if FTZ:
        TEXT: tl.constexpr = TURN_BF16 if dtype == tl.bfloat16 else TURN_FP16
        first, second = tl.inline_asm_elementwise(
            TEXT, "=&r,=&r,r,r,f,r,r,r,r,r,r", [a, b, root, w1, w2, cos, sin, less1, less2],
            (tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        a1, a2 = _released(a, dtype)
        b1, b2 = _released(b, dtype)
        a3, b3 = _halves(w1)
        a4, b4 = _halves(w2)
        a1 = (a1 * root).to(tl.float16) * a3
        a2 = (a2 * root).to(tl.float16) * a4
        b1 = (b1 * root).to(tl.float16) * b3
        b2 = (b2 * root).to(tl.float16) * b4
        ac, bc = _halves(cos)
        as_, bs = _halves(sin)
        al1, bl1 = _halves(less1)
        al2, bl2 = _halves(less2)
        first = _pair(a1 * ac + (al1 - a2 * as_), b1 * bc + (bl1 - b2 * bs))
        second = _pair(a2 * ac + (a1 * as_ + al2), b2 * bc + (b1 * bs + bl2))
    return first, second


@triton.jit
def _larger(a, b):
    """The larger magnitudes of two times two halves; their signs are anything."""
    return tl.inline_asm_elementwise("max.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger_plain(a, b):
    """The same where there is no such instruction."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u, v; and.b32 u, $1, 0x7fff7fff; and.b32 v, $2, 0x7fff7fff; max.f16x2 $0, u, v; }",
        "=r,r,r", [a, b], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def _raised(most, a, SIGNED: tl.constexpr, FTZ: tl.constexpr):
    """The largest magnitudes so far and those of a."""
    if FTZ and SIGNED:
        most = _larger(most, a)
    elif FTZ:
        most = _larger_plain(most, a)
    else:
        low, high = _halves(a)
        least_low, least_high = _halves(most)
        most = _pair(tl.maximum(least_low, tl.abs(low)), tl.maximum(least_high, tl.abs(high)))
    return most


@triton.jit
def _top(most, SIGNED: tl.constexpr, FTZ: tl.constexpr):
    """The largest of all."""
    if FTZ and SIGNED:
        most = tl.reduce(most, 0, _larger)
    elif FTZ:
        most = tl.reduce(most, 0, _larger_plain)
    low, high = _released(most & EVERY_ONE, tl.float16)
    if not FTZ:
        low = tl.max(low, 0)
        high = tl.max(high, 0)
    return tl.maximum(low, high)


@triton.jit
def _factor(most, FTZ: tl.constexpr):
    """Two halves 127 / most, never more than that: a factor that brings no magnitude above 127."""
    if FTZ:  # the reciprocal is off by 2^-23: 127.00002 rounds to 127
        pair = tl.inline_asm_elementwise(
            "{ .reg .f32 f; .reg .b16 h; max.f32 f, $1, 0f33d6bf95; rcp.approx.ftz.f32 f, f; mul.f32 f, f, 0f42fe0000; "
            "min.f32 f, f, 0f477fe000; cvt.rz.f16.f32 h, f; mov.b32 $0, {h, h}; }",
            "=r,f", [most], tl.int32, True, 1,
        )  # fmt: skip
    else:
        f = tl.minimum(127.0 / tl.maximum(most, 1e-7), 65504.0)
        half = (f * (1 - 2.0**-11)).to(tl.float16)  # not above f whichever way it is rounded
        pair = _pair(half, half)
    return pair


@triton.jit
def _coded(first, second, factor, FTZ: tl.constexpr):
    """Two pairs times the factor, as four bytes in the order of the channels."""
    if FTZ:
        bytes = tl.inline_asm_elementwise(
            "{ .reg .b32 u, v, m; mov.b32 m, 0x66006600; fma.rn.f16x2 u, $1, $3, m; fma.rn.f16x2 v, $2, $3, m; "
            "prmt.b32 $0, u, v, 0x6240; }",
            "=r,r,r,r", [first, second, factor], tl.int32, True, 1,
        )  # fmt: skip
    else:
        f, _ = _halves(factor)
        a1, b1 = _halves(first)
        a2, b2 = _halves(second)
        bytes = _low(a1, f) | _low(a2, f) << 8 | _low(b1, f) << 16 | _low(b2, f) << 24
    return bytes


@triton.jit
def _low(x, f):
    """The integer nearest to x f as a byte; the interpreter's halves are rounded after the product, too."""
    return (x.to(tl.float32) * f.to(tl.float32) + 12582912.0).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _sum(a, b, MINUS: tl.constexpr, FTZ: tl.constexpr):
    """Sums of two times two halves, or differences."""
    if FTZ:
        TEXT: tl.constexpr = "sub.rn.f16x2 $0, $1, $2;" if MINUS else "add.rn.f16x2 $0, $1, $2;"
        both = tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        both = _pair(a1 - b1, a2 - b2) if MINUS else _pair(a1 + b1, a2 + b2)
    return both


@triton.jit
def _all_plus(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


# A quad of threads holds rows of one operand and a column of the other; both are the quad's own words, so that the
# diagonal of the product has the sums of their squares: of the first and third word in rows 0-7, of the others in 8-15.
_PRODUCT = "mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}}; "
_PRODUCTS = (
    _PRODUCT.format(t="{t}", d="$0, $1, $2, $3", a="$16, $17", b="$16", c="$8, $9, $10, $11")
    + _PRODUCT.format(t="{t}", d="$4, $5, $6, $7", a="$16, $17", b="$17", c="$12, $13, $14, $15")
    + _PRODUCT.format(t="{t}", d="$0, $1, $2, $3", a="$18, $19", b="$18", c="$0, $1, $2, $3")
    + _PRODUCT.format(t="{t}", d="$4, $5, $6, $7", a="$18, $19", b="$19", c="$4, $5, $6, $7")
)
PRODUCTS_BF16, PRODUCTS_FP16 = (
    tl.constexpr(_PRODUCTS.replace("{t}", "bf16")),
    tl.constexpr(_PRODUCTS.replace("{t}", "f16")),
)
# The thread of a quad that holds the quad's own place of the diagonal, rows 0-7 in $1, $2 and 8-15 in $3, $4; else 0.
DIAGONAL = tl.constexpr(
    "{ .reg .b32 lane, quad, half, mine; .reg .pred odd, own; .reg .f32 a, b; "
    "mov.u32 lane, %laneid; shr.u32 quad, lane, 2; and.b32 mine, lane, 3; shr.u32 half, quad, 1; "
    "setp.eq.u32 own, mine, half; and.b32 quad, quad, 1; setp.ne.u32 odd, quad, 0; "
    "selp.f32 a, $2, $1, odd; selp.f32 b, $4, $3, odd; add.f32 a, a, b; selp.f32 $0, a, 0f00000000, own; }"
)


@triton.jit
def _squares(pieces, K: tl.constexpr, dtype: tl.constexpr, FTZ: tl.constexpr):
    """Sums whose sum over a row is that of its squares. pieces: K times four words (rows, lanes)."""
    a0 = tl.zeros(pieces[0][0].shape, tl.float32)
    if FTZ:
        TEXT: tl.constexpr = PRODUCTS_BF16 if dtype == tl.bfloat16 else PRODUCTS_FP16
        a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
        for k in tl.static_range(K):
            a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
                TEXT, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,r,r,r,r",
                [a0, a1, a2, a3, a4, a5, a6, a7, pieces[k][0], pieces[k][1], pieces[k][2], pieces[k][3]],
                (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                True, 1,
            )  # fmt: skip
        a0 = tl.inline_asm_elementwise(DIAGONAL, "=f,f,f,f,f", [a0, a1, a6, a7], tl.float32, True, 1)
    else:
        for k in tl.static_range(K):
            for i in tl.static_range(4):
                low, high = _released(pieces[k][i], dtype)
                a0 += low * low + high * high
    return a0


@triton.jit
def _roots(
    x, words, count, step, first, x_l, by1, by2, n1, n2, shift1, shift0, eps,
    C: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """The words of PER times R rows from `first` on, of `count` that are step apart; behind the last comes the last
    again. A row is K pieces of eight channels for each of LANES threads. A word: where the token stands along the axes,
    and above it 1 + its root's bits.
    """
    lane = tl.arange(0, LANES)[None, :]
    held = ()
    for i in tl.static_range(PER):
        row = (tl.minimum(first + i * R + tl.arange(0, R)[:, None], count - 1) * step).to(tl.int64)
        pieces = ()
        for k in tl.static_range(K):
            at = x + row * x_l + (k * LANES + lane) * 4
            if (k + 1) * LANES * 8 <= C:
                pieces = pieces + (_four(at, LOADS_FIRST, FTZ),)  # type: ignore[assignment]
            else:  # what is behind the row's end is read from its start, and does not count
                real = (k * LANES + lane) * 8 < C
                a, b, c, d = _four(tl.where(real, at, x + row * x_l), LOADS_FIRST, FTZ)
                piece = (tl.where(real, a, 0), tl.where(real, b, 0), tl.where(real, c, 0), tl.where(real, d, 0))
                pieces = pieces + (piece,)  # type: ignore[assignment]
        held = held + (pieces,)  # type: ignore[assignment]
    for i in tl.static_range(PER):
        total = tl.sum(_squares(held[i], K, DTYPE, FTZ), 1)  # type: ignore[misc]
        root = tl.rsqrt(tl.div_rn(total, C * 1.0) + eps)
        high = root.to(tl.int32, bitcast=True) + 1  # never 0: a root is not negative, and a GPU's NaN is 0x7FFFFFFF
        to = tl.minimum(first + i * R + tl.arange(0, R), count - 1)
        row = to * step
        # floor((row + 1/2) / n): 1 / n and the product are off by 2^-24 each, which moves nothing below 2^22 rows
        plane = ((row.to(tl.float32) + 0.5) * by2).to(tl.int32)
        i0 = ((plane.to(tl.float32) + 0.5) * by1).to(tl.int32)
        low = (row - plane * n2) | (plane - i0 * n1) << shift1 | i0 << shift0
        tl.store(words + to, high.to(tl.int64) << 32 | low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _centre(
    x, sampled, weights, centres, table, groups, samples, step, head, item, x_l,
    H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Minus the mean of `samples` (S at most) tokens, step apart, of a head of a batch item. No word of it is 0: a pair
    of zeros has a sign.
    """
    tl.static_assert(S % CHUNK == 0)
    G: tl.constexpr = D // 8
    member = tl.arange(0, CHUNK)[:, None]
    g = tl.arange(0, G)[None, :]
    each = member * 0 + g
    x += head * (D // 2)
    held = ()
    for i in tl.static_range(S // CHUNK):
        row = tl.minimum(i * CHUNK + member, samples - 1) * step
        held = held + (_four(x + row.to(tl.int64) * x_l + g * 4, LOADS_FIRST, FTZ),)  # type: ignore[assignment]
    w0, w1, w2, w3 = _four(weights + (head * G + each) * 4, LOADS_AGAIN, FTZ)
    shift, mask, base, stride = _four(groups + each * 4, LOADS_AGAIN, FTZ)
    none = tl.zeros((CHUNK, G), tl.int32)
    s0 = tl.zeros((CHUNK, G), tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for i in tl.static_range(S // CHUNK):
        word = tl.load(sampled + tl.minimum(i * CHUNK + member, samples - 1) + each * 0)
        root = ((word >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)
        place = base + ((word.to(tl.int32) >> shift) & mask) * stride
        t0, t1, t2, t3 = _four(table + place * 4, LOADS_AGAIN, FTZ)
        a, b, c, d = held[i]  # type: ignore[misc, var-annotated]
        a, b = _turned(a, b, root, w0, w1, t0, t1, none, none, DTYPE, FTZ)
        c, d = _turned(c, d, root, w2, w3, t2, t3, none, none, DTYPE, FTZ)
        real = i * CHUNK + member < samples
        a0, a1 = _released(tl.where(real, a, 0), tl.float16)
        b0, b1 = _released(tl.where(real, b, 0), tl.float16)
        c0, c1 = _released(tl.where(real, c, 0), tl.float16)
        d0, d1 = _released(tl.where(real, d, 0), tl.float16)
        s0, s1, s2, s3, s4, s5, s6, s7 = _all_plus(
            s0, s1, s2, s3, s4, s5, s6, s7, a0, a1, b0, b1, c0, c1, d0, d1
        )  # fmt: skip
    s0, s1, s2, s3, s4, s5, s6, s7 = tl.reduce((s0, s1, s2, s3, s4, s5, s6, s7), 0, _all_plus)
    share = -1.0 / samples
    to = centres + ((item * H + head) * G + tl.arange(0, G)) * 4
    _put_centre(to, s0 * share, s1 * share)
    _put_centre(to + 1, s2 * share, s3 * share)
    _put_centre(to + 2, s4 * share, s5 * share)
    _put_centre(to + 3, s6 * share, s7 * share)


@triton.jit
def _put_centre(at, low, high):
    """Two numbers as a word of halves that is not 0."""
    pair = _pair(low.to(tl.float16), high.to(tl.float16))
    tl.store(at, tl.where(pair == 0, 0x8000, pair))


@triton.jit
def _tile(
    x, words, weights, centres, units, table, groups, k8, k_scale, pooled, k_out,
    length, block, head, item, tile, x_l,
    H: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    DTYPE: tl.constexpr, SIGNED: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """A block of EDGE tokens of a head of a batch item, CHUNK at a time. A thread has eight channels of a token. WHOLE:
    all tokens of the block are there; those that are not are zeros in k8.
    """
    G: tl.constexpr = D // 8
    first = block * EDGE
    member = tl.arange(0, CHUNK)[:, None]
    g = tl.arange(0, G)[None, :]
    each = member * 0 + g
    words += first
    x += first.to(tl.int64) * x_l + head * (D // 2)
    held = ()
    seen = ()
    for i in tl.static_range(EDGE // CHUNK):
        row = i * CHUNK + member
        if not WHOLE:
            row = tl.minimum(row, length - 1 - first)
        held = held + (_four(x + row * x_l + g * 4, LOADS_LAST, FTZ),)  # type: ignore[assignment]
    for i in tl.static_range(EDGE // CHUNK):
        row = i * CHUNK + member
        if not WHOLE:
            row = tl.minimum(row, length - 1 - first)
        seen = seen + (_glance(words + row + each * 0, FTZ),)  # type: ignore[assignment]
    w0, w1, w2, w3 = _four(weights + (head * G + each) * 4, LOADS_AGAIN, FTZ)
    shift, mask, base, stride = _four(groups + each * 4, LOADS_AGAIN, FTZ)
    unit = tl.load(units + head)
    centre_at = centres + ((item * H + head) * G + each) * 4
    centre = _four(centre_at, GLANCED, FTZ)
    waited = ()
    for i in tl.static_range(EDGE // CHUNK):
        row = i * CHUNK + member
        if not WHOLE:
            row = tl.minimum(row, length - 1 - first)
        waited = waited + (_wait(seen[i], words + row + each * 0, FTZ),)  # type: ignore[assignment, misc]
    c0, c1, c2, c3 = _wait_four(centre, centre_at, FTZ)
    most = tl.zeros((CHUNK, G), tl.int32)
    done = ()
    for i in tl.static_range(EDGE // CHUNK):
        word = waited[i]  # type: ignore[misc, var-annotated]
        root = ((word >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)  # type: ignore[attr-defined]
        place = base + ((word.to(tl.int32) >> shift) & mask) * stride
        t0, t1, t2, t3 = _four(table + place * 4, LOADS_AGAIN, FTZ)
        a, b, c, d = held[i]  # type: ignore[misc]
        a, b = _turned(a, b, root, w0, w1, t0, t1, c0, c1, DTYPE, FTZ)
        c, d = _turned(c, d, root, w2, w3, t2, t3, c2, c3, DTYPE, FTZ)
        if k_out is not None:
            a1, b1 = _released(_sum(a, c0, True, FTZ), tl.float16)
            a2, b2 = _released(_sum(b, c1, True, FTZ), tl.float16)
            e1, f1 = _released(_sum(c, c2, True, FTZ), tl.float16)
            e2, f2 = _released(_sum(d, c3, True, FTZ), tl.float16)
            to = k_out + ((first + i * CHUNK + member).to(tl.int64) * H + head) * (D // 2) + g * 4
            _put4(
                to, _kept(a1 * unit, a2 * unit, DTYPE, FTZ), _kept(b1 * unit, b2 * unit, DTYPE, FTZ),
                _kept(e1 * unit, e2 * unit, DTYPE, FTZ), _kept(f1 * unit, f2 * unit, DTYPE, FTZ),
                i * CHUNK + member < length - first, WHOLE, FTZ,
            )  # fmt: skip
        if not WHOLE:
            real = i * CHUNK + member < length - first
            a = tl.where(real, a, 0)
            b = tl.where(real, b, 0)
            c = tl.where(real, c, 0)
            d = tl.where(real, d, 0)
        most = _raised(_raised(most, a, SIGNED, FTZ), b, SIGNED, FTZ)
        most = _raised(_raised(most, c, SIGNED, FTZ), d, SIGNED, FTZ)
        done = done + ((a, b, c, d),)  # type: ignore[assignment]
    factor = _factor(_top(most.reshape(CHUNK * G), SIGNED, FTZ), FTZ)
    out = k8 + tile * (EDGE * D // 4)
    for i in tl.static_range(EDGE // CHUNK):
        a, b, c, d = done[i]  # type: ignore[misc, var-annotated]
        to = out + (i * CHUNK + member) * (D // 4) + g * 2
        _put2(to, _coded(a, b, factor, FTZ), _coded(c, d, factor, FTZ), FTZ)
    f, _ = _released(factor, tl.float16)
    tl.store(k_scale + tile, unit * _reciprocal(f, FTZ))
    if pooled is not None:
        a, b, c, d = done[0]  # type: ignore[misc]
        for i in tl.static_range(1, EDGE // CHUNK):
            a = _sum(a, done[i][0], False, FTZ)  # type: ignore[misc]
            b = _sum(b, done[i][1], False, FTZ)  # type: ignore[misc]
            c = _sum(c, done[i][2], False, FTZ)  # type: ignore[misc]
            d = _sum(d, done[i][3], False, FTZ)  # type: ignore[misc]
        s0, s2 = _released(a, tl.float16)
        s1, s3 = _released(b, tl.float16)
        s4, s6 = _released(c, tl.float16)
        s5, s7 = _released(d, tl.float16)
        s0, s1, s2, s3, s4, s5, s6, s7 = tl.reduce((s0, s1, s2, s3, s4, s5, s6, s7), 0, _all_plus)
        share = unit / tl.minimum(length - first, EDGE)
        to = pooled + tile * (D // 2) + tl.arange(0, G) * 4
        tl.store(to, _kept(s0 * share, s1 * share, DTYPE, FTZ))
        tl.store(to + 1, _kept(s2 * share, s3 * share, DTYPE, FTZ))
        tl.store(to + 2, _kept(s4 * share, s5 * share, DTYPE, FTZ))
        tl.store(to + 3, _kept(s6 * share, s7 * share, DTYPE, FTZ))


@triton.jit
def _put4(at, a, b, c, d, real, WHOLE: tl.constexpr, FTZ: tl.constexpr):
    """Four neighbouring words, one transfer a thread, where `real` or WHOLE."""
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
        real = real | (at.to(tl.int64) == 0)  # in the shape of the others
        tl.store(at, a, mask=real)
        tl.store(at + 1, b, mask=real)
        tl.store(at + 2, c, mask=real)
        tl.store(at + 3, d, mask=real)


@triton.jit
def _put2(at, a, b, FTZ: tl.constexpr):
    """Two neighbouring words, one transfer a thread."""
    if FTZ:
        tl.inline_asm_elementwise(
            "st.global.cs.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0;", "=r,l,r,r",
            [at.to(tl.int64), a, b], tl.int32, False, 1,
        )  # fmt: skip
    else:
        tl.store(at, a)
        tl.store(at + 1, b)


@triton.jit(
    do_not_specialize=["length", "num_blocks", "lag", "samples", "step", "x_b", "x_l", "n1", "n2", "shift1", "shift0"]
)
def _keys(
    x, words, sampled, weights, centres, units, table, groups, k8, k_scale, pooled, k_out,
    x_b, x_l, length, num_blocks, lag, samples, step, by1, by2, n1, n2, shift1, shift0, eps,
    H: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr, ALONE: tl.constexpr, SIGNED: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """A program over PER times R rows of a block, or over a head of the block that came `lag` (1 at least) before; the
    first ones over a centre.

    x, weights, centres, table, k8, pooled, k_out: as words of 32 bits; x_b and x_l in words. num_blocks: of all batch
    items, of which there is one if ALONE. words, one a token, and centres: zeros. samples, S at most, and step: the
    tokens of the centres, and `sampled` their words.
    """
    PARTS: tl.constexpr = (EDGE + R * PER - 1) // (R * PER)
    steps = num_blocks - lag  # that have both kinds: before them rows alone, behind them heads alone
    each = tl.cdiv(length, EDGE)
    front = H
    if not ALONE:
        front = num_blocks // each * H
    turn = tl.program_id(0) - front
    if turn < 0:
        member = (turn + front) % H
        block = (turn + front) // H * each
    elif turn < lag * PARTS:
        member = H + turn % PARTS
        block = turn // PARTS
    elif turn < lag * PARTS + steps * (H + PARTS):
        turn -= lag * PARTS
        member = turn % (H + PARTS)
        block = turn // (H + PARTS)
        if member >= H:
            block += lag
    else:
        turn -= lag * PARTS + steps * (H + PARTS)
        member = turn % H
        block = steps + turn // H
    b = 0
    if ALONE:
        tile = member.to(tl.int64) * num_blocks + block
    else:
        b = block // each
        block = block % each
        x += b.to(tl.int64) * x_b
        words += b.to(tl.int64) * length
        if k_out is not None:
            k_out += b.to(tl.int64) * length * (H * D // 2)
        tile = (b * H + member).to(tl.int64) * each + block
    if member >= H:
        first = block * EDGE + (member - H) * (R * PER)
        if first < length:
            _roots(
                x, words, length, 1, first, x_l, by1, by2, n1, n2, shift1, shift0, eps,
                H * D, R, LANES, PER, K, DTYPE, FTZ,
            )  # fmt: skip
    elif turn < 0:
        _centre(
            x, sampled + b * samples, weights, centres, table, groups, samples, step, member, b, x_l,
            H, D, S, CHUNK, DTYPE, FTZ,
        )  # fmt: skip
    elif (block + 1) * EDGE <= length:
        _tile(
            x, words, weights, centres, units, table, groups, k8, k_scale, pooled, k_out,
            length, block, member, b, tile, x_l, H, D, EDGE, CHUNK, True, DTYPE, SIGNED, FTZ,
        )  # fmt: skip
    else:
        _tile(
            x, words, weights, centres, units, table, groups, k8, k_scale, pooled, k_out,
            length, block, member, b, tile, x_l, H, D, EDGE, CHUNK, False, DTYPE, SIGNED, FTZ,
        )  # fmt: skip


@triton.jit
def _cosine(t0, t1, t2, i0, i1, i2, p, n0, n1, n2, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The tables' entries of pair p at positions i0, i1, i2, of which p's axis counts; 0 where none is."""
    value = tl.zeros(i0.shape, tl.float32)
    if D0 > 0:
        value += tl.load(t0 + i0 * D0 + p, mask=(p < D0) & (i0 < n0), other=0.0)
    if D1 > 0:
        value += tl.load(t1 + i1 * D1 + (p - D0), mask=(p >= D0) & (p < D0 + D1) & (i1 < n1), other=0.0)
    if D2 > 0:
        value += tl.load(t2 + i2 * D2 + (p - D0 - D1), mask=(p >= D0 + D1) & (i2 < n2), other=0.0)
    return value


@triton.jit(
    do_not_specialize=[
        "x_b", "x_l", "n0", "n1", "n2", "bits0", "bits1", "bits2", "room", "chunks", "rows", "items", "samples", "step",
    ]
)  # fmt: skip
def _lay_out(
    x, weight, cos0, cos1, cos2, sin0, sin1, sin2, words, sampled, weights, centres, units, table, groups,
    x_b, x_l, n0, n1, n2, bits0, bits1, bits2, room, chunks, rows, items, samples, step, by1, by2, eps,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """What the keys' kernel reads: of each of `items` batch items the words of `samples` tokens, step apart; of each
    head its weights and unit; of each group of four pairs and each WIDTH of its places, of which there are at most
    `chunks`, cosines and sines. The words of `rows` tokens and all centres are set to 0.

    x: as words of 32 bits. Word m of a head holds its elements 4 (m / 2) + m % 2 and the one 2 behind. room: bits of a
    group's places.
    """
    PARTS: tl.constexpr = (S + R * PER - 1) // (R * PER)
    turn = tl.program_id(0)
    if turn < items * PARTS:
        b = turn // PARTS
        first = turn % PARTS * (R * PER)
        if first < samples:
            _roots(
                x + b.to(tl.int64) * x_b, sampled + b * samples, samples, step, first, x_l, by1, by2, n1, n2,
                bits2, bits1 + bits2, eps, H * D, R, LANES, PER, K, DTYPE, FTZ,
            )  # fmt: skip
    else:
        turn -= items * PARTS
        _laid_out(
            weight, cos0, cos1, cos2, sin0, sin1, sin2, words, weights, centres, units, table, groups,
            n0, n1, n2, bits0, bits1, bits2, room, turn // chunks, turn % chunks, chunks, rows, items,
            H, D, D0, D1, D2, WIDTH,
        )  # fmt: skip


@triton.jit
def _cleared(at, count, first, share, WIDTH: tl.constexpr):
    """Zeros from `first` on, of every `share` WIDTH."""
    zero = tl.zeros([WIDTH], at.dtype.element_ty)
    for start in range(first, count, share):
        to = start + tl.arange(0, WIDTH)
        tl.store(at + to, zero, mask=to < count)


@triton.jit
def _laid_out(
    weight, cos0, cos1, cos2, sin0, sin1, sin2, words, weights, centres, units, table, groups,
    n0, n1, n2, bits0, bits1, bits2, room, part, chunk, chunks, rows, items,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Part `part` of H + D / 8, a head or a group of four pairs, of whose places this is chunk `chunk`."""
    first = (part * chunks + chunk) * WIDTH
    share = (H + D // 8) * chunks * WIDTH
    _cleared(words, rows, first, share, WIDTH)
    _cleared(centres, items * (H * D // 2), first, share, WIDTH)
    if part < H:
        if chunk == 0:
            m = tl.arange(0, D // 2)
            low = part * D + m // 2 * 4 + m % 2
            if weight is not None:
                w1 = tl.load(weight + low).to(tl.float32)
                w2 = tl.load(weight + low + 2).to(tl.float32)
            else:
                w1 = tl.full((D // 2,), 1.0, tl.float32)
                w2 = w1
            top = tl.max(tl.maximum(tl.abs(w1), tl.abs(w2)), 0)
            unit = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            unit = tl.where(unit > 0, unit, 1.0)
            to = weights + part * (D // 2) + m
            tl.store(to, _pair((w1 / unit).to(tl.float16), (w2 / unit).to(tl.float16)))
            tl.store(units + part, unit)
    else:
        g = part - H
        front = (g * 4 >= D0).to(tl.int32) + (g * 4 >= D0 + D1).to(tl.int32)  # the axes of the group's pairs
        back = (g * 4 + 3 >= D0).to(tl.int32) + (g * 4 + 3 >= D0 + D1).to(tl.int32)
        shift = tl.where(back == 0, bits1 + bits2, tl.where(back == 1, bits2, 0))
        stop = bits2 + tl.where(front <= 1, bits1, 0) + tl.where(front == 0, bits0, 0)
        count = 1 << (stop - shift)
        # Groups of the same axes lie side by side at each place: what a token's threads read is in few lines.
        stride = 0
        before = 0
        for q in tl.static_range(D // 8):
            alike = (front == (q * 4 >= D0) + (q * 4 >= D0 + D1)) & (back == (q * 4 + 3 >= D0) + (q * 4 + 3 >= D0 + D1))
            stride += alike.to(tl.int32)
            before += (alike & (q < g)).to(tl.int32)
        base = ((g - before) << room) + before
        if chunk == 0:
            i = tl.arange(0, 4)
            last = tl.where(i == 2, base, stride)
            tl.store(groups + g * 4 + i, tl.where(i == 0, shift, tl.where(i == 1, count - 1, last)))
        if chunk * WIDTH < count:
            place = chunk * WIDTH + tl.arange(0, WIDTH)
            token = place << shift
            i2 = token & ((1 << bits2) - 1)
            i1 = token >> bits2 & ((1 << bits1) - 1)
            i0 = token >> (bits1 + bits2)
            to = table + (base + place * stride) * 4
            for half in tl.static_range(2):
                p = token * 0 + (g * 4 + half * 2)  # a tensor: of a scalar condition the interpreter makes integers
                c1 = _cosine(cos0, cos1, cos2, i0, i1, i2, p, n0, n1, n2, D0, D1, D2)
                c2 = _cosine(cos0, cos1, cos2, i0, i1, i2, p + 1, n0, n1, n2, D0, D1, D2)
                s1 = _cosine(sin0, sin1, sin2, i0, i1, i2, p, n0, n1, n2, D0, D1, D2)
                s2 = _cosine(sin0, sin1, sin2, i0, i1, i2, p + 1, n0, n1, n2, D0, D1, D2)
                tl.store(to + half * 2, _pair(c1.to(tl.float16), c2.to(tl.float16)), mask=place < count)
                tl.store(to + half * 2 + 1, _pair(s1.to(tl.float16), s2.to(tl.float16)), mask=place < count)


@dataclass(frozen=True)
class KeysConfig:
    """How the kernel is launched."""

    warps: int
    words: int  # of rows a thread of a program over rows has in flight
    registers: int | None  # a thread may use at most
    lag: float  # programs a multiprocessor takes between a block's rows and its heads

    def pieces(self, width: int) -> dict[str, int]:
        """Rows of `width` as a program takes them: PER times R, each in K pieces of eight for each of LANES threads."""
        lanes = 32
        while triton.cdiv(width, 8 * lanes) * 4 > self.words:
            lanes *= 2
        k = triton.cdiv(width, 8 * lanes)
        rows = self.warps * 32 // lanes
        most = max(1, min(self.words // (4 * k), 64 // rows))
        return {"LANES": lanes, "K": k, "R": rows, "PER": 1 << (most.bit_length() - 1)}


# The declared set: keys alone, and with k kept
KEYS_CONFIGS = (KeysConfig(8, 48, 80, lag=5), KeysConfig(8, 48, 80, lag=4))


@dataclass(frozen=True)
class Tables:
    """What the kernel reads beside x: words of two halves each, and where they are."""

    words: torch.Tensor  # (B, L) int64, zeros, which the kernel fills: Tables serve once
    sampled: torch.Tensor  # (B, samples) int64, the words of the tokens of which it makes the centres
    weights: torch.Tensor  # (H * D / 2) int32
    centres: torch.Tensor  # (B, H * D / 2) int32, zeros, of which the kernel makes minus the means
    units: torch.Tensor  # (H) float32
    table: torch.Tensor  # (D / 8 * places, 4) int32, the groups of the same axes side by side at each place
    groups: torch.Tensor  # (D / 8, 4) int32: shift and mask of the group's places, the first and their distance
    counts: tuple[int, int, int]  # positions along the axes
    bits: tuple[int, int, int]
    step: int  # how far apart the tokens of the centres are


def spread(length: int) -> tuple[int, int]:
    """(how many tokens, how far apart) the centre is the mean of."""
    step = max(1, length // SAMPLES)
    while gcd(step, length) > 1 and step > 1:  # no column or row of the video alone
        step -= 1
    return min(SAMPLES, length), step


def room_of(columns: Sequence[int], bits: Sequence[int]) -> int:
    """Bits that count the places of four neighbouring pairs, at most. columns, bits: of the three axes."""
    axes = [axis for axis, n in enumerate(columns) for _ in range(n)]
    return max(sum(bits[axes[p] : axes[p + 3] + 1]) for p in range(0, len(axes), 4))


def lay_out(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> Tables:
    """Tables for x (B, L, H * D): a launch over a few tokens and the tables alone."""
    batch, length, dim, dev = x.shape[0], x.shape[1], x.shape[2] // num_heads, x.device
    missing = AXES - len(cos)  # axes in front, of one position and no columns
    n0, n1, n2 = [1] * missing + list(grid)
    columns = [0] * missing + [c.shape[1] for c in cos]
    bits = (n0 - 1).bit_length(), (n1 - 1).bit_length(), (n2 - 1).bit_length()
    room = room_of(columns, bits)
    if length >= TOKENS:
        raise ValueError(f"{length} tokens are more than the {TOKENS - 1} that the kernel counts")
    if 1 << room > PLACES:
        raise ValueError(f"{1 << room} places of the tables are more than {PLACES}: a grid of {n0} x {n1} x {n2}")
    tables = [[None] * missing + [t.float().contiguous() for t in axes] for axes in (cos, sin)]
    v = _rows16(x)
    x_b, x_l = row_strides(v)
    samples, step = spread(length)
    groups = dim // 8
    made = Tables(
        torch.empty((batch, length), dtype=torch.int64, device=dev),
        torch.empty((batch, samples), dtype=torch.int64, device=dev),
        torch.empty(num_heads * dim // 2, dtype=torch.int32, device=dev),
        torch.empty((batch, num_heads * dim // 2), dtype=torch.int32, device=dev),
        torch.empty(num_heads, dtype=torch.float32, device=dev),
        torch.empty((groups << room, 4), dtype=torch.int32, device=dev),
        torch.empty((groups, 4), dtype=torch.int32, device=dev),
        (n0, n1, n2), bits, step,
    )  # fmt: skip
    config, width = KEYS_CONFIGS[0], 256
    taken = config.pieces(num_heads * dim)
    chunks = triton.cdiv(1 << room, width)
    programs = batch * triton.cdiv(SAMPLES, taken["R"] * taken["PER"]) + (num_heads + groups) * chunks
    _lay_out[(programs,)](
        v.view(torch.int32), None if weight is None else weight.contiguous(), *tables[0], *tables[1],
        made.words, made.sampled, made.weights, made.centres, made.units, made.table, made.groups,
        x_b // 2, x_l // 2, n0, n1, n2, *bits, room, chunks, batch * length, batch, samples, step, 1 / n1, 1 / n2, eps,
        H=num_heads, D=dim, D0=columns[0], D1=columns[1], D2=columns[2], S=SAMPLES, **taken, WIDTH=width,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, FTZ=x.is_cuda,
        **FUSED, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return made


def _rows16(x: torch.Tensor) -> torch.Tensor:
    """x (B, L, C) as rows of which 16 bytes can be read at a time."""
    v = view3(x, x.shape)
    return v.contiguous() if any(s % 8 for s in row_strides(v)) or v.data_ptr() % 16 else v


def norm_keys(
    x: torch.Tensor,
    eps: float,
    num_heads: int,
    tables: Tables,
    block_k: int,
    *,
    pool: bool = False,
    keep: bool = False,
    config: KeysConfig | None = None,
) -> Keys:
    """Keys of x (B, L, H * D) in blocks of block_k (64 or 128) tokens. pool: block means; keep: k itself, too."""
    batch, length, width = x.shape
    dim, n, dev = width // num_heads, triton.cdiv(length, block_k), x.device
    config = config or KEYS_CONFIGS[keep]
    v = _rows16(x)
    made = Keys(
        torch.empty((batch * num_heads, n, block_k, dim), dtype=torch.int8, device=dev),
        torch.empty((batch * num_heads, n), dtype=torch.float32, device=dev),
        torch.empty((batch * num_heads, n, dim), dtype=x.dtype, device=dev) if pool else None,
        torch.empty((batch, length, num_heads, dim), dtype=x.dtype, device=dev) if keep else None,
    )
    taken = config.pieces(width)
    programs = num_heads + triton.cdiv(block_k, taken["R"] * taken["PER"])
    lag = min(int(config.lag * processors(dev)) // programs + 1, batch * n)
    _, n1, n2 = tables.counts
    x_b, x_l = row_strides(v)
    _keys[(batch * (num_heads + n * programs),)](
        v.view(torch.int32), tables.words, tables.sampled, tables.weights, tables.centres, tables.units, tables.table,
        tables.groups, made.k8.view(torch.int32), made.k_scale,
        None if made.pooled is None else made.pooled.view(torch.int32),
        None if made.k is None else made.k.view(torch.int32), x_b // 2, x_l // 2, length, batch * n, lag,
        tables.sampled.shape[1], tables.step, 1 / n1, 1 / n2, n1, n2, tables.bits[2], tables.bits[1] + tables.bits[2],
        eps,
        H=num_heads, D=dim, EDGE=block_k, CHUNK=min(block_k, config.warps * 256 // dim), S=SAMPLES, **taken,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        ALONE=batch == 1, SIGNED=not x.is_cuda or torch.cuda.get_device_capability(dev) >= (8, 6), FTZ=x.is_cuda,
        **FUSED, num_warps=config.warps, num_stages=1,
        **({} if config.registers is None or not x.is_cuda else {"maxnreg": config.registers}),
    )  # fmt: skip
    return made


def quantized_keys(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    block_k: int,
    *,
    linear: bool = False,
) -> Keys:
    """Keys of x (B, L, H * D) as sage_forward reads them, or, `linear`, sla_forward. The rest as in qk_norm_rope.py."""
    tables = lay_out(x, weight, eps, num_heads, cos, sin, grid)
    return norm_keys(x, eps, num_heads, tables, block_k, pool=linear, keep=linear)
