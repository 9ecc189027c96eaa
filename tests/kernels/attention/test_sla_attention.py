"""Sparse-linear attention against dense float64 formulas under a mask, and its gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import ops
from turbocompile.kernels.attention import sla_attention
from turbocompile.kernels.attention.sla_attention import block_map, count_blocks, kept_blocks, reference

from turbocompile.errors import UnsupportedError

FEATURES = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


def dense(q, k, v, weight, bias, chosen, block_q, block_k, feature_map):
    """Both branches dense, projected after the division, in the operands' dtype: what autograd differentiates."""
    tokens = q.shape[1]
    mask = chosen.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :tokens, :tokens]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    sparse = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
    phi_q, phi_k = FEATURES[feature_map](q), FEATURES[feature_map](k)
    weights = phi_q @ phi_k.transpose(-1, -2)
    linear = weights @ v / (1e-5 + weights.sum(-1, keepdim=True))
    return (sparse + linear @ weight.T + bias).transpose(1, 2)


def operands(make, batch=2, tokens=37, heads=2, dim=8, dtype=torch.float64):
    return [make(batch, tokens, heads, dim, dtype=dtype) for _ in "qkv"] + [
        make(dim, dim, dtype=dtype),
        make(dim, dtype=dtype),
    ]


def random_map(seed, batch, heads, rows, columns):
    """Any number of blocks a row, at least one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, heads, rows, columns, generator=generator) < 0.4
    one = torch.randint(columns, (batch, heads, rows, 1), generator=generator)
    return chosen.scatter(-1, one, True)


def relative_l1(got, expected):
    return ((got.double() - expected).abs().sum() / expected.abs().sum()).item()


# --- the map


@pytest.mark.parametrize(
    ("tokens", "block", "blocks", "kept"),
    [
        (32760, 64, 512, {0.1: 51, 0.15: 76}),  # 832 x 480, 81 frames
        (32760, 128, 256, {0.1: 25, 0.15: 38}),
        (75600, 64, 1182, {0.1: 118, 0.15: 177}),  # 1280 x 720, 81 frames
        (75600, 128, 591, {0.1: 59, 0.15: 88}),
        (100, 64, 2, {0.1: 1, 1.0: 2}),  # the floor would be none
    ],
)
def test_sizes_of_the_map_are_the_published_ones(tokens, block, blocks, kept):
    assert count_blocks(tokens, block) == blocks
    assert {topk: kept_blocks(topk, blocks) for topk in kept} == kept


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 70), block_q=st.integers(1, 20), block_k=st.integers(1, 20), topk=st.floats(0.01, 1.0))
def test_the_map_keeps_the_blocks_with_the_largest_product_of_means(randn, tokens, block_q, block_k, topk):
    q, k = (randn(tokens)(1, tokens, 2, 8, dtype=torch.float64) for _ in "qk")
    k = k + torch.arange(8) * 100.0  # a bias shifts each row by a constant, and must not matter
    chosen = block_map(q, k, topk, block_q, block_k)
    assert chosen.shape == (1, 2, -(-tokens // block_q), -(-tokens // block_k))
    for head in range(2):
        means = [torch.stack([p.mean(0) for p in x[0, :, head].split(b)]) for x, b in ((q, block_q), (k, block_k))]
        for row, kept in zip(means[0] @ means[1].T, chosen[0, head], strict=True):
            assert kept.sum() == max(1, int(topk * len(kept)))
            assert kept.all() or row[kept].min() >= row[~kept].max() - 1e-9


# --- the float attention


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 60),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dim=st.sampled_from([1, 8, 12]),
    topk=st.floats(0.05, 1.0),
    feature_map=st.sampled_from(sorted(FEATURES)),
)
def test_the_formula_at_any_shape(randn, tokens, blocks, dim, topk, feature_map):
    args = operands(randn(tokens), tokens=tokens, dim=dim)
    y = ops.sla_attention(*args, topk, *blocks, feature_map, "none")
    assert y.is_contiguous()
    expected = dense(*args, block_map(*args[:2], topk, *blocks), *blocks, feature_map)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pv", ["none", "fp16"])
def test_a_map_can_be_given_with_any_number_of_blocks_a_row(normal, pv):
    args = operands(normal)
    chosen = random_map(0, 2, 2, 5, 10)
    y = reference(*args, 0.1, 8, 4, "softmax", pv, chosen=chosen)
    expected = dense(*args, chosen, 8, 4, "softmax")
    assert relative_l1(y, expected) < (1e-12 if pv == "none" else 0.02)


def test_all_blocks_and_no_projection_are_dense_attention(normal):
    q, k, v, weight, bias = operands(normal)
    y = ops.sla_attention(q, k, v, weight * 0, bias * 0, 1.0, 16, 8, "softmax", "none")
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rounding_to_the_dtype_of_q(normal, unit, dtype):
    args = [t.to(dtype) for t in operands(normal, tokens=200, dim=64)]
    chosen = block_map(*args[:2], 0.3, 64, 32)
    expected = dense(*(t.double() for t in args), chosen, 64, 32, "softmax")
    y = ops.sla_attention(*args, 0.3, 64, 32, "softmax", "none")
    assert y.dtype == dtype
    # Float32 inside: sums over 200 tokens and 64 channels, 1e-5 of the largest; then one rounding.
    error = (y.double() - expected).abs()
    assert (error <= 1e-5 * expected.abs().max() + unit[dtype] * expected.abs()).all()


@pytest.mark.parametrize("pv", ["none", "fp16"])
def test_the_chunks_do_not_show(normal, monkeypatch, pv):
    args = (*operands(normal, tokens=100, heads=3), 0.4, 16, 8, "softmax", pv)
    whole = ops.sla_attention(*args)
    for scores in (1, 16 * 8 * 8, 100 * 5 * 8 * 2):
        monkeypatch.setattr(sla_attention, "SCORES", scores)
        assert (ops.sla_attention(*args) - whole).abs().max() < (1e-12 if pv == "none" else 1e-3)


# --- gradients


@pytest.mark.parametrize("feature_map", sorted(FEATURES))
def test_gradients_by_finite_differences(normal, feature_map):
    args = [t.requires_grad_() for t in operands(normal, batch=1, tokens=13, dim=4)]
    function = lambda *t: ops.sla_attention(*t, 0.5, 4, 3, feature_map, "none")  # noqa: E731
    assert torch.autograd.gradcheck(function, args)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 60),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    topk=st.floats(0.05, 1.0),
    feature_map=st.sampled_from(sorted(FEATURES)),
)
def test_gradients_are_those_of_dense_attention_under_the_mask(randn, tokens, blocks, topk, feature_map):
    make = randn(tokens)
    args = [t.requires_grad_() for t in operands(make, tokens=tokens)]
    grad = make(2, tokens, 2, 8, dtype=torch.float64)
    got = torch.autograd.grad(ops.sla_attention(*args, topk, *blocks, feature_map, "none"), args, grad)
    chosen = block_map(args[0].detach(), args[1].detach(), topk, *blocks)
    expected = torch.autograd.grad(dense(*args, chosen, *blocks, feature_map), args, grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradients_have_the_dtypes_of_their_operands_and_survive_chunks(normal, monkeypatch):
    args = operands(normal, tokens=40, dtype=torch.float32)
    args[:3] = [t.bfloat16() for t in args[:3]]
    grads = []
    for scores in (1 << 23, 1):
        monkeypatch.setattr(sla_attention, "SCORES", scores)
        leaves = [t.clone().requires_grad_() for t in args]
        ops.sla_attention(*leaves, 0.5, 16, 8, "softmax", "none").float().square().sum().backward()
        grads.append([t.grad for t in leaves])
        assert [g.dtype for g in grads[-1]] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2.0**-7, atol=1e-4)


def test_a_zero_projection_still_learns(normal):
    """The checkpoints' training starts from proj_l = 0: its weight must receive a gradient at the first step."""
    args = operands(normal)
    args[3], args[4] = torch.zeros_like(args[3], requires_grad=True), torch.zeros_like(args[4], requires_grad=True)
    ops.sla_attention(*args, 0.3, 8, 8, "softmax", "none").square().sum().backward()
    assert args[3].grad.abs().max() > 0
    assert args[4].grad.abs().max() > 0


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_the_quantized_attention_refuses_a_gradient(normal, pv):
    args = [t.requires_grad_() for t in operands(normal)]
    with pytest.raises(UnsupportedError, match=f'"{pv}" has no gradient'):
        ops.sla_attention(*args, 0.3, 8, 8, "softmax", pv).sum().backward()


