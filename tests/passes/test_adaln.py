"""A modulated LayerNorm becomes one op, with the quantize that alone reads it; near misses stay or stay right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo

B, L, C = 2, 32, 32  # as many tokens as channels: a wrong axis then has the right shape


def tensors(*modulation):
    g = torch.Generator().manual_seed(0)
    sizes = modulation or (B, 1, C)
    return tuple(torch.randn(s, generator=g) for s in ((B, L, C), sizes, sizes))


def ln(x, *affine):
    return F.layer_norm(x, (C,), *affine, eps=1e-6)


FORMS = {
    "formula": lambda x, s, b, m: ln(x) * (1 + s) + b,
    "reordered": lambda x, s, b, m: b + (s + 1.0) * ln(x),
    "addcmul": lambda x, s, b, m: torch.addcmul(b, ln(x), 1 + s),
    "axes added behind the sum": lambda x, s, b, m: ln(x) * (1 + s[:, 0])[:, None] + b[:, 0, None],
    "affine and modulated": lambda x, s, b, m: ln(x, m.a, m.b) * (1 + s) + b,
    "a shift that is subtracted": lambda x, s, b, m: ln(x) * (1 + s) - b,
    "a scale that is subtracted": lambda x, s, b, m: ln(x) * (1 - s) + b,
    "in float32 and back": lambda x, s, b, m: (ln(x.double()) * (1 + s) + b).float(),
}


@pytest.mark.parametrize("name", FORMS)
def test_any_writing_becomes_adaln(name, form, rewrite, assert_same):
    model, args = form(FORMS[name]), tensors()
    done = rewrite(model, args, until="adaln")
    assert done.results["adaln"].rewritten == 1
    assert done.ops().count("adaln") == 1
    assert "layer_norm" not in done.ops()
    assert_same(done.run(*args), model(*args))


@pytest.mark.parametrize("sizes", [(B, 1, C), (1, 1, C), (C,), (B, L, C)])
def test_modulation_is_alike_for_all_tokens_or_given_for_each(sizes, form, rewrite, assert_same):
    model, args = form(FORMS["formula"]), tensors(*sizes)
    done = rewrite(model, args, until="adaln")
    assert done.results["adaln"].rewritten == 1
    assert_same(done.run(*args), model(*args))


NEAR_MISSES = {
    "scale alone": lambda x, s, b, m: ln(x) * s + b,
    "two and scale": lambda x, s, b, m: ln(x) * (2 + s) + b,
    "the square of one and scale": lambda x, s, b, m: ln(x) * (1 + s) * (1 + s) + b,
    "shifted before it is scaled": lambda x, s, b, m: (ln(x) + b) * (1 + s) + b,
    "normalized over tokens and channels": lambda x, s, b, m: F.layer_norm(x, (L, C)) * (1 + s) + b,
    "modulation along the tokens": lambda x, s, b, m: ln(x) * (1 + s.reshape(B, L, 1)) + b.reshape(B, L, 1),
    "a number for shift": lambda x, s, b, m: ln(x) * (1 + s) + 0.5,
    "a product with another norm's values": lambda x, s, b, m: ln(x)[:, :1] * (1 + s) + x,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_or_stay_right(name, form, rewrite, assert_same):
    model, args = form(NEAR_MISSES[name]), tensors()
    done = rewrite(model, args, until="adaln")
    result = done.results["adaln"]
    assert result.rewritten == 0
    assert result.sites == len(result.skipped)
    assert all(reason for _, reason, _ in result.skipped)
    assert_same(done.run(*args), model(*args))


def test_swapped_scale_and_shift_are_not_confused(form, rewrite, assert_same):
    model, args = form(lambda x, s, b, m: ln(x) * (1 + b) + s), tensors()
    assert_same(rewrite(model, args, until="adaln").run(*args), model(*args))


def test_in_bfloat16_the_norm_is_rounded_once(form, rewrite):
    model = form(lambda x, s, b, m: (ln(x.float()) * (1 + s) + b).type_as(x))
    x, s, b = tensors()
    x = x.bfloat16()
    done = rewrite(model, (x, s, b), until="adaln")
    (node,) = done.nodes("adaln")
    assert node.args[0].meta["val"].dtype == torch.bfloat16
    assert "to" not in done.ops()
    assert torch.equal(done.run(x, s, b), model(x, s, b))


def test_a_result_that_is_used_in_float32_is_not_rounded(form, rewrite):
    model = form(lambda x, s, b, m: (ln(x.float()) * (1 + s) + b).sin())
    x, s, b = tensors()
    x = x.bfloat16()
    assert torch.equal(rewrite(model, (x, s, b), until="adaln").run(x, s, b), model(x, s, b))


def test_the_quantize_behind_it_joins(rewrite):
    for modulation in ("table", "linear"):
        style = zoo.Style(modulation=modulation)
        done = rewrite(zoo.build(style), zoo.example(style), until="adaln", options={"w8a8": {"format": "int8"}})
        before = rewrite(zoo.build(style), zoo.example(style), until="w8a8", options={"w8a8": {"format": "int8"}})
        assert done.ops("blocks").count("adaln_quantize") == 2
        assert before.ops("blocks").count("quantize") - done.ops("blocks").count("quantize") == 2
        assert torch.equal(done.run(*zoo.example(style)), before.run(*zoo.example(style)))


def test_a_norm_that_something_else_reads_keeps_its_quantize(rewrite):
    class Both(zoo.Mlp):
        def forward(self, x):
            return super().forward(x) + x.sin()

    model = zoo.build()
    for block in model.blocks:
        block.stream.mlp.__class__ = Both
    done = rewrite(model, zoo.example(model.style), until="adaln", options={"w8a8": {"format": "int8"}})
    assert done.results["adaln"].rewritten == 5
    assert done.ops("blocks").count("adaln_quantize") == 1
    assert done.ops("blocks").count("adaln") == 1


def test_the_graph_before_and_after(form, shown):
    shown("adaln", form(FORMS["addcmul"]), tensors(), "adaln")
