"""RMSNorm of q or k, split into heads, and rotation in Triton, in one pass over the projection's result.

    n = x / sqrt(mean(x^2) + eps) * weight          over all channels of a token, or over each head's
    y1 = n1 cos - n2 sin,  y2 = n2 cos + n1 sin     for the pairs of each head, unless there are no tables

The kernel computes the op of qk_norm_rope.py, whose reference defines the op: x (B, L, H * D), bf16, fp16 or float32,
strides free (a last axis that is not contiguous costs a copy) -> (B, L, H, D), contiguous, rounded once. Tables as in
rope.py, for at most three axes.

A program computes some tokens, one behind the other, and loads the next token before it computes the present one. It
holds a token's pairs as tiles (heads, D/2) of first and of second elements. One load brings interleaved pairs, whose
elements are neighbours in a thread; the two halves of rotate-half take two loads. The heads are held as two tiles whose
sizes are powers of two, 12 = 8 + 4, 40 = 32 + 8 (_rows.py). A row of the tables is loaded once for all heads.

For 16-bit x the kernel reads 2 bytes an element and writes 2; the tables are some kilobytes. At the 3.0 TB/s of a copy
that takes 0.067 ms for 32,760 x 1536 and 0.516 ms for 75,600 x 5120.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from turbocompile.kernels._jit import inside, only_before
from turbocompile.kernels._registry import FUSED, WIDEST
from turbocompile.kernels._rows import RowConfig, check_input, pieces, row_config, row_strides, view3
from turbocompile.kernels.rotary.qk_norm_rope import AXES, check_operands

from turbocompile.errors import UnsupportedError


@triton.jit
def _pairs(at, h, real, p, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, POLICY: tl.constexpr):
    """Loads the first and the second elements of pairs p of heads h, both (heads, pairs), from the token at `at`.

    real: the mask of the heads that exist. If D is odd, which needs rotate-half, the last pair has no second element,
    and gets 0.
    """
    if INTERLEAVED:
        d = tl.arange(0, 2 * p.shape[0])
        mask = real[:, None] & inside(d, D, 2 * p.shape[0])[None, :]
        x = tl.load(at + h[:, None] * D + d[None, :], mask=mask, other=0.0, eviction_policy=POLICY)  # (heads, 2 P)
        x1, x2 = tl.split(x.reshape(h.shape[0], p.shape[0], 2))
    else:
        to = at + h[:, None] * D + p[None, :]
        mask1 = real[:, None] & inside(p, HALF, p.shape[0])[None, :]
        mask2 = real[:, None] & inside(p, D - HALF, p.shape[0])[None, :]
        x1 = tl.load(to, mask=mask1, other=0.0, eviction_policy=POLICY)  # (heads, P)
        x2 = tl.load(to + HALF, mask=mask2, other=0.0, eviction_policy=POLICY)  # (heads, P)
    return x1, x2


@triton.jit
def _store_pairs(at, y1, y2, h, real, p, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Stores the elements that _pairs loads, rounded to at's dtype."""
    y1 = y1.to(at.dtype.element_ty)
    y2 = y2.to(at.dtype.element_ty)
    if INTERLEAVED:
        d = tl.arange(0, 2 * p.shape[0])
        mask = real[:, None] & inside(d, D, 2 * p.shape[0])[None, :]
        tl.store(at + h[:, None] * D + d[None, :], tl.join(y1, y2).reshape(h.shape[0], 2 * p.shape[0]), mask=mask)
    else:
        to = at + h[:, None] * D + p[None, :]
        tl.store(to, y1, mask=real[:, None] & inside(p, HALF, p.shape[0])[None, :])
        tl.store(to + HALF, y2, mask=real[:, None] & inside(p, D - HALF, p.shape[0])[None, :])


