"""Verification: right rewrites pass, wrong ones with right shapes fail, sites over a budget are left alone."""

from __future__ import annotations

import math

import pytest
import torch
from asked import asked
from torch import nn

from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.program import is_op
from turbocompile.ir.weights import Load
from turbocompile.numerics.errors import compare
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import Interpreter
from turbocompile.numerics.normal_forms import wrong_forms
from turbocompile.numerics.verifier import Verifier
from turbocompile.recipe.options import BUDGETS
from turbocompile.rewrite.match import Pass, rewrite, variables
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import run_passes

aten = torch.ops.aten
x, y = variables("x y")


class Model(nn.Module):
    """Two linears, a product and a permuted sum: enough for a rewrite to go wrong in."""

    def __init__(self, dim=64, block=None):
        super().__init__()
        self.blocks = nn.ModuleList((block or Block)(dim) for _ in range(2))

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


def made(dtype=torch.float32, block=Block):
    """A model, its Program in normal form and as captured, and a Verifier."""
    torch.manual_seed(0)
    model = Model(block=block).eval().to(dtype)
    program = capture(model, (torch.randn(2, 12, 64, dtype=dtype),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    return model, program, raw, verifier


@pytest.fixture
def case():
    return made()


def products(sub):
    return [n for n in sub.graph.nodes if is_op(n, aten.mul.Tensor)]


def product_pass(kind, change, name="product"):
    """A pass that rewrites the product by `change(m)`. name: of a built-in pass, it has the budget of that one."""

    @rewrite(x * y, candidates=products)
    def rule(m):
        return change(m)

    return Pass(name, kind, [rule])


def wrong(model, raw, program, verifier):
    """The graphs whose normal form is wrong."""
    return wrong_forms(raw, program, Evaluator(ModuleTensors(model), program.constants), verifier.inputs)


def test_the_normal_form_agrees_with_what_was_captured(case):
    model, program, raw, verifier = case
    assert wrong(model, raw, program, verifier) == {}


def test_a_wrong_normal_form_is_found_in_its_graph_alone(case):
    model, program, raw, verifier = case
    node = products(raw.graphs["blocks"])[0]
    node.args = (node.args[0], node.args[0])
    ((graph, reason),) = wrong(model, raw, program, verifier).items()
    assert graph == "blocks"
    assert "is another function: in float64 the largest difference is" in reason


def test_a_wrong_value_that_the_shell_hands_to_a_block_is_found():
    class Outer(Model):
        def forward(self, x):
            return super().forward(x.tanh())

    torch.manual_seed(0)
    model = Outer().eval()
    program = capture(model, (torch.randn(2, 12, 64),))
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    next(n for n in raw.shell.graph.nodes if is_op(n, aten.tanh)).target = aten.sin.default
    assert list(wrong(model, raw, program, verifier)) == ["shell"]


def test_a_shell_that_reads_another_call_of_a_block_is_found(case):
    """Of the blocks one alone is computed for all, and still each gives something of its own."""
    model, program, raw, verifier = case
    first, last = raw.calls()
    output = raw.shell.output()
    output.args = ((first.node,),)
    assert last.node.name != first.node.name
    assert list(wrong(model, raw, program, verifier)) == ["shell"]


class Clock(nn.Module):
    """Sines of a timestep in bfloat16, where 999 is 1000: radians off what float64 gives, as the model itself is."""

    def forward(self, x):
        t = x[:, :1, 0].abs() * 1000
        return x * (t * torch.arange(1, 33, dtype=x.dtype) / 32).sin().repeat(1, 2)[:, None]


@pytest.mark.parametrize("cosine", [False, True])
def test_what_a_16_bit_model_rounds_itself_is_no_wrong_normal_form(cosine):
    model, inputs = Clock().bfloat16(), (torch.randn(2, 12, 64).bfloat16(),)
    program = capture(model, inputs)
    raw = program.copy()
    normalize(program)
    verifier = Verifier(program, Evaluator(ModuleTensors(model), program.constants))
    truth = verifier.outputs["shell"][0]
    assert compare(run_raw(raw, verifier), truth).rel_l1 > 0.05  # the model's own rounding
    if cosine:
        node = next(n for n in raw.shell.graph.nodes if is_op(n, aten.sin.default))
        node.target = aten.cos.default
    assert list(wrong(model, raw, program, verifier)) == (["shell"] if cosine else [])


def run_raw(raw, verifier):
    """The output of a captured shell, in its own types."""
    values = Interpreter(raw.shell, lambda node: None, None)({"input_0": verifier.inputs[0]})
    return values[raw.shell.outputs()[0].name]


def test_a_right_exact_rewrite_has_an_error_of_rounding(case):
    _, program, _, verifier = case
    (result,) = run_passes(
        program, asked(), verifier, passes=[product_pass("exact", lambda m: m.op(aten.mul.Tensor, m.y, m.x))]
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
        lambda m: m.op(aten.mul.Tensor, m.op(aten.mul.Tensor, m.x, m.y), 1 + 1e-8),
    ],
    ids=["operand twice", "sign", "order of tokens", "a factor of 1 + 1e-8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_exact_rewrite_with_right_shapes_is_left_alone(change, dtype):
    """However small the fault is beside the dtype's own rounding."""
    _, program, _, verifier = made(dtype)
    before = {g: str(sub.graph) for g, sub in program.graphs.items()}
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("exact", change)])
    assert result.rewritten == 0
    ((site, reason),) = result.vetoed.items()
    assert site.startswith("blocks:")
    assert "changes the numbers: in float64 the largest difference is" in reason
    assert {g: str(sub.graph) for g, sub in program.graphs.items()} == before


def test_of_two_sites_the_wrong_one_alone_is_left():
    class Two(Block):
        def forward(self, x):
            return super().forward(x) * self.b(x)

    _, program, _, verifier = made(torch.float32, Two)
    first = []

    def change(m):
        first.append(m.site)
        return m.op(aten.mul.Tensor, m.y, m.y if m.site == first[0] else m.x)

    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("exact", change)])
    assert (result.sites, result.rewritten) == (4, 2)
    assert list(result.vetoed) == [first[0]]


