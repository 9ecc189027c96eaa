"""A residual and the norm behind it become one op; a sum that is no residual stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo

B, L, C = 2, 32, 32  # as many tokens as channels: a wrong axis then has the right shape


def tensors():
    """x, y, gate, scale, shift."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g) for s in [(B, L, C)] * 2 + [(B, 1, C)] * 3)


def ln(x, *affine):
    return F.layer_norm(x, (C,), *affine, eps=1e-6)


def rms(x, *weight):
    return F.rms_norm(x, (C,), *weight, eps=1e-6)


def both(r, n):
    return r, n


FORMS = {
    "gate and affine norm": lambda x, y, g, s, b, m: both(r := x + g * y, ln(r, m.a, m.b)),
    "gate last": lambda x, y, g, s, b, m: both(r := y * g + x, ln(r, m.a, m.b)),
    "addcmul": lambda x, y, g, s, b, m: both(r := torch.addcmul(x, g, y), ln(r)),
    "gate subtracted": lambda x, y, g, s, b, m: both(r := x - g * y, ln(r, m.a, m.b)),
    "gate and modulated norm": lambda x, y, g, s, b, m: both(r := x + g * y, ln(r) * (1 + s) + b),
    "affine and modulated norm": lambda x, y, g, s, b, m: both(r := x + g * y, ln(r, m.a, m.b) * (1 + s) + b),
    "no gate": lambda x, y, g, s, b, m: both(r := x + y, ln(r) * (1 + s) + b),
    "no gate, RMS": lambda x, y, g, s, b, m: both(r := x + y, rms(r, m.a)),
    "modulated RMS": lambda x, y, g, s, b, m: both(r := x + g * y, b + rms(r) * (1 + s)),
    "a gate of the model": lambda x, y, g, s, b, m: both(r := x + m.c * y, rms(r)),
    "a gate for each token": lambda x, y, g, s, b, m: both(r := x + (y.sin() + g) * y, ln(r)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_residual_and_its_norm_are_one_op(name, form, rewrite, assert_same):
    model, args = form(FORMS[name]), tensors()
    done = rewrite(model, args, until="residual_norm")
    assert done.results["residual_norm"].rewritten == 1
    assert done.ops().count("residual_norm") == 1
    assert not {"layer_norm", "rms_norm", "adaln"} & set(done.ops())
    assert_same(done.run(*args), model(*args))


GATED = {
    "no norm": lambda x, y, g, s, b, m: x + g * y,
    "the norm of something else": lambda x, y, g, s, b, m: both(x + g * y, ln(y)),
    "a norm over tokens and channels": lambda x, y, g, s, b, m: both(r := x + g * y, F.layer_norm(r, (L, C))),
    "a norm of the residual, doubled": lambda x, y, g, s, b, m: both(r := x + g * y, ln(2 * r)),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gated_residual_without_its_norm_is_an_op_of_its_own(name, form, rewrite, assert_same):
    model, args = form(GATED[name]), tensors()
    done = rewrite(model, args, until="residual_norm")
    assert done.results["residual_norm"].rewritten == 1
    assert "gated_residual" in done.ops()
    assert_same(done.run(*args), model(*args))


NEAR_MISSES = {
    "a plain sum": lambda x, y, g, s, b, m: x + y,
    "a gate along the tokens": lambda x, y, g, s, b, m: x + g.reshape(B, L, 1) * y,
    "a gate along tokens, not channels": lambda x, y, g, s, b, m: x + g.reshape(B, C, 1).expand(B, L, 1) * y,
    "a number for a gate": lambda x, y, g, s, b, m: x + 0.5 * y,
    "a broadcast shortcut": lambda x, y, g, s, b, m: s + g * y,
    "transposed": lambda x, y, g, s, b, m: x + (g * y).transpose(1, 2),
    "a doubled product": lambda x, y, g, s, b, m: torch.add(x, g * y, alpha=2),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_and_say_why(name, form, rewrite, assert_same):
    model, args = form(NEAR_MISSES[name]), tensors()
    done = rewrite(model, args, until="residual_norm")
    result = done.results["residual_norm"]
    assert result.rewritten == 0
    assert result.sites == len(result.skipped)
    assert_same(done.run(*args), model(*args))


def test_a_gate_along_the_tokens_says_so(form, rewrite):
    model = form(NEAR_MISSES["a gate along the tokens"])
    assert "neither alike for all tokens nor given for each" in rewrite(model, tensors()).reasons("residual_norm")[0]


def test_the_residual_that_others_read_is_the_same(form, rewrite, assert_same):
    model = form(lambda x, y, g, s, b, m: both(r := x + g * y, ln(r) * (1 + s) + b + r.sin()))
    done = rewrite(model, tensors(), until="residual_norm")
    assert "residual_norm" in done.ops()
    assert_same(done.run(*tensors()), model(*tensors()))


def test_in_bfloat16_the_sum_is_rounded_where_the_model_rounds_it(form, rewrite):
    def wan_like(x, y, g, s, b, m):
        r = (x.float() + y * g).type_as(x)
        return r, (ln(r.float()) * (1 + s) + b).type_as(r)

    x, y, *rest = tensors()
    args = (x.bfloat16(), y.bfloat16(), *rest)
    done = rewrite(form(wan_like), args, until="residual_norm")
    assert "to" not in done.ops()
    for a, b in zip(done.run(*args), form(wan_like)(*args), strict=True):
        assert torch.equal(a, b)


def test_a_float32_residual_of_bfloat16_operands_stays_float32(form, rewrite):
    def mixed(x, y, g, s, b, m):
        r = x.float() + y * g
        return r, ln(r).bfloat16()

    x, y, *rest = tensors()
    args = (x.bfloat16(), y.bfloat16(), *rest)
    found, truth = rewrite(form(mixed), args, until="residual_norm").run(*args), form(mixed)(*args)
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


def test_the_quantize_behind_the_norm_joins(rewrite):
    for style in (zoo.Style(cross=True), zoo.Style(cross=True, modulation="none")):
        options, args = {"w8a8": {"format": "int8"}}, zoo.example(style)
        before = rewrite(zoo.build(style), args, until="w8a8", options=options)
        done = rewrite(zoo.build(style), args, until="residual_norm", options=options)
        assert done.ops("blocks").count("residual_norm_quantize") == 2
        assert torch.equal(done.run(*args), before.run(*args))


def test_the_graph_before_and_after(form, shown):
    shown("residual_norm", form(FORMS["gate and modulated norm"]), tensors(), "residual_norm")
