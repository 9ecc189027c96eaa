"""Norms written by hand become the one op; near misses stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from turbocompile.passes.norms import PASS

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.recipe.options import PassOptions
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.run_pass import run_pass

C = 32  # channels, and tokens too: a wrong axis or a forgotten keepdim then has the right shape
EPS = 1e-5


class Written(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.w = nn.Parameter(torch.randn(C))
        self.b = nn.Parameter(torch.randn(C))

    def forward(self, x):
        return self.form(x, self.w, self.b)


def mean(x):
    return x.mean(-1, keepdim=True)


def population_variance(x):
    return x.var(-1, keepdim=True, unbiased=False)


def squares(x):
    return mean(x.pow(2))


def root(x):
    return torch.rsqrt(population_variance(x) + EPS)


LAYER = {
    "divided by a root of var": lambda x, w, b: (x - mean(x)) / torch.sqrt(population_variance(x) + EPS) * w + b,
    "weight first": lambda x, w, b: w * ((x - mean(x)) * torch.rsqrt(mean((x - mean(x)) ** 2) + EPS)) + b,
    "weight on the root": lambda x, w, b: b + (x - mean(x)) * (w * (population_variance(x) + EPS) ** -0.5),
    "weight on the difference": lambda x, w, b: torch.addcmul(b, w * (x - mean(x)), root(x)),
    "squares less squares": lambda x, w, b: (x - mean(x)) * (mean(x * x) - mean(x) ** 2 + EPS).rsqrt() * w + b,
    "sums": lambda x, w, b: (x - x.sum(-1, keepdim=True) / C) / (
        (x - x.sum(-1, keepdim=True) / C).square().sum(-1, keepdim=True) / C + EPS
    ) ** 0.5 * w + b,
    "unsqueezed": lambda x, w, b: (x - x.mean(-1)[..., None]) / (x.var(-1, False)[..., None] + EPS) ** 0.5 * w + b,
    "computed in float32": lambda x, w, b: ((x.float() - mean(x.float())) * root(x.float())).type_as(x) * w + b,
    "the op, then weight and bias": lambda x, w, b: F.layer_norm(x, (C,), eps=EPS) * w + b,
}  # fmt: skip
RMS = {
    "weight first": lambda x, w, b: w * (x * torch.rsqrt(squares(x) + EPS)),
    "left to right": lambda x, w, b: w * x * torch.rsqrt(squares(x) + EPS),
    "divided": lambda x, w, b: x / (squares(x) + EPS).sqrt() * w,
    "float32, then weight": lambda x, w, b: (x.float() * torch.rsqrt(squares(x.float()) + EPS)).to(x.dtype) * w,
    "float32 with the weight": lambda x, w, b: (w.float() * x.float() * (squares(x.float()) + EPS).rsqrt()).to(x.dtype),
    "the op, then weight": lambda x, w, b: F.rms_norm(x, (C,), eps=EPS) * w,
}  # fmt: skip
NEAR_MISSES = {
    "layer norm over the tokens": lambda x, w, b: (
        (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + EPS)
    ),
    "rms norm over the tokens": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
    "over tokens and channels": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS) * w,
    "sample variance": lambda x, w, b: (x - mean(x)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w,
    "eps outside the root": lambda x, w, b: x / (squares(x).sqrt() + 0.1) * w,
    "forgotten keepdim": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1) + EPS) * w,
    "fourth powers": lambda x, w, b: x * torch.rsqrt(mean(x**4) + EPS) * w,
    "another tensor's mean": lambda x, w, b: (x - mean(x.flip(1))) * torch.rsqrt(population_variance(x) + EPS),
    "plus the mean": lambda x, w, b: (x + mean(x)) * torch.rsqrt(mean((x + mean(x)) ** 2) - 2 * mean(x) ** 2 + EPS),
    "multiplied by the root": lambda x, w, b: x * torch.sqrt(squares(x) + EPS),
    "reciprocal without a root": lambda x, w, b: x / (squares(x) + EPS) * w,
}


def rewritten(model, x):
    """(value of the rewritten program, names of its operations, the pass's result)."""
    program = capture(model, (x,))
    normalize(program)
    result = run_pass(program, PASS, PassOptions(True))
    sub = program.shell
    evaluate = Evaluator(ModuleTensors(model), program.constants)
    values = Interpreter(sub, lambda node: evaluate(sub.weights[node.target]), None)({sub.inputs()[0].name: x})
    names = [node.target._opname for node in sub.graph.nodes if node.op == "call_function"]
    return values[sub.outputs()[0].name], names, result


def make(form, dtype):
    torch.manual_seed(0)
    return Written(form).to(dtype).requires_grad_(False), (torch.randn(2, C, C) + 0.3).to(dtype)


# float32: a mean of C terms is off by at most C units of 2^-24 of its terms, and some eight operations by one each.
# bfloat16: the op and, where it has them, weight and bias round by 2^-8 each; truth has the same bfloat16 inputs.
TOLERANCE = {torch.float32: (C + 8) * 2.0**-24, torch.bfloat16: 3 * 2.0**-8, torch.float64: (C + 8) * 2.0**-53}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm_in_any_arrangement_becomes_the_op(name, dtype):
    model, x = make(LAYER[name], dtype)
    found, names, result = rewritten(model, x)
    assert names == ["layer_norm"]
    assert (result.sites, result.rewritten, result.skipped) == (1, 1, ())
    truth = F.layer_norm(x.double(), (C,), model.w.double(), model.b.double(), EPS)
    assert (found.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm_in_any_arrangement_becomes_the_op(name, dtype):
    model, x = make(RMS[name], dtype)
    found, names, result = rewritten(model, x)
    assert names == ["rms_norm"]
    assert (result.sites, result.rewritten, result.skipped) == (1, 1, ())
    truth = F.rms_norm(x.double(), (C,), model.w.double(), EPS)
    assert (found.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_stays_and_keeps_its_numbers(name):
    model, x = make(NEAR_MISSES[name], torch.float32)
    x = x[:1]
    found, names, result = rewritten(model, x)
    assert "layer_norm" not in names
    assert "rms_norm" not in names
    assert result.rewritten == 0
    # Two orders of rounding: sums of C terms on both sides, over a variance that may be small.
    assert torch.allclose(found, model(x), rtol=1e-4, atol=1e-5)
    for _, reason, _ in result.skipped:
        assert "does not have the form" in reason


def test_a_scale_that_depends_on_the_input_is_no_weight():
    def modulated(x, w, b):
        core = (x - mean(x)) * torch.rsqrt(population_variance(x) + EPS)
        return core * (1 + x[:1, :1] * w) + b

    model, x = make(modulated, torch.float32)
    found, names, _ = rewritten(model, x[:1])
    assert names[:1] == ["layer_norm"] or "layer_norm" in names
    assert names.count("mul") == 2
    assert torch.allclose(found, model(x[:1]), rtol=1e-5, atol=1e-5)


def test_a_norm_that_two_modulations_read_stays_one_op():
    def twice(x, w, b):
        core = x * torch.rsqrt(squares(x) + EPS)
        return (core * w) @ (core * b).transpose(1, 2)

    model, x = make(twice, torch.float32)
    found, names, result = rewritten(model, x)
    assert names.count("rms_norm") == 1
    assert result.sites == 1
    assert torch.allclose(found, model(x), rtol=1e-4, atol=1e-4)


def test_a_float32_weight_keeps_the_op_in_float32():
    model, x = make(LAYER["weight first"], torch.float32)
    x = x.to(torch.bfloat16)

    def mixed(x, w, b):
        return LAYER["weight first"](x.float(), w, b).to(x.dtype)

    model.form = mixed
    found, names, _ = rewritten(model, x)
    assert names == ["to", "layer_norm", "to"]
    truth = F.layer_norm(x.double(), (C,), model.w.double(), model.b.double(), EPS)
    assert (found.double() - truth).abs().max() <= (2.0**-8 + TOLERANCE[torch.float32]) * truth.abs().max()


def test_a_site_is_named_by_its_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Written(RMS["divided"]), Written(LAYER["sums"])

        def forward(self, x):
            return self.norm2(self.norm1(x))

    model, x = Outer().requires_grad_(False), torch.randn(1, 4, C)
    _, names, result = rewritten(model, x)
    assert names == ["rms_norm", "layer_norm"]
    assert [r.site for r in result.rewrites] == ["shell:norm1", "shell:norm2"]
