"""Every kernel, in every declared configuration, compiles for every card and fits the card's shared memory.

The launchers run as on a card, with operands that have no values: each kernel that they would launch is compiled, and
for a combination that they refuse nothing is compiled. By default each launch is compiled for one card that does not
refuse it, the cards in turn. With TURBOCOMPILE_EVERY_LAUNCH=1 all cards compile all launches, those of further dtypes,
ragged shapes, masks and options, too, which takes an hour of one core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from turbocompile.kernels import ops
from turbocompile.kernels._registry import ON_CUDA
from turbocompile.kernels.quantize.quantize import ALIGNED, BLOCK, FORMATS, blocks

pytest.importorskip("triton")

FULL = os.environ.get("TURBOCOMPILE_EVERY_LAUNCH") == "1"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
TOKENS = 32760  # of Wan's 81 frames of 832 x 480
GRID = (21, 30, 52)
CAPABILITIES = (80, 86, 89, 90, 100, 120)
CUDA = torch.device("cuda")

Launches = Iterator[tuple[str, Callable[[], object]]]


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def on_cuda(op: torch._ops.OpOverloadPacket, *args: object, **options: object) -> Callable[[], object]:
    """The call of an op as on a card: the kernels where its predicate says so."""
    return lambda: ON_CUDA[op.default](*args, **options)


def rows() -> Iterator[tuple[str, torch.Tensor]]:
    """Activations (B, L, C): one for each configuration over rows, and in full of other dtypes and ragged sizes."""
    for width in (1536, 3072, 5120, 9000, 20000):
        yield str(width), empty(1, TOKENS, width)
    if FULL:
        for dtype, width in product((FP16, FP32), (1536, 200)):
            yield f"{width} {dtype}", empty(2, 300, width, dtype=dtype)


def norms() -> Launches:
    for name, x in rows():
        width = x.shape[-1]
        if width not in (1536, 5120) and not FULL:  # `quantizations` has the configurations of wider rows
            continue
        shared, token, vector = empty(1, 1, width, dtype=FP32), empty(*x.shape, dtype=x.dtype), empty(width)
        # Modulations: for the whole batch, and one a token.
        for scale in (shared, token) if FULL else (shared,):
            each = f"{name}, {'a token' if scale is token else 'shared'}"
            yield f"adaln {each}", on_cuda(ops.adaln, x, scale, scale, None, None, EPS)
            yield (
                f"residual_norm {each}",
                on_cuda(ops.residual_norm, x, token, scale, scale, scale, None, None, EPS, "layer"),
            )
            for format in FORMATS:
                yield (
                    f"adaln_quantize {format} {each}",
                    on_cuda(ops.adaln_quantize, x, scale, scale, None, None, EPS, format),
                )
                yield (
                    f"residual_norm_quantize {format} {each}",
                    on_cuda(
                        ops.residual_norm_quantize, x, token, scale, scale, scale, None, None, EPS, "layer", format
                    ),
                )
        if name in ("1536", "5120") or FULL:
            yield f"gated_residual {name}", on_cuda(ops.gated_residual, x, token, shared)
            yield (
                f"residual_norm rms {name}",
                on_cuda(ops.residual_norm, x, token, None, None, None, vector, vector, EPS, "rms"),
            )
            for format in FORMATS:
                yield f"norm_quantize {format} {name}", on_cuda(ops.norm_quantize, x, vector, None, EPS, "rms", format)


def quantizations() -> Launches:
    for name, x in rows():
        for format in FORMATS if FULL or name == "1536" else ("int8",):
            yield f"quantize {format} {name}", on_cuda(ops.quantize, x, format)
            for approximate in ("tanh", "none") if FULL or name == "1536" else ():
                yield f"gelu_quantize {approximate} {format} {name}", on_cuda(ops.gelu_quantize, x, approximate, format)


def tables(head_dim: int, axes: int) -> tuple[list[torch.Tensor], list[int]]:
    """Rotary tables over the axes, as Wan splits a head's pairs, and the grid."""
    if not axes:
        return [], []
    half, third = head_dim // 2, head_dim // 6
    columns = (half - 2 * third, third, third) if axes == 3 else (half,)
    grid = GRID if axes == 3 else (math.prod(GRID),)
    return [empty(n, c, dtype=FP32) for n, c in zip(grid, columns, strict=True)], list(grid)


