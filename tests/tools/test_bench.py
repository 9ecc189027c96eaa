"""Timing an engine: what is timed, how it adds up, where the record goes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.capture.export import capture
from turbocompile.cli import main
from turbocompile.errors import RecipeError, UnsupportedError
from turbocompile.recipe.schema import Recipe, load_recipe
from turbocompile.report.timings import Bench
from turbocompile.runtime.engine import load
from turbocompile.runtime.timing import time_attentions
from turbocompile.tools.bench import bench, bench_path, example, read_record, record_path, save_record

EXAMPLES = Path(__file__).parents[2] / "examples"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "engine"
    optimize_recipe(load_recipe(EXAMPLES / "wan-tiny.yaml", ["target=cpu"]), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def found(folder) -> Bench:
    return bench(load(folder, device="cpu"), calls=3)


def test_every_operation_of_the_report_is_timed_but_those_folded_at_load(folder, found):
    """The same rows, counts and names as the report's; what is missing is made of constants alone (tables)."""
    costs = {(op.graph, op.name, op.where, op.shapes): op.count for op in load(folder).report.ops}
    timed = {(op.graph, op.name, op.where, op.shapes): op.count for op in found.ops}
    assert timed.items() <= costs.items()
    assert {"aten.linear", "turbocompile.adaln", "aten.scaled_dot_product_attention"} <= {op.name for op in found.ops}
    large = [op for op in load(folder).report.ops if op.flops > 1e6]
    assert large
    assert {(op.graph, op.name, op.where, op.shapes) for op in large} <= timed.keys()


def test_times_are_of_the_whole_forward(found):
    """Sum and forward are of one machine a moment apart: within a factor of three even where it is busy."""
    assert found.seconds > 0
    assert 1 / 3 < sum(op.seconds for op in found.ops) / found.seconds < 3
    assert [op.seconds for op in found.ops] == sorted((op.seconds for op in found.ops), reverse=True)
    assert (found.ungraphed, found.launch, found.peak) == (None, None, None)


def test_each_attention_is_timed_by_its_site(folder):
    program = next(iter(load(folder).programs.values()))
    times = time_attentions(program, torch.device("cpu"))
    assert list(times) == ["blocks:attn1", "blocks:attn2"]
    assert all(seconds > 0 for seconds in times.values())


def test_expanded_operands_are_timed_too():
    class Grouped(torch.nn.Module):
        def forward(self, q, k):
            return torch.nn.functional.scaled_dot_product_attention(q, k.expand(1, 2, 5, 8), k.expand(1, 2, 5, 8))

    program = capture(Grouped(), (torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)))
    assert list(time_attentions(program, torch.device("cpu"))) == ["shell:"]


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 5, 5, dtype=torch.bool), torch.zeros(5, 5)])
def test_masks_are_timed_as_masks(mask):
    class Masked(torch.nn.Module):
        def forward(self, q, mask):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)

    program = capture(Masked(), (torch.randn(1, 2, 5, 8), mask))
    assert list(time_attentions(program, torch.device("cpu"))) == ["shell:"]


def test_the_inputs_are_what_the_program_takes(folder):
    program = next(iter(load(folder).programs.values()))
    tensors = example(program, torch.device("cpu"))
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [(i.shape, i.dtype) for i in program.signature.inputs]
    assert all(torch.equal(a, b) for a, b in zip(tensors, example(program, torch.device("cpu")), strict=True))


def test_the_record_comes_back_and_the_folder_stays_as_it_was(folder, found, cache):
    before = sorted(p for p in folder.rglob("*"))
    _, path = bench_path(folder, calls=1, device="cpu")
    digest = json.loads((folder / "manifest.json").read_text())["digest"]
    assert path == record_path("transformer", digest)
    assert cache in path.parents
    assert sorted(p for p in folder.rglob("*")) == before
    save_record(replace(found, calls=77), "transformer", digest)
    assert read_record("transformer", digest) == replace(found, calls=77)
    assert read_record("transformer_2", digest) is None
    path.write_text("{}")
    assert read_record("transformer", digest) is None


def test_the_command_times_an_engine_and_explain_shows_it(folder):
    made = CliRunner().invoke(main, ["bench", str(folder), "--calls", "1", "--device", "cpu"])
    assert made.exit_code == 0, made.output
    assert "Operations, each timed alone" in made.stdout
    shown = CliRunner().invoke(main, ["explain", str(folder)])
    assert "Operations, each timed alone" in shown.stdout


def test_the_command_builds_the_engine_of_a_recipe():
    arguments = ["bench", str(EXAMPLES / "wan-tiny.yaml"), "--set", "target=cpu", "--calls", "1", "--json"]
    made = CliRunner().invoke(main, arguments)
    assert made.exit_code == 0, made.output
    assert Bench.from_dict(json.loads(made.stdout)).ops


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "1x1x1"], "the engine has no shape '1x1x1'; it has 256x256x9x1"),
        (["--module", "vae"], "the engine has no module 'vae'; it has transformer"),
        (["--set", "target=cpu"], "--set changes a recipe"),
    ],
)
def test_what_it_refuses(folder, arguments, said):
    made = CliRunner().invoke(main, ["bench", str(folder), "--device", "cpu", *arguments])
    assert made.exit_code == 2
    assert said in made.stderr


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        bench_path(tmp_path / "none.yaml")


def test_another_backend_is_refused(folder):
    engine = load(folder)
    engine.backend = "onnx"
    with pytest.raises(UnsupportedError, match="backend triton"):
        bench(engine)


class TestCuda:
    pytestmark = on_gpu

    def test_a_gpu_has_all_figures(self, tmp_path):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none"])
        optimize_recipe(recipe, tmp_path / "engine")
        engine = load(tmp_path / "engine", device="cuda")
        found = bench(engine)
        assert 0 < found.seconds < found.ungraphed
        assert found.launch < 1e-3
        assert found.peak > sum(t.nbytes for t in engine.weights.values())
        # Alone and in a row the operations take what they take in the forward, but for caches and gaps.
        assert 0.5 < sum(op.seconds for op in found.ops) / found.seconds < 1.5
        assert all(op.seconds > 0 for op in found.ops)

    @pytest.mark.parametrize(
        ("attention", "kinds"),
        [
            ("native", ["native", "native"]),
            ("sage", ["sage", "sage"]),
            ({"kind": "sla", "allow_untuned": True}, ["sla", None]),
        ],
        ids=str,
    )
    def test_a_build_on_a_gpu_runs_and_times_each_attention(self, tmp_path, attention, kinds):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none"])
        passes = replace(recipe.passes, attention=Recipe.from_dict(
            {"model": {"preset": "wan-tiny"}, "passes": {"attention": attention}}
        ).passes.attention)  # fmt: skip
        report = optimize_recipe(replace(recipe, passes=passes), tmp_path / "engine")
        assert report.measured_on == torch.cuda.get_device_name()
        assert [a.role for a in report.attention] == ["self", "cross"]
        for site, kind in zip(report.attention, kinds, strict=True):
            assert kind is None or site.kind == kind
            assert site.seconds > site.cost.seconds(report.gpu())  # a floor
