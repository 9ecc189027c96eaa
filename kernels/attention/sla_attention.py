"""Sparse-linear attention: the sum of softmax attention on the most important key blocks and linear attention on all
keys.

    map   A_i = the topk * N (at least one) key blocks j with the largest mean(q block i) . mean(k block j)
    O_s   = softmax(q k^T D^-0.5 over the keys in A_i) v
    O_l   = phi(q) (phi(k)^T v) / (1e-5 + phi(q) . sum phi(k))                          over all keys
    O     = O_s + O_l W^T + b

q, k, v: (B, L, H, D), any float dtype. W = proj_weight (D, D), b = proj_bias (D,), shared by the heads, any float
dtype. block_q, block_k: tokens of a block of queries and of keys; the last block may be short; N = ceil(L / block_k).
topk: a share in (0, 1]. feature_map: phi, which is "softmax" over D, "elu" (elu(x) + 1) or "relu". Output: (B, L, H,
D), contiguous, q's dtype. Sums are float32 (float64 for float64 inputs). The mean of a short block is the mean of its
real tokens. No gradient flows through the map.

pv "none" is attention in floating point, which can be trained. pv "fp8" and "fp16" quantize the sparse branch as
sage_attention.py does, with scales for blocks of block_q and block_k tokens; the linear branch is not quantized.

On a GPU the kernels (sla_triton.py, sla_train_triton.py) take blocks of 64 and 128 tokens (with pv "none" not both 128)
and the operands that has_kernel accepts. The kernels round the means of blocks to the operands' dtype before they
compare them. The reference computes all other operands.

O_l W^T is computed as (phi(q) (phi(k)^T v W^T)) / z, because the projection then costs D^3 a head instead of L D^2.
Source: arXiv 2509.24006, in the variant of TurboDiffusion's checkpoints (the linear branch is over all keys).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from turbocompile.kernels._registry import check, choose, compute_dtype, register, register_on_cuda
from turbocompile.kernels.attention.sage_attention import (
    LOG2E,
    SCORES,
    e4m3,
    e4m3_in_float,
    has_kernel,
    quantize_rows,
    round_values,
    rows_of_channels,
    softmax_values,
)

from turbocompile.errors import UnsupportedError

FEATURE_MAPS = ("softmax", "elu", "relu")
KERNEL_BLOCKS = (64, 128)
LINEAR_EPS = 1e-5  # a term of the linear branch's denominator; the checkpoints were trained with this value


def count_blocks(tokens: int, block: int) -> int:
    """How many blocks of `block` tokens cover `tokens` tokens."""
    return -(-tokens // block)


def kept_blocks(topk: float, key_blocks: int) -> int:
    """How many of `key_blocks` key blocks a query block reads: the floor of the share `topk`, and at least one."""
    return max(1, min(key_blocks, int(topk * key_blocks)))


def _block_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """The means of the blocks of `block` tokens of x (B, L, H, D): (B, H, ceil(L / block), D), in the sums' dtype."""
    batch, tokens, heads, dim = x.shape
    whole, wide = tokens // block, compute_dtype(x.dtype)
    means = [x[:, : whole * block].reshape(batch, whole, block, heads, dim).mean(2, dtype=wide)] if whole else []
    if tokens % block:
        means.append(x[:, whole * block :].mean(1, keepdim=True, dtype=wide))
    return torch.cat(means, dim=1).permute(0, 2, 1, 3)


