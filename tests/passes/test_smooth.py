"""Scales move from a linear's input into its weight, and out of what makes the input: the same function."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from torch import nn
from turbocompile.backends.triton import compile_program

from turbocompile.build.compile import merged_constants
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.evaluate import Evaluator, WithVectors
from turbocompile.ir.program import is_op
from turbocompile.ir.weights import Cat, Load, Mul, Quantize, Reshape, Slice
from turbocompile.numerics.linear_errors import find_groups, find_linears
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Settings
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import load_pass, run_passes, story
from turbocompile.rewrite.run_pass import run_pass
from turbocompile.rewrite.scale_folding import NO_PRODUCER, fold_of

aten = torch.ops.aten
INT8 = {"format": "int8"}
NATIVE = {"attention": {"kind": "native"}}
OPTIONS = resolve(Settings.from_dict({"target": "cpu", "passes": {**NATIVE, "w8a8": INT8}}))


def prepared(model, args, kwargs=None):
    program = capture(model, args, kwargs)
    normalize(program)
    run_passes(program, OPTIONS, passes=story("smooth")[:-1])
    return program


def random_vectors(program, groups, seed=0, octaves=6):
    """A scale of powers of two for each group and layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        for prefix in program.prefixes(group.linears[0].graph):
            (channels,) = group.fold.vector("smooth").shape
            exponents = torch.randint(-octaves, octaves + 1, (channels,), generator=generator)
            found |= group.vectors(prefix, torch.exp2(exponents.float()))
    return found


def smoothed(model, args, kwargs=None):
    """The Program with every group smoothed by random scales, its vectors, the groups, and what the pass did."""
    program = prepared(model, args, kwargs)
    groups, reasons = find_groups(program, find_linears(program, OPTIONS.w8a8))
    vectors = random_vectors(program, groups)
    found = OPTIONS.with_calibration({}, frozenset(g.site for g in groups), reasons)
    result = run_pass(program, load_pass("smooth"), found.w8a8)
    return program, vectors, groups, result


def run(model, program, vectors, args):
    evaluate = Evaluator(WithVectors(ModuleTensors(model), vectors), merged_constants({"one": program}))
    weights = {name: evaluate(e.expr, e.prefix) for name, e in weight_plan({"one": program}).items()}
    return compile_program(program, weights, torch.device("cpu"), None, ())(*args)


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(style=zoo.styles(depth=2))
def test_a_smoothed_model_is_the_same_function_to_float64_rounding(style):
    model = zoo.build(style).double()
    args = tuple(t.double() if t.is_floating_point() else t for t in zoo.example(style))
    program, vectors, groups, result = smoothed(model, args)
    assert groups  # the input of the feed-forward is a norm in every style
    assert result.rewritten > 0
    found, expected = run(model, program, vectors, args), model(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) < 1e-12
    wrong = {k: torch.ones_like(v) if k.endswith(".unsmooth") else v for k, v in vectors.items()}
    assert difference(run(model, program, wrong, args)[0], expected[0]) > 1e-6  # the scales are there, on both sides


@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(style=zoo.styles(depth=2))
def test_later_passes_find_as_many_sites_as_without(style):
    model, args = zoo.build(style), zoo.example(style)
    counts = []
    for sites in (set(), {g.site for g in smoothed(model, args)[2]}):
        program = capture(model, args)
        normalize(program)
        results = run_passes(program, OPTIONS.with_calibration({}, frozenset(sites), {}))
        found = {r.name: (r.rewritten, sorted(x.site for x in r.rewrites)) for r in results}
        assert bool(found["smooth"][0]) == bool(sites)
        counts.append({name: count for name, count in found.items() if name != "smooth"})
    assert counts[0] == counts[1]


def test_before_and_after(shown):
    style = zoo.Style(cross=True)
    sites = {"blocks:attn.qkv.to_q", "blocks:attn.to_out"}
    shown("smooth", zoo.build(style), zoo.example(style), "smooth", smoothed=sites)


def test_in_bf16_no_weight_loses_a_bit(wan, wan_call):
    model = wan().bfloat16()
    program, vectors, _, _ = smoothed(model, (), wan_call(dtype=torch.bfloat16))
    evaluate = Evaluator(WithVectors(ModuleTensors(model), vectors), program.constants)
    weights = program.graphs["blocks"].weights
    seen = 0
    for name, expr in weights.items():
        if isinstance(expr, Mul) and isinstance(expr.by, Load) and name.endswith("smooth_weight"):
            scaled, plain = evaluate(expr, "blocks.1."), evaluate(expr.of, "blocks.1.")
            s = vectors["blocks.1." + expr.by.name[1:]]
            assert torch.equal(scaled.float() / s, plain.float())
            seen += 1
    assert seen >= 3


# -------------------------------------------------------------------------------------------- where it goes, and not


