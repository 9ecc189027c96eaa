"""The main kernel of the quantized attentions, dense or over lists of key blocks, for any GPU, and its launcher.

A program computes block_m query rows of one head and visits one key block after the other. With
c = q_scale k_scale scale log2 e of its rows and of the present key block:

    s = q8 k8^T (int32, exact),  t = max_j s,  m' = max(m, t c),  p = 2^((s - t) c + (t c - m') + offset)
    l = l 2^(m - m') + sum p,    o = o 2^(m - m') + round(p) v8,    result  o / l v_scale

s - t is exact, so no weight is larger than 2^offset and the largest weight of a row is 2^offset, whatever the size of
the scores: no weight overflows, and l is never zero. The kernel adds each block's product with v8 in float32, because
tensor cores add products of e4m3 with some 13 bits and cut off the rest: on a Hopper card one sum over 32,760 keys of a
v with mean 1 came out 30% short.

offset is 8.807 for pv "fp8" and 0 for pv "fp16". The kernel quantizes q after loading it, with one scale for block_m
rows. It adds the linear branch of SLA last: (phi(q) phi_sum / z) folded + bias, z = phi(q) . phi_sum + 1e-5.

attend_gluon.py holds the kernel for Hopper, which computes the same function. In the kernels of this folder b, h, d are
indices along the axes B, H, D of (B, L, H, D); x_b, x_l, x_h are a tensor x's strides along B, L, H in elements.
"""

# mypy: allow-untyped-defs
# (the arguments of a jit function have types of Triton's)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from turbocompile.kernels._jit import LOG2E, ROUND, exp2, product
from turbocompile.kernels._registry import FUSED, card, check
from turbocompile.kernels.attention.prepare_triton import (
    LINEAR_EPS,
    MASKED,
    OFFSET,
    QK_FLOOR,
    QK_LIMIT,
    Keys,
    Prepared,
    features,
    prepare,
    strides,
)

try:
    from turbocompile.kernels.attention import attend_gluon
except ImportError:  # this Triton has no Gluon, or a Gluon with other names; the portable kernel runs everywhere
    attend_gluon = None  # type: ignore[assignment]