def rotations() -> Launches:
    shapes = [(12, 128, BF16), (40, 128, BF16)] + ([(5, 64, FP32), (3, 48, FP16), (24, 128, BF16)] if FULL else [])
    options = [(False, 3, True), (True, 3, True), (False, 0, True), (False, 1, False)]
    for (heads, head_dim, dtype), (per_head, axes, interleaved) in product(shapes, options):
        cos, grid = tables(head_dim, axes)
        weight = empty(head_dim if per_head else heads * head_dim)
        x = empty(1, TOKENS, heads * head_dim, dtype=dtype)
        yield (
            f"{heads} x {head_dim} {dtype}, per_head {per_head}, {axes} axes, interleaved {interleaved}",
            on_cuda(ops.qk_norm_rope, x, weight, EPS, per_head, heads, cos, cos, grid, interleaved),
        )


def keys() -> Launches:
    """The keys of both attentions, in both dtypes, for one batch item and for several."""
    from turbocompile.kernels.attention.keys_triton import quantized_keys

    shapes = [(1, 12, 128, BF16)] + ([(2, 12, 128, BF16), (1, 5, 64, FP16), (1, 40, 128, FP16)] if FULL else [])
    for (batch, heads, head_dim, dtype), block_k, linear in product(shapes, (64, 128), (False, True)):
        cos, grid = tables(head_dim, 3)
        x, weight = empty(batch, TOKENS, heads * head_dim, dtype=dtype), empty(heads * head_dim)
        yield (
            f"{batch} x {heads} x {head_dim} {dtype}, blocks of {block_k}, linear {linear}",
            lambda x=x, weight=weight, heads=heads, cos=cos, grid=grid, block_k=block_k, linear=linear: quantized_keys(
                x, weight, EPS, heads, cos, cos, grid, block_k, linear=linear
            ),
        )


def heads_of(head_dim: int, dtype: torch.dtype, tokens: int) -> torch.Tensor:
    return empty(1, tokens, 12, head_dim, dtype=dtype)


def attention_shapes() -> Iterator[tuple[int, torch.dtype, int]]:
    """head_dim, dtype, tokens: TOKENS are no multiple of a block."""
    yield 128, BF16, TOKENS
    if FULL:
        yield from ((128, FP16, TOKENS), (128, BF16, 32768), (64, BF16, TOKENS), (96, BF16, TOKENS))


def sage() -> Launches:
    from turbocompile.kernels.attention.attend_triton import configs, product_format

    for (head_dim, dtype, tokens), pv, is_causal in product(attention_shapes(), ("fp8", "fp16"), (False, True)):
        q = heads_of(head_dim, dtype, tokens)
        declared = configs(CUDA, product_format(CUDA, pv))
        for config in declared[:1] if is_causal and not FULL else declared:
            yield (
                f"{head_dim} {dtype} {tokens} {pv}, causal {is_causal}, {config}",
                on_cuda(ops.sage_attention, q, q, q, 0.1, is_causal, pv, config=config),
            )


def sla() -> Launches:
    from turbocompile.kernels.attention.attend_triton import configs, product_format

    maps = ("softmax", "elu", "relu") if FULL else ("softmax",)
    cuts = [(64, 128), (128, 128)] + ([(64, 64), (128, 64)] if FULL else [])  # query and key tokens of a block
    for (head_dim, dtype, tokens), pv, (block_q, block_k), feature_map in product(
        attention_shapes(), ("fp8", "fp16"), cuts, maps
    ):
        q, weight, bias = heads_of(head_dim, dtype, tokens), empty(head_dim, head_dim), empty(head_dim)
        for config in configs(CUDA, product_format(CUDA, pv)):
            yield (
                f"{head_dim} {dtype} {tokens} {pv}, blocks {block_q} x {block_k}, {feature_map}, {config}",
                on_cuda(
                    ops.sla_attention, q, q, q, weight, bias, 0.1, block_q, block_k, feature_map, pv, config=config
                ),
            )


