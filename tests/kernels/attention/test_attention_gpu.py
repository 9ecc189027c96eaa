"""The attention kernels on a GPU, against the references in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from turbocompile.kernels import ops
from turbocompile.kernels.attention import sage_attention as sage
from turbocompile.kernels.attention import sla_attention as sla

from turbocompile.errors import UnsupportedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WAN_MINI = Path(__file__).parents[3] / "examples" / "wan-mini"
BF16, FP16 = torch.bfloat16, torch.float16
PORTABLE = pytest.param("portable", id="portable")
DEFAULT = pytest.param(None, id="default")


@pytest.fixture
def make():
    """make(*shape, dtype=bfloat16): N(0, 1) on the GPU, another tensor at each call."""
    generator = torch.Generator("cuda").manual_seed(0)
    return lambda *shape, dtype=BF16: torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def fused(make, batch, tokens, heads, dim, dtype=BF16):
    """q, k, v as slices of one tensor, as a fused projection leaves them."""
    return make(batch, tokens, 3, heads, dim, dtype=dtype).unbind(2)


def truth(q, k, v, scale, is_causal=False):
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], device=q.device, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def relative_l1(got, expected):
    return ((got.double() - expected).abs().sum() / expected.abs().sum()).item()


def relative_l2(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def cosine(got, expected):
    return torch.cosine_similarity(got.double().flatten(), expected.flatten(), dim=0).item()


def config(path, pv, block_q, block_k):
    from turbocompile.kernels.attention.attend_triton import PORTABLE_CONFIGS, default_config

    if path is None:
        return default_config(torch.device("cuda", 0), pv, block_k, block_q)
    return PORTABLE_CONFIGS[2 if block_q == 128 else 0]


def compiled():
    """How many kernels were compiled so far."""
    from turbocompile.kernels.attention import attend_triton, prepare_triton, sla_train_triton, sla_triton

    modules = [prepare_triton, attend_triton, sla_triton, sla_train_triton]
    modules += [attend_triton.attend_gluon] if attend_triton.attend_gluon else []
    kernels = {id(f): f for m in modules for f in vars(m).values() if hasattr(f, "device_caches")}
    assert len(kernels) > 10
    return sum(len(f.device_caches[0][0]) for f in kernels.values())


# --- Sage


@pytest.mark.parametrize(
    ("shape", "pv", "is_causal", "dtype", "path", "factor"),
    [
        ((1, 2000, 2000, 4, 4, 128), "fp8", False, BF16, None, 1.0),
        ((1, 1999, 1999, 4, 4, 128), "fp8", True, BF16, None, 1e-3),
        ((2, 1000, 777, 4, 2, 128), "fp8", False, BF16, None, 1e-3),
        ((1, 1000, 1300, 3, 3, 64), "fp8", False, FP16, None, 1.0),
        ((2, 500, 1300, 2, 1, 96), "fp8", True, BF16, None, 1.0),
        ((1, 300, 20, 2, 2, 40), "fp8", False, BF16, None, 1.0),
        ((4, 1, 1000, 8, 8, 128), "fp8", False, BF16, None, 1.0),
        ((1, 1999, 1999, 2, 2, 128), "fp8", False, BF16, "portable", 1.0),
        ((1, 1000, 777, 4, 2, 64), "fp16", True, BF16, "portable", 1.0),
        ((2, 999, 1300, 2, 2, 96), "fp16", False, FP16, "portable", 1e-3),
    ],
)
@pytest.mark.parametrize("bias", [0.0, 4.0])
def test_sage_is_as_near_the_truth_as_its_reference(make, unit, shape, pv, is_causal, dtype, path, factor, bias):
    batch, tokens, keys, heads, kv_heads, dim = shape
    q = fused(make, batch, tokens, heads, dim, dtype)[0] * factor
    _, k, v = fused(make, batch, keys, kv_heads, dim, dtype)
    k = k + bias * make(1, 1, kv_heads, dim, dtype=dtype)
    args = (q, k, v, dim**-0.5, is_causal, pv)
    if path is None:
        y = ops.sage_attention(*args)
    else:
        from turbocompile.kernels.attention.attend_triton import sage_forward

        y = sage_forward(*args, config=config(path, pv, 64, 128))
    assert (y.shape, y.dtype, y.is_contiguous()) == (q.shape, dtype, True)
    expected = truth(q, k, v, dim**-0.5, is_causal)
    least, most = (0.999, 0.04) if pv == "fp8" else (0.9998, 0.02)
    assert cosine(y, expected) >= least
    assert relative_l1(y, expected) <= most
    # The same formula with blocks of other sizes: amax of twice the rows is at most a few per cent larger, and so is
    # the error; the reference's own rounding of the result is in both.
    assert relative_l1(y, expected) <= 1.15 * relative_l1(sage.reference(*args), expected) + unit[dtype]


@pytest.mark.parametrize(("pv", "path"), [("fp8", None), ("fp8", "portable"), ("fp16", "portable")])
def test_long_sums_lose_nothing(make, pv, path):
    """Values with a mean add up over all keys: an accumulator that cuts bits off comes out short, by 30% here."""
    from turbocompile.kernels.attention.attend_triton import sage_forward

    q, k, v = make(1, 256, 1, 128), make(1, 32760, 1, 128), make(1, 32760, 1, 128) + 1
    y = sage_forward(q, k, v, 128**-0.5, False, pv, config(path, pv, 64, 128)).double()
    expected = truth(q, k, v, 128**-0.5)
    # 13 bits cut 4 times in 128 keys: 4 * 2^-13; e4m3 rounds without a bias; the result is about 1 in bf16
    assert abs((y * expected).sum() / expected.square().sum() - 1) < 2.0**-8


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_outlier_channels_of_k_cost_no_more_than_in_the_reference(make, unit, pv):
    q, k, v = fused(make, 1, 2000, 4, 128)
    k = k * torch.where(torch.arange(128, device="cuda") % 20 == 0, 8.0, 1.0).to(BF16)
    args = (q * 0.5, k, v, 128**-0.5, False, pv)
    expected = truth(*args[:4])
    error = relative_l1(ops.sage_attention(*args), expected)
    assert error <= 1.15 * relative_l1(sage.reference(*args), expected) + unit[BF16]


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sage_is_finite_on_zeros_and_large_values(make, pv, dtype):
    for factors in ((1e4, 1e4, 1e4), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        q, k, v = (t * f for t, f in zip(fused(make, 1, 700, 2, 128, dtype), factors, strict=True))
        q[:, :200], k[:, :300], v[:, :100], v[..., 3] = 0, 0, 0, 0
        y = ops.sage_attention(q, k, v, 128**-0.5, False, pv)
        assert y.isfinite().all()
        assert (y[..., 3] == 0).all()


@pytest.mark.parametrize("factor", [3.0, 30.0, 1e3])
def test_scores_of_any_size_find_the_largest(make, factor):
    """Blocks of keys of very different sizes: what is in a block's scale must not reach the others' weights."""
    q, k, v = (make(1, 1500, 2, 128) for _ in "qkv")
    k[:, 500:900] *= 0.05  # whole blocks, whose integers are far apart from the others'
    q, k = q * factor, k * factor
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).transpose(-1, -2) * 128**-0.5
    top = scores.topk(2).values
    # INT8 of q and k is off by 2^-8 of their largest (4.5 sigma, say) at most, uniformly: 6 sigma of a score's error
    error = 6 * 2 * (2**-8 * 4.5 / 3**0.5) * factor**2
    clear = top[..., 0] - top[..., 1] > error + 30  # the largest alone has a weight, whatever INT8 makes of it
    assert factor < 30 or clear.float().mean() > 0.1
    y = ops.sage_attention(q, k, v, 128**-0.5, False, "fp8").transpose(1, 2)
    chosen = v.transpose(1, 2).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 128))
    unit = 2.0**-3 * v.float().abs().amax(1)[:, :, None]  # e4m3's rounding of v and of its weight, 2^-4 each
    assert ((y.float() - chosen.float()).abs() <= unit)[clear].all()


def test_operands_of_any_strides(make):
    q, k, v = fused(make, 2, 500, 2, 64)
    y = ops.sage_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.125, False, "fp8")
    assert torch.equal(ops.sage_attention(q, k, v, 0.125, False, "fp8"), y)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(ops.sage_attention(*heads_first, 0.125, False, "fp8"), y)
    channels_apart = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert torch.equal(ops.sage_attention(*channels_apart, 0.125, False, "fp8"), y)


def test_what_the_kernels_do_not_take_goes_to_the_reference(make):
    for dim, dtype, scale in ((160, BF16, 0.1), (64, torch.float32, 0.1), (64, torch.float64, 0.1), (64, BF16, -0.1)):
        q, k, v = (make(1, 100, 2, dim, dtype=dtype) for _ in "qkv")
        y = ops.sage_attention(q, k, v, scale, False, "fp8")
        assert torch.equal(y, sage.reference(q, k, v, scale, False, "fp8"))
    q, k, v, weight, bias = (*fused(make, 1, 100, 2, 64), make(64, 64), make(64))
    y = ops.sla_attention(q, k, v, weight, bias, 0.5, 32, 16, "softmax", "fp8")
    assert torch.equal(y, sla.reference(q, k, v, weight, bias, 0.5, 32, 16, "softmax", "fp8"))


# --- SLA, quantized


def sla_operands(make, batch, tokens, heads, dim, dtype=BF16, linear=True):
    weight, bias = make(dim, dim, dtype=dtype) * 0.2, make(dim, dtype=dtype)
    return [*fused(make, batch, tokens, heads, dim, dtype), weight * linear, bias * linear]


def as_map(lut, like, block_k):
    """lists (B H, M, count) as a map (B, H, M, N), after a look at them."""
    batch, tokens, heads, _ = like.shape
    blocks = -(-tokens // block_k)
    assert (lut[..., 1:] > lut[..., :-1]).all()
    assert lut.min() >= 0
    assert lut.max() < blocks
    chosen = torch.zeros(*lut.shape[:2], blocks, dtype=torch.bool, device=lut.device).scatter_(2, lut.long(), True)
    return chosen.unflatten(0, (batch, heads))


@pytest.mark.parametrize(
    ("shape", "blocks", "pv", "dtype", "path", "topk"),
    [
        ((1, 4000, 2, 128), (64, 128), "fp8", BF16, None, 0.2),
        ((1, 4000, 2, 128), (128, 64), "fp8", BF16, None, 0.2),
        ((1, 3999, 2, 128), (64, 64), "fp8", FP16, None, 0.1),
        ((2, 2000, 2, 128), (128, 128), "fp8", BF16, None, 0.2),
        ((1, 50, 2, 128), (64, 128), "fp8", BF16, None, 0.5),
        ((2, 130, 1, 128), (128, 64), "fp8", BF16, None, 0.5),
        ((1, 1000, 2, 64), (128, 64), "fp8", BF16, None, 1.0),
        ((1, 1000, 2, 96), (64, 128), "fp8", FP16, None, 0.3),
        ((1, 2000, 2, 128), (64, 128), "fp8", BF16, "portable", 0.2),
        ((1, 2000, 2, 128), (128, 64), "fp16", BF16, "portable", 0.2),
        ((2, 1000, 2, 64), (64, 64), "fp16", FP16, "portable", 0.2),
    ],
)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_sla_is_as_near_the_truth_as_its_reference(make, unit, shape, blocks, pv, dtype, path, topk, linear, factor):
    from turbocompile.kernels.attention.sla_triton import sla_forward

    args = sla_operands(make, *shape, dtype, linear)
    args[0] = args[0] * factor
    feature_map = {128: "softmax", 64: "elu", 96: "relu"}[shape[3]] if linear else "softmax"
    count = sla.kept_blocks(topk, -(-shape[1] // blocks[1]))
    y, lut = sla_forward(*args, count, *blocks, feature_map, pv, config(path, pv, *blocks))
    if path is None:
        assert torch.equal(y, ops.sla_attention(*args, topk, *blocks, feature_map, pv))
    chosen = as_map(lut, args[0], blocks[1])
    assert (chosen.sum(-1) == count).all()
    options = (topk, *blocks, feature_map)
    expected = sla.reference(*(t.double() for t in args), *options, "none", chosen=chosen)
    quantized = sla.reference(*args, *options, pv, chosen=chosen)
    assert cosine(y, expected) >= 0.999
    assert relative_l1(y, expected) <= 0.04
    # As for Sage; the linear branch's 16-bit factors add one rounding each, its state and phi(q), to the result's own.
    assert relative_l1(y, expected) <= 1.15 * relative_l1(quantized, expected) + 2 * unit[dtype]


def test_the_map_is_the_references_but_for_the_rounding_of_means(make):
    q, k = fused(make, 2, 4000, 2, 128)[:2]
    k = k + 5 * make(1, 1, 2, 128)
    from turbocompile.kernels.attention.prepare_triton import prepare
    from turbocompile.kernels.attention.sla_triton import select_blocks

    for block_q, block_k in ((64, 128), (128, 64)):
        kv = prepare(k, k, block_k, pv="fp8", pool=True)
        count = sla.kept_blocks(0.2, -(-4000 // block_k))
        chosen = as_map(select_blocks(q, kv.pooled, count, block_q), q, block_k)
        smooth = k.double() - k.double().mean(1, keepdim=True)
        queries, keys = sla._block_means(q.double(), block_q), sla._block_means(smooth, block_k)
        scores = queries @ keys.transpose(-1, -2)
        assert (chosen == sla.block_map(q.double(), smooth, 0.2, block_q, block_k)).double().mean() > 0.99
        # Two means rounded to bf16, 2^-8 of each product's terms on either side of the boundary.
        slack = 4 * 2.0**-8 * (queries.abs() @ keys.abs().transpose(-1, -2)).amax(-1)
        worst = torch.where(chosen, scores, math.inf).amin(-1)
        best = torch.where(chosen, -math.inf, scores).amax(-1)
        assert (worst >= best - slack).all()


@pytest.mark.parametrize("pv", ["fp8", "fp16", "none"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_sla_is_finite_on_zeros_and_large_values(make, pv, feature_map):
    for dtype in (BF16, FP16):
        for factors in ((1e4, 1e4, 1e4), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
            q, k, v, *proj = sla_operands(make, 1, 700, 2, 128, dtype)
            q, k, v = (t * f for t, f in zip((q, k, v), factors, strict=True))
            q[:, :200], k[:, :300], v[:, :100], v[..., 3] = 0, 0, 0, 0
            assert ops.sla_attention(q, k, v, *proj, 0.3, 64, 64, feature_map, pv).isfinite().all()
            if pv == "none" and dtype == BF16:  # in float16 the gradients themselves are out of range
                leaves = [t.detach().requires_grad_() for t in (q, k, v, *proj)]
                y = ops.sla_attention(*leaves, 0.3, 64, 64, feature_map, pv)
                assert all(g.isfinite().all() for g in torch.autograd.grad(y, leaves, make(*y.shape)))


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_sums_over_many_tokens_fit_float16(make, feature_map):
    """phi(k)^T v would be 2e5 here."""
    q, k, v, weight, bias = sla_operands(make, 1, 20000, 1, 64, FP16)
    v = v + 10
    expected = sla._linear(
        *(t[0].double().transpose(0, 1) for t in (q, k, v)), weight.double(), bias.double(), feature_map
    )
    for pv in ("fp8", "none"):
        y = ops.sla_attention(q, k, v, weight, bias, 1e-3, 64, 128, feature_map, pv)
        rest = ops.sla_attention(q, k, v, weight * 0, bias * 0, 1e-3, 64, 128, feature_map, pv)
        got = (y.double() - rest.double())[0].transpose(0, 1)
        # two results of about 20 rounded to float16, and two operands: a few of 2^-11 of that
        assert relative_l2(got, expected) < 2.0**-8


# --- on what a trained model gives them


@pytest.fixture(scope="module")
def recorded():
    """q, k, v of all attentions of wan-mini at three times of two videos, in bf16."""
    from turbocompile.wan_mini import world
    from turbocompile.wan_mini.activations import record_pipeline

    return record_pipeline(WAN_MINI, world.evaluation_set(2), device="cuda", dtype=BF16)


# Bounds: of each attention what is asked of N(0, 1); of their mean what SageAttention's authors publish for the layers
# of video models (tests/digits/test_activations.py).
@pytest.mark.parametrize(
    ("pv", "is_self", "mean"),
    [
        ("fp8", True, (0.9997, 0.0186)),
        ("fp8", False, (0.9994, 0.0345)),
        ("fp16", True, (0.9998, 0.0156)),
        ("fp16", False, (0.9998, 0.0156)),
    ],
)
def test_sage_on_a_trained_model_is_as_near_as_its_reference_and_as_published(recorded, unit, pv, is_self, mean):
    found = []
    for a in (a for a in recorded if a.is_self == is_self):
        args = (a.q, a.k, a.v, 64**-0.5, False, pv)
        y, expected = ops.sage_attention(*args), truth(*args[:4])
        found.append((cosine(y, expected), relative_l1(y, expected)))
        assert found[-1][1] <= 1.15 * relative_l1(sage.reference(*args), expected) + unit[BF16], a.module
    cosines, distances = zip(*found, strict=True)
    least, most = (0.999, 0.04) if pv == "fp8" else (0.9998, 0.02)
    assert min(cosines) >= least
    assert max(distances) <= most
    assert sum(cosines) / len(found) >= mean[0]
    assert sum(distances) / len(found) <= mean[1]


@pytest.mark.parametrize("blocks", [(128, 64), (64, 64), (64, 128)])
def test_sla_on_a_trained_model_is_as_near_as_its_reference(recorded, unit, blocks):
    """Without its linear branch, which is not quantized."""
    from turbocompile.kernels.attention.sla_triton import sla_forward

    distances = []
    for a in (a for a in recorded if a.is_self):
        zero = a.q.new_zeros(64, 64)
        args = (a.q, a.k, a.v, zero, zero[0])
        count = sla.kept_blocks(0.1, -(-a.q.shape[1] // blocks[1]))
        y, lut = sla_forward(*args, count, *blocks, "softmax", "fp8")
        chosen = as_map(lut, a.q, blocks[1])
        expected = sla.reference(*(t.double() for t in args), 0.1, *blocks, "softmax", "none", chosen=chosen)
        quantized = sla.reference(*args, 0.1, *blocks, "softmax", "fp8", chosen=chosen)
        distances.append(relative_l1(y, expected))
        assert cosine(y, expected) >= 0.999
        assert distances[-1] <= 0.04
        assert distances[-1] <= 1.15 * relative_l1(quantized, expected) + 2 * unit[BF16], a.module
    assert sum(distances) / len(distances) <= 0.0186


# --- SLA, trained


@pytest.mark.parametrize(
    ("shape", "blocks", "feature_map", "dtype"),
    [
        ((1, 1000, 2, 128), (64, 64), "softmax", BF16),
        ((2, 999, 2, 128), (128, 64), "elu", BF16),
        ((1, 1000, 2, 128), (64, 128), "softmax", BF16),
        ((1, 700, 2, 64), (64, 64), "relu", FP16),
        ((2, 130, 1, 96), (64, 64), "elu", FP16),
        ((1, 40, 2, 64), (64, 128), "softmax", BF16),
    ],
)
def test_gradients_are_the_references(make, shape, blocks, feature_map, dtype):
    from turbocompile.kernels.attention.sla_train_triton import Blocks, sla_train_backward, sla_train_forward

    args = sla_operands(make, *shape, dtype)
    args[1] = args[1] + 3  # what would leak into dq if rows of dS did not sum to zero
    grad = make(*shape, dtype=dtype)
    count = sla.kept_blocks(0.2, -(-shape[1] // blocks[1]))
    how = Blocks(count, *blocks, feature_map)
    out, lut = sla_train_forward(*args, how)
    chosen = as_map(lut, args[0], blocks[1])
    exact = [t.double() for t in args]
    step = 2.0**-8 if dtype == BF16 else 2.0**-11
    expected = sla.reference(*exact, 0.2, *blocks, feature_map, "none", chosen=chosen)
    # Each operand of a product and the result is rounded once: random errors of at most step, some 0.3 step in the
    # norm; the chain to dq, dk has four of them and one cancellation, dP - delta, which doubles what stands before it.
    assert relative_l2(out, expected) <= step
    expected = sla.reference_backward(grad.double(), out.double(), *exact, 0.2, *blocks, feature_map, chosen=chosen)
    got = sla_train_backward(grad, out, *args, how)
    for one, other in zip(got, expected, strict=True):
        assert relative_l2(one, other) <= 2 * step
    leaves = [t.detach().requires_grad_() for t in args]
    y = ops.sla_attention(*leaves, 0.2, *blocks, feature_map, "none")
    assert torch.equal(y, out)
    for one, other in zip(torch.autograd.grad(y, leaves, grad), got, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


def test_gradients_with_a_float32_projection_and_an_expanded_gradient(make):
    args = sla_operands(make, 1, 300, 2, 64)
    leaves = [t.detach().to(d).requires_grad_() for t, d in zip(args, [BF16] * 3 + [torch.float32] * 2, strict=True)]
    ops.sla_attention(*leaves, 0.5, 64, 64, "softmax", "none").sum().backward()
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
    # db sums 600 ones a channel
    assert torch.equal(leaves[4].grad, torch.full_like(leaves[4], 600.0))


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_the_quantized_kernels_refuse_a_gradient(make, pv):
    leaves = [t.detach().requires_grad_() for t in sla_operands(make, 1, 200, 2, 64)]
    with pytest.raises(UnsupportedError, match="has no gradient"):
        ops.sla_attention(*leaves, 0.5, 64, 64, "softmax", pv).sum().backward()
    with pytest.raises(UnsupportedError, match="has no gradient"):
        ops.sage_attention(*leaves[:3], 0.1, False, pv).sum().backward()


# --- both, as a program runs them


def calls(make):
    """Each op as a function of q, k and v."""
    weight, bias = make(128, 128) * 0.2, make(128)
    return {
        "sage": lambda q, k, v: ops.sage_attention(q, k, v, 0.1, False, "fp8"),
        "sage_fp16": lambda q, k, v: ops.sage_attention(q, k, v, 0.1, False, "fp16"),
        "sla": lambda q, k, v: ops.sla_attention(q, k, v, weight, bias, 0.2, 64, 128, "softmax", "fp8"),
        "sla_default": lambda q, k, v: ops.sla_attention(q, k, v, weight, bias, 0.2, 128, 64, "softmax", "fp8"),
        "sla_none": lambda q, k, v: ops.sla_attention(q, k, v, weight, bias, 0.2, 64, 64, "softmax", "none"),
    }


def test_repeated_calls_are_equal_bit_by_bit(make):
    operands = fused(make, 1, 3000, 4, 128)
    for name, call in calls(make).items():
        first = call(*operands)
        for _ in range(5):
            torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # what freed memory holds must not matter
            assert torch.equal(call(*operands), first), name


def test_repeated_gradients_are_equal_bit_by_bit(make):
    leaves = [t.detach().requires_grad_() for t in sla_operands(make, 1, 1500, 2, 128)]
    y = ops.sla_attention(*leaves, 0.2, 64, 64, "softmax", "none")
    grad = make(*y.shape)
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for _ in range(3):
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, grad, retain_graph=True), first))


def test_a_captured_graph_replays_on_new_operands(make):
    for name, call in calls(make).items():
        operands = [t.contiguous() for t in fused(make, 1, 1000, 2, 128)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(*operands)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(*operands)
        for old, new in zip(operands, fused(make, 1, 1000, 2, 128), strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, call(*operands)), name


def test_torch_compile_takes_them_whole(make):
    operands = fused(make, 1, 500, 2, 128)
    for name, call in calls(make).items():
        whole = torch.compile(lambda q, k, v, call=call: call(q * 2, k, v) + 1, fullgraph=True)
        assert relative_l2(whole(*operands), call(operands[0] * 2, *operands[1:]) + 1) == 0, name
    leaves = [t.detach().requires_grad_() for t in sla_operands(make, 1, 300, 2, 64)]
    function = lambda *t: ops.sla_attention(*t, 0.5, 64, 64, "softmax", "none").square().sum()  # noqa: E731
    function(*leaves).backward()
    expected = [t.grad.clone() for t in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.compile(function, fullgraph=True)(*leaves).backward()
    # the incoming gradient 2 y may be rounded once more or less
    assert all(relative_l2(t.grad, e) < 2.0**-7 for t, e in zip(leaves, expected, strict=True))


def test_a_new_length_compiles_nothing(make):
    def run(tokens):
        for call in calls(make).values():
            call(*fused(make, 1, tokens, 2, 128))
        leaves = [t.detach().requires_grad_() for t in sla_operands(make, 1, tokens, 2, 128)]
        ops.sla_attention(*leaves, 0.2, 64, 64, "softmax", "none").sum().backward()

    run(2000)
    before = compiled()
    for tokens in (1777, 2100, 1001, 3001):
        run(tokens)
    assert compiled() == before


def test_every_path_for_the_sanitizer(make):
    """Small, so that compute-sanitizer gets through it: `-k sanitizer`."""
    q, k, v, weight, bias = sla_operands(make, 1, 300, 2, 128)
    results = [call(q, k, v) for call in calls(make).values()]
    results.append(ops.sage_attention(q, k, v, 0.1, True, "fp8"))
    leaves = [t.detach().requires_grad_() for t in (q, k, v, weight, bias)]
    y = ops.sla_attention(*leaves, 0.5, 64, 64, "softmax", "none")
    results += torch.autograd.grad(y, leaves, make(*y.shape))
    assert all(r.isfinite().all() for r in results)
