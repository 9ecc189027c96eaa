"""The attention kernels in Triton's interpreter, at small ragged shapes, against float64 formulas.

The interpreter is wrong on
products of bf16 and on casts to e4m3: inputs are float16 and pv is "fp16"; the rest is for the GPU. It knows the
portable kernels alone.
"""

from __future__ import annotations

import pytest
import torch
from turbocompile.kernels.attention.sage_attention import reference as sage
from turbocompile.kernels.attention.sla_attention import block_map, kept_blocks, reference, reference_backward

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")


def relative_l2(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def lists(chosen):
    """A map (B, H, M, N) with equally many blocks a row as ascending indices (B H, M, count)."""
    count = int(chosen[0, 0, 0].sum())
    return chosen.flatten(0, 1).to(torch.uint8).topk(count, dim=-1).indices.sort(-1).values.int()


@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "is_causal", "block_k"),
    [((70, 90), (2, 1), 48, False, 64), ((100, 100), (1, 1), 64, True, 64), ((40, 130), (1, 1), 96, False, 128)],
)
def test_sage(normal, lengths, heads, dim, is_causal, block_k):
    from turbocompile.kernels.attention.attend_triton import sage_forward

    make = {"dtype": torch.float16}
    q = normal(2, lengths[0], heads[0], dim, **make) * 1e-3
    k, v = (normal(2, lengths[1], heads[1], dim, **make) for _ in "kv")
    k = k + 3
    got = sage_forward(q, k, v, 0.1, is_causal, "fp16", block_k=block_k)
    # Both quantize, by other blocks: the scores are nearly equal here, so what is left is the rounding of P to float16
    # (2^-11, random, over tens of keys) and of the result.
    assert relative_l2(got, sage(q.double(), k.double(), v.double(), 0.1, is_causal, "fp16")) < 2.0**-10


def test_values_beyond_float16_and_rows_of_zeros(normal):
    from turbocompile.kernels.attention.attend_triton import sage_forward

    q, k, v = (normal(1, 70, 1, 64, dtype=torch.float16) for _ in "qkv")
    q[:, :64], k[:, :64], v[..., 3] = 0, 0, 0
    got = sage_forward(q * 1e4, k * 1e4, v * 1e4, 0.125, False, "fp16")
    assert got.isfinite().all()
    assert (got[..., 3] == 0).all()


@pytest.mark.parametrize(("lines", "n", "count"), [(5, 7, 3), (17, 64, 1), (3, 64, 64), (6, 200, 20), (2, 600, 60)])
@pytest.mark.parametrize("kind", ["random", "close", "tied", "far"])
def test_the_largest_are_found_and_of_equal_ones_the_first(normal, lines, n, count, kind):
    from turbocompile.kernels.attention.sla_triton import largest

    scores = normal(lines, n)
    if kind == "close":  # told apart by their last bits alone
        scores = 1 + scores.argsort(-1) * 2.0**-23
    elif kind == "tied":
        scores = (2 * scores).round() + 0.0  # that -0 is 0
    elif kind == "far":
        scores = scores.sign() * 10 ** (12 * scores)
        scores[0], scores[-1, :2] = 0, float("inf")
    scores = scores.float()
    expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    assert torch.equal(largest(scores, count), expected.int())


@pytest.mark.parametrize(
    ("feature_map", "batch", "tokens", "dim", "blocks"),
    [("softmax", 1, 150, 64, (64, 64)), ("elu", 2, 140, 48, (128, 64)), ("relu", 1, 200, 96, (64, 128))],
)
def test_quantized_sla_and_its_map(normal, feature_map, batch, tokens, dim, blocks):
    from turbocompile.kernels.attention.sla_triton import sla_forward

    q, k, v = (normal(batch, tokens, 1, dim, dtype=torch.float16) for _ in "qkv")
    weight, bias = normal(dim, dim) * 0.2, normal(dim)
    count = kept_blocks(0.5, -(-tokens // blocks[1]))
    got, lut = sla_forward(q, k, v, weight, bias, count, *blocks, feature_map, "fp16")
    chosen = block_map(q.double(), k.double(), 0.5, *blocks)
    assert torch.equal(lut, lists(chosen))
    expected = reference(q.double(), k.double(), v.double(), weight.double(), bias.double(), 0.5, *blocks, feature_map,
                         "none", chosen=chosen)  # fmt: skip
    # INT8 scores cost 0.02 of the sparse branch (the published figure), whose share of this sum is under a half.
    assert relative_l2(got, expected) < 0.01


@pytest.mark.parametrize(
    ("feature_map", "batch", "tokens", "dim", "blocks"),
    [("softmax", 1, 150, 64, (64, 64)), ("elu", 2, 140, 48, (128, 64)), ("relu", 1, 100, 64, (64, 64))],
)
def test_trainable_sla(normal, feature_map, batch, tokens, dim, blocks):
    from turbocompile.kernels.attention.sla_train_triton import Blocks, sla_train_backward, sla_train_forward

    q, k, v, grad = (normal(batch, tokens, 1, dim, dtype=torch.float16) for _ in range(4))
    k = k + 3  # what would leak into dq if rows of dS did not sum to zero
    weight, bias = normal(dim, dim) * 0.2, normal(dim)
    options = (0.5, *blocks, feature_map)
    how = Blocks(kept_blocks(0.5, -(-tokens // blocks[1])), *blocks, feature_map)
    out, lut = sla_train_forward(q, k, v, weight, bias, how)
    chosen = block_map(q.double(), k.double(), 0.5, *blocks)
    assert torch.equal(lut, lists(chosen))
    exact = [t.double() for t in (q, k, v, weight, bias)]
    # One rounding to float16 of each operand of a product and of the result: a few of 2^-11, relative to the norm.
    assert relative_l2(out, reference(*exact, *options, "none", chosen=chosen)) < 2.0**-9
    expected = reference_backward(grad.double(), out.double(), *exact, *options, chosen=chosen)
    got = sla_train_backward(grad, out, q, k, v, weight, bias, how)
    for one, other in zip(got, expected, strict=True):
        assert relative_l2(one, other) < 2.0**-8
