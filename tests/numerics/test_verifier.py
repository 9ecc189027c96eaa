"""Verification: right rewrites pass, wrong ones with right shapes fail, sites over a budget are left alone."""

from __future__ import annotations

import pytest
import torch
from asked import asked
from products import Block, made, product_pass

from turbocompile.ir.program import is_op
from turbocompile.ir.weights import Load
from turbocompile.recipe.options import BUDGETS
from turbocompile.rewrite.match import Pass, rewrite
from turbocompile.rewrite.pipeline import run_passes

aten = torch.ops.aten


@pytest.fixture
def case():
    return made()


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
    _, program, _, verifier = made(torch.bfloat16)
    (result,) = run_passes(
        program, asked(), verifier, passes=[product_pass("exact", lambda m: m.op(aten.mul.Tensor, m.y, m.x))]
    )
    assert result.error["rel_l1"] < 1e-6
    assert 1e-4 < result.error_output["rel_l1"] < 0.02  # the block as it runs, in bf16, with its own rounding


def test_a_budget_is_the_recipes_else_that_of_the_format_found_at_the_site():
    assert asked({"w8a8": {"budget": 0.5}}).w8a8.budget({"int8"}) == 0.5
    assert asked().w8a8.budget({"fp8"}) == BUDGETS["fp8"] == 0.05
    assert asked().attention.budget({"sage_fp16"}) == BUDGETS["sage_fp16"] == 0.02
    assert asked().of("p").budget({"another"}) == max(BUDGETS.values())