@triton.jit
def _table(t0, t1, t2, i0, i1, i2, p, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The rows i0, i1, i2 of the tables t0, t1, t2, side by side, (P,) float32."""
    row = tl.zeros([p.shape[0]], tl.float32)
    if D0 > 0:
        row += tl.load(t0 + i0 * D0 + p, mask=p < D0, other=0.0)  # (P,)
    if D1 > 0:
        row += tl.load(t1 + i1 * D1 + (p - D0), mask=(p >= D0) & (p < D0 + D1), other=0.0)  # (P,)
    if D2 > 0:
        row += tl.load(t2 + i2 * D2 + (p - D0 - D1), mask=(p >= D0 + D1) & (p < D0 + D1 + D2), other=0.0)  # (P,)
    return row


@triton.jit
def _scaled(
    x1, x2, root, weight, h, real, p,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The pairs (heads, P), times the root of their norm and their weight, float32."""
    x1 = x1 * root
    x2 = x2 * root
    if weight is not None:
        if PER_HEAD:
            h = h * 0
        w1, w2 = _pairs(weight, h, real, p, D, HALF, INTERLEAVED, "evict_last")
        x1 = x1 * w1.to(tl.float32)
        x2 = x2 * w2.to(tl.float32)
    return x1, x2


@triton.jit(do_not_specialize=["length", "per", "n1", "n2"])
def _rotate_rows(
    x, weight, out, cos0, cos1, cos2, sin0, sin1, sin2,
    x_b, x_l,
    length, per, n1, n2, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, P: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    PER_HEAD: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Computes `per` tokens of one batch item, with H heads of D channels in tiles of H0 and H1 heads.

    H1 may be 0, for one tile. HALF: pairs of a head; P: HALF rounded up to a power of two. D0, D1, D2: columns of the
    axes' tables; n1, n2: how many positions axes 1 and 2 have. TURN: the pairs are rotated.
    """
    first = tl.program_id(0) * per
    stop = tl.minimum(first + per, length)
    b = tl.program_id(1).to(tl.int64)
    at = x + b * x_b + first.to(tl.int64) * x_l
    to = out + (b * length + first) * (H * D)
    p = tl.arange(0, P)
    head_a = tl.arange(0, H0)
    real_a = inside(head_a, H, H0)
    a1, a2 = _pairs(at, head_a, real_a, p, D, HALF, INTERLEAVED, "evict_first")  # (H0, P)
    if H1 > 0:
        head_b = H0 + tl.arange(0, H1)
        real_b = inside(head_b, H, H0 + H1)
        b1, b2 = _pairs(at, head_b, real_b, p, D, HALF, INTERLEAVED, "evict_first")  # (H1, P)
    for row in range(first, stop):
        at += x_l
        next_a1, next_a2 = _pairs(
            at, head_a, only_before(real_a, row + 1, stop), p, D, HALF, INTERLEAVED, "evict_first"
        )
        a1 = a1.to(tl.float32)
        a2 = a2.to(tl.float32)
        square = tl.sum(a1 * a1 + a2 * a2, 1)
        if H1 > 0:
            next_b1, next_b2 = _pairs(
                at, head_b, only_before(real_b, row + 1, stop), p, D, HALF, INTERLEAVED, "evict_first"
            )
            b1 = b1.to(tl.float32)
            b2 = b2.to(tl.float32)
            square_b = tl.sum(b1 * b1 + b2 * b2, 1)
        if PER_HEAD:
            root = tl.rsqrt(tl.div_rn(square, D * 1.0) + eps)[:, None]
            if H1 > 0:
                root_b = tl.rsqrt(tl.div_rn(square_b, D * 1.0) + eps)[:, None]
        else:
            total = tl.sum(square, 0)
            if H1 > 0:
                total += tl.sum(square_b, 0)
            root = tl.rsqrt(tl.div_rn(total, H * D * 1.0) + eps)
            root_b = root
        y1, y2 = _scaled(a1, a2, root, weight, head_a, real_a, p, D, HALF, INTERLEAVED, PER_HEAD)
        if TURN:
            i2 = row % n2
            i1 = row // n2 % n1
            i0 = row // n2 // n1
            cosine = _table(cos0, cos1, cos2, i0, i1, i2, p, D0, D1, D2)[None, :]
            sine = _table(sin0, sin1, sin2, i0, i1, i2, p, D0, D1, D2)[None, :]
            z1 = y1 * cosine - y2 * sine
            z2 = y2 * cosine + y1 * sine
        else:
            z1 = y1
            z2 = y2
        _store_pairs(to, z1, z2, head_a, real_a, p, D, HALF, INTERLEAVED)
        a1 = next_a1
        a2 = next_a2
        if H1 > 0:
            y1, y2 = _scaled(b1, b2, root_b, weight, head_b, real_b, p, D, HALF, INTERLEAVED, PER_HEAD)
            if TURN:
                z1 = y1 * cosine - y2 * sine
                z2 = y2 * cosine + y1 * sine
            else:
                z1 = y1
                z2 = y2
            _store_pairs(to, z1, z2, head_b, real_b, p, D, HALF, INTERLEAVED)
            b1 = next_b1
            b2 = next_b2
        to += H * D


def launch_qk_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    per_head: bool,
    num_heads: int,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    interleaved: bool,
    config: RowConfig | None = None,
) -> torch.Tensor:
    """The op of qk_norm_rope.py: (B, L, H, D), contiguous, x's dtype. config: None is the default.

    Raises ValueError if the operands do not fit each other, and UnsupportedError for more than three axes, or for a
    dtype or a number of channels that the kernel does not take.
    """
    check_operands(x, weight, per_head, num_heads, cos, sin, grid)
    check_input(x, x.shape[2])
    if len(cos) > AXES:
        raise UnsupportedError(f"the kernel turns by {AXES} axes at most, not {len(cos)}: use the reference")
    dim = x.shape[2] // num_heads
    half = triton.cdiv(dim, 2)
    out = x.new_empty((x.shape[0], x.shape[1], num_heads, dim))
    rows = view3(x, x.shape)
    # the kernel always has AXES axes; missing axes come first, with one position and no columns
    missing = AXES - len(cos)
    counts = [1] * missing + list(grid) if cos else [1] * AXES
    columns = [0] * missing + [c.shape[1] for c in cos]
    tables = [[None] * missing + [t.float().contiguous() for t in axes] for axes in (cos, sin)]
    h0, h1 = pieces(num_heads, 4)
    pairs = triton.next_power_of_2(half)
    config = config or row_config(min(WIDEST, (h0 + h1) * 2 * pairs), x.shape[0] * x.shape[1], x.device)
    _rotate_rows[(triton.cdiv(rows.shape[1], config.rows), rows.shape[0])](
        rows, None if weight is None else weight.contiguous(), out, *tables[0], *tables[1],
        *row_strides(rows), rows.shape[1], config.rows, counts[1], counts[2], eps,
        H=num_heads, D=dim, HALF=half, H0=h0, H1=h1, P=pairs, D0=columns[0], D1=columns[1], D2=columns[2],
        PER_HEAD=per_head, TURN=bool(cos), INTERLEAVED=interleaved and bool(cos),
        **FUSED, num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return out