def block_map(q: torch.Tensor, k: torch.Tensor, topk: float, block_q: int, block_k: int) -> torch.Tensor:
    """Which key blocks each query block reads: bool (B, H, ceil(L / block_q), ceil(L / block_k)).

    q, k: (B, L, H, D). Each row has kept_blocks(topk, ceil(L / block_k)) true entries.
    """
    queries, keys = _block_means(q, block_q), _block_means(k, block_k)
    # The mean is subtracted from all keys. That shifts a row of scores by a constant, so that the ranking stays the
    # same, and smaller scores are rounded more finely.
    scores = queries @ (keys - keys.mean(-2, keepdim=True)).transpose(-1, -2)
    chosen = scores.topk(kept_blocks(topk, keys.shape[-2]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores).scatter(-1, chosen, 1.0) > 0.5


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """The feature map phi(x) over the last dimension of x; same shape and dtype as x."""
    if feature_map == "softmax":
        return torch.softmax(x, dim=-1)
    return F.elu(x) + 1 if feature_map == "elu" else torch.relu(x)


class _Operands(NamedTuple):
    """The operands of the sparse branch's two products, quantized or not, and the scales of the products' results.

    q, k, v (..., L, D); q_scale (..., L), including D^-0.5 log2(e); k_scale (..., L); v_scale (..., 1, D) or None.
    After _in_blocks, two axes (M, block_q) or (N, block_k) stand in the place of L, and tokens past the end are zeros.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor | None


def _cut(x: torch.Tensor, block: int) -> torch.Tensor:
    """x (G, L, ...), cut into blocks: (G, ceil(L / block), block, ...), padded with zeros."""
    blocks = count_blocks(x.shape[1], block)
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, blocks * block - x.shape[1]))
    return padded.reshape(x.shape[0], blocks, block, *x.shape[2:])


def _operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_q: int,
    block_k: int,
    pv: str,
    fp8: Callable[[torch.Tensor], torch.Tensor] = e4m3,
) -> _Operands:
    """The operands of q, k, v (..., L, D), quantized unless pv is "none"."""
    if pv == "none":
        q_scale, k_scale = torch.ones_like(q[..., 0]), torch.ones_like(k[..., 0])
    else:
        q, q_scale = quantize_rows(q, block_q)
        k, k_scale = quantize_rows(k - k.mean(-2, keepdim=True), block_k)
    v, v_scale = round_values(v, pv, fp8)
    return _Operands(q, q_scale * (q.shape[-1] ** -0.5 * LOG2E), k, k_scale, v, v_scale)


def _in_blocks(x: _Operands, block_q: int, block_k: int) -> _Operands:
    """The operands x of G heads, (G, L, D), cut into blocks."""
    v_scale = None if x.v_scale is None else x.v_scale[:, None]
    q, q_scale = (_cut(t, block_q) for t in (x.q, x.q_scale))
    k, k_scale, v = (_cut(t, block_k) for t in (x.k, x.k_scale, x.v))
    return _Operands(q, q_scale, k, k_scale, v, v_scale)


def _gather(blocks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each row of table (G, M, K), the K blocks of `blocks` (G, N, block, ...) that the row names, side by side.

    Returns (G, M, K * block, ...).
    """
    rows = torch.arange(blocks.shape[0], device=blocks.device)[:, None, None]
    return blocks[rows, table].flatten(2, 3)


class _Chunk(NamedTuple):
    """Some of the M query blocks, and the key blocks that they read."""

    part: slice  # which m of the M query blocks
    table: torch.Tensor  # (G, m, K) int64, the key blocks that each query block reads
    scores: torch.Tensor  # (G, m, block_q, K * block_k), base-2 logarithms, -inf where there is no key


def _chunks(blocks: _Operands, chosen: torch.Tensor, tokens: int) -> Iterator[_Chunk]:
    """Yields the scores of the blocks in `chosen` (G, M, N), for a few query blocks at a time.

    chosen: bool, which key blocks each query block reads. tokens: L, behind which the keys are masked.
    """
    most = int(chosen.sum(-1).max())
    table = chosen.to(torch.uint8).topk(most, dim=-1).indices.sort(dim=-1).values
    present = chosen.gather(-1, table)
    block_q, block_k = blocks.q.shape[2], blocks.k.shape[2]
    position = table[..., None] * block_k + torch.arange(block_k, device=table.device)
    masked = ~(present[..., None] & (position < tokens)).flatten(2)  # (G, M, K * block_k)
    step = max(1, SCORES // (chosen.shape[0] * block_q * most * block_k))
    for first in range(0, chosen.shape[1], step):
        part = slice(first, first + step)
        keys, k_scale = _gather(blocks.k, table[:, part]), _gather(blocks.k_scale, table[:, part])
        scores = (blocks.q[:, part] @ keys.transpose(-1, -2)) * blocks.q_scale[:, part, :, None] * k_scale[:, :, None]
        yield _Chunk(part, table[:, part], scores.masked_fill(masked[:, part, None], -math.inf))


def _sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, block_q: int, block_k: int, pv: str
) -> torch.Tensor:
    """The sparse branch O_s (G, L, D) of q, k, v (G, L, D) and the map `chosen` (G, M, N)."""
    blocks = _in_blocks(_operands(q, k, v, block_q, block_k, pv), block_q, block_k)
    parts = [
        softmax_values(chunk.scores, _gather(blocks.v, chunk.table), blocks.v_scale, pv)
        for chunk in _chunks(blocks, chosen, q.shape[1])
    ]
    return torch.cat(parts, dim=1).flatten(1, 2)[:, : q.shape[1]]


def _linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """The linear branch O_l W^T + b (..., L, D) of q, k, v (..., L, D), weight (D, D) and bias (D,)."""
    phi_q, phi_k = features(q, feature_map), features(k, feature_map)
    z = LINEAR_EPS + phi_q @ phi_k.sum(-2, keepdim=True).transpose(-1, -2)
    return phi_q @ (phi_k.transpose(-1, -2) @ v @ weight.T) / z + bias


def _head_groups(q: torch.Tensor, chosen: torch.Tensor, block_k: int) -> Iterator[tuple[int, slice]]:
    """Yields (batch item, slice of heads), with at most SCORES scores a slice, or one head, to bound the memory."""
    heads = max(1, SCORES // (q.shape[1] * int(chosen.sum(-1).max()) * block_k))
    for batch in range(q.shape[0]):
        for head in range(0, q.shape[2], heads):
            yield batch, slice(head, head + heads)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of the op: (B, L, H, D) in q's dtype.

    chosen: bool (B, H, M, N), a map to use instead of block_map's; each row must have at least one true entry. Raises
    ValueError if the operands do not fit each other.
    """
    check_operands(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)
    wide = compute_dtype(q.dtype)
    weight, bias = proj_weight.to(wide), proj_bias.to(wide)
    chosen = block_map(q, k, topk, block_q, block_k) if chosen is None else chosen
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for batch, heads in _head_groups(q, chosen, block_k):
        qh, kh, vh = (t[batch, :, heads].to(wide).transpose(0, 1) for t in (q, k, v))
        sparse = _sparse(qh, kh, vh, chosen[batch, heads], block_q, block_k, pv)
        linear = _linear(qh, kh, vh, weight, bias, feature_map)
        out[batch, :, heads] = (sparse + linear).transpose(0, 1).to(q.dtype)
    return out


def _sparse_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of _sparse with respect to q, k, v, all (G, L, D), from `grad`, the gradient of O_s.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = D^-0.5 dS K, dK = D^-0.5 dS^T Q, over the chosen blocks.
    P is computed again.
    """
    blocks = _in_blocks(_operands(q, k, v, block_q, block_k, "none"), block_q, block_k)
    grads, scale = _cut(grad, block_q), q.shape[-1] ** -0.5
    # new_zeros, because zeros_like would keep strides that are not contiguous.
    dq, dk, dv = (t.new_zeros(t.shape) for t in (blocks.q, blocks.k, blocks.v))
    for part, table, scores in _chunks(blocks, chosen, q.shape[1]):
        p = torch.softmax(scores / LOG2E, dim=-1)
        dp = grads[:, part] @ _gather(blocks.v, table).transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[:, part] = ds @ _gather(blocks.k, table)
        _add_blocks(dk, table, ds.transpose(-1, -2) @ blocks.q[:, part])
        _add_blocks(dv, table, p.transpose(-1, -2) @ grads[:, part])
    dq, dk, dv = (t.flatten(1, 2)[:, : q.shape[1]] for t in (dq, dk, dv))
    return dq, dk, dv


def _add_blocks(total: torch.Tensor, table: torch.Tensor, parts: torch.Tensor) -> None:
    """Adds `parts` (G, m, K * block, D) to the blocks of `total` (G, N, block, D) that `table` (G, m, K) names."""
    groups, blocks = total.shape[:2]
    row = torch.arange(groups, device=table.device)[:, None, None] * blocks + table
    total.view(groups * blocks, *total.shape[2:]).index_add_(0, row.flatten(), parts.reshape(-1, *total.shape[2:]))


def _linear_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of _linear with respect to q, k, v (G, L, D), weight and bias, from `grad`, its output's
    gradient.
    """
    phi_q, phi_k = features(q, feature_map), features(k, feature_map)
    sums, products = phi_k.sum(-2, keepdim=True), phi_k.transpose(-1, -2) @ v
    z = LINEAR_EPS + phi_q @ sums.transpose(-1, -2)
    out = phi_q @ products / z
    dout = grad @ weight / z
    dz = -(out * dout).sum(-1, keepdim=True)
    dproducts = phi_q.transpose(-1, -2) @ dout
    dphi_q = dout @ products.transpose(-1, -2) + dz * sums
    dphi_k = v @ dproducts.transpose(-1, -2) + (dz * phi_q).sum(-2, keepdim=True)
    dq, dk = (_features_backward(*t, feature_map) for t in ((dphi_q, phi_q), (dphi_k, phi_k)))
    dweight = torch.einsum("glo,gli->oi", grad, out)
    return dq, dk, phi_k @ dproducts, dweight, grad.sum((0, 1))


def _features_backward(grad: torch.Tensor, phi: torch.Tensor, feature_map: str) -> torch.Tensor:
    """The gradient with respect to x, from `grad`, the gradient of phi(x). The value phi gives all three
    derivatives.
    """
    if feature_map == "softmax":
        return phi * (grad - (phi * grad).sum(-1, keepdim=True))
    return grad * (phi.clamp(max=1.0) if feature_map == "elu" else phi > 0)


def reference_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    chosen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the op with pv "none" with respect to q, k, v, proj_weight, proj_bias, in their dtypes.

    grad (B, L, H, D): the gradient of the op's result. out (B, L, H, D): the op's result, which the kernels need and
    this reference ignores. chosen: as in `reference`.
    """
    wide = compute_dtype(q.dtype)
    weight = proj_weight.to(wide)
    chosen = block_map(q, k, topk, block_q, block_k) if chosen is None else chosen
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(proj_bias, dtype=wide)
    for batch, heads in _head_groups(q, chosen, block_k):
        dout, qh, kh, vh = (t[batch, :, heads].to(wide).transpose(0, 1) for t in (grad, q, k, v))
        sparse = _sparse_backward(dout, qh, kh, vh, chosen[batch, heads], block_q, block_k)
        *linear, dw, db = _linear_backward(dout, qh, kh, vh, weight, feature_map)
        dweight += dw
        dbias += db
        for total, one, other in zip((dq, dk, dv), sparse, linear, strict=True):
            total[batch, :, heads] = (one + other).transpose(0, 1).to(total.dtype)
    return (dq, dk, dv, dweight.to(proj_weight.dtype), dbias.to(proj_bias.dtype))


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_q: int, block_k: int, pv: str) -> bool:
    """Whether the GPU kernels compute the op of these operands.

    The trainable kernels (pv "none") do not take block_q = block_k = 128, which need more shared memory than most GPUs
    have.
    """
    fits = block_q in KERNEL_BLOCKS and block_k in KERNEL_BLOCKS
    return fits and (pv != "none" or min(block_q, block_k) == KERNEL_BLOCKS[0]) and has_kernel(q, k, v)


def on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
    config: Any = None,
) -> torch.Tensor:
    """The op on CUDA: the kernels compute the operands that `serves` accepts, and the reference all others.

    config: an AttendConfig of attend_triton.py for the main kernel of inference; None is the default.
    """
    check_operands(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)
    if not serves(q, k, v, block_q, block_k, pv):
        return reference(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)
    # Imported here, because a machine without a GPU may lack Triton.
    from turbocompile.kernels.attention.sla_train_triton import Blocks, sla_train_forward
    from turbocompile.kernels.attention.sla_triton import sla_forward

    count = kept_blocks(topk, count_blocks(q.shape[1], block_k))
    q, k, v, bias = (rows_of_channels(t) for t in (q, k, v, proj_bias))
    with torch.cuda.device(q.device):
        if pv == "none":
            return sla_train_forward(q, k, v, proj_weight, bias, Blocks(count, block_q, block_k, feature_map))[0]
        return sla_forward(q, k, v, proj_weight, bias, count, block_q, block_k, feature_map, pv, config)[0]


