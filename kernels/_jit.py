"""Device functions that several families of kernels share.

Arithmetic in single instructions (`exp2`, `product`, `reciprocal`), rows of a (B, L, C) tensor and their masks, two
16-bit elements in one register (`hold`, `release`, `packed`), 8-bit codes (`encode`), and words that one program writes
and another waits for (`glance`, `wait`).

FTZ is a constant of all kernels: True on a GPU, where a function is PTX that flushes denormal numbers to zero, False
under Triton's interpreter, which knows no PTX.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to |x| < 2^22 it rounds half to even; the bits end in the integer
CUT = tl.constexpr(127.25 / 128)  # of amax; bfloat16 numbers near amax lie 1/2 to 1 apart in units of amax / 128
# 2^26 naps of 0.1 us and a read each take longer than any program runs: a word that never comes ends the launch with
# an error, and not in a standstill.
NAP = "nanosleep.u32 100; add.u32 naps, naps, 1; setp.gt.u32 there, naps, 0x4000000; @there trap; "
WAIT = tl.constexpr(
    "{ .reg .pred there; .reg .b32 low, high, naps; mov.b64 $0, $1; mov.b32 naps, 0; "
    "again: mov.b64 {low, high}, $0; setp.ne.s32 there, high, 0; @there bra done; "
    f"{NAP}ld.relaxed.gpu.global.b64 $0, [$2]; bra again; done: }}"
)


@triton.jit
def exp2(x, FTZ: tl.constexpr):
    """2^x. FTZ leaves out the instructions that keep denormal results."""
    if FTZ:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def product(x, y, FTZ: tl.constexpr):
    """x y, rounded. A plain product may be fused with a difference behind it, which then contains the rounding error,
    up to 2^10 where scores reach 1e10, and 2^(2^10) is infinite.
    """
    if FTZ:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    return x * y


@triton.jit
def reciprocal(x, FTZ: tl.constexpr):
    """1 / x within an ulp; with FTZ in one instruction."""
    if FTZ:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def place(row, length, b_stride, l_stride, FLAT: tl.constexpr):
    """Offsets of rows of a (B, L, C) tensor, in elements, int64. FLAT: B is 1, and no division is needed."""
    if FLAT:
        at = row.to(tl.int64) * l_stride
    else:
        at = (row // length).to(tl.int64) * b_stride + (row % length).to(tl.int64) * l_stride
    return at


@triton.jit
def inside(c, C: tl.constexpr, END: tl.constexpr):
    """c < C, for columns c below END. Where END <= C it is a constant, and the mask is not compiled."""
    if END <= C:
        mask = tl.full(c.shape, 1, tl.int32) > 0
    else:
        mask = c < C
    return mask


@triton.jit
def only_before(mask, row, stop):
    """mask where row < stop, else False. (The interpreter would make integers of a mask and a scalar condition.)"""
    return mask & (tl.full(mask.shape, 0, tl.int32) + row < stop)


@triton.jit
def fetch(at, mask):
    """Loads elements that are read once. They leave the first-level cache first, where vectors that every row needs
    stay.
    """
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def hold(x):
    """x (W,) while it waits: (W / 2,) int32 of two 16-bit elements, which else use a register each. A float32
    x stays as it is.
    """
    if x.dtype.primitive_bitwidth == 16:
        low, high = tl.split(x.to(tl.int16, bitcast=True).reshape(x.shape[0] // 2, 2))
        x = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return x


@triton.jit
def release(held, dtype: tl.constexpr):
    """The inverse of `hold`: (W,) elements of dtype, as float32."""
    if held.dtype.is_floating():
        x = held.to(tl.float32)
    elif dtype == tl.bfloat16:
        low = (held << 16).to(tl.float32, bitcast=True)
        high = (held & -65536).to(tl.float32, bitcast=True)
        x = tl.join(low, high).reshape(2 * held.shape[0])
    else:
        low = held.to(tl.int16).to(tl.float16, bitcast=True)
        high = (held >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        x = tl.join(low, high).reshape(2 * held.shape[0]).to(tl.float32)
    return x


@triton.jit
def encode(y, factor, data, FORMAT: tl.constexpr, FTZ: tl.constexpr):
    """y * factor, rounded, as an element of data. Its magnitude is at most the format's limit and an ulp, which rounds
    to the limit, so int8_block's +128 alone has to be cut.
    """
    v = product(y, factor, FTZ)  # a multiply-add with what rounds to integers would move a quotient near a half
    if FORMAT == "fp8":
        coded = v.to(data.dtype.element_ty)
    else:
        if FORMAT == "int8_block":
            v = tl.minimum(v, 127.0)
        coded = (v + ROUND).to(tl.int32, bitcast=True).to(data.dtype.element_ty)
    return coded


@triton.jit
def rounded(x, dtype: tl.constexpr, FTZ: tl.constexpr):
    """x, float32, rounded to dtype and still float32. On a GPU two at a time to bfloat16: a cast whose result is not
    stored compiles to one conversion each, of which a multiprocessor does 16 a clock, as of exponentials.
    """
    if FTZ and dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f", [x], tl.int32, True, 2,
        )  # fmt: skip
        y = bits.to(tl.float32, bitcast=True)
    else:
        y = x.to(dtype).to(tl.float32)
    return y


@triton.jit
def packed(x, dtype: tl.constexpr, FTZ: tl.constexpr):
    """x, float32, rounded to dtype, as `hold` holds it. On a GPU two at a time to bfloat16, as in `rounded`."""
    if FTZ and dtype == tl.bfloat16:
        low, high = tl.split(x.reshape(x.shape[0] // 2, 2))
        held = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        held = hold(x.to(dtype))
    return held


@triton.jit
def larger_of_two(a, b):
    """The larger of two pairs of bfloat16 that are not negative, a pair in a register."""
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def largest_held(held, dtype: tl.constexpr, FTZ: tl.constexpr):
    """The largest magnitude of the elements that `hold` was given; of bfloat16 on a GPU two at a time."""
    if FTZ and dtype == tl.bfloat16:
        pair = tl.reduce(held & 0x7FFF7FFF, 0, larger_of_two)
        most = tl.maximum((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    else:
        most = tl.max(tl.abs(release(held, dtype)), 0)
    return most


@triton.jit
def encode_held(held, amax, data, dtype: tl.constexpr, LIMIT: tl.constexpr, FTZ: tl.constexpr):
    """What `hold` was given, magnitudes up to amax, as elements of data of format int8_block.

    On a GPU it is two bfloat16 at a time that are cut, before they are scaled: what rounds to 128, amax and its
    predecessor at most, becomes the largest that rounds to 127, and nothing else that does not round to it changes.
    """
    factor = tl.div_rn(LIMIT, amax)
    if FTZ and dtype == tl.bfloat16:
        most = ((amax * CUT).to(tl.int32, bitcast=True) >> 16) * 0x10001
        held = tl.inline_asm_elementwise("min.bf16x2 $0, $1, $2;", "=r,r,r", [held, most], tl.int32, True, 1)
        coded = encode(release(held, dtype), factor, data, "int8", FTZ)
    else:
        coded = encode(release(held, dtype), factor, data, "int8_block", FTZ)
    return coded


@triton.jit
def sum_of(a, b):
    """The sum of a row in two pieces a and b (None: in one piece). The pieces are added in each thread first, so that
    there is one sum across threads and not two.
    """
    if b is not None:
        a = tl.sum(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0) + b
    return tl.sum(a, 0)


@triton.jit
def largest(a, b):
    """The largest magnitude of a and b, where a is longer, for each element of b; b None: |a|."""
    a = tl.abs(a)
    if b is not None:
        a = tl.maximum(tl.max(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0), tl.abs(b))
    return a


@triton.jit
def glance(at, FTZ: tl.constexpr):
    """Loads words that another multiprocessor may have written. (The load counts as pure, because the compiler would
    else repeat it for each layout that it tries.)
    """
    if FTZ:
        word = tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b64 $0, [$1];", "=l,l", [at.to(tl.int64)], tl.int64, True, 1
        )
    else:
        word = tl.load(at)
    return word


@triton.jit
def wait(word, at, FTZ: tl.constexpr):
    """word, where it is not 0, else the word at `at` once that is not 0. The interpreter runs programs in order:
    the word is there.
    """
    if FTZ:
        word = tl.inline_asm_elementwise(WAIT, "=&l,l,l", [word, at.to(tl.int64)], tl.int64, True, 1)
    return word
