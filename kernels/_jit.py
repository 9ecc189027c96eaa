"""Device functions that several families of kernels share.

They compute in single instructions (`exp2`, `product`, `reciprocal`), locate and mask the rows of a (B, L, C) tensor,
hold two 16-bit elements in one register (`hold`, `release`, `packed`), make 8-bit codes (`encode`), and read words that
one program writes and another program waits for (`glance`, `wait`).

All kernels have the constant FTZ. It is True on a GPU, where the functions are PTX that flushes denormal numbers to
zero, and False under Triton's interpreter, because the interpreter runs no PTX.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# 1.5 * 2^23: the sum x + ROUND, |x| < 2^22, rounds x half to even, and the sum's lowest bits are the rounded integer.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)  # the bits of ROUND: ROUND_BITS + i, |i| < 2^22, are the bits of ROUND + i
# encode_held cuts magnitudes at CUT * amax. Near amax, bfloat16 numbers lie 1/2 to 1 apart in units of amax / 128.
CUT = tl.constexpr(127.25 / 128)
# 2^26 naps, each of 0.1 us and a read, take longer than any program runs. A program whose word never comes then ends
# the launch with an error, because it would otherwise wait forever.
NAP = "nanosleep.u32 100; add.u32 naps, naps, 1; setp.gt.u32 there, naps, 0x4000000; @there trap; "
WAIT = tl.constexpr(
    "{ .reg .pred there; .reg .b32 low, high, naps; mov.b64 $0, $1; mov.b32 naps, 0; "
    "again: mov.b64 {low, high}, $0; setp.ne.s32 there, high, 0; @there bra done; "
    f"{NAP}ld.relaxed.gpu.global.b64 $0, [$2]; bra again; done: }}"
)


@triton.jit
def exp2(x, FTZ: tl.constexpr):
    """2^x, float32. With FTZ, denormal results become zero, which saves the instructions that would keep them."""
    if FTZ:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.exp2(x)


@triton.jit
def product(x, y, FTZ: tl.constexpr):
    """x y, rounded to float32 on its own.

    The compiler may fuse a plain product with a following difference. The difference then contains the product's
    rounding error, which is up to 2^10 where scores reach 1e10, and 2^(2^10) is infinite.
    """
    if FTZ:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    return x * y


@triton.jit
def reciprocal(x, FTZ: tl.constexpr):
    """1 / x within an ulp, float32; with FTZ in one instruction."""
    if FTZ:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def place(row, length, b_stride, l_stride, FLAT: tl.constexpr):
    """The offsets of rows of a (B, L, C) tensor, in elements, int64. FLAT: B is 1, so that no division is needed."""
    if FLAT:
        at = row.to(tl.int64) * l_stride
    else:
        at = (row // length).to(tl.int64) * b_stride + (row % length).to(tl.int64) * l_stride
    return at


@triton.jit
def inside(c, C: tl.constexpr, END: tl.constexpr):
    """The mask c < C of columns c, all below END. If END <= C, the mask is a constant, and is not compiled."""
    if END <= C:
        mask = tl.full(c.shape, 1, tl.int32) > 0
    else:
        mask = c < C
    return mask


@triton.jit
def only_before(mask, row, stop):
    """mask if row < stop, otherwise False everywhere.

    The condition becomes a tensor first, because the interpreter makes integers of a mask and a scalar condition.
    """
    return mask & (tl.full(mask.shape, 0, tl.int32) + row < stop)


@triton.jit
def fetch(at, mask):
    """Loads elements that are read once.

    They leave the first-level cache first, because the cache shall keep the vectors that every row needs.
    """
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def hold(x):
    """x (W,) in the form in which it waits for its use: (W / 2,) int32, each of two 16-bit elements.

    Unpacked, each 16-bit element would use a register of its own. A float32 x stays as it is.
    """
    if x.dtype.primitive_bitwidth == 16:
        low, high = tl.split(x.to(tl.int16, bitcast=True).reshape(x.shape[0] // 2, 2))
        x = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return x


@triton.jit
def release(held, dtype: tl.constexpr):
    """The inverse of `hold`: the (W,) elements, of dtype `dtype`, as float32."""
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
    """y * factor, rounded, as an element of data's dtype.

    The magnitude of y * factor is at most the format's limit and an ulp, and rounds to the limit. Only int8_block's
    limit of 128 is no int8, so only +128 is cut, to 127.
    """
    # A product of its own, because a multiply-add with ROUND would move a quotient near a half to the other side.
    v = product(y, factor, FTZ)
    if FORMAT == "fp8":
        coded = v.to(data.dtype.element_ty)
    else:
        if FORMAT == "int8_block":
            v = tl.minimum(v, 127.0)
        coded = (v + ROUND).to(tl.int32, bitcast=True).to(data.dtype.element_ty)
    return coded


@triton.jit
def rounded(x, dtype: tl.constexpr, FTZ: tl.constexpr):
    """x, float32, rounded to dtype and still float32.

    On a GPU one instruction rounds two elements to bfloat16, because a cast whose result is not stored compiles to one
    conversion an element, and a multiprocessor does only 16 conversions a clock.
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
    """The larger elements of two registers a and b, each of two bfloat16 that are not negative."""
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def largest_held(held, dtype: tl.constexpr, FTZ: tl.constexpr):
    """The largest magnitude of the elements that `hold` packed; on a GPU two bfloat16 are compared at a time."""
    if FTZ and dtype == tl.bfloat16:
        pair = tl.reduce(held & 0x7FFF7FFF, 0, larger_of_two)
        most = tl.maximum((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    else:
        most = tl.max(tl.abs(release(held, dtype)), 0)
    return most


@triton.jit
def encode_held(held, amax, data, dtype: tl.constexpr, LIMIT: tl.constexpr, FTZ: tl.constexpr):
    """The elements that `hold` packed, magnitudes up to amax, as codes of format int8_block in data's dtype.

    On a GPU one instruction cuts two bfloat16, before they are scaled. An element that would round to 128, which is
    amax or its predecessor, becomes the largest element that rounds to 127. Every other element keeps its code.
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
    """The sum of a row, which is held as two pieces a and b, or as one piece a if b is None.

    Each thread adds its elements of both pieces first, so that one sum across threads is enough.
    """
    if b is not None:
        a = tl.sum(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0) + b
    return tl.sum(a, 0)


@triton.jit
def largest(a, b):
    """For each element of b, the largest magnitude of the element and of its share of a, which is longer; |a| if b is
    None.
    """
    a = tl.abs(a)
    if b is not None:
        a = tl.maximum(tl.max(a.reshape(a.shape[0] // b.shape[0], b.shape[0]), 0), tl.abs(b))
    return a


@triton.jit
def glance(at, FTZ: tl.constexpr):
    """Loads words that another multiprocessor may have written.

    The instruction is declared pure, because the compiler would otherwise repeat it for each layout that it tries.
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
    """word if it is not 0, otherwise the word at `at`, once another program has written it.

    The interpreter runs one program after the other, so that the word is already there.
    """
    if FTZ:
        word = tl.inline_asm_elementwise(WAIT, "=&l,l,l", [word, at.to(tl.int64)], tl.int64, True, 1)
    return word
