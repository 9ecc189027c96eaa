"""An attention that makes its k is the two ops, one after the other, to the bit; where its kernel serves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turbocompile.kernels import _registry, ops
from turbocompile.kernels.attention import norm_attention, sage_attention

from turbocompile.errors import UnsupportedError

EPS = 1e-6
NAMES = ("q", "x", "v", "weight", "eps", "cos", "sin", "grid")
SAGE = (*NAMES, "scale", "is_causal", "pv")
SLA = (*NAMES, "proj_weight", "proj_bias", "topk", "block_q", "block_k", "feature_map", "pv")


def keys(make, batch=1, grid=(2, 3, 2), heads=2, dim=12, dtype=torch.float32, weighted=True):
    """x and v, and what k is made with: (x, v, [weight, eps, cos, sin, grid])."""
    tokens = torch.Size(grid).numel()
    x, v = make(batch, tokens, heads * dim, dtype=dtype), make(batch, tokens, heads, dim, dtype=dtype)
    widths = [dim // 2 - (len(grid) - 1) * (dim // 6), *[dim // 6] * (len(grid) - 1)]
    angles = [make(n, d) for n, d in zip(grid, widths, strict=True)]
    tables = [a.cos() for a in angles], [a.sin() for a in angles]
    return x, v, [make(heads * dim, dtype=dtype) + 1 if weighted else None, EPS, *tables, list(grid)]


def projection(make, dim, dtype=torch.float32):
    return make(dim, dim, dtype=dtype), make(dim, dtype=dtype)


def made(x, v, weight, eps, cos, sin, grid):
    return ops.qk_norm_rope(x, weight, eps, False, v.shape[2], cos, sin, grid, True)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pv=st.sampled_from(["fp8", "fp16"]),
)
def test_sage_is_the_two_ops_to_the_bit(randn, same, batch, grid, heads, group, flags, dtype, pv):
    weighted, is_causal = flags
    make = randn(batch + 10 * len(grid))
    x, v, rest = keys(make, batch, grid, heads, dtype=dtype, weighted=weighted)
    q = make(batch, v.shape[1] if is_causal else 5, heads * group, 12, dtype=dtype)
    y = ops.norm_sage_attention(q, x, v, *rest, 0.3, is_causal, pv)
    assert y.is_contiguous()
    same(y, ops.sage_attention(q, made(x, v, *rest), v, 0.3, is_causal, pv))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    feature_map=st.sampled_from(["softmax", "elu", "relu"]),
    pv=st.sampled_from(["fp8", "fp16"]),
)
def test_sla_is_the_two_ops_to_the_bit(randn, same, batch, grid, blocks, weighted, dtype, feature_map, pv):
    make = randn(batch + 10 * len(grid))
    x, v, rest = keys(make, batch, grid, dtype=dtype, weighted=weighted)
    options = (*projection(make, 12, dtype), 0.4, *blocks, feature_map, pv)
    q = make(*v.shape, dtype=dtype)
    y = ops.norm_sla_attention(q, x, v, *rest, *options)
    assert y.is_contiguous()
    same(y, ops.sla_attention(q, made(x, v, *rest), v, *options))


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_sound_and_equal_to_their_decompositions(normal, sound, decomposed, pv):
    x, v, rest = keys(normal, batch=2)
    q, wide = normal(*v.shape), normal(2, 7, 4, 12)
    for op, args in (
        (ops.norm_sage_attention.default, (wide, x, v, *rest, 0.3, False, pv)),
        (ops.norm_sla_attention.default, (q, x, v, *rest, *projection(normal, 12), 0.4, 4, 3, "softmax", pv)),
    ):
        sound(op, *args)
        y, z = op(*args), decomposed(op, *args)
        assert ((y - z).abs() < 1e-5).double().mean() > 0.97  # what float32 puts beside a tie may turn
        assert (y - z).abs().max() < 2.0**-4 * v.abs().max()


def test_a_gradient_is_refused_in_one_sentence(normal):
    x, v, rest = keys(normal)
    q = normal(*v.shape).requires_grad_()
    with pytest.raises(UnsupportedError, match="norm_sage_attention has no gradient"):
        ops.norm_sage_attention(q, x, v, *rest, 0.3, False, "fp8").sum().backward()
    with pytest.raises(UnsupportedError, match="norm_sla_attention has no gradient"):
        ops.norm_sla_attention(q, x, v, *rest, *projection(normal, 12), 0.4, 4, 3, "elu", "fp8").sum().backward()


BOTH = [
    ({"x": torch.zeros(1, 12, 25)}, "does not hold the heads of v"),
    ({"x": torch.zeros(1, 11, 24)}, "does not hold the heads of v"),
    ({"x": torch.zeros(12, 24)}, "does not hold the heads of v"),
    ({"v": torch.zeros(1, 12, 24)}, "v is (B, L, H, D), and has 3 dimensions"),
    ({"weight": torch.zeros(12)}, "vector over the 24 channels"),
    ({"cos": [], "sin": [], "grid": []}, "no tables to rotate k by"),
    ({"grid": [12]}, "3 cos and 3 sin tables for 1 axes"),
    ({"sin": [torch.zeros(2, 2)] * 3}, "axis 1 of 3 has tables"),
    ({"pv": "fp4"}, "pv is 'fp4'"),
]


@pytest.mark.parametrize(
    ("change", "words"),
    [*BOTH, ({"q": torch.zeros(1, 5, 3, 12)}, "does not fit"), ({"q": torch.zeros(2, 5, 4, 12)}, "does not fit")],
)
def test_sage_refuses_what_does_not_fit(normal, change, words):
    x, v, rest = keys(normal)
    refused(
        ops.norm_sage_attention,
        dict(zip(SAGE, (normal(1, 5, 4, 12), x, v, *rest, 0.3, False, "fp8"), strict=True)),
        change,
        words,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [*BOTH, ({"pv": "none"}, "norm_sla_attention: pv is 'none'"), ({"q": torch.zeros(1, 5, 2, 12)}, "differ in shape")]
    + [({"topk": 0.0}, "topk"), ({"block_k": 0}, "blocks of 4 and 0"), ({"feature_map": "hedgehog"}, "hedgehog")]
    + [({"proj_bias": torch.zeros(11)}, "projection")],
)
def test_sla_refuses_what_does_not_fit(normal, change, words):
    x, v, rest = keys(normal)
    args = (normal(*v.shape), x, v, *rest, *projection(normal, 12), 0.4, 4, 3, "softmax", "fp8")
    refused(ops.norm_sla_attention, dict(zip(SLA, args, strict=True)), change, words)


def refused(op, args, change, words):
    """One sentence, by the reference and by the fake."""
    for device in ("cpu", "meta"):
        moved = {k: place(v, device) for k, v in (args | change).items()}
        with pytest.raises(ValueError) as error:
            op(**moved)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def place(value, device):
    if isinstance(value, list):
        return [place(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


# --- where the kernel serves


@pytest.fixture
def card(monkeypatch):
    """As where Triton runs on a card of compute capability 8.0."""
    for module in (_registry, sage_attention):
        monkeypatch.setattr(module, "runs_triton", lambda device, capability=(8, 0): capability <= (8, 0))


def operands(grid=(8, 64, 16), columns=(22, 21, 21), heads=2, groups=2, dim=128, dtype=torch.bfloat16, device="meta"):
    """Arguments, without values, that the kernel takes."""
    tokens = torch.Size(grid).numel()
    empty = lambda *shape: torch.empty(*shape, dtype=dtype, device=device)  # noqa: E731
    tables = [torch.empty(n, c, device=device) for n, c in zip(grid, columns, strict=True)]
    q, v = empty(1, tokens, heads, dim), empty(1, tokens, groups, dim)
    weight = torch.empty(groups * dim, device=device)
    keys = (q, empty(1, tokens, groups * dim), v, weight, EPS, tables, tables, list(grid))
    sage = dict(zip(SAGE, (*keys, dim**-0.5, False, "fp8"), strict=True))
    options = (empty(dim, dim), empty(dim), 0.1, 64, 128, "softmax", "fp8")
    return sage, dict(zip(SLA, (*keys, *options), strict=True))


def taken(sage, sla):
    return norm_attention.takes_sage(**sage), norm_attention.takes_sla(**sla)


SQUARE = {"columns": (32, 32)}
SHAPES = {
    "as it is": ({}, True),
    "fp16": ({"dtype": torch.float16}, True),
    "64 channels": ({"dim": 64, "columns": (12, 10, 10)}, True),
    "float32": ({"dtype": torch.float32}, False),
    "96 channels": ({"dim": 96, "columns": (16, 16, 16)}, False),
    "32 channels": ({"dim": 32, "columns": (6, 5, 5)}, False),
    "as many tokens as pay": ({"grid": (1, 64, 64)}, True),
    "fewer tokens": ({"grid": (1, 63, 65)}, False),
    "the widest row": ({"heads": 256, "groups": 256}, True),
    "a wider one": ({"heads": 257, "groups": 257}, False),
    "one axis": ({"grid": (65536,), "columns": (64,)}, True),
    "one that is too long": ({"grid": (65537,), "columns": (64,)}, False),
    "two axes": ({"grid": (256, 256), "columns": (32, 32)}, True),
    "two whose powers of two are too many": ({"grid": (129, 257), "columns": (32, 32)}, False),
    "three, of which two and two are few": ({"grid": (21, 45, 80)}, True),
    "three, of which the last two are too many": ({"grid": (1, 600, 65)}, False),
    "three, of which the first two are too many": ({"grid": (65, 600, 1)}, False),
    "four axes": ({"grid": (8, 8, 8, 8), "columns": (16, 16, 16, 16)}, False),
    "an axis of two columns between two others": ({"columns": (31, 2, 31)}, False),
    "one of three": ({"columns": (31, 3, 30)}, True),
    "a last axis of one": ({"columns": (32, 31, 1)}, True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_the_kernel_takes(card, name):
    change, expected = SHAPES[name]
    assert taken(*operands(**change)) == (expected, expected)


def test_tokens_are_fewer_than_a_float_counts(card):
    assert taken(*operands(grid=(63, 256, 256))) == (True, True)
    assert taken(*operands(grid=(64, 256, 256))) == (False, False)  # 2^22


def other(value):
    return torch.empty_like(value, device="cpu")


@pytest.mark.parametrize(
    ("change", "expected"),
    [({name: other}, False) for name in ("q", "x", "v", "weight")]
    + [({name: lambda t: t.half()}, False) for name in ("q", "x", "v")]
    + [({name: lambda t: [*t[:2], other(t[2])]}, False) for name in ("cos", "sin")]
    + [({"weight": lambda t: None}, True)],
)
def test_operands_that_the_kernels_take(card, change, expected):
    sage, sla = operands()
    for args in (sage, sla):
        args |= {name: alter(args[name]) for name, alter in change.items()}
    assert taken(sage, sla) == (expected, expected)


def test_options_that_each_kernel_takes(card):
    sage, sla = operands()
    for change, expected in (
        ({"scale": 0.0}, True),
        ({"scale": -1.0}, False),
        ({"is_causal": True}, True),
        ({"pv": "fp16"}, True),
    ):
        assert norm_attention.takes_sage(**sage | change) == expected
    for change, expected in (
        ({"block_q": 128, "block_k": 128}, True),
        ({"block_q": 32}, False),
        ({"block_k": 256}, False),
        ({"pv": "fp16"}, True),
        ({"proj_weight": other(sla["proj_weight"])}, False),
        ({"proj_bias": other(sla["proj_bias"])}, False),
    ):
        assert norm_attention.takes_sla(**sla | change) == expected
    assert norm_attention.takes_sage(**operands(heads=8, groups=2)[0])  # a head of k for four of q


def test_a_cpu_runs_the_references():
    assert taken(*operands(device="cpu")) == (False, False)
