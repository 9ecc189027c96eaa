"""The main kernel of the quantized attentions for Hopper (compute capability 9.x), pv "fp8"; importing it needs Gluon.

The kernel computes the function of attend_triton.py with fewer instructions for the exponents. A program is one
warpgroup, which computes 64 query rows. Three programs share a multiprocessor (at most 168 registers a thread), so that
the softmax of one program runs under the products of the others. The bulk copy engine brings K and V into a ring of
shared memory. V's tokens are stored in the order in which a thread already holds its weights, so that the operand of
the second product needs no exchange between threads.

On an H100 the dense kernel reads K and V from the second-level cache at 7.2 to 7.7 TB/s, near the most that this cache
delivers.

Three variants were measured and left out. A program of 128 rows and two warpgroups takes 1.4 times as long, because
both warpgroups run in step. Running the products of one tile under the softmax of the next tile within a warpgroup
needs 255 registers, leaves two programs a multiprocessor, and takes 1.25 times as long. Converting the scores to float
(I2FP), instead of adding them to the bits of ROUND, takes 1.05 to 1.07 times as long.
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
from turbocompile.kernels._jit import LOG2E, ROUND, ROUND_BITS
from turbocompile.kernels._registry import FUSED
from turbocompile.kernels.attention.prepare_triton import LINEAR_EPS, MASKED, OFFSET, QK_FLOOR, QK_LIMIT

LARGEST_EXPONENT = gl.constexpr(8.857)  # 2^8.857 is the largest number that e4m3 rounds to 448
LARGE = gl.constexpr(40.0)  # a magnitude whose exponential, summed over the channels, is far within float32's range

# Triton changed these three names after 3.6: one in 3.7, one in 3.8 and one in 3.9.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.constexpr_function
def _mma(warps, n, k):
    """The layout of a warpgroup product's accumulator, by instructions of 16 x n x k a warp."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, n, k])


