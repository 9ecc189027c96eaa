"""Verification: right rewrites pass, wrong ones with right shapes fail, sites over a budget are left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from turbocompile.capture import capture
from turbocompile.errors import VerificationError
from turbocompile.match import Pass, rewrite, variables
from turbocompile.normalize import normalize
from turbocompile.pipeline import run_passes
from turbocompile.program import is_op
from turbocompile.verify import BUDGETS, Evaluation, Verifier, budget_of, compare, random_inputs
from turbocompile.weights import Evaluator, ModuleTensors

aten = torch.ops.aten
x, y = variables("x y")


class Model(nn.Module):
    """Two linears, a product and a permuted sum: enough for a rewrite to go wrong in."""

    def __init__(self, dim=64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x):
        n = self.norm(x)
        return x + (self.a(n) * self.b(n).sigmoid()).transpose(1, 2).contiguous().transpose(1, 2).relu()


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Model().eval()
    program = capture(model, (torch.randn(2, 12, 64),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    return model, program, raw, verifier


def products(sub):
    return [n for n in sub.graph.nodes if is_op(n, aten.mul.Tensor)]


def product_pass(kind, change):
    """A pass that rewrites the product by `change(m)`."""

    @rewrite(x * y, candidates=products)
    def rule(m):
        return change(m)

    return Pass("product", kind, [rule])


def test_the_normal_form_agrees_with_what_was_captured(case):
    _, program, raw, verifier = case
    verifier.check_captured(raw, program)


def test_a_wrong_normal_form_is_found(case):
    _, program, raw, verifier = case
    node = products(raw.graphs["blocks"])[0]
    node.args = (node.args[0], node.args[0])
    with pytest.raises(VerificationError, match="differs from what was captured"):
        verifier.check_captured(raw, program)


class Clock(nn.Module):
    """Sines of a timestep in bfloat16, where 999 is 1000: radians off what float64 gives, as the model itself is."""

    def forward(self, x):
        t = x[:, :1, 0].abs() * 1000
        return x * (t * torch.arange(1, 33, dtype=x.dtype) / 32).sin().repeat(1, 2)[:, None]


@pytest.mark.parametrize("wrong", [False, True])
def test_what_a_16_bit_model_rounds_itself_is_no_wrong_normal_form(wrong):
    model, inputs = Clock().bfloat16(), (torch.randn(2, 12, 64).bfloat16(),)
    program = capture(model, inputs)
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    truth = verifier.outputs["shell"][0]
    assert compare(run_raw(raw, verifier), truth).rel_l1 > 0.05
    if wrong:
        node = next(n for n in raw.shell.graph.nodes if is_op(n, aten.sin.default))
        node.target = aten.cos.default
        with pytest.raises(VerificationError, match="differs from what was captured"):
            verifier.check_captured(raw, program)
    else:
        verifier.check_captured(raw, program)


def run_raw(raw, verifier):
    """The output of a captured shell, in its own types."""
    values = Evaluation(raw.shell, lambda node: None, None)({"input_0": verifier.inputs[0]})
    return values[raw.shell.outputs()[0].name]


def test_a_right_exact_rewrite_has_an_error_of_rounding(case):
    _, program, _, verifier = case
    (result,) = run_passes(
        program, {}, "cpu", verifier, passes=[product_pass("exact", lambda m: m.op(aten.mul.Tensor, m.y, m.x))]
    )
    assert result.rewritten == 2
    assert result.error["rel_l1"] < 1e-6
    assert result.error["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert result.error_output["rel_l1"] < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.op(aten.mul.Tensor, m.x, m.x),
        lambda m: m.op(aten.neg.default, m.op(aten.mul.Tensor, m.x, m.y)),
        lambda m: m.op(aten.roll.default, m.op(aten.mul.Tensor, m.x, m.y), [1], [1]),
        lambda m: m.op(aten.mul.Tensor, m.op(aten.mul.Tensor, m.x, m.y), 1 + 1e-4),
    ],
    ids=["operand twice", "sign", "order of tokens", "a factor of 1.0001"],
)
def test_a_wrong_exact_rewrite_with_right_shapes_stops_the_build(case, change):
    _, program, _, verifier = case
    with pytest.raises(VerificationError, match=r"'product' changed the numbers at blocks:.*enabled: false"):
        run_passes(program, {}, "cpu", verifier, passes=[product_pass("exact", change)])


def coarse(step):
    """Rounds the product to multiples of `step`."""

    def change(m):
        scaled = m.op(aten.mul.Tensor, m.op(aten.mul.Tensor, m.x, m.y), 1 / step)
        return m.op(aten.mul.Tensor, m.op(aten.round.default, scaled), step)

    return change


def test_a_quantizing_rewrite_within_its_budget_is_measured_at_the_site_and_at_the_output(case):
    model, program, _, verifier = case
    verifier.options = {"product": {"budget": 0.05}}
    step = 0.01
    (result,) = run_passes(program, {}, "cpu", verifier, passes=[product_pass("quantizing", coarse(step))])
    assert result.rewritten == 2
    # A uniform rounding error of +-step/2 has a mean magnitude of step/4, and a maximum of step/2.
    assert 0 < result.error["max_abs"] <= step / 2 * 1.001
    with torch.no_grad():
        inputs = verifier.inputs[0]
        block = model.blocks[0]
        n = block.norm(inputs)
        exact = block.a(n) * block.b(n).sigmoid()
    assert result.error["rel_l1"] == pytest.approx(step / 4 / float(exact.abs().mean()), rel=0.1)
    assert 0 < result.error_output["rel_l1"] < result.error["rel_l1"]  # the residual hides it
    assert max(error.rel_l1 for error, _ in result.site_errors.values()) == result.error["rel_l1"]


def test_a_site_over_its_budget_is_left_alone_and_says_so(case):
    _, program, _, verifier = case
    verifier.options = {"product": {"budget": 1e-4}}
    before = [str(n.target) for n in program.graphs["blocks"].graph.nodes]
    (result,) = run_passes(program, {}, "cpu", verifier, passes=[product_pass("quantizing", coarse(0.1))])
    assert (result.sites, result.rewritten) == (2, 0)
    ((_, reason, count),) = result.skipped
    assert count == 2
    assert "over its budget of 0.0001" in reason
    ((site, (error, budget)),) = result.site_errors.items()  # refused, and its error is known all the same
    assert (site, budget) == (result.skipped[0][0], 1e-4)
    assert f"{error.rel_l1:.4f}" in reason
    assert [str(n.target) for n in program.graphs["blocks"].graph.nodes] == before


def test_after_a_quantizing_rewrite_the_next_pass_is_judged_on_exact_inputs(case):
    """The truth stays that of the captured graph: a second, exact rewrite behind a coarse one shows rounding alone."""
    _, program, _, verifier = case
    verifier.options = {"product": {"budget": 1.0}}

    @rewrite(None, candidates=lambda sub: [n for n in sub.graph.nodes if is_op(n, aten.relu.default)])
    def relu(m):
        return m.op(aten.clamp_min.default, m.root.args[0], 0)

    passes = [product_pass("quantizing", coarse(0.2)), Pass("relu", "exact", [relu])]
    first, second = run_passes(program, {}, "cpu", verifier, passes=passes)
    assert first.error["rel_l1"] > 0.05
    assert second.error["rel_l1"] < 1e-6
    assert second.error_output["rel_l1"] > 1e-3  # the output still carries the first pass's error


def test_a_semantic_rewrite_sets_the_truth_anew(case):
    _, program, _, verifier = case
    semantic = product_pass("semantic", lambda m: m.op(aten.add.Tensor, m.x, m.y))

    @rewrite(None, candidates=lambda sub: [n for n in sub.graph.nodes if is_op(n, aten.relu.default)])
    def relu(m):
        return m.op(aten.clamp_min.default, m.root.args[0], 0)

    first, second = run_passes(program, {}, "cpu", verifier, passes=[semantic, Pass("relu", "exact", [relu])])
    assert first.error is None
    assert "another function" in first.error_reason
    assert second.error_output["rel_l1"] < 1e-6


def test_bf16_models_are_judged_in_float32_for_exact_rewrites():
    torch.manual_seed(0)
    model = Model().eval().bfloat16()
    program = capture(model, (torch.randn(2, 12, 64).bfloat16(),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    verifier.check_captured(raw, program)
    (result,) = run_passes(
        program, {}, "cpu", verifier, passes=[product_pass("exact", lambda m: m.op(aten.mul.Tensor, m.y, m.x))]
    )
    assert result.error["rel_l1"] < 1e-6
    assert 1e-4 < result.error_output["rel_l1"] < 0.02  # the block as it runs, in bf16, with its own rounding


def test_truth_is_more_exact_than_float32(case):
    model, program, _, verifier = case
    wide = Evaluation(program.graphs["blocks"], verifier._weight(program, "blocks"), torch.float64)
    inputs = verifier.inputs[0].double()
    found = wide({program.graphs["blocks"].inputs()[0].name: inputs})
    with torch.no_grad():
        expected = model.double().blocks[0](inputs)
    (output,) = program.graphs["blocks"].outputs()
    assert compare(found[output.name], expected).max_rel < 1e-14


def test_the_figures_of_an_error():
    truth = torch.tensor([3.0, -4.0])
    error = compare(torch.tensor([3.0, -3.0]), truth)
    assert error.rel_l1 == pytest.approx(1 / 7)
    assert error.max_abs == 1
    assert error.max_rel == pytest.approx(1 / 4)
    assert error.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert compare(torch.tensor([math.nan, 1.0]), truth).rel_l1 == math.inf
    assert compare(torch.zeros(2), torch.zeros(2)).rel_l1 == 0
    assert compare(torch.ones(2), torch.zeros(2)).rel_l1 == math.inf


def test_random_inputs_follow_the_signature(case):
    _, program, _, _ = case
    first, again = random_inputs(program, 3), random_inputs(program, 3)
    assert torch.equal(first[0], again[0])
    assert tuple(first[0].shape) == (2, 12, 64)
    assert not torch.equal(first[0], random_inputs(program, 4)[0])


def test_a_budget_is_the_recipes_else_that_of_the_format_found_at_the_site():
    assert budget_of({"budget": 0.5}, {"int8"}) == 0.5
    assert budget_of({"format": "auto"}, {"fp8"}) == BUDGETS["fp8"] == 0.05
    assert budget_of({"pv": None}, {"sage_fp16"}) == BUDGETS["sage_fp16"] == 0.02
    assert budget_of({}, {"another"}) == max(BUDGETS.values())
