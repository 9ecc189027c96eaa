"""The main kernel of the quantized attentions for Hopper (compute capability 9.x), pv "fp8"; importing it needs Gluon.

The arithmetic is attend_triton.py's, with exponents that take fewer instructions. A program is one warpgroup and 64
rows; three of them share a multiprocessor (at most 168 registers a thread) and hide each other's softmax behind their
products. K and V come through the bulk copy engine into a ring of shared memory. V's tokens are stored in the order in
which a thread already holds its weights, so that the second product's operand needs no exchange between threads.

On an H100 the dense kernel reads K and V from the second-level cache at 7.2 to 7.7 TB/s, near what that gives.

Measured and left out: 128 rows and two warpgroups a program (both in step, 1.4 times as long), the products of one tile
under the softmax of the next within a warpgroup (255 registers, two programs a multiprocessor, 1.25 times as long),
a conversion of the scores (I2FP) in the place of the bits of 12582912 (1.05 to 1.07 times as long).
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from turbocompile.kernels._registry import FUSED

# Three names that Triton changed after 3.6: in 3.7, in 3.8 and in 3.9.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.constexpr_function
def _mma(warps, n, k):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, n, k])


@gluon.constexpr_function
def _rows(warps, d, width):
    lanes = min(32, d // width)
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _power(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    """1 / x within an ulp, in one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _product(x, y):
    """x y, rounded: see prepare_triton.py."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _fetch(k_tiles, v_tiles, k_ring, v_ring, full, at, BLOCK_K: gl.constexpr, D: gl.constexpr, live):
    """Key block `at` and its values into one place of the ring; `full` completes when both are there."""
    mbarrier.expect(full, 2 * BLOCK_K * D, pred=live)
    _copy(k_tiles, [at * BLOCK_K, 0], full, k_ring, pred=live)
    _copy(v_tiles, [at * D, 0], full, v_ring, pred=live)


@gluon.jit
def _entry(line, j, count, SPARSE: gl.constexpr):
    """Key block of list place j; past the end the last (it is then not fetched)."""
    j = gl.minimum(j, count - 1)
    if SPARSE:
        j = gl.load(line + j)
    return j


@gluon.jit(do_not_specialize=["length", "keys", "num_heads", "group", "num_k", "topk"])
def _attend_hopper(
    q, out, k_tiles, v_tiles, k_scale, v_scale, lut, g_tiles, phi_sum, bias,
    q_b, q_l, q_h, o_b, o_l, o_h,
    length, keys, num_heads, group, num_k, topk, scale,
    HEAD: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    SHARE: gl.constexpr, SPARSE: gl.constexpr, LINEAR: gl.constexpr, CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
    MAP: gl.constexpr,
):  # fmt: skip
    """BLOCK_Q = 64 rows of one head; SHARE programs in a row use one line of lut (block_q = SHARE * BLOCK_Q)."""
    WARPS: gl.constexpr = gl.num_warps()
    s_layout: gl.constexpr = _mma(WARPS, BLOCK_K, 32)
    o_layout: gl.constexpr = _mma(WARPS, D, 32)
    l_layout: gl.constexpr = _mma(WARPS, D, 16)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    q_layout: gl.constexpr = _rows(WARPS, D, 8)
    q8_layout: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    # the places of the last keys take the linear branch's state (D x D of 2 bytes) if they are large enough
    REUSE: gl.constexpr = STAGES * BLOCK_K >= 2 * D
    tile = gl.program_id(0)
    head = gl.program_id(1)
    b = head // num_heads
    h = head % num_heads
    kv_head = b * (num_heads // group) + h // group
    first = kv_head * num_k

    k_ring = gl.allocate_shared_memory(k_tiles.dtype, [STAGES, BLOCK_K, D], k_tiles.layout)
    v_ring = gl.allocate_shared_memory(v_tiles.dtype, [STAGES, D, BLOCK_K], v_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(g_full, count=1)
    fence_async_shared()
    _barrier()
    if LINEAR and REUSE:
        # several of the state's size where heads are narrow: what is reinterpreted keeps its size
        PLACES: gl.constexpr = STAGES * BLOCK_K // (2 * D)
        if _REINTERPRET:
            g_tile = k_ring.reinterpret(g_tiles.dtype, [PLACES, D, D], g_tiles.layout).index(0)
        else:
            g_tile = k_ring._reinterpret(g_tiles.dtype, [PLACES, D, D], g_tiles.layout).index(0)

    line = lut + (head * (gl.num_programs(0) // SHARE) + tile // SHARE).to(gl.int64) * topk
    if SPARSE:
        count = topk
    elif CAUSAL:
        count = gl.minimum(gl.cdiv((tile + 1) * BLOCK_Q, BLOCK_K), num_k)
    else:
        count = num_k
    for i in gl.static_range(STAGES):
        at = first + _entry(line, i, count, SPARSE)
        _fetch(k_tiles, v_tiles, k_ring.index(i), v_ring.index(i), full.index(i), at, BLOCK_K, D, i < count)

    row = tile * BLOCK_Q + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, q_layout))
    d = gl.arange(0, D, gl.SliceLayout(0, q_layout))
    inside = (row < length)[:, None] & (d < HEAD)[None, :]
    q_at = q + b.to(gl.int64) * q_b + h.to(gl.int64) * q_h + row.to(gl.int64)[:, None] * q_l + d[None, :]
    x = gl.load(q_at, mask=inside, other=0.0).to(gl.float32)  # (BLOCK_Q, D)
    amax = gl.maximum(gl.max(gl.abs(x).reshape([BLOCK_Q * D]), 0), 1e-7)
    q8 = (x * (127.0 / amax) + 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)
    unit = amax / 127.0 * scale * 1.4426950408889634
    # Where neighbours among a block's integer scores would be further apart than 2^(1/8), all scores of the tile are
    # scaled down to that: `offset`, below, is no finer than such a step, and INT8 is off by some hundred (an estimate).
    some: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    t = gl.arange(0, 128, some)
    largest = gl.zeros([128], gl.float32, some)
    for start in range(0, num_k, 128):
        largest = gl.maximum(largest, gl.load(k_scale + first + start + t, mask=start + t < num_k, other=0.0))  # (128,)
    unit = unit * gl.minimum(1.0, 0.125 / (gl.max(largest, 0) * unit))
    q_tile = gl.allocate_shared_memory(gl.int8, [BLOCK_Q, D], q8_layout, q8)
    fence_async_shared()
    _barrier()

    zero = gl.zeros([BLOCK_Q, BLOCK_K], gl.int32, s_layout)
    nothing = gl.zeros([BLOCK_Q, D], gl.float32, o_layout)
    acc = gl.zeros([BLOCK_Q, D], gl.float32, o_layout)
    high = gl.full([BLOCK_Q], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    level = gl.full([BLOCK_Q], float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    norm = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, s_layout))
    col = gl.arange(0, BLOCK_K, gl.SliceLayout(0, s_layout))
    if CAUSAL:
        edge = gl.minimum(keys, tile * BLOCK_Q + 1)  # the first key that some row of this tile must not see
        limit = gl.minimum(tile * BLOCK_Q + 1 + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, s_layout)), keys)

    # list entries are read two steps ahead and scales one: neither read is waited for
    index = _entry(line, 0, count, SPARSE)
    ahead = _entry(line, 1, count, SPARSE)
    following = 0  # the block that takes the place of the one before: none yet
    c = gl.load(k_scale + first + index) * unit
    for j in range(count):
        slot = j % STAGES
        phase = (j // STAGES) & 1
        c_ahead = gl.load(k_scale + first + ahead)
        two_ahead = _entry(line, j + 2, count, SPARSE)
        mbarrier.wait(full.index(slot), phase)
        # (BLOCK_Q, BLOCK_K) int32
        s = warpgroup_mma(q_tile, k_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        # Under this product: every warp has read the place before, and it is filled again. The threads' wait for each
        # other costs nothing here; behind the second product it was a sixth of the time.
        free = (j + STAGES - 1) % STAGES
        _barrier()
        _fetch(k_tiles, v_tiles, k_ring.index(free), v_ring.index(free), full.index(free), first + following, BLOCK_K,
               D, (j > 0) & (j + STAGES - 1 < count))  # fmt: skip
        _barrier()  # that the compiler would put between this copy and the second product
        following = _entry(line, j + STAGES, count, SPARSE)
        s = warpgroup_mma_wait(0, [s])
        # outer conditions are the compiler's, inner ones the program's
        if LINEAR and REUSE:  # noqa: SIM102
            if j == count - 1:
                _barrier()  # every warp has read the last keys
                mbarrier.expect(g_full, 2 * D * D)
                _copy(g_tiles, [head * D, 0], g_full, g_tile)
        # masked scores: below every real one (127^2 D = 2064512 for D = 128)
        if CAUSAL:
            if (index + 1) * BLOCK_K > edge:
                s = gl.where((index * BLOCK_K + col)[None, :] < limit[:, None], s, -2100000)
        elif RAGGED:  # noqa: SIM102
            if index == num_k - 1:
                s = gl.where((col < keys - index * BLOCK_K)[None, :], s, -2100000)
        top = gl.max(s, 1)
        peak = _product(top.to(gl.float32), c)
        new = gl.maximum(high, peak)
        # An integer s under 2^22, added to the bits of 12582912 = 1.5 * 2^23, gives the bits of the float 12582912 + s,
        # so that a weight is one multiply-add and one power. `offset` undoes 12582912 c and, being so large, is rounded
        # by up to 0.75 c. What it leaves beside s c, `level`, is small and exact: the blocks are weighed by that.
        # 2^8.857 is the largest number that e4m3 rounds to 448.
        offset = gl.fma(c, -12582912.0, gl.minimum(8.807, 8.857 - 0.75 * c) - new)
        level_now = gl.fma(c, 12582912.0, offset)
        alpha = _power(level_now - level)
        level = level_now
        p = _power(gl.fma((s + 0x4B400000).to(gl.float32, bitcast=True), c, offset[:, None]))
        # a small c brings masked scores near the real ones, so their weights are taken out
        if CAUSAL:  # noqa: SIM102
            if (index + 1) * BLOCK_K > edge:
                p = gl.where((index * BLOCK_K + col)[None, :] < limit[:, None], p, 0.0)
        norm = norm * alpha + gl.sum(p, 1)
        if RAGGED and not CAUSAL:  # noqa: SIM102
            if index == num_k - 1:  # V is zero past the end: only the sum has to give them back
                past = _power(gl.fma(c, 12582912.0 - 2100000.0, offset))
                norm -= past * (num_k * BLOCK_K - keys)
        high = new
        # of 16 columns a thread owns {2t, 2t+1, 2t+8, 2t+9}: V's tokens are stored in that order
        p8 = (
            p.to(gl.float8e4nv)
            .reshape([BLOCK_Q, BLOCK_K // 16, 2, 4, 2])
            .permute([0, 1, 3, 2, 4])
            .reshape([BLOCK_Q, BLOCK_K])
        )
        w = gl.convert_layout(p8, p_layout)
        # each block's product by itself: see attend_triton.py on sums of e4m3 products
        # (BLOCK_Q, D)
        part = warpgroup_mma(w, v_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, [part])
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part
        index = ahead
        ahead = two_ahead
        c = c_ahead * unit

    # Every warp has read the last keys and values, whose places are scratch from here on. The compiler counts a product
    # as read where it is issued, not where it is waited for, so that a barrier between the two is none to these reads.
    _barrier()
    v_ring._keep_alive()
    q_tile._keep_alive()
    if LINEAR:
        # phi(q) phi_sum / z, where a factor that all of a row share leaves nothing: phi is not divided by its sum, and
        # its maximum is taken out only where e^x might leave float32's range.
        x = gl.load(q_at, mask=inside, other=0.0).to(gl.float32)  # (BLOCK_Q, D)
        ks = gl.load(phi_sum + head * D + d)[None, :]  # (1, D)
        if MAP == "softmax":
            lift = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, q_layout))
            if amax > 40.0:
                lift = gl.max(gl.where((d < HEAD)[None, :], x, float("-inf")), 1)
            e = _power((x - lift[:, None]) * 1.4426950408889634)
        elif MAP == "elu":
            e = gl.where(x > 0, x + 1.0, _power(gl.minimum(x, 0.0) * 1.4426950408889634))
        else:
            e = gl.maximum(x, 0.0)
        if HEAD < D:
            e = gl.where((d < HEAD)[None, :], e, 0.0)
        if MAP == "softmax":
            z = gl.sum(e * (ks + 1e-5), 1)  # the 1e-5 is added to z of phi divided by its sum
        else:
            z = gl.sum(e * ks, 1) + 1e-5
        phi = (e * ks * _reciprocal(z)[:, None]).to(g_tiles.dtype)
    if LINEAR and not REUSE:
        g_tile = gl.allocate_shared_memory(g_tiles.dtype, [D, D], g_tiles.layout)
        fence_async_shared()
        _barrier()
        mbarrier.expect(g_full, 2 * D * D)
        _copy(g_tiles, [head * D, 0], g_full, g_tile)
    acc = acc * gl.convert_layout(_reciprocal(norm), gl.SliceLayout(1, o_layout))[:, None]
    e_o = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    unit_v = gl.load(v_scale + kv_head * D + e_o)[None, :]  # (1, D)
    if LINEAR:
        # bias: (1, D)
        acc = gl.fma(acc, unit_v, gl.load(bias + e_o, mask=e_o < HEAD, other=0.0).to(gl.float32)[None, :])
        phi_op = gl.convert_layout(phi, gl.DotOperandLayout(0, l_layout, 2))
        mbarrier.wait(g_full, 0)
        acc = gl.convert_layout(acc, l_layout)
        acc = warpgroup_mma(phi_op, g_tile, acc, is_async=True)  # (BLOCK_Q, D)
        acc = warpgroup_mma_wait(0, [acc])
    else:
        acc = acc * unit_v
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
    mbarrier.invalidate(g_full)
    k_ring._keep_alive()
    result = gl.convert_layout(acc.to(out.dtype.element_ty), q_layout)
    o_at = out + b.to(gl.int64) * o_b + h.to(gl.int64) * o_h + row.to(gl.int64)[:, None] * o_l + d[None, :]
    gl.store(o_at, result, mask=inside)


def launch(
    q: torch.Tensor,
    out: torch.Tensor,
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    lists: torch.Tensor,
    folded: torch.Tensor,
    tail: tuple[Any, ...],
    flags: dict[str, Any],
    *,
    share: int,
    stages: int,
    registers: dict[str, int],
) -> None:
    """Write out, from k_flat (BH N block_k, d), v_flat (BH N d, block_k), folded (BH d, d).

    share: programs in a row that read one line of lists.
    """
    batch, length, heads, _ = q.shape
    d, block_k = k_flat.shape[-1], v_flat.shape[-1]
    _attend_hopper[(triton.cdiv(length, 64 * share) * share, batch * heads)](
        q, out,
        TensorDescriptor.from_tensor(k_flat, [block_k, d], gl.NVMMASharedLayout(d, 8, 2)),
        TensorDescriptor.from_tensor(v_flat, [d, block_k], gl.NVMMASharedLayout(block_k, 8, 2)),
        k_scale, v_scale, lists,
        TensorDescriptor.from_tensor(folded, [d, d], gl.NVMMASharedLayout(128, 16, 2)), *tail,
        BLOCK_Q=64, STAGES=stages, SHARE=share, **flags, **FUSED, num_warps=4, **registers,
    )  # fmt: skip