@gluon.constexpr_function
def _rows(warps, d, width):
    """The layout of a tile (rows, d) in which a thread holds `width` neighbouring channels."""
    lanes = min(32, d // width)
    return gl.BlockedLayout([1, width], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def _power(x):
    """2^x in one instruction, which makes denormal results zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    """1 / x within an ulp, in one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _product(x, y):
    """x y, rounded to float32 on its own, never fused with a following sum: see `product` of _jit.py."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _fetch(k_tiles, v_tiles, k_ring, v_ring, full, at, BLOCK_K: gl.constexpr, D: gl.constexpr, live):
    """Starts the copy of key block `at` and of its values into one slot of the ring, if `live`.

    The barrier `full` completes when both copies have arrived.
    """
    mbarrier.expect(full, 2 * BLOCK_K * D, pred=live)
    _copy(k_tiles, [at * BLOCK_K, 0], full, k_ring, pred=live)
    _copy(v_tiles, [at * D, 0], full, v_ring, pred=live)


@gluon.jit
def _entry(line, j, count, SPARSE: gl.constexpr):
    """The key block at position j of the list `line`, or the list's last block if j is past the end.

    The caller does not fetch a block past the end.
    """
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
    """Computes BLOCK_Q = 64 query rows of one head; constants as in _attend_portable of attend_triton.py.

    STAGES: slots of the ring. SHARE neighbouring programs read one line of lut, because block_q = SHARE * BLOCK_Q.
    """
    WARPS: gl.constexpr = gl.num_warps()
    s_layout: gl.constexpr = _mma(WARPS, BLOCK_K, 32)
    o_layout: gl.constexpr = _mma(WARPS, D, 32)
    l_layout: gl.constexpr = _mma(WARPS, D, 16)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    q_layout: gl.constexpr = _rows(WARPS, D, 8)
    q8_layout: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    # REUSE: the ring's slots for keys are large enough to hold the linear branch's state (D x D elements of 2 bytes),
    # which is copied there once the last keys are read.
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
        # `reinterpret` keeps the size, so for narrow heads it gives several tiles of the state's size, of which the
        # first is used.
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
    amax = gl.maximum(gl.max(gl.abs(x).reshape([BLOCK_Q * D]), 0), QK_FLOOR)
    q8 = (x * (QK_LIMIT / amax) + ROUND).to(gl.int32, bitcast=True).to(gl.int8)  # (BLOCK_Q, D)
    unit = amax / QK_LIMIT * scale * LOG2E
    # A step of one in a block's integer scores changes a weight by the factor 2^c. Where c would exceed 1/8, all scores
    # of the tile are scaled down to c = 1/8, because `offset` below is no finer than such a step. By an estimate,
    # INT8's own error is some hundred steps at such scores.
    flat_layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    member = gl.arange(0, 128, flat_layout)
    largest = gl.zeros([128], gl.float32, flat_layout)
    for start in range(0, num_k, 128):
        scales = gl.load(k_scale + first + start + member, mask=start + member < num_k, other=0.0)  # (128,)
        largest = gl.maximum(largest, scales)
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
        edge = gl.minimum(keys, tile * BLOCK_Q + 1)  # the first key that at least one row of this tile must not see
        limit = gl.minimum(tile * BLOCK_Q + 1 + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, s_layout)), keys)

    # The loop loads list entries two steps ahead and scales one step ahead, so that it never waits for either load.
    index = _entry(line, 0, count, SPARSE)
    ahead = _entry(line, 1, count, SPARSE)
    following = 0  # the key block that is fetched next, into the slot of the block before; none in the first step
    c = gl.load(k_scale + first + index) * unit
    for j in range(count):
        slot = j % STAGES
        phase = (j // STAGES) & 1
        c_ahead = gl.load(k_scale + first + ahead)
        two_ahead = _entry(line, j + 2, count, SPARSE)
        mbarrier.wait(full.index(slot), phase)
        # (BLOCK_Q, BLOCK_K) int32
        s = warpgroup_mma(q_tile, k_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        # While this product runs, the slot of the block before is filled again, because every warp has read that slot
        # after the barrier. The barrier costs nothing here; behind the second product it cost a sixth of the time.
        free = (j + STAGES - 1) % STAGES
        _barrier()
        _fetch(k_tiles, v_tiles, k_ring.index(free), v_ring.index(free), full.index(free), first + following, BLOCK_K,
               D, (j > 0) & (j + STAGES - 1 < count))  # fmt: skip
        _barrier()  # the compiler would otherwise put this barrier between the copy and the second product
        following = _entry(line, j + STAGES, count, SPARSE)
        s = warpgroup_mma_wait(0, [s])
        # The outer condition is decided when the kernel is compiled, the inner condition when it runs.
        if LINEAR and REUSE:  # noqa: SIM102
            if j == count - 1:
                _barrier()  # after it every warp has read the last keys
                mbarrier.expect(g_full, 2 * D * D)
                _copy(g_tiles, [head * D, 0], g_full, g_tile)
        if CAUSAL:
            if (index + 1) * BLOCK_K > edge:
                s = gl.where((index * BLOCK_K + col)[None, :] < limit[:, None], s, MASKED)
        elif RAGGED:  # noqa: SIM102
            if index == num_k - 1:
                s = gl.where((col < keys - index * BLOCK_K)[None, :], s, MASKED)
        top = gl.max(s, 1)
        peak = _product(top.to(gl.float32), c)
        new = gl.maximum(high, peak)
        # An integer s below 2^22, added to ROUND_BITS, gives the bits of the float ROUND + s, so that a weight takes
        # one multiply-add and one power. `offset` takes ROUND c away again; because it is so large, it is rounded by up
        # to 0.75 c. `level` = ROUND c + offset is what remains beside s c. It is small and exact, so the blocks are
        # weighted by 2^level.
        offset = gl.fma(c, -ROUND, gl.minimum(OFFSET, LARGEST_EXPONENT - 0.75 * c) - new)
        level_now = gl.fma(c, ROUND, offset)
        alpha = _power(level_now - level)
        level = level_now
        p = _power(gl.fma((s + ROUND_BITS).to(gl.float32, bitcast=True), c, offset[:, None]))
        # The weights of masked keys are set to 0, because a small c brings the masked scores near the real scores.
        if CAUSAL:  # noqa: SIM102
            if (index + 1) * BLOCK_K > edge:
                p = gl.where((index * BLOCK_K + col)[None, :] < limit[:, None], p, 0.0)
        norm = norm * alpha + gl.sum(p, 1)
        if RAGGED and not CAUSAL:  # noqa: SIM102
            # V is zero past the end, so the weights of the masked keys are taken out of the sum alone.
            if index == num_k - 1:
                past = _power(gl.fma(c, ROUND + MASKED, offset))
                norm -= past * (num_k * BLOCK_K - keys)
        high = new
        # Of 16 columns, thread t of a quad owns {2t, 2t + 1, 2t + 8, 2t + 9}; V's tokens are stored in that order.
        p8 = (
            p.to(gl.float8e4nv)
            .reshape([BLOCK_Q, BLOCK_K // 16, 2, 4, 2])
            .permute([0, 1, 3, 2, 4])
            .reshape([BLOCK_Q, BLOCK_K])
        )
        w = gl.convert_layout(p8, p_layout)
        # The product of each block starts from zero: attend_triton.py says why tensor cores must not add the blocks.
        # (BLOCK_Q, D)
        part = warpgroup_mma(w, v_ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, [part])
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part
        index = ahead
        ahead = two_ahead
        c = c_ahead * unit

    # After this barrier every warp has read the last keys and values, whose slots are scratch from here on. The
    # compiler believes that a product has read its operands where it is issued, not where it is waited for. A barrier
    # that the compiler puts between the two therefore does not protect these reads.
    _barrier()
    v_ring._keep_alive()
    q_tile._keep_alive()
    if LINEAR:
        # phi(q) phi_sum / z: a factor that a whole row shares cancels. Therefore the softmax is not divided by its sum,
        # and its maximum is subtracted only where e^x might leave float32's range.
        x = gl.load(q_at, mask=inside, other=0.0).to(gl.float32)  # (BLOCK_Q, D)
        ks = gl.load(phi_sum + head * D + d)[None, :]  # (1, D)
        if MAP == "softmax":
            lift = gl.zeros([BLOCK_Q], gl.float32, gl.SliceLayout(1, q_layout))
            if amax > LARGE:
                lift = gl.max(gl.where((d < HEAD)[None, :], x, float("-inf")), 1)
            e = _power((x - lift[:, None]) * LOG2E)
        elif MAP == "elu":
            e = gl.where(x > 0, x + 1.0, _power(gl.minimum(x, 0.0) * LOG2E))
        else:
            e = gl.maximum(x, 0.0)
        if HEAD < D:
            e = gl.where((d < HEAD)[None, :], e, 0.0)
        if MAP == "softmax":
            z = gl.sum(e * (ks + LINEAR_EPS), 1)  # e is phi times its sum, so LINEAR_EPS is multiplied by that sum, too
        else:
            z = gl.sum(e * ks, 1) + LINEAR_EPS
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
    """Launches the kernel, which writes `out` (B, L, H, D), contiguous.

    q (B, L, H, D), bf16 or fp16; k_flat (BH * N * block_k, d) int8; v_flat (BH * N * d, block_k) e4m3, tokens in
    operand order; k_scale (BH, N), v_scale (BH, d) float32; lists (BH, M, topk) int32; folded (BH * d, d), q's dtype.
    tail, flags: the kernel's further arguments and constants, as attend_triton.attend makes them. share: how many
    neighbouring programs read one line of lists. stages: slots of the ring. registers: the limit as a launch takes it.
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
