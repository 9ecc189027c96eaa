"""A quantized attention that makes its own k: RMSNorm over all channels, heads, rotary, then the attention.

    norm_sage_attention(q, x, v, ...) = sage_attention(q, qk_norm_rope(x, ...), v, ...)
    norm_sla_attention(q, x, v, ...)  = sla_attention(q, qk_norm_rope(x, ...), v, ...)

These equations define the references, to the bit; k is rounded to x's dtype in between. x: (B, Lk, Hkv * D), any float
dtype. weight, eps, cos, sin and grid are those of qk_norm_rope.py, with per_head False, interleaved True and tables of
at least one axis. q (B, Lq, H, D), v (B, Lk, Hkv, D) and all further arguments are those of sage_attention.py and
sla_attention.py, except that pv is "fp8" or "fp16" for both. Output: (B, Lq, H, D), contiguous, q's dtype.

On a GPU one pass makes the INT8 blocks of k from x (keys_triton.py), for the operands that takes_sage and takes_sla
accept. For all other operands the two ops run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from turbocompile.kernels._registry import check, check_channels, choose, register, register_on_cuda
from turbocompile.kernels.attention import sage_attention, sla_attention
from turbocompile.kernels.attention.keys import takes_keys
from turbocompile.kernels.rotary import qk_norm_rope, rope

MADE = 5  # how many operands behind q, x and v serve to make k from x: weight, eps, cos, sin, grid


def _keys(
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> tuple[Any, ...]:
    """The arguments of qk_norm_rope that make k of v's shape from x."""
    return x, weight, eps, False, v.shape[2], cos, sin, grid, True


def _check_keys(
    name: str,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
) -> None:
    check(v.ndim == 4, f"{name}: v is (B, L, H, D), and has {v.ndim} dimensions")
    fits = tuple(x.shape) == (*v.shape[:2], v.shape[2] * v.shape[3])
    check(fits, f"{name}: x of {list(x.shape)} does not hold the heads of v, {list(v.shape)}, side by side")
    check_channels(x, weight=weight)
    check(len(cos) > 0, f"{name}: there are no tables to rotate k by")
    rope.check_tables(x.shape[1], v.shape[3], cos, sin, grid)


# ------------------------------------------------------------------------------------------------ norm_sage_attention


def sage_reference(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    scale: float,
    is_causal: bool,
    pv: str,
) -> torch.Tensor:
    """The references of the two ops, one after the other: (B, Lq, H, D) in q's dtype.

    Raises ValueError if the operands do not fit each other.
    """
    _check_sage(q, x, v, weight, eps, cos, sin, grid, scale, is_causal, pv)
    k = qk_norm_rope.reference(*_keys(x, v, weight, eps, cos, sin, grid))
    return sage_attention.reference(q, k, v, scale, is_causal, pv)


def _check_sage(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    scale: float,
    is_causal: bool,
    pv: str,
) -> None:
    _check_keys("norm_sage_attention", x, v, weight, cos, sin, grid)
    sage_attention.check_operands(q, v, v, pv)  # k has v's shape


def _sage_fake(q: torch.Tensor, *operands: Any) -> torch.Tensor:
    _check_sage(q, *operands)
    return q.new_empty(q.shape)


def takes_sage(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    scale: float,
    is_causal: bool,
    pv: str,
) -> bool:
    """Whether the GPU kernels compute the op of these operands.

    The kernels of sage_attention must take q and v, and takes_keys must accept x.
    """
    return scale >= 0 and sage_attention.has_kernel(q, v, v) and takes_keys(x, v, weight, cos, sin, grid)


def sage_on_cuda(q: torch.Tensor, x: torch.Tensor, v: torch.Tensor, *operands: Any, config: Any = None) -> torch.Tensor:
    """The op on CUDA: one pass makes k for the operands that takes_sage accepts; for all others the two ops run.

    config: an AttendConfig of attend_triton.py for the main kernel; None is the default.
    """
    _check_sage(q, x, v, *operands)
    keys, options = operands[:MADE], (*operands[MADE:], config)
    if not takes_sage(q, x, v, *operands):
        return sage_attention.on_cuda(q, qk_norm_rope.qk_norm_rope(*_keys(x, v, *keys)), v, *options)
    # Imported here, because a machine without a GPU may lack Triton.
    from turbocompile.kernels.attention.attend_triton import SAGE_BLOCKS, sage_forward
    from turbocompile.kernels.attention.keys_triton import quantized_keys

    q, x, v = (sage_attention.rows_of_channels(t) for t in (q, x, v))
    weight, eps, cos, sin, grid = keys
    with torch.cuda.device(q.device):
        k = quantized_keys(x, weight, eps, v.shape[2], cos, sin, grid, SAGE_BLOCKS[1])
        return sage_forward(q, k, v, *options)