def test_a_rewrite_that_rounds_to_a_narrower_type_is_left_alone():
    """Casts between floating types are no part of the function, and their rounding is measured at the site."""

    def narrow(m):
        x, y = (m.op(aten.to.dtype, n, torch.bfloat16) for n in (m.x, m.y))
        return m.op(aten.to.dtype, m.op(aten.mul.Tensor, x, y), torch.float32)

    _, program, _, verifier = made(torch.float32)
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("exact", narrow)])
    ((_, reason),) = result.vetoed.items()
    assert "rounds more than what it replaces: in float32" in reason


def test_a_rewrite_that_reads_one_layer_by_name_is_left_alone():
    """The first call alone would not show it: there it is right."""

    def first_layer(m):
        linear = m.x if is_op(m.x, aten.linear.default) else m.y
        other = m.y if linear is m.x else m.x
        weight = m.weight("first", Load("blocks.0.a.weight", (64, 64), torch.float32))
        return m.op(aten.mul.Tensor, m.op(aten.linear.default, linear.args[0], weight, linear.args[2]), other)

    _, program, _, verifier = made(torch.float32)
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("exact", first_layer)])
    assert result.rewritten == 0


def test_a_pass_that_changes_what_it_did_not_match_is_undone():
    def change(m):
        norm = next(n for n in m.sub.graph.nodes if is_op(n, aten.layer_norm))
        norm.args = (*norm.args[:4], 2 * norm.args[4])
        return m.op(aten.mul.Tensor, m.y, m.x)

    _, program, _, verifier = made(torch.float32)
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("exact", change)])
    assert result.rewritten == 0
    assert next(n for n in program.graphs["blocks"].graph.nodes if is_op(n, aten.layer_norm)).args[4] == 1e-5


@pytest.mark.parametrize("kind", ["exact", "quantizing", "semantic"])
def test_a_rewritten_site_that_cannot_be_computed_is_left_alone(kind):
    def out_of_range(m):
        return m.op(aten.index_select.default, m.op(aten.mul.Tensor, m.x, m.y), 0, m.op(aten.full.default, [2], 7))

    _, program, _, verifier = made(torch.float32)
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass(kind, out_of_range)])
    ((_, reason),) = result.vetoed.items()
    assert "cannot be computed (IndexError" in reason


def test_where_truth_is_no_number_the_same_must_stand():
    nan, inf = math.nan, math.inf
    truth = torch.tensor([1.0, nan, inf])
    assert compare(torch.tensor([1.0, nan, inf]), truth).max_rel == 0
    for found in ([1.0, 1.0, inf], [1.0, nan, -inf], [nan, nan, inf]):
        assert compare(torch.tensor(found), truth).max_rel == inf


