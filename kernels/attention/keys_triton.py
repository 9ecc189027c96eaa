"""The keys of a quantized attention, made from their projection in one pass, in Triton: RMSNorm, rotation, INT8 blocks.

    n = x / sqrt(mean(x^2) + eps) * weight                       over all channels of a token
    k = (n1 cos - n2 sin, n2 cos + n1 sin)                       for the pairs of each head
    k8 = rne(127 (k - centre) / amax), k_scale = amax / 127      amax over a block of tokens of a head
    pooled = mean of k - centre over a block

x: (B, L, H * D), bf16 or fp16, D 64 or 128, pairs interleaved, tables as in rope.py for at most three axes. The kernel
does in one pass the work of qk_norm_rope.py's op and of the half of prepare_triton.py that concerns k. It writes k
itself only if SLA's linear branch needs k. A constant vector may be subtracted from all keys, because it changes no
softmax. The centre is the mean of SAMPLES tokens spread over a batch item, because the mean of all tokens would take a
pass of its own before this pass.

Each element of x is read twice, because the tokens of a block share a scale and a norm needs the token's whole row. The
second read hits the second-level cache, as in int8_block's norms (norms_triton.py). Programs over rows write one word a
token: the root of its norm and its positions in the tables. Programs over tiles, one for each block and head, come some
blocks later and wait for the words of their tokens. The first programs make the centres, one for each head, and all
tiles of the head wait for its centre. A small launch before this kernel (keys_tables_triton.py) writes the words of the
sampled tokens and lays out the tables.

The kernel computes on pairs of halves (float16; keys_halves_triton.py), because a Hopper card issues only 38
instructions an element in the time in which a copy moves the element's 3 bytes. A version in float32 took 27
instructions an element, and this version takes 11. Four multiply-adds rotate two pairs. A fifth multiply-add rounds to
integers (1536 added to |x| <= 127 leaves the integer in the low byte), and one permutation packs four bytes. Weights
are divided by a power of two, `unit`, so that halves never overflow: |k| <= 2 sqrt(2 C) units. The errors are smaller
than those of a k that is rounded to bf16.

The kernel reads 2 bytes an element and writes 1, and 2 more if it writes k. At the 3.0 TB/s of a copy that takes 0.050
ms for 32,760 x 1536 and 0.387 ms for 75,600 x 5120.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import glance, reciprocal, wait
from turbocompile.kernels._registry import FUSED, card
from turbocompile.kernels._rows import row_strides
from turbocompile.kernels.attention.keys_halves_triton import (
    GLANCED,
    LOADS_AGAIN,
    LOADS_FIRST,
    LOADS_LAST,
    eight_sums,
    factor_of,
    four_codes,
    four_words,
    pair_of,
    put_four,
    put_two,
    raised,
    sum_of_halves,
    top_of,
    turned,
    two_floats,
    two_rounded,
    wait_for_four,
)
from turbocompile.kernels.attention.keys_tables_triton import (
    KEYS_CONFIGS,
    SAMPLES,
    KeysConfig,
    Tables,
    lay_out,
    roots,
    rows_of_16_bytes,
)
from turbocompile.kernels.attention.prepare_triton import Keys


@triton.jit
def _centre(
    x, sampled, weights, centres, table, groups, samples, step, head, item, x_l,
    H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Stores minus the mean of `samples` tokens (at most S), which lie `step` rows apart, of one head of a batch item.

    No word of the result is 0, because a tile that reads 0 believes that the word is not written yet. A pair of zeros
    is stored as (0, -0).
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
        # four words (CHUNK, G)
        held = held + (four_words(x + row.to(tl.int64) * x_l + g * 4, LOADS_FIRST, FTZ),)  # type: ignore[assignment]
    w0, w1, w2, w3 = four_words(weights + (head * G + each) * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
    shift, mask, base, stride = four_words(groups + each * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
    none = tl.zeros((CHUNK, G), tl.int32)
    s0 = tl.zeros((CHUNK, G), tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for i in tl.static_range(S // CHUNK):
        word = tl.load(sampled + tl.minimum(i * CHUNK + member, samples - 1) + each * 0)  # (CHUNK, G)
        root = ((word >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)
        place = base + ((word.to(tl.int32) >> shift) & mask) * stride
        t0, t1, t2, t3 = four_words(table + place * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
        a, b, c, d = held[i]  # type: ignore[misc, var-annotated]
        a, b = turned(a, b, root, w0, w1, t0, t1, none, none, DTYPE, FTZ)
        c, d = turned(c, d, root, w2, w3, t2, t3, none, none, DTYPE, FTZ)
        real = i * CHUNK + member < samples
        a0, a1 = two_floats(tl.where(real, a, 0), tl.float16)
        b0, b1 = two_floats(tl.where(real, b, 0), tl.float16)
        c0, c1 = two_floats(tl.where(real, c, 0), tl.float16)
        d0, d1 = two_floats(tl.where(real, d, 0), tl.float16)
        s0, s1, s2, s3, s4, s5, s6, s7 = eight_sums(
            s0, s1, s2, s3, s4, s5, s6, s7, a0, a1, b0, b1, c0, c1, d0, d1
        )  # fmt: skip
    s0, s1, s2, s3, s4, s5, s6, s7 = tl.reduce((s0, s1, s2, s3, s4, s5, s6, s7), 0, eight_sums)
    share = -1.0 / samples
    to = centres + ((item * H + head) * G + tl.arange(0, G)) * 4
    _put_centre(to, s0 * share, s1 * share)
    _put_centre(to + 1, s2 * share, s3 * share)
    _put_centre(to + 2, s4 * share, s5 * share)
    _put_centre(to + 3, s6 * share, s7 * share)


@triton.jit
def _put_centre(at, low, high):
    """Stores two numbers as a word of two halves, which is never 0."""
    pair = pair_of(low.to(tl.float16), high.to(tl.float16))
    tl.store(at, tl.where(pair == 0, 0x8000, pair))


@triton.jit
def _tile(
    x, words, weights, centres, units, table, groups, k8, k_scale, pooled, k_out,
    length, block, head, item, tile, x_l,
    H: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    DTYPE: tl.constexpr, SIGNED: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Computes a tile: the keys of a block of EDGE tokens of one head of a batch item, CHUNK tokens at a time.

    A thread holds eight channels of a token, which are four words of x. WHOLE: the block has EDGE tokens; if it has
    fewer, the tokens behind the end become zeros in k8. Tensors have the shape (CHUNK, G) where no comment names
    another shape.
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
        # four words (CHUNK, G)
        held = held + (four_words(x + row * x_l + g * 4, LOADS_LAST, FTZ),)  # type: ignore[assignment]
    for i in tl.static_range(EDGE // CHUNK):
        row = i * CHUNK + member
        if not WHOLE:
            row = tl.minimum(row, length - 1 - first)
        seen = seen + (glance(words + row + each * 0, FTZ),)  # type: ignore[assignment]
    w0, w1, w2, w3 = four_words(weights + (head * G + each) * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
    shift, mask, base, stride = four_words(groups + each * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
    unit = tl.load(units + head)
    centre_at = centres + ((item * H + head) * G + each) * 4
    centre = four_words(centre_at, GLANCED, FTZ)  # four words (CHUNK, G)
    waited = ()
    for i in tl.static_range(EDGE // CHUNK):
        row = i * CHUNK + member
        if not WHOLE:
            row = tl.minimum(row, length - 1 - first)
        waited = waited + (wait(seen[i], words + row + each * 0, FTZ),)  # type: ignore[assignment, misc]
    c0, c1, c2, c3 = wait_for_four(centre, centre_at, FTZ)
    most = tl.zeros((CHUNK, G), tl.int32)
    done = ()
    for i in tl.static_range(EDGE // CHUNK):
        word = waited[i]  # type: ignore[misc, var-annotated]
        root = ((word >> 32).to(tl.int32) - 1).to(tl.float32, bitcast=True)  # type: ignore[attr-defined]
        place = base + ((word.to(tl.int32) >> shift) & mask) * stride
        t0, t1, t2, t3 = four_words(table + place * 4, LOADS_AGAIN, FTZ)  # four words (CHUNK, G)
        a, b, c, d = held[i]  # type: ignore[misc]
        a, b = turned(a, b, root, w0, w1, t0, t1, c0, c1, DTYPE, FTZ)
        c, d = turned(c, d, root, w2, w3, t2, t3, c2, c3, DTYPE, FTZ)
        if k_out is not None:
            a1, b1 = two_floats(sum_of_halves(a, c0, True, FTZ), tl.float16)
            a2, b2 = two_floats(sum_of_halves(b, c1, True, FTZ), tl.float16)
            e1, f1 = two_floats(sum_of_halves(c, c2, True, FTZ), tl.float16)
            e2, f2 = two_floats(sum_of_halves(d, c3, True, FTZ), tl.float16)
            to = k_out + ((first + i * CHUNK + member).to(tl.int64) * H + head) * (D // 2) + g * 4
            put_four(
                to, two_rounded(a1 * unit, a2 * unit, DTYPE, FTZ), two_rounded(b1 * unit, b2 * unit, DTYPE, FTZ),
                two_rounded(e1 * unit, e2 * unit, DTYPE, FTZ), two_rounded(f1 * unit, f2 * unit, DTYPE, FTZ),
                i * CHUNK + member < length - first, WHOLE, FTZ,
            )  # fmt: skip
        if not WHOLE:
            real = i * CHUNK + member < length - first
            a = tl.where(real, a, 0)
            b = tl.where(real, b, 0)
            c = tl.where(real, c, 0)
            d = tl.where(real, d, 0)
        most = raised(raised(most, a, SIGNED, FTZ), b, SIGNED, FTZ)
        most = raised(raised(most, c, SIGNED, FTZ), d, SIGNED, FTZ)
        done = done + ((a, b, c, d),)  # type: ignore[assignment]
    factor = factor_of(top_of(most.reshape(CHUNK * G), SIGNED, FTZ), FTZ)
    out = k8 + tile * (EDGE * D // 4)
    for i in tl.static_range(EDGE // CHUNK):
        a, b, c, d = done[i]  # type: ignore[misc, var-annotated]
        to = out + (i * CHUNK + member) * (D // 4) + g * 2
        put_two(to, four_codes(a, b, factor, FTZ), four_codes(c, d, factor, FTZ), FTZ)
    f, _ = two_floats(factor, tl.float16)
    tl.store(k_scale + tile, unit * reciprocal(f, FTZ))
    if pooled is not None:
        a, b, c, d = done[0]  # type: ignore[misc]
        for i in tl.static_range(1, EDGE // CHUNK):
            a = sum_of_halves(a, done[i][0], False, FTZ)  # type: ignore[misc]
            b = sum_of_halves(b, done[i][1], False, FTZ)  # type: ignore[misc]
            c = sum_of_halves(c, done[i][2], False, FTZ)  # type: ignore[misc]
            d = sum_of_halves(d, done[i][3], False, FTZ)  # type: ignore[misc]
        s0, s2 = two_floats(a, tl.float16)
        s1, s3 = two_floats(b, tl.float16)
        s4, s6 = two_floats(c, tl.float16)
        s5, s7 = two_floats(d, tl.float16)
        s0, s1, s2, s3, s4, s5, s6, s7 = tl.reduce((s0, s1, s2, s3, s4, s5, s6, s7), 0, eight_sums)
        share = unit / tl.minimum(length - first, EDGE)
        to = pooled + tile * (D // 2) + tl.arange(0, G) * 4
        tl.store(to, two_rounded(s0 * share, s1 * share, DTYPE, FTZ))
        tl.store(to + 1, two_rounded(s2 * share, s3 * share, DTYPE, FTZ))
        tl.store(to + 2, two_rounded(s4 * share, s5 * share, DTYPE, FTZ))
        tl.store(to + 3, two_rounded(s6 * share, s7 * share, DTYPE, FTZ))


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
    """Runs the programs of three kinds in one grid.

    The first programs make the centres. Then come programs over PER times R rows of a block, and programs over tiles,
    which are `lag` blocks (at least 1) behind the programs over rows.

    x, weights, centres, table, k8, pooled, k_out: tensors of words of 32 bits; x_b and x_l count words. words (one a
    token) and centres must be zeros before the launch. num_blocks: how many blocks all batch items have; ALONE: there
    is one batch item. A centre is the mean of `samples` tokens (at most S), which lie `step` rows apart; `sampled`
    holds their words.
    """
    PARTS: tl.constexpr = (EDGE + R * PER - 1) // (R * PER)
    # In `steps` turns there are both rows and tiles. The turns before have rows alone, the turns behind have tiles
    # alone.
    steps = num_blocks - lag
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
            roots(
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
    """The keys of x (B, L, H * D), bf16 or fp16, in blocks of block_k (64 or 128) tokens.

    tables: those that `lay_out` made for x; a launch uses them up. pool: whether to make the blocks' means. keep:
    whether to write k itself, (B, L, H, D). config: None is the default.
    """
    batch, length, width = x.shape
    dim, n, dev = width // num_heads, triton.cdiv(length, block_k), x.device
    config = config or KEYS_CONFIGS[keep]
    rows = rows_of_16_bytes(x)
    made = Keys(
        torch.empty((batch * num_heads, n, block_k, dim), dtype=torch.int8, device=dev),
        torch.empty((batch * num_heads, n), dtype=torch.float32, device=dev),
        torch.empty((batch * num_heads, n, dim), dtype=x.dtype, device=dev) if pool else None,
        torch.empty((batch, length, num_heads, dim), dtype=x.dtype, device=dev) if keep else None,
    )
    taken = config.pieces(width)
    programs = num_heads + triton.cdiv(block_k, taken["R"] * taken["PER"])
    lag = min(int(config.lag * card(dev).processors) // programs + 1, batch * n)
    _, n1, n2 = tables.counts
    x_b, x_l = row_strides(rows)
    _keys[(batch * (num_heads + n * programs),)](
        rows.view(torch.int32), tables.words, tables.sampled, tables.weights, tables.centres, tables.units,
        tables.table, tables.groups, made.k8.view(torch.int32), made.k_scale,
        None if made.pooled is None else made.pooled.view(torch.int32),
        None if made.k is None else made.k.view(torch.int32), x_b // 2, x_l // 2, length, batch * n, lag,
        tables.sampled.shape[1], tables.step, 1 / n1, 1 / n2, n1, n2, tables.bits[2], tables.bits[1] + tables.bits[2],
        eps,
        H=num_heads, D=dim, EDGE=block_k, CHUNK=min(block_k, config.warps * 256 // dim), S=SAMPLES, **taken,
        DTYPE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        ALONE=batch == 1, SIGNED=not x.is_cuda or card(dev).capability >= (8, 6), FTZ=x.is_cuda,
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
    """The keys of x (B, L, H * D), bf16 or fp16, for sage_forward, or, if `linear`, for sla_forward.

    sla_forward needs the blocks' means and k itself, too. weight, eps, cos, sin, grid: as in qk_norm_rope.py. Raises
    ValueError for more tokens or places than the kernel counts (keys.py).
    """
    tables = lay_out(x, weight, eps, num_heads, cos, sin, grid)
    return norm_keys(x, eps, num_heads, tables, block_k, pool=linear, keep=linear)
