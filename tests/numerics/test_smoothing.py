"""Scales of SmoothQuant: powers of two, chosen where they help, and what an engine makes of them."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from asked import asked
from hypothesis import given
from hypothesis import strategies as st

import turbocompile
from turbocompile.errors import RecipeError
from turbocompile.ir.site_errors import LayerError, SiteError
from turbocompile.numerics.errors import compare
from turbocompile.numerics.smoothing import LEAST, MARGIN, OCTAVES, best_scale, scale_of
from turbocompile.recipe.schema import Recipe

STYLE = zoo.Style(depth=3, batch=1, head_dim=32)
UP = "blocks:stream.mlp.up"
magnitudes = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=16)


# ------------------------------------------------------------------------------------------------------------- scales


@given(x=magnitudes, alpha=st.floats(0, 1), data=st.data())
def test_a_scale_is_a_power_of_two_and_one_where_a_channel_is_zero(x, alpha, data):
    weight = data.draw(st.lists(st.floats(0, 1e6, width=32), min_size=len(x), max_size=len(x)))
    s = scale_of(torch.tensor(x), torch.tensor(weight), alpha)
    octaves = torch.log2(s)
    assert torch.equal(octaves, octaves.round())
    assert octaves.abs().max() <= OCTAVES
    for value, a, b in zip(s, x, weight, strict=True):
        assert value == 1 or (a > 0 and b > 0)


def test_alpha_says_how_much_moves_into_the_weight():
    x, weight = torch.tensor([64.0, 1.0, 1.0, 1.0]), torch.ones(4)
    none, half, all_ = (scale_of(x, weight, alpha) for alpha in (0.0, 0.5, 1.0))
    assert torch.equal(none, torch.ones(4))
    assert float(half[0] / half[1]) == 8  # sqrt(64)
    assert float(all_[0] / all_[1]) == 64


def best(errors, top, budget=0.02, alphas=(0.3, 0.5, 0.7)):
    """The alpha chosen, where the alphas give these errors and none gives `top`."""
    given_ = iter(errors)
    largest = (torch.tensor([64.0, 1.0]), torch.ones(2))
    found = best_scale(*largest, alphas, {"a": top}, budget, lambda s: {"a": next(given_)})
    assert (found.alpha is None) == torch.equal(found.s, torch.ones(2))
    return found.alpha


def test_the_best_alpha_is_kept_where_it_helps():
    assert best([0.015, 0.010, 0.012], 0.018) == 0.5
    assert best([0.018 * (1 - MARGIN) + 1e-5] * 3, 0.018) is None  # within the budget already, and no tenth better
    assert best([0.019, 0.03, 0.03], 0.0201) == 0.3  # over it, and under it now
    assert best([0.021, 0.021, 0.021], 0.04) is None  # it stays wide, so it may stay as it is
    assert best([0.02 * (1 - LEAST / 2)] * 3, 0.02001) is None  # by a hair
    assert best([float("inf")] * 3, 0.01) is None


def test_several_linears_are_judged_by_the_worst():
    found = best_scale(
        torch.tensor([64.0, 1.0]),
        torch.ones(2),
        (0.5,),
        {"a": 0.01, "b": 0.019},
        0.02,
        lambda s: {"a": 0.018, "b": 0.01},
    )
    assert found.alpha is None


def test_the_recipe_says_what_is_tried():
    assert asked({"w8a8": {"smooth": "off"}}).w8a8.alphas == ()
    assert asked().w8a8.alphas == (0.3, 0.5, 0.7)
    assert asked({"w8a8": {"smooth": "0.5"}}).w8a8.alphas == (0.5,)
    for text in ("1.5", "-0.1", "some", "nan"):
        with pytest.raises(RecipeError, match="smooth must be auto, off or a number from 0 to 1"):
            recipe(text)
    assert recipe(0.25).passes.w8a8.smooth == "0.25"
    assert recipe("off").passes.w8a8.smooth == "off"


def recipe(smooth):
    return Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": "cpu", "passes": {"w8a8": {"smooth": smooth}}})


# ------------------------------------------------------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def model():
    """The feed-forward of the second block gets three channels that are far larger than the rest."""
    made = zoo.build(STYLE)
    with torch.no_grad():
        block = made.blocks[1].stream
        block.modulation.table[0, 4, :3] = 60.0  # the scale of the norm
        block.mlp.up.weight[:, :3] /= 60.0
    return made


def optimized(model, **w8a8):
    calls = [zoo.example(STYLE, seed) for seed in range(3)]
    options = {"passes": {"w8a8": {"format": "int8", **w8a8}}}
    return turbocompile.optimize(model, zoo.example(STYLE), recipe=options, calibration=calls)


@pytest.fixture(scope="module")
def engine(model):
    return optimized(model)


def row(engine, site=UP):
    return next(e for e in engine.report.passes["w8a8"].site_errors if e.site == site)


def test_smoothing_brings_a_site_under_its_budget_that_would_stay_wide(model, engine):
    without = row(optimized(model, smooth="off"))
    assert [e.quantized for e in without.layers] == [True, False, True]
    found = row(engine)
    assert all(e.quantized for e in found.layers)
    assert found.layers[1].alpha is not None
    assert found.layers[1].unsmoothed == pytest.approx(without.layers[1].error["rel_l1"], rel=1e-6)
    assert found.layers[1].error["rel_l1"] < 0.02 < found.layers[1].unsmoothed
    assert len(next(iter(engine.programs.values())).graphs) == 2


def test_the_smoothed_engine_is_nearer_to_the_model(model, engine):
    args = zoo.example(STYLE, seed=7)
    worse = optimized(model, smooth="off", budget=1.0)
    truth = model(*args)
    assert compare(engine(*args), truth).rel_l1 < 0.8 * compare(worse(*args), truth).rel_l1


def test_every_layer_has_its_own_scale(model, engine):
    sub = next(iter(engine.programs.values())).graphs["blocks"]
    name = next(n for n in sub.weights if n.endswith("mlp.up.unsmooth"))
    scales = [engine.weights[f"blocks.{i}.{name}"] for i in range(3)]
    assert len({tuple(s.tolist()) for s in scales}) > 1
    assert scales[1][:3].max() < scales[1][3:].min()
    assert all(torch.equal(torch.log2(s), torch.log2(s).round()) for s in scales)


def test_it_is_written_loaded_and_reported(engine, tmp_path):
    args = zoo.example(STYLE, seed=7)
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    assert torch.equal(loaded(*args), engine(*args))
    assert loaded.report.passes == engine.report.passes
    done = engine.report.passes["smooth"]
    assert (done.kind, done.rewritten > 0) == ("exact", True)
    assert done.error["rel_l1"] < 1e-6
    assert "no producer to fold a scale into" in {s.reason for s in done.skipped}
    text = " ".join(str(engine.report).split())
    assert "smoothed (alpha" in text
    assert "smoothed (alpha" in engine.report.to_html()


def test_a_fixed_alpha_is_the_one_that_is_tried(model):
    found = {e.alpha for s in optimized(model, smooth=0.6).report.passes["w8a8"].site_errors for e in s.layers}
    assert found <= {None, 0.6}
    assert 0.6 in found


def test_on_random_inputs_nothing_is_smoothed(model):
    options = {"passes": {"w8a8": {"format": "int8", "smooth": 0.5}}}
    engine = turbocompile.optimize(model, zoo.example(STYLE), recipe=options)
    assert engine.report.passes["smooth"].rewritten == 0
    assert any("smooth: 0.5 needs recorded inputs" in w for w in engine.report.warnings)


@pytest.mark.parametrize("format", ["fp8", "int8_block"])
def test_every_format_can_be_smoothed(format):
    style = zoo.Style(depth=2, batch=1, head_dim=64)
    made = zoo.build(style)
    with torch.no_grad():
        made.blocks[1].stream.modulation.table[0, 4, :3] = 60.0
        made.blocks[1].stream.mlp.up.weight[:, :3] /= 60.0
    calls = [zoo.example(style, seed) for seed in range(2)]
    options = {"passes": {"w8a8": {"format": format, "budget": 0.05}}}
    engine = turbocompile.optimize(made, zoo.example(style), recipe=options, calibration=calls)
    errors = row(engine).layers
    assert all(e.error["rel_l1"] <= 0.05 for e in errors if e.quantized)
    if format == "int8_block":  # FP8 has a scale of its own in each value's exponent
        assert errors[1].alpha is not None


def test_smoothing_survives_json_and_damaged_rows_are_refused():
    figures = {"cosine": 0.99, "rel_l1": 0.01, "max_abs": 1.0}
    layers = (LayerError("blocks.0", figures, True), LayerError("blocks.1", figures, True, 0.5, 0.03))
    one = SiteError("blocks:a", figures, 0.02, layers)
    data = json.loads(json.dumps(one.to_dict()))
    assert SiteError.from_dict(data) == one
    assert one.why == "smoothed (alpha 0.5) in blocks 1: 0.0300 to 0.0100"
    for damage in ({"alpha": float("nan")}, {"unsmoothed": None}):
        with pytest.raises(ValueError):
            SiteError.from_dict({**data, "layers": [{**data["layers"][1], **damage}]})


@pytest.mark.parametrize("attention", ["native", "sage"])
def test_the_output_of_attention_is_smoothed_through_v(attention):
    style = zoo.Style(depth=2, batch=1, head_dim=64)
    made = zoo.build(style)
    with torch.no_grad():
        for block in made.blocks:
            block.attn.qkv.to_v.weight[:3] *= 100.0
            block.attn.qkv.to_v.bias[:3] *= 100.0
            block.attn.to_out.weight[:, :3] /= 100.0
    calls = [zoo.example(style, seed) for seed in range(2)]
    options = {"passes": {"w8a8": "int8", "attention": attention}}
    engine = turbocompile.optimize(made, zoo.example(style), recipe=options, calibration=calls)
    found = row(engine, "blocks:attn.to_out")
    assert all(e.alpha is not None and e.error["rel_l1"] <= 0.02 < e.unsmoothed for e in found.layers)
    assert engine.report.passes["smooth"].error["rel_l1"] < 1e-6  # exact, whatever the attention's own 8 bits do
    args = zoo.example(style, 5)
    assert compare(engine(*args), made(*args)).rel_l1 < 0.05