def test_an_eps_that_is_not_named_is_that_of_the_models_type():
    """Of an RMSNorm in 16 bits it is float32's, in float64 another: the truth has the model's."""

    class Norm(nn.Module):
        def forward(self, x):
            return nn.functional.rms_norm(x * 1e-3, (64,)) * 2

    for dtype in (torch.float32, torch.bfloat16):
        program = capture(Norm(), (torch.randn(2, 12, 64, dtype=dtype),))
        raw = program.copy()
        normalize(program)
        (norm,) = (n for n in program.shell.graph.nodes if is_op(n, aten.rms_norm))
        assert norm.args[3] == torch.finfo(torch.float32).eps
        inputs = random_inputs(program)
        assert wrong_forms(raw, program, Evaluator(ModuleTensors(Norm()), program.constants), inputs) == {}


def coarse(step):
    """Rounds the product to multiples of `step`."""

    def change(m):
        scaled = m.op(aten.mul.Tensor, m.op(aten.mul.Tensor, m.x, m.y), 1 / step)
        return m.op(aten.mul.Tensor, m.op(aten.round.default, scaled), step)

    return change


def test_a_quantizing_rewrite_within_its_budget_is_measured_at_the_site_and_at_the_output(case):
    model, program, _, verifier = case
    verifier.options = asked({"w8a8": {"budget": 0.05}})
    step = 0.01
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("quantizing", coarse(step), "w8a8")])
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
    verifier.options = asked({"w8a8": {"budget": 1e-4}})
    before = [str(n.target) for n in program.graphs["blocks"].graph.nodes]
    (result,) = run_passes(program, asked(), verifier, passes=[product_pass("quantizing", coarse(0.1), "w8a8")])
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
    verifier.options = asked({"w8a8": {"budget": 1.0}})

    @rewrite(None, candidates=lambda sub: [n for n in sub.graph.nodes if is_op(n, aten.relu.default)])
    def relu(m):
        return m.op(aten.clamp_min.default, m.root.args[0], 0)

    passes = [product_pass("quantizing", coarse(0.2), "w8a8"), Pass("relu", "exact", [relu])]
    first, second = run_passes(program, asked(), verifier, passes=passes)
    assert first.error["rel_l1"] > 0.05
    assert second.error["rel_l1"] < 1e-6
    assert second.error_output["rel_l1"] > 1e-3  # the output still carries the first pass's error


def test_a_semantic_rewrite_sets_the_truth_anew(case):
    _, program, _, verifier = case
    semantic = product_pass("semantic", lambda m: m.op(aten.add.Tensor, m.x, m.y))

    @rewrite(None, candidates=lambda sub: [n for n in sub.graph.nodes if is_op(n, aten.relu.default)])
    def relu(m):
        return m.op(aten.clamp_min.default, m.root.args[0], 0)

    first, second = run_passes(program, asked(), verifier, passes=[semantic, Pass("relu", "exact", [relu])])
    assert first.error is None
    assert "another function" in first.error_reason
    assert second.error_output["rel_l1"] < 1e-6


def test_bf16_models_are_judged_in_float64_for_exact_rewrites():
    model, program, raw, verifier = made(torch.bfloat16)
    assert wrong(model, raw, program, verifier) == {}
    (result,) = run_passes(
        program, asked(), verifier, passes=[product_pass("exact", lambda m: m.op(aten.mul.Tensor, m.y, m.x))]
    )
    assert result.error["rel_l1"] < 1e-6
    assert 1e-4 < result.error_output["rel_l1"] < 0.02  # the block as it runs, in bf16, with its own rounding


def test_truth_is_more_exact_than_float32(case):
    model, program, _, verifier = case
    wide = Interpreter(program.graphs["blocks"], verifier._weight(program, "blocks"), torch.float64)
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
    assert asked({"w8a8": {"budget": 0.5}}).w8a8.budget({"int8"}) == 0.5
    assert asked().w8a8.budget({"fp8"}) == BUDGETS["fp8"] == 0.05
    assert asked().attention.budget({"sage_fp16"}) == BUDGETS["sage_fp16"] == 0.02
    assert asked().of("p").budget({"another"}) == max(BUDGETS.values())
