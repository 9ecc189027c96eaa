"""Calibration: each linear is measured in each layer, and a layer that 8 bits hurt keeps the model's dtype there."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from asked import asked
from hypothesis import given
from hypothesis import strategies as st
from turbocompile.kernels import ops

import turbocompile
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.ir.program import SHELL, is_op
from turbocompile.ir.site_errors import LayerError, SiteError, ranges
from turbocompile.numerics.calibrate import calibrate
from turbocompile.numerics.errors import Error, compare
from turbocompile.numerics.inputs import Inputs, random_inputs
from turbocompile.numerics.layer_values import each_layer
from turbocompile.numerics.linear_errors import Linear
from turbocompile.numerics.plan import MAX_KINDS, Measured, decide, few_kinds
from turbocompile.rewrite.normalize import normalize

STYLE = zoo.Style(depth=4, batch=1)
DOWN = "blocks:stream.mlp.down"
INT8 = {"passes": {"w8a8": "int8"}}
ALL = {"passes": {"w8a8": {"format": "int8", "budget": 1}}}  # whatever it costs


def outlier(block: torch.nn.Module, factor: float = 200.0) -> None:
    """One channel that the block's `down` reads becomes large, and its weights small: the same function.

    The scale of a token is then that of one channel, and the others are rounded to few steps.
    """
    block.stream.mlp.up.weight[0] *= factor
    block.stream.mlp.up.bias[0] = factor * 3.0  # far from zero, where GELU is the identity
    block.stream.mlp.down.weight[:, 0] /= factor


@pytest.fixture(scope="module")
def model():
    made = zoo.build(STYLE)
    outlier(made.blocks[2])
    return made


@pytest.fixture(scope="module")
def engine(model):
    return turbocompile.optimize(model, zoo.example(STYLE), recipe=INT8)


def programmed(model):
    program = capture(model, zoo.example(STYLE))
    normalize(program)
    return program


OPTIONS = asked({"w8a8": {"format": "int8"}})


def ran(program, graph):
    return [c.prefix for c in program.calls() if c.graph == graph]


def count(program, graph, op):
    return sum(is_op(n, op) for n in program.graphs[graph].graph.nodes)


# --------------------------------------------------------------------------------------------------------- measuring


def test_a_sites_error_in_a_layer_is_that_of_the_linear_on_the_input_it_has_there(model):
    program = programmed(model)
    inputs = Inputs([random_inputs(program, seed) for seed in (0, 1)])
    plan = calibrate(program, ModuleTensors(model), OPTIONS, inputs)
    (row,) = [s for s in plan.sites if s.site == DOWN]
    for i, block in enumerate(model.blocks):
        expected = []
        for call in inputs.calls:
            seen = []
            hook = block.stream.mlp.down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            model(*call)
            hook.remove()
            linear = block.stream.mlp.down
            data = (*ops.quantize(seen[0], "int8"), *ops.quantize(linear.weight, "int8"))
            found = ops.w8a8_linear(*data, linear.bias, "int8", torch.float32)
            expected.append(compare(found, linear(seen[0])).rel_l1)
        assert row.layers[i].layer == f"blocks.{i}"
        # Another order of the sums moves a value by a rounding, and now and then across a tie of the quantization.
        assert row.layers[i].error["rel_l1"] == pytest.approx(max(expected), rel=1e-2)


def test_the_truth_of_each_layer_is_the_models(model):
    """Also of a later layer, whose input all layers before it have made."""
    program = programmed(model)
    call = random_inputs(program)
    (output,) = (n.name for n in program.graphs["blocks"].outputs()[:1])
    seen = []
    hooks = [b.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0])) for b in model.blocks]
    model(*call)
    for hook in hooks:
        hook.remove()
    layers = list(each_layer(program, ModuleTensors(model), Inputs([call]), {}))
    assert [layer.name for layer in layers] == [f"blocks.{i}" for i in range(4)]
    for layer, expected in zip(layers, seen, strict=True):
        assert set(layer.values[0]) == {n.name for n in program.graphs["blocks"].outputs()}  # the rest was freed
        assert compare(layer.values[0][output], expected).max_rel < 1e-5


def test_the_weights_of_one_layer_are_read_at_a_time(model):
    class Source(ModuleTensors):
        def __init__(self, module):
            super().__init__(module)
            self.read = []

        def get(self, name):
            self.read.append(name)
            return super().get(name)

    program = programmed(model)
    source = Source(model)
    calibrate(program, source, OPTIONS, Inputs([random_inputs(program, seed) for seed in range(3)]))
    blocks = [name.split(".")[1] for name in source.read if name.startswith("blocks.")]
    assert blocks == sorted(blocks)  # a layer is done before the next one begins
    names = [name for name in source.read if name.startswith("blocks.")]
    assert len(names) == len(set(names))  # and none of its weights is read twice


# ---------------------------------------------------------------------------------------------------------- deciding


def test_only_the_layer_that_8_bits_hurt_keeps_its_dtype(model, engine):
    (program,) = engine.programs.values()
    assert set(program.graphs) == {SHELL, "blocks", "blocks_1"}
    assert ran(program, "blocks") == ["blocks.0.", "blocks.1.", "blocks.3."]
    assert ran(program, "blocks_1") == ["blocks.2."]
    assert count(program, "blocks", ops.w8a8_linear) == 4
    assert count(program, "blocks_1", ops.w8a8_linear) == 3
    assert count(program, "blocks_1", torch.ops.aten.linear.default) == 1
    done = engine.report.passes["w8a8"]
    assert done.rewritten == zoo.expected_sites(model)["w8a8"] - 1
    (skip,) = [s for s in done.skipped if s.site.startswith("blocks")]
    assert (skip.site, skip.count) == ("blocks_1:stream.mlp.down", 1)
    assert "in blocks 2 is over its budget of 0.02" in skip.reason


def test_every_pass_finds_the_same_sites_in_the_split_graphs(model, engine):
    plain = turbocompile.optimize(model, zoo.example(STYLE), recipe=ALL)
    assert next(iter(plain.programs.values())).graphs.keys() == {SHELL, "blocks"}
    for name, done in plain.report.passes.items():
        less = {"w8a8": 1, "gelu_quant": 1}.get(name, 0)  # the site that stays, and the quantize that it has not
        assert engine.report.passes[name].rewritten == done.rewritten - less


def test_the_engine_answers_better_than_with_that_layer_in_8_bits(model, engine):
    args = zoo.example(STYLE, seed=5)
    truth = model(*args)
    plain = turbocompile.optimize(model, zoo.example(STYLE), recipe=ALL)
    found, worse = compare(engine(*args), truth).rel_l1, compare(plain(*args), truth).rel_l1
    assert found < worse
    assert found < 2 * 0.02  # four layers of sites within their budget


def test_a_split_engine_is_written_and_loaded_to_the_bit(engine, tmp_path):
    args = zoo.example(STYLE, seed=3)
    loaded = turbocompile.load(engine.save(tmp_path / "engine"))
    assert torch.equal(loaded(*args), engine(*args))
    assert loaded.report.passes == engine.report.passes


def test_the_report_has_a_row_a_site_and_the_json_every_layer(engine):
    (row,) = [e for e in engine.report.passes["w8a8"].site_errors if e.site == DOWN]
    assert engine.report.passes["w8a8"].site_errors[0] == row  # the farthest off first
    assert (row.worst, row.computed_in("bfloat16")) == ("blocks.2", "8 bits, bfloat16 in blocks 2")
    assert row.error == row.layers[2].error
    assert row.median < row.budget < row.error["rel_l1"]
    data = engine.report.to_dict()["passes"]["w8a8"]
    assert data["inputs"] == "random inputs"
    (layers,) = [e["layers"] for e in data["site_errors"] if e["site"] == DOWN]
    assert [layer["quantized"] for layer in layers] == [True, True, False, True]
    assert [layer["layer"] for layer in layers] == [f"blocks.{i}" for i in range(4)]
    text = str(engine.report)
    assert "w8a8 in every layer on random inputs" in text
    assert "blocks 2" in text
    assert json.loads(json.dumps(data)) == data
    quantized = [e["rel_l1"] for s in data["site_errors"] for e in s["layers"] if e["quantized"]]
    assert data["error"]["rel_l1"] == max(quantized) <= 0.02


def test_with_layers_first_the_first_layer_stands_for_all(model):
    recipe = {"passes": {"w8a8": {"format": "int8", "layers": "first"}}}
    engine = turbocompile.optimize(model, zoo.example(STYLE), recipe=recipe)
    (program,) = engine.programs.values()
    assert set(program.graphs) == {SHELL, "blocks"}
    assert not any(e.layers for e in engine.report.passes["w8a8"].site_errors)
    assert "in the first layer" in str(engine.report)


def test_nothing_is_measured_where_nothing_is_quantized(model):
    engine = turbocompile.optimize(model, zoo.example(STYLE))  # a CPU has no 8-bit linears
    assert "calibrate" not in engine.report.stages


def sites(count):
    graph = programmed(zoo.build(STYLE)).graphs["blocks"]
    node = next(iter(graph.graph.nodes))
    return [Linear(f"blocks:s{i}", "blocks", "", "", node, graph) for i in range(count)]


def error(rel_l1):
    return Error(1.0, rel_l1, 0.0, 0.0)


def test_where_too_many_kinds_of_a_block_would_arise_a_site_is_kept_in_all_layers(model):
    program = programmed(zoo.build(zoo.Style(depth=5, batch=1)))
    linears = sites(4)
    over = [{0}, {0, 1}, {0, 2}, {3}, set()]  # five kinds of layers
    errors = {
        s.site: {f"blocks.{i}.": error(0.03 if k in over[i] else 0.01) for i in range(5)} for k, s in enumerate(linears)
    }
    plan = decide(program, linears, Measured(errors, {s.site: 0.02 for s in linears}), "random inputs")
    graphs = set(plan.names["blocks"].values())
    assert len(graphs) <= MAX_KINDS
    (row,) = [s for s in plan.sites if s.site == "blocks:s0"]
    assert not row.kept
    assert "in blocks 0-2, and wide in all layers, since more than 4 kinds" in row.note
    assert {f"{graph}:s0" for graph in graphs} <= set(plan.keep)
    (row,) = [s for s in plan.sites if s.site == "blocks:s3"]
    assert [e.quantized for e in row.layers] == [True, True, True, False, True]
    assert not row.note


@given(st.lists(st.frozensets(st.sampled_from("abcdef")), min_size=1, max_size=12))
def test_few_kinds_keep_what_must_be_kept_and_change_nothing_where_they_are_few(kinds):
    wide = {f"blocks.{i}.": kind for i, kind in enumerate(kinds)}
    found, everywhere = few_kinds(wide)
    assert len(set(found.values())) <= MAX_KINDS
    assert all(found[p] == wide[p] | everywhere for p in wide)
    if len(set(kinds)) <= MAX_KINDS:
        assert not everywhere


def test_a_figure_that_is_no_number_keeps_the_site_and_leaves_no_row(model):
    program = programmed(model)
    linears = sites(1)
    errors = {linears[0].site: {f"blocks.{i}.": error(float("inf")) for i in range(4)}}
    plan = decide(program, linears, Measured(errors, {linears[0].site: 0.02}), "random inputs")
    assert plan.keep
    assert plan.sites == ()


# -------------------------------------------------------------------------------------------------------------- data


def test_layers_are_said_in_short():
    assert ranges([f"blocks.{i}" for i in (0, 3, 4, 5, 9)]) == "blocks 0, 3-5, 9"
    assert ranges(["a.0", "b.c.1", "b.c.2"]) == "a 0, b.c 1-2"
    assert ranges(["middle"]) == "middle"


def test_rows_survive_json_and_damaged_ones_are_refused():
    figures = {"cosine": 0.99, "rel_l1": 0.03, "max_abs": 1.0}
    row = SiteError("blocks:a", figures, 0.02, (LayerError("blocks.0", figures, False),), "a note")
    data = json.loads(json.dumps(row.to_dict()))
    assert SiteError.from_dict(data) == row
    for damage in ({"rel_l1": float("nan")}, {"quantized": "yes"}):
        with pytest.raises(ValueError):
            SiteError.from_dict({**data, "layers": [{**data["layers"][0], **damage}]})