def training() -> Launches:
    from turbocompile.kernels.attention.sla_train_triton import (
        Blocks,
        sla_train_backward,
        sla_train_forward,
        train_configs,
    )

    maps = ("softmax", "elu", "relu") if FULL else ("softmax",)
    cuts = [(64, 64), (128, 64)] + ([(64, 128)] if FULL else [])
    for (head_dim, dtype, tokens), (block_q, block_k), feature_map, config in product(
        attention_shapes(), cuts, maps, train_configs(CUDA)
    ):
        q, weight, bias = heads_of(head_dim, dtype, tokens), empty(head_dim, head_dim), empty(head_dim)
        cut = Blocks(50, block_q, block_k, feature_map)
        name = f"{head_dim} {dtype} {tokens}, blocks {block_q} x {block_k}, {feature_map}, {config}"
        yield (
            f"forward {name}",
            lambda q=q, weight=weight, bias=bias, cut=cut, config=config: sla_train_forward(
                q, q, q, weight, bias, cut, config
            ),
        )
        yield (
            f"backward {name}",
            lambda q=q, weight=weight, bias=bias, cut=cut, config=config: sla_train_backward(
                q, q, q, q, q, weight, bias, cut, config
            ),
        )


def linears() -> Launches:
    from turbocompile.kernels.linear.linear_triton import configs

    shapes = [(TOKENS, 1536, 1536, True)]
    if FULL:  # and a K that no block divides, an N whose rows are not multiples of 16 bytes: pointers alone read those
        shapes += [(TOKENS, 1536, 1536, False), (300, 1537, 1552, True)]
    for format, dtype, (m, n, k, biased) in product(FORMATS, (BF16, FP32) if FULL else (BF16,), shapes):
        if format == "int8_block":
            n, k = n // 8 * 8, k // BLOCK * BLOCK
            scales = empty(blocks(m), k // BLOCK, dtype=FP32), empty(blocks(n), k // BLOCK, dtype=FP32)
        else:
            scales = empty(1, m, 1, dtype=FP32), empty(n, 1, dtype=FP32)
        data, weight = empty(1, m, k, dtype=FORMATS[format]), empty(n, k, dtype=FORMATS[format])
        arguments = data, scales[0], weight, scales[1], empty(n) if biased else None, format, dtype
        for config in configs(format, CUDA):
            if config.path == "pointer" or n * dtype.itemsize % ALIGNED == 0:
                yield (
                    f"{format} {m} x {k} to {n} {dtype}, bias {biased}, {config}",
                    on_cuda(ops.w8a8_linear, *arguments, config=config),
                )


def fills() -> Launches:
    from turbocompile.kernels.memory.fill_triton import launch_fill

    yield "fill", lambda: launch_fill(4096, 7, 1)


FAMILIES = (norms, quantizations, rotations, keys, sage, sla, training, linears, fills)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_is_launched_fits_the_card(fake_card, family):
    launches: dict[str, dict[int, Callable[[], object]]] = {}  # by label and capability
    too_large = {}
    with FakeTensorMode():
        for capability in CAPABILITIES:
            fake_card(capability)
            for label, launch in family():
                launches.setdefault(label, {})[capability] = launch
        for turn, (label, of_cards) in enumerate(launches.items()):
            first = turn % len(of_cards)
            in_turn = [*of_cards][first:] + [*of_cards][:first]
            compiled = 0
            for capability in in_turn:
                card = fake_card(capability)
                try:
                    of_cards[capability]()
                except Exception as error:
                    raise AssertionError(f"sm{capability}: {family.__name__} {label} fails: {error}") from error
                for name, kernel in card.launched.items():
                    assert kernel.asm["cubin"]
                    if kernel.metadata.shared > card.largest_program:
                        too_large[f"sm{capability} {name}: {label}"] = kernel.metadata.shared
                compiled += len(card.launched)
                if compiled and not FULL:
                    break
            assert compiled, f"no card launches {label}"
    assert not too_large, f"bytes of shared memory that the cards do not have: {too_large}"
