"""The launch before the keys' kernel: it makes a word of each sampled token, and lays out all tables for the kernel.

A token's `word` (int64) holds in its low 32 bits the token's positions along the axes, and in its high 32 bits 1 + the
bits of the row's root 1 / sqrt(mean(x^2) + eps), so that a written word is never 0. `roots` computes words: in this
launch for the SAMPLES tokens whose mean is the centre, and in the keys' kernel for all tokens.

Four neighbouring pairs of a head are a `group`. One load of 16 bytes brings their cosines and sines, from the `place`
that the token's positions along the group's axes select. A head's weights are halves (float16) of weight / unit, where
unit is the largest power of two that is at most the head's largest weight.

Tensor cores compute the sums of squares: a quad of threads gives its own elements as both operands of a product, so
that the product's diagonal holds the sums.
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
from turbocompile.kernels._rows import row_strides, view3
from turbocompile.kernels.attention.keys import PLACES, TOKENS
from turbocompile.kernels.attention.keys_halves_triton import LOADS_FIRST, four_words, pair_of, two_floats
from turbocompile.kernels.rotary.qk_norm_rope import AXES

# How many tokens the centre is the mean of. Their mean differs from the mean of all tokens by an eighth of k's standard
# deviation.
SAMPLES = 64

# A quad of threads holds a row of one operand and a column of the other. Both hold the quad's own words, so that the
# diagonal of the product has the sums of their squares: rows 0-7 those of the first and third word, rows 8-15 those of
# the second and fourth.
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
# One thread of a quad holds the quad's own element of the diagonal: rows 0-7 in $1 or $2, rows 8-15 in $3 or $4. That
# thread gets the sum of both, and the quad's other threads get 0.
DIAGONAL = tl.constexpr(
    "{ .reg .b32 lane, quad, half, mine; .reg .pred odd, own; .reg .f32 a, b; "
    "mov.u32 lane, %laneid; shr.u32 quad, lane, 2; and.b32 mine, lane, 3; shr.u32 half, quad, 1; "
    "setp.eq.u32 own, mine, half; and.b32 quad, quad, 1; setp.ne.u32 odd, quad, 0; "
    "selp.f32 a, $2, $1, odd; selp.f32 b, $4, $3, odd; add.f32 a, a, b; selp.f32 $0, a, 0f00000000, own; }"
)


@triton.jit
def _squares(pieces, K: tl.constexpr, dtype: tl.constexpr, FTZ: tl.constexpr):
    """A (rows, lanes) float32 tensor, whose sum over the lanes is the sum of squares of a row.

    pieces: K times four words (rows, lanes) of elements of dtype `dtype`.
    """
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
                low, high = two_floats(pieces[k][i], dtype)
                a0 += low * low + high * high
    return a0


@triton.jit
def roots(
    x, words, count, step, first, x_l, by1, by2, n1, n2, shift1, shift0, eps,
    C: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr, K: tl.constexpr,
    DTYPE: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Stores the words of PER times R tokens, from token `first` on, of `count` tokens that lie `step` rows apart.

    Past the end the last token is computed again. A row of C channels is held as K pieces of eight channels by each of
    LANES threads. by1, by2: 1 / n1, 1 / n2 of the grid (n0, n1, n2); shift1, shift0: the first bits of the positions
    along axes 1 and 0 in a word.
    """
    lane = tl.arange(0, LANES)[None, :]
    held = ()
    for i in tl.static_range(PER):
        row = (tl.minimum(first + i * R + tl.arange(0, R)[:, None], count - 1) * step).to(tl.int64)
        pieces = ()
        for k in tl.static_range(K):
            at = x + row * x_l + (k * LANES + lane) * 4
            if (k + 1) * LANES * 8 <= C:
                # four words (R, LANES)
                pieces = pieces + (four_words(at, LOADS_FIRST, FTZ),)  # type: ignore[assignment]
            else:  # past the end of the row the loads read the row's start instead, and its words are replaced by zeros
                real = (k * LANES + lane) * 8 < C
                a, b, c, d = four_words(tl.where(real, at, x + row * x_l), LOADS_FIRST, FTZ)  # four words (R, LANES)
                piece = (tl.where(real, a, 0), tl.where(real, b, 0), tl.where(real, c, 0), tl.where(real, d, 0))
                pieces = pieces + (piece,)  # type: ignore[assignment]
        held = held + (pieces,)  # type: ignore[assignment]
    for i in tl.static_range(PER):
        total = tl.sum(_squares(held[i], K, DTYPE, FTZ), 1)  # type: ignore[misc]
        root = tl.rsqrt(tl.div_rn(total, C * 1.0) + eps)
        # Never 0, because a root is not negative, and the NaN of a GPU has the bits 0x7FFFFFFF.
        high = root.to(tl.int32, bitcast=True) + 1
        to = tl.minimum(first + i * R + tl.arange(0, R), count - 1)
        row = to * step
        # floor((row + 1/2) / n). 1 / n and the product are each off by 2^-24, which changes no result below 2^22 rows.
        plane = ((row.to(tl.float32) + 0.5) * by2).to(tl.int32)
        i0 = ((plane.to(tl.float32) + 0.5) * by1).to(tl.int32)
        low = (row - plane * n2) | (plane - i0 * n1) << shift1 | i0 << shift0
        tl.store(words + to, high.to(tl.int64) << 32 | low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _cosine(t0, t1, t2, i0, i1, i2, p, n0, n1, n2, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The entries of the tables t0 (n0, D0), t1 (n1, D1), t2 (n2, D2) for pairs p at positions i0, i1, i2, float32.

    A pair reads the table of its own axis. Past the table's end the entry is 0.
    """
    value = tl.zeros(i0.shape, tl.float32)
    if D0 > 0:
        value += tl.load(t0 + i0 * D0 + p, mask=(p < D0) & (i0 < n0), other=0.0)  # (WIDTH,)
    if D1 > 0:
        value += tl.load(t1 + i1 * D1 + (p - D0), mask=(p >= D0) & (p < D0 + D1) & (i1 < n1), other=0.0)  # (WIDTH,)
    if D2 > 0:
        value += tl.load(t2 + i2 * D2 + (p - D0 - D1), mask=(p >= D0 + D1) & (i2 < n2), other=0.0)  # (WIDTH,)
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
    """Writes all tensors that the keys' kernel reads beside x, and clears the words and centres that the kernel writes.

    The first programs write the words of `samples` tokens, `step` rows apart, of each of `items` batch items. Each
    program behind them writes the weights and the unit of one head, or the cosines and sines of WIDTH places of one
    group, which has at most `chunks` times WIDTH places. Together these programs zero the words of `rows` tokens and
    the centres.

    x: (B, L, C) as words of 32 bits; x_b and x_l count words. Word m of a head's weights holds element 4 (m // 2) + m %
    2 and the element two behind it. bits0, bits1, bits2: how many bits a position along each axis takes; room: how many
    bits the number of a group's place takes.
    """
    PARTS: tl.constexpr = (S + R * PER - 1) // (R * PER)
    turn = tl.program_id(0)
    if turn < items * PARTS:
        b = turn // PARTS
        first = turn % PARTS * (R * PER)
        if first < samples:
            roots(
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
    """Zeros WIDTH of every `share` elements at `at`, from `first` on and before `count`."""
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
    """Writes the weights and the unit of head `part` if part < H, otherwise chunk `chunk` of the places of group part -
    H, and clears its share of words and centres.
    """
    first = (part * chunks + chunk) * WIDTH
    share = (H + D // 8) * chunks * WIDTH
    _cleared(words, rows, first, share, WIDTH)
    _cleared(centres, items * (H * D // 2), first, share, WIDTH)
    if part < H:
        if chunk == 0:
            word = tl.arange(0, D // 2)
            low = part * D + word // 2 * 4 + word % 2
            if weight is not None:
                first_weight = tl.load(weight + low).to(tl.float32)  # (D / 2,)
                second_weight = tl.load(weight + low + 2).to(tl.float32)  # (D / 2,)
            else:
                first_weight = tl.full((D // 2,), 1.0, tl.float32)
                second_weight = first_weight
            top = tl.max(tl.maximum(tl.abs(first_weight), tl.abs(second_weight)), 0)
            unit = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            unit = tl.where(unit > 0, unit, 1.0)
            to = weights + part * (D // 2) + word
            tl.store(to, pair_of((first_weight / unit).to(tl.float16), (second_weight / unit).to(tl.float16)))
            tl.store(units + part, unit)
    else:
        group = part - H
        # front, back: the axes of the group's first and last pair.
        front = (group * 4 >= D0).to(tl.int32) + (group * 4 >= D0 + D1).to(tl.int32)
        back = (group * 4 + 3 >= D0).to(tl.int32) + (group * 4 + 3 >= D0 + D1).to(tl.int32)
        shift = tl.where(back == 0, bits1 + bits2, tl.where(back == 1, bits2, 0))
        stop = bits2 + tl.where(front <= 1, bits1, 0) + tl.where(front == 0, bits0, 0)
        count = 1 << (stop - shift)
        # Groups of the same axes lie side by side at each place, because the threads of a token then read few cache
        # lines.
        stride = 0
        before = 0
        for other in tl.static_range(D // 8):
            alike = (front == (other * 4 >= D0) + (other * 4 >= D0 + D1)) & (
                back == (other * 4 + 3 >= D0) + (other * 4 + 3 >= D0 + D1)
            )
            stride += alike.to(tl.int32)
            before += (alike & (other < group)).to(tl.int32)
        base = ((group - before) << room) + before
        if chunk == 0:
            i = tl.arange(0, 4)
            last = tl.where(i == 2, base, stride)
            tl.store(groups + group * 4 + i, tl.where(i == 0, shift, tl.where(i == 1, count - 1, last)))
        if chunk * WIDTH < count:
            place = chunk * WIDTH + tl.arange(0, WIDTH)
            token = place << shift
            i2 = token & ((1 << bits2) - 1)
            i1 = token >> bits2 & ((1 << bits1) - 1)
            i0 = token >> (bits1 + bits2)
            to = table + (base + place * stride) * 4
            for half in tl.static_range(2):
                # A tensor and no scalar, because the interpreter makes integers of a scalar condition.
                p = token * 0 + (group * 4 + half * 2)
                c1 = _cosine(cos0, cos1, cos2, i0, i1, i2, p, n0, n1, n2, D0, D1, D2)
                c2 = _cosine(cos0, cos1, cos2, i0, i1, i2, p + 1, n0, n1, n2, D0, D1, D2)
                s1 = _cosine(sin0, sin1, sin2, i0, i1, i2, p, n0, n1, n2, D0, D1, D2)
                s2 = _cosine(sin0, sin1, sin2, i0, i1, i2, p + 1, n0, n1, n2, D0, D1, D2)
                tl.store(to + half * 2, pair_of(c1.to(tl.float16), c2.to(tl.float16)), mask=place < count)
                tl.store(to + half * 2 + 1, pair_of(s1.to(tl.float16), s2.to(tl.float16)), mask=place < count)


@dataclass(frozen=True)
class KeysConfig:
    """A configuration of the keys' kernel's launch."""

    warps: int
    words: int  # how many words a thread of a program over rows loads before it uses the first
    registers: int | None  # the most registers that a thread may use; None: no limit
    lag: float  # how many programs a multiprocessor runs between the rows of a block and its tiles

    def pieces(self, width: int) -> dict[str, int]:
        """The constants of a program over rows of `width` channels.

        The program takes PER times R rows, and holds each row as K pieces of eight channels in each of LANES threads.
        """
        lanes = 32
        while triton.cdiv(width, 8 * lanes) * 4 > self.words:
            lanes *= 2
        k = triton.cdiv(width, 8 * lanes)
        rows = self.warps * 32 // lanes
        most = max(1, min(self.words // (4 * k), 64 // rows))
        return {"LANES": lanes, "K": k, "R": rows, "PER": 1 << (most.bit_length() - 1)}


# The declared set: the first for kernels that do not write k, the second for kernels that do.
KEYS_CONFIGS = (KeysConfig(8, 48, 80, lag=5), KeysConfig(8, 48, 80, lag=4))


@dataclass(frozen=True)
class Tables:
    """The tensors that the keys' kernel reads beside x. An int32 element is a word of two halves (float16).

    Tables serve one launch, because the kernel fills `words` and `centres`.
    """

    words: torch.Tensor  # (B, L) int64, zeros, which the kernel replaces by the tokens' words
    sampled: torch.Tensor  # (B, samples) int64, the words of the tokens whose mean is the centre
    weights: torch.Tensor  # (H * D / 2) int32
    centres: torch.Tensor  # (B, H * D / 2) int32, zeros, which the kernel replaces by minus the centres
    units: torch.Tensor  # (H) float32
    table: torch.Tensor  # (D / 8 * places, 4) int32; the groups of the same axes lie side by side at each place
    # (D / 8, 4) int32 numbers: shift and mask of a group's places in a word, its first place, the distance of its
    # places
    groups: torch.Tensor
    counts: tuple[int, int, int]  # how many positions each axis has
    bits: tuple[int, int, int]  # how many bits a position along each axis takes
    step: int  # rows between the sampled tokens


def spread(length: int) -> tuple[int, int]:
    """(count, step): the centre is the mean of `count` of `length` tokens, `step` rows apart."""
    step = max(1, length // SAMPLES)
    # No common divisor, because the sampled tokens could otherwise all lie in one row or column of the video.
    while gcd(step, length) > 1 and step > 1:
        step -= 1
    return min(SAMPLES, length), step


def room_of(columns: Sequence[int], bits: Sequence[int]) -> int:
    """How many bits the number of a place takes, in the group with the most places.

    columns: how many pairs each axis turns; bits: how many bits a position along each axis takes.
    """
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
    """Makes the Tables of x (B, L, H * D), bf16 or fp16, in one launch over SAMPLES tokens and the rotary tables.

    weight, eps, cos, sin, grid: as in qk_norm_rope.py. Raises ValueError for more tokens or places than the kernel
    counts (keys.py).
    """
    batch, length, dim, dev = x.shape[0], x.shape[1], x.shape[2] // num_heads, x.device
    # the kernel always has AXES axes; missing axes come first, with one position and no columns
    missing = AXES - len(cos)
    n0, n1, n2 = [1] * missing + list(grid)
    columns = [0] * missing + [c.shape[1] for c in cos]
    bits = (n0 - 1).bit_length(), (n1 - 1).bit_length(), (n2 - 1).bit_length()
    room = room_of(columns, bits)
    if length >= TOKENS:
        raise ValueError(f"{length} tokens are more than the {TOKENS - 1} that the kernel counts")
    if 1 << room > PLACES:
        raise ValueError(f"{1 << room} places of the tables are more than {PLACES}: a grid of {n0} x {n1} x {n2}")
    tables = [[None] * missing + [t.float().contiguous() for t in axes] for axes in (cos, sin)]
    rows = rows_of_16_bytes(x)
    x_b, x_l = row_strides(rows)
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
        rows.view(torch.int32), None if weight is None else weight.contiguous(), *tables[0], *tables[1],
        made.words, made.sampled, made.weights, made.centres, made.units, made.table, made.groups,
        x_b // 2, x_l // 2, n0, n1, n2, *bits, room, chunks, batch * length, batch, samples, step, 1 / n1, 1 / n2, eps,
        H=num_heads, D=dim, D0=columns[0], D1=columns[1], D2=columns[2], S=SAMPLES, **taken, WIDTH=width,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, FTZ=x.is_cuda,
        **FUSED, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return made


def rows_of_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """x (B, L, C), copied if the kernel could not read its rows 16 bytes at a time."""
    v = view3(x, x.shape)
    return v.contiguous() if any(s % 8 for s in row_strides(v)) or v.data_ptr() % 16 else v