@triton.jit(do_not_specialize=["length", "keys", "num_heads", "group", "num_k", "topk"])
def _attend_portable(
    q, out, k_tiles, v_tiles, k_scale, v_scale, lut, folded, phi_sum, bias,
    q_b, q_l, q_h, o_b, o_l, o_h,
    length, keys, num_heads, group, num_k, topk, scale,
    HEAD: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPARSE: tl.constexpr, LINEAR: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, FP8: tl.constexpr,
    MAP: tl.constexpr, FTZ: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_Q query rows of one head.

    HEAD: head_dim; D: head_dim padded to 64 or 128. SPARSE: lut (BH, M, topk) names the key blocks that each query
    block reads. LINEAR: adds the linear branch. CAUSAL: masks the keys behind a query. RAGGED: the last key block is
    short.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = head // num_heads
    h = head % num_heads
    kv_head = b * (num_heads // group) + h // group
    d = tl.arange(0, D)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (row < length)[:, None] & (d < HEAD)[None, :]
    q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + row.to(tl.int64)[:, None] * q_l + d[None, :]
    x = tl.load(q_at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_Q, D)
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), QK_FLOOR)
    q8 = (x * (QK_LIMIT / amax) + ROUND).to(tl.int32, bitcast=True).to(tl.int8)  # (BLOCK_Q, D)
    unit = amax / QK_LIMIT * scale * LOG2E
    high = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    first = kv_head * num_k
    line = lut + (head * tl.num_programs(0) + tile).to(tl.int64) * topk
    if SPARSE:
        count = topk
    elif CAUSAL:
        count = tl.minimum(tl.cdiv((tile + 1) * BLOCK_Q, BLOCK_K), num_k)
    else:
        count = num_k
    for j in range(count):
        if SPARSE:
            index = tl.load(line + j)
        else:
            index = j
        k = k_tiles.load([(first + index) * BLOCK_K, 0])  # (BLOCK_K, D)
        s = tl.dot(q8, k.T)  # (BLOCK_Q, BLOCK_K) int32
        c = tl.load(k_scale + first + index) * unit
        col = index * BLOCK_K + tl.arange(0, BLOCK_K)
        if CAUSAL:
            seen = (col[None, :] <= row[:, None]) & (col < keys)[None, :]
            s = tl.where(seen, s, MASKED)
        elif RAGGED and index == num_k - 1:
            s = tl.where((col < keys)[None, :], s, MASKED)
        top = tl.max(s, 1)
        peak = product(top.to(tl.float32), c, FTZ)
        new = tl.maximum(high, peak)
        alpha = exp2(high - new, FTZ)
        if FP8:
            shift = peak - new + OFFSET
        else:
            shift = peak - new
        p = exp2((s - top[:, None]).to(tl.float32) * c + shift[:, None], FTZ)
        # The weights of masked keys are set to 0, because a small c brings the masked scores near the real scores.
        if CAUSAL:
            p = tl.where(seen, p, 0.0)
        elif RAGGED and index == num_k - 1:
            p = tl.where((col < keys)[None, :], p, 0.0)
        norm = norm * alpha + tl.sum(p, 1)
        if FP8:
            v = v_tiles.load([(first + index) * D, 0])  # (D, BLOCK_K)
            part = tl.dot(p.to(v.dtype), v.T)  # (BLOCK_Q, D)
        else:
            v = v_tiles.load([(first + index) * BLOCK_K, 0])  # (BLOCK_K, D)
            part = tl.dot(p.to(v.dtype), v)  # (BLOCK_Q, D)
        # tl.fma, because the compiler would make a plain sum the third operand of the dot above.
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), part)
        high = new
    acc = acc * (1.0 / norm)[:, None] * tl.load(v_scale + kv_head * D + d)[None, :]  # (1, D)
    if LINEAR:
        x = tl.load(q_at, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_Q, D)
        e, s = features(x, d < HEAD, HEAD, D, MAP, FTZ)
        e = e * tl.load(phi_sum + head * D + d)[None, :]  # (1, D)
        z = tl.sum(e, 1) + LINEAR_EPS * s
        state = tl.load(folded + head.to(tl.int64) * D * D + d[:, None] * D + d[None, :])  # (D, D)
        acc = tl.dot((e * (1.0 / z)[:, None]).to(state.dtype), state, acc)  # (BLOCK_Q, D)
        acc += tl.load(bias + d, mask=d < HEAD, other=0.0).to(tl.float32)[None, :]  # (1, D)
    o_at = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + row.to(tl.int64)[:, None] * o_l + d[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class AttendConfig:
    """A configuration of the main kernel's launch."""

    path: str  # "hopper" | "portable"
    block_m: int = (
        64  # query rows of a program in dense attention; a program of "hopper" always has 64 rows and 4 warps
    )
    warps: int = 4
    stages: int = 2
    registers: int | None = None  # the most registers that a thread may use; None: no limit


# The declared sets: a saved choice is one of these. A limit of 168 registers lets three programs share a
# multiprocessor, which then runs the softmax of one program under the products of the others. Without the limit the
# kernel is 15% slower.
HOPPER_CONFIGS = (
    AttendConfig("hopper", stages=2, registers=168),
    # For blocks of 64 keys: with four stages the ring is large enough to hold the linear branch's state.
    AttendConfig("hopper", stages=4, registers=168),
    AttendConfig("hopper", stages=2, registers=160),
)
PORTABLE_CONFIGS = (
    AttendConfig("portable", 64, 4, 3),
    AttendConfig("portable", 64, 4, 2),
    AttendConfig("portable", 128, 8, 3),
    AttendConfig("portable", 128, 8, 2),
)
# Bytes of shared memory of a multiprocessor that hold three stages; compute capabilities 8.6, 8.9 and 12.0 have 100
# KiB, which hold two.
LARGE_SHARED = 160 << 10


def product_format(device: torch.device, pv: str) -> str:
    """The format in which a device computes P V for the option pv.

    That is pv, except that "fp8" becomes "fp16", the more exact format, on GPUs without e4m3 (before capability 8.9).
    """
    return "fp16" if device.type == "cuda" and card(device).capability < (8, 9) else pv


# How many rows of q (or block_m, if block_m is larger) and of k share a scale. 128 rows of k were 15% faster than 64.
SAGE_BLOCKS = (64, 128)


def choice_key(device: torch.device, pv: str, block_k: int, block_q: int = 64) -> str:
    """The key under which an engine keeps a choice: the card's name, the format of P V, the sizes of the blocks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}: {product_format(device, pv)} blocks {block_q}x{block_k}"


def declared(name: str, fields: Mapping[str, Any]) -> AttendConfig:
    """The declared configuration that has these fields.

    name: the key of the saved choice, for the message. Raises ValueError if no declared configuration has these fields.
    """
    matches = [c for c in (*HOPPER_CONFIGS, *PORTABLE_CONFIGS) if asdict(c) == dict(fields)]
    check(bool(matches), f"{name!r} names no declared configuration of the attention: {dict(fields)}")
    return matches[0]


def configs(device: torch.device, pv: str) -> tuple[AttendConfig, ...]:
    """The declared configurations that a device runs for P V in the format pv; the Hopper kernel's come first."""
    on = card(device)
    hopper = device.type == "cuda" and attend_gluon is not None and pv == "fp8" and on.capability[0] == 9
    portable = [c for c in PORTABLE_CONFIGS if c.stages == 2 or on.shared >= LARGE_SHARED]
    return (*(HOPPER_CONFIGS if hopper else ()), *portable)


def usable_config(
    config: AttendConfig | None, device: torch.device, pv: str, block_k: int, block_q: int = 64
) -> AttendConfig:
    """`config`, or the default if `config` is None or needs the Hopper kernel and this Triton lacks that kernel."""
    if config is None or (config.path == "hopper" and attend_gluon is None):
        return default_config(device, pv, block_k, block_q)
    return config


def default_config(device: torch.device, pv: str, block_k: int, block_q: int = 64) -> AttendConfig:
    """The default configuration for a device, a format of P V and sizes of blocks; it depends on no other size."""
    found = configs(device, pv)
    if found[0].path == "hopper":
        return HOPPER_CONFIGS[1] if block_k == 64 else HOPPER_CONFIGS[0]
    large = card(device).shared >= LARGE_SHARED
    return PORTABLE_CONFIGS[(2 if block_q == 128 else 0) + (not large)]


def attend(
    q: torch.Tensor,
    kv: Prepared,
    keys: int,
    scale: float,
    config: AttendConfig,
    *,
    kv_heads: int,
    is_causal: bool = False,
    lut: torch.Tensor | None = None,
    block_q: int = 64,
    bias: torch.Tensor | None = None,
    feature_map: str = "softmax",
) -> torch.Tensor:
    """Launches the main kernel: q (B, L, H, D), bf16 or fp16 -> attention (B, L, H, D), contiguous, q's dtype.

    kv: K and V of kv_heads heads, by `prepare`; keys: how many tokens kv holds. scale: multiplies the scores.
    lut (B * H, ceil(L / block_q), topk) int32: the key blocks that each query block reads; None: all key blocks.
    bias (D,): adds the linear branch, for which `prepare` needs `weight`; feature_map: the linear branch's phi.

    Raises ValueError if kv holds V in the order of the other kernel, or if a program has more causal rows than a key
    block has keys.
    """
    batch, length, heads, head_dim = q.shape
    d, n, block_k = kv.k8.shape[-1], kv.k8.shape[1], kv.block_k
    sparse, linear = lut is not None, bias is not None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_flat, v_flat = kv.k8.view(-1, d), kv.v8.view(-1, kv.v8.shape[-1])
    tail = (
        kv.phi_sum if linear else q, bias if linear else q, *strides(q), *strides(out), length, keys, heads,
        heads // kv_heads, n, lut.shape[-1] if lut is not None else 0, scale,
    )  # fmt: skip
    flags = {
        "HEAD": head_dim, "D": d, "BLOCK_K": block_k, "SPARSE": sparse, "LINEAR": linear, "CAUSAL": is_causal,
        "RAGGED": keys % block_k != 0, "MAP": feature_map,
    }  # fmt: skip
    registers = {} if config.registers is None else {"maxnreg": config.registers}
    lists = lut if lut is not None else q
    if config.path == "hopper":
        if not kv.permuted:
            raise ValueError("the Hopper kernel reads V in operand order: prepare with permute=True")
        g = kv.folded if kv.folded is not None else torch.empty((d, d), dtype=q.dtype, device=q.device)
        attend_gluon.launch(
            q, out, k_flat, v_flat, kv.k_scale, kv.v_scale, lists, g.view(-1, d), tail, flags,
            share=block_q // 64 if sparse else 1, stages=config.stages, registers=registers,
        )  # fmt: skip
        return out
    if kv.permuted:
        raise ValueError("the portable kernel reads V in token order: prepare with permute=False")
    rows = block_q if sparse else config.block_m
    if is_causal and rows > block_k:
        raise ValueError(
            f"{rows} causal rows a program need blocks of as many keys: each row has to see one of each block"
        )
    _attend_portable[(triton.cdiv(length, rows), batch * heads)](
        q, out, TensorDescriptor.from_tensor(k_flat, [block_k, d]),
        TensorDescriptor.from_tensor(v_flat, list(kv.v8.shape[-2:])), kv.k_scale, kv.v_scale,
        lists, kv.folded if kv.folded is not None else q, *tail,
        BLOCK_Q=rows, FP8=kv.v8.dtype != torch.float16, FTZ=q.is_cuda, **flags,
        **FUSED, num_warps=config.warps, num_stages=config.stages, **registers,
    )  # fmt: skip
    return out


def sage_forward(
    q: torch.Tensor,
    k: torch.Tensor | Keys,
    v: torch.Tensor,
    scale: float,
    is_causal: bool,
    pv: str,
    config: AttendConfig | None = None,
    block_k: int = SAGE_BLOCKS[1],
) -> torch.Tensor:
    """SageAttention: q (B, Lq, H, D), k and v (B, Lk, Hkv, D) -> (B, Lq, H, D), contiguous, q's dtype.

    bf16 or fp16, D <= 128, H % Hkv == 0, scale >= 0. 64 (or block_m) rows of q share an INT8 scale, and block_k rows of
    k. k may be `Keys`, which are quantized already. config: None is the default.
    """
    pv = product_format(q.device, pv)
    config = usable_config(config, q.device, pv, block_k)
    kv = prepare(k, v, block_k, pv=pv, permute=config.path == "hopper")
    return attend(q, kv, v.shape[1], scale, config, kv_heads=v.shape[2], is_causal=is_causal)