def _backward_on_cuda(
    grad: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward op on CUDA: the kernels compute the operands that `serves` accepts, and the reference all others."""
    operands = (grad, out, q, k, v, proj_weight, proj_bias)
    if not serves(q, k, v, block_q, block_k, "none"):
        return reference_backward(*operands, topk, block_q, block_k, feature_map)
    from turbocompile.kernels.attention.sla_train_triton import Blocks, sla_train_backward

    blocks = Blocks(kept_blocks(topk, count_blocks(q.shape[1], block_k)), block_q, block_k, feature_map)
    grad, out, q, k, v, weight, bias = (rows_of_channels(t) for t in operands)
    with torch.cuda.device(q.device):
        dq, dk, dv, dweight, dbias = sla_train_backward(grad, out, q, k, v, weight, bias, blocks)
    return dq, dk, dv, dweight.to(proj_weight.dtype), dbias.to(proj_bias.dtype)


def check_operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> None:
    """Raises ValueError unless q, k, v have one shape (B, L, H, D), proj_weight is (D, D), proj_bias is (D,), and every
    option has a possible value.
    """
    choose("sla_attention: pv", pv, "none", "fp8", "fp16")
    choose("sla_attention: the feature map", feature_map, *FEATURE_MAPS)
    check(q.ndim == 4, f"sla_attention: q is (B, L, H, D), and has {q.ndim} dimensions")
    check(q.shape == k.shape == v.shape, "sla_attention: q, k and v differ in shape; it is for self-attention")
    dim = q.shape[3]
    check(
        tuple(proj_weight.shape) == (dim, dim) and tuple(proj_bias.shape) == (dim,),
        f"sla_attention: the projection does not map {dim} channels to {dim}",
    )
    check(0 < topk <= 1, f"sla_attention: topk is {topk}; it is a share of the key blocks, above 0 and at most 1")
    check(block_q > 0 and block_k > 0, f"sla_attention: blocks of {block_q} and {block_k} tokens")


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> torch.Tensor:
    check_operands(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)
    return q.new_empty(q.shape)


def _fake_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, proj_weight, proj_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *ctx.options, ctx.pv = inputs[5:]
    if ctx.pv == "none":
        ctx.save_for_backward(output, *inputs[:5])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.pv != "none":
        raise UnsupportedError(
            f'turbocompile::sla_attention with pv "{ctx.pv}" has no gradient; train with "none", or use torch.no_grad()'
        )
    return (*sla_attention_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5)


_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor proj_weight, Tensor proj_bias"
_OPTIONS = "float topk, int block_q, int block_k, str feature_map"
sla_attention = register(
    "sla_attention", f"({_OPERANDS}, {_OPTIONS}, str pv) -> Tensor", reference, _fake, _backward, _setup_context
)
sla_attention_backward = register(
    "sla_attention_backward",
    f"(Tensor grad, Tensor out, {_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_backward,
    _fake_backward,
)
register_on_cuda(sla_attention, on_cuda)
register_on_cuda(sla_attention_backward, _backward_on_cuda)


def _decomposition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> torch.Tensor:
    """The op in aten: dense attention under the map's mask, with e4m3 by floating-point arithmetic."""
    check_operands(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, feature_map, pv)
    tokens, wide = q.shape[1], compute_dtype(q.dtype)
    chosen = block_map(q, k, topk, block_q, block_k)
    down, right = chosen.shape[-2:]
    mask = chosen[:, :, :, None, :, None].expand(-1, -1, down, block_q, right, block_k)
    mask = mask.reshape(*chosen.shape[:2], down * block_q, right * block_k)[:, :, :tokens, :tokens]
    q_, k_, v_ = (t.to(wide).permute(0, 2, 1, 3) for t in (q, k, v))
    x = _operands(q_, k_, v_, block_q, block_k, pv, e4m3_in_float)
    scores = (x.q @ x.k.transpose(-1, -2)) * x.q_scale[..., None] * x.k_scale[..., None, :]
    sparse = softmax_values(torch.where(mask, scores, -math.inf), x.v, x.v_scale, pv, e4m3_in_float)
    y = sparse + _linear(q_, k_, v_, proj_weight.to(wide), proj_bias.to(wide), feature_map)
    return y.permute(0, 2, 1, 3).to(q.dtype).contiguous()


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The op by aten operators alone; the backward op has none, because saved programs are not trained."""
    return {sla_attention: _decomposition}