# --- the quantized attention


@pytest.mark.parametrize(("pv", "most"), [("fp8", 0.04), ("fp16", 0.02)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("blocks", [(128, 64), (64, 64), (64, 128)])
def test_quantizing_the_sparse_branch_keeps_the_budget_of_sage(normal, pv, most, biased, blocks):
    """The linear branch and its projection are off: they are not quantized, and would only dilute the error."""
    q, k, v, weight, bias = operands(normal, batch=1, tokens=1000, heads=2, dim=128, dtype=torch.float32)
    k = k + 4 * normal(1, 1, 2, 128) if biased else k
    args = (q, k, v, weight * 0, bias * 0)
    expected = dense(*(t.double() for t in args), block_map(q, k, 0.3, *blocks), *blocks, "softmax")
    y = ops.sla_attention(*args, 0.3, *blocks, "softmax", pv)
    assert relative_l1(y, expected) <= most
    assert torch.cosine_similarity(y.double().flatten(), expected.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_all_blocks_and_no_projection_are_sage_attention(normal, pv):
    q, k, v, weight, bias = operands(normal, tokens=300, dim=64)
    y = ops.sla_attention(q, k, v, weight * 0, bias * 0, 1.0, 128, 64, "softmax", pv)
    error = (y - ops.sage_attention(q, k, v, 0.125, False, pv)).abs()
    assert (error < 1e-12).double().mean() > 0.97  # sums in another order turn what lies beside a tie
    assert error.max() < 2.0**-4 * v.abs().max()


@pytest.mark.parametrize("pv", ["none", "fp8", "fp16"])
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_zero_and_large_operands_give_no_nan(normal, which, value, pv):
    args = [t.bfloat16() for t in operands(normal, tokens=150, dim=64)]
    args[which][:, :70] = value
    for feature_map in FEATURES:
        assert ops.sla_attention(*args, 0.1, 64, 32, feature_map, pv).isfinite().all()


# --- registration


@pytest.mark.parametrize("pv", ["none", "fp8", "fp16"])
@pytest.mark.parametrize("feature_map", sorted(FEATURES))
def test_sound_and_equal_to_its_decomposition(normal, sound, decomposed, feature_map, pv):
    args = (*operands(normal, tokens=41, dtype=torch.float32), 0.4, 16, 8, feature_map, pv)
    sound(ops.sla_attention.default, *args)
    y, z = ops.sla_attention(*args), decomposed(ops.sla_attention.default, *args)
    assert ((y - z).abs() < 1e-5).double().mean() > 0.97
    assert (y - z).abs().max() < (1e-5 if pv == "none" else 2.0**-4 * args[2].abs().max())


def test_its_backward_is_sound_and_traced_with_gradients(normal, sound):
    args = operands(normal, tokens=21, dtype=torch.float32)
    options = (0.4, 16, 8, "softmax")
    sound(ops.sla_attention_backward.default, normal(2, 21, 2, 8), normal(2, 21, 2, 8), *args, *options)
    torch.library.opcheck(ops.sla_attention.default, (*[t.requires_grad_() for t in args], *options, "none"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"topk": 0.0}, "topk"), ({"topk": 1.1}, "topk"), ({"feature_map": "hedgehog"}, "hedgehog")]
    + [({"pv": "int8"}, "int8"), ({"k": torch.zeros(1, 9, 2, 8)}, "self-attention"), ({"block_q": 0}, "blocks of 0")]
    + [({"proj_weight": torch.zeros(8, 4)}, "projection")],
)
def test_what_does_not_fit_is_refused_by_reference_and_fake(change, words):
    args = {n: torch.zeros(1, 10, 2, 8) for n in "qkv"} | {
        "proj_weight": torch.zeros(8, 8),
        "proj_bias": torch.zeros(8),
        "topk": 0.5,
        "block_q": 4,
        "block_k": 4,
        "feature_map": "softmax",
        "pv": "none",
    }
    for device in ("cpu", "meta"):
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (args | change).items()}
        with pytest.raises(ValueError, match=words):
            ops.sla_attention(**moved)