_OPERANDS = "Tensor q, Tensor x, Tensor v, Tensor? weight, float eps, Tensor[] cos, Tensor[] sin, int[] grid"
norm_sage_attention = register(
    "norm_sage_attention",
    f"({_OPERANDS}, float scale, bool is_causal, str pv) -> Tensor",
    sage_reference,
    _sage_fake,
)
register_on_cuda(norm_sage_attention, sage_on_cuda)


# ------------------------------------------------------------------------------------------------- norm_sla_attention


def sla_reference(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> torch.Tensor:
    """The references of the two ops, one after the other: (B, L, H, D) in q's dtype.

    Raises ValueError if the operands do not fit each other.
    """
    options = (topk, block_q, block_k, feature_map, pv)
    _check_sla(q, x, v, weight, eps, cos, sin, grid, proj_weight, proj_bias, *options)
    k = qk_norm_rope.reference(*_keys(x, v, weight, eps, cos, sin, grid))
    return sla_attention.reference(q, k, v, proj_weight, proj_bias, *options)


def _check_sla(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> None:
    choose("norm_sla_attention: pv", pv, "fp8", "fp16")
    _check_keys("norm_sla_attention", x, v, weight, cos, sin, grid)
    sla_attention.check_operands(q, v, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)


def _sla_fake(q: torch.Tensor, *operands: Any) -> torch.Tensor:
    _check_sla(q, *operands)
    return q.new_empty(q.shape)


def takes_sla(
    q: torch.Tensor,
    x: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    grid: Sequence[int],
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> bool:
    """Whether the GPU kernels compute the op of these operands.

    The kernels of sla_attention must take q and v, and takes_keys must accept x.
    """
    together = q.device == proj_weight.device == proj_bias.device
    return together and sla_attention.serves(q, v, v, block_q, block_k, pv) and takes_keys(x, v, weight, cos, sin, grid)


def sla_on_cuda(q: torch.Tensor, x: torch.Tensor, v: torch.Tensor, *operands: Any, config: Any = None) -> torch.Tensor:
    """The op on CUDA: one pass makes k for the operands that takes_sla accepts; for all others the two ops run.

    config: an AttendConfig of attend_triton.py for the main kernel; None is the default.
    """
    _check_sla(q, x, v, *operands)
    keys, options = operands[:MADE], (*operands[MADE:], config)
    if not takes_sla(q, x, v, *operands):
        return sla_attention.on_cuda(q, qk_norm_rope.qk_norm_rope(*_keys(x, v, *keys)), v, *options)
    from turbocompile.kernels.attention.keys_triton import quantized_keys
    from turbocompile.kernels.attention.sla_triton import sla_forward

    proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv, config = options
    count = sla_attention.kept_blocks(topk, sla_attention.count_blocks(x.shape[1], block_k))
    q, x, v, bias = (sage_attention.rows_of_channels(t) for t in (q, x, v, proj_bias))
    weight, eps, cos, sin, grid = keys
    with torch.cuda.device(q.device):
        k = quantized_keys(x, weight, eps, v.shape[2], cos, sin, grid, block_k, linear=True)
        return sla_forward(q, k, v, proj_weight, bias, count, block_q, block_k, feature_map, pv, config)[0]


norm_sla_attention = register(
    "norm_sla_attention",
    f"({_OPERANDS}, Tensor proj_weight, Tensor proj_bias, float topk, int block_q, int block_k, str feature_map,"
    " str pv) -> Tensor",
    sla_reference,
    _sla_fake,
)
register_on_cuda(norm_sla_attention, sla_on_cuda)


# ------------------------------------------------------------------------------------------------------ decompositions


def _sage_decomposition(q: torch.Tensor, x: torch.Tensor, v: torch.Tensor, *operands: Any) -> torch.Tensor:
    _check_sage(q, x, v, *operands)
    keys, options = operands[:MADE], operands[MADE:]
    attend = sage_attention.decompositions()[sage_attention.sage_attention]
    return attend(q, qk_norm_rope.reference(*_keys(x, v, *keys)), v, *options)


def _sla_decomposition(q: torch.Tensor, x: torch.Tensor, v: torch.Tensor, *operands: Any) -> torch.Tensor:
    _check_sla(q, x, v, *operands)
    keys, options = operands[:MADE], operands[MADE:]
    attend = sla_attention.decompositions()[sla_attention.sla_attention]
    return attend(q, qk_norm_rope.reference(*_keys(x, v, *keys)), v, *options)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The ops by aten operators alone: the decompositions of the two ops, one after the other."""
    return {norm_sage_attention: _sage_decomposition, norm_sla_attention: _sla_decomposition}