def folds(model, args):
    program = prepared(model, args)
    sub = program.graphs["blocks"]
    linears = [n for n in sub.graph.nodes if is_op(n, aten.linear.default)]
    return {str(n.args[1].target): fold_of(n, sub) for n in linears}


def test_norms_and_attentions_take_scales_and_gelu_does_not():
    style = zoo.Style(cross=True)
    found = folds(zoo.build(style), zoo.example(style))
    assert found.pop("stream.mlp.down.weight") == NO_PRODUCER
    assert found.pop("cross_attn.kv.to_k_to_v.weight") == NO_PRODUCER  # the text comes from outside
    attention = {name for name, fold in found.items() if fold.attention is not None}
    assert attention == {"attn.to_out.weight", "cross_attn.to_out.weight"}
    assert set(found) - attention == {
        "attn.qkv.to_q_to_k_to_v.weight",
        "cross_attn.to_q.weight",
        "stream.mlp.up.weight",
    }


def test_linears_that_share_an_input_share_a_scale():
    style = zoo.Style(mlp="silu_glu")
    model, args = zoo.build(style), zoo.example(style)
    program, _, groups, _ = smoothed(model, args)
    (pair,) = [g for g in groups if len(g.linears) == 2]
    assert {s.site for s in pair.linears} == {"blocks:stream.mlp.gate", "blocks:stream.mlp.up"}
    weights = program.graphs["blocks"].weights
    by = {weights[f"stream.mlp.{name}.smooth_weight"].by for name in ("gate", "up")}
    assert by == {pair.fold.vector("smooth")}


def test_of_grouped_heads_v_takes_no_scale():
    style = zoo.Style(num_kv_heads=1)
    found = folds(zoo.build(style), zoo.example(style))
    assert found["attn.to_out.weight"] == "a head of v serves several heads of q"


def test_only_v_is_scaled_in_a_fused_projection():
    style = zoo.Style()
    model, args = zoo.build(style), zoo.example(style)
    program, _, _, _ = smoothed(model, args)
    weights = program.graphs["blocks"].weights
    expr = weights["attn.qkv.to_q_to_k_to_v.smooth_less_weight"]
    assert isinstance(expr, Cat)  # of the smoothed weight: q and k as they were, v scaled
    first, last = expr.of
    assert isinstance(first, Slice)
    assert (first.start, first.stop) == (0, 2 * style.dim)
    assert isinstance(last, Mul)
    assert isinstance(last.by, Reshape)
    bias = weights["attn.qkv.to_q_to_k_to_v.less_bias"]
    assert [isinstance(e, Mul) for e in bias.of] == [False, False, True]


class Read(nn.Module):
    """The normed value is used beside the linear."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.norm, self.linear, self.other = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        n = self.norm(x)
        x = x + (x.sin() * 0.1).cos().tanh().sigmoid() * 0.1  # a block is of eight nodes at least
        if self.where == "norm":
            return x + self.linear(n * 2.0 + x[:, :1]) + n
        if self.where == "input":
            return x + self.linear(n) * n.sigmoid()
        if self.where == "shift":
            return x + self.linear(n + x.sin()) + self.other(x).relu().cos() * 0.5
        return x + self.linear(x.sin()) + self.other(x.cos()) * 0.5


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("norm", NO_PRODUCER),
        ("input", "something else than linears reads its input"),
        ("shift", NO_PRODUCER),
        ("nothing", NO_PRODUCER),
    ],
)
def test_what_else_reads_or_makes_the_input_stops_it(where, reason):
    torch.manual_seed(0)
    found = folds(zoo.Stack(lambda: Read(where)).eval(), (torch.randn(2, 6, 32),))
    assert found["linear.weight"] == reason


def test_unasked_sites_say_why(rewrite):
    style = zoo.Style()
    done = rewrite(zoo.build(style), zoo.example(style), until="smooth")
    shown = done.results["smooth"]  # with its reasons, though nothing was rewritten
    assert shown.sites == sum(count for _, _, count in shown.skipped) > 0
    assert {reason for _, reason, _ in shown.skipped} == {"the linear stays wide: switched off in the recipe"}
    program = prepared(zoo.build(style), zoo.example(style))
    given = OPTIONS.with_calibration({}, frozenset(), {"blocks:attn.to_out": "it does not help"}).w8a8
    result = run_pass(program, load_pass("smooth"), given)
    assert ("blocks:attn.to_out", "it does not help", 2) in result.skipped
    assert {r for _, r, _ in result.skipped} == {"it does not help", "calibration did not ask for it"}


def test_what_is_smoothed_is_quantized_from_the_scaled_weight():
    style = zoo.Style()
    program, _, _, _ = smoothed(zoo.build(style), zoo.example(style))
    run_pass(program, load_pass("w8a8"), OPTIONS.w8a8)
    weights = program.graphs["blocks"].weights
    data = weights["stream.mlp.up.smooth_int8_weight"]
    assert isinstance(data, Quantize)
    assert isinstance(data.of, Mul)
