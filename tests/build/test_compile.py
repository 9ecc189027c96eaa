"""Recipes become engines: from memory and from folders, at several shapes, with two experts, dry, and interrupted."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from asked import sage_speeds

from turbocompile import hardware
from turbocompile.build import from_recipe, measure
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError
from turbocompile.recipe.schema import Recipe, load_recipe
from turbocompile.report import attentions
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import read_manifest
from turbocompile.tools.verify_folder import verify_folder
from turbocompile.wan.example import write_example
from turbocompile.wan.source import open_source
from turbocompile.wan.transformer import BlocksFrom

SMALL = {"height": 64, "width": 64, "num_frames": 5}


def recipe(**changes):
    fields = {
        "model": {"preset": "wan-tiny", "weights": "synthetic", "seed": 0},
        "target": "cpu",
        "shapes": [SMALL],
        "sampler": {"kind": "rcm", "steps": 4},
    }
    return Recipe.from_dict({**fields, **changes})


def call(engine, shape=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    program = list(engine.programs.values())[shape]
    made = {}
    for i in program.signature.inputs:
        random = torch.rand(i.shape, generator=g) * 999 if i.cast else torch.randn(i.shape, generator=g)
        made[i.path] = random.to(i.dtype)
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "engine"
    report = optimize_recipe(recipe(), out)
    return out, report


def test_the_engine_answers_as_the_source_model_does(built):
    out, _ = built
    engine = load(out)
    model = open_source(recipe()).transformers["transformer"].load()
    inputs = call(engine)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    found = engine(**inputs, return_dict=False)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_report_counts_every_site_of_the_model(built):
    _, report = built
    n = open_source(recipe()).transformers["transformer"].config["num_layers"]
    passes = report.to_dict()["passes"]
    rewritten = {name: row["rewritten"] for name, row in passes.items()}
    assert rewritten["attention"] == rewritten["fuse_qkv"] == rewritten["qk_norm_rope"] == 2 * n
    assert rewritten["adaln"] == 2 * n + 1
    assert rewritten["residual_norm"] == 3 * n
    assert passes["w8a8"]["sites"] == 10 * n + 6
    for row in passes.values():
        assert row["sites"] == row["rewritten"] + sum(s.get("count", 1) for s in row["skipped"])
        assert all(s["reason"] for s in row["skipped"])
        assert (row["error"] is None) == (row["error_reason"] is not None)
        for error in filter(None, (row["error"], row["error_output"])):
            assert set(error) == {"cosine", "rel_l1", "max_abs"}
            assert error["rel_l1"] < 1e-5  # exact rewrites in float32


def test_the_predicted_size_is_the_built_one_within_a_percent(built):
    out, report = built
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    dry = optimize_recipe(recipe(), None, dry_run=True)
    assert dry.predicted_bytes == pytest.approx(size, rel=0.01)
    assert report.engine_bytes == pytest.approx(size, rel=0.01)
    assert dry.engine_bytes is None


def test_verify_finds_the_folder_whole_and_the_numbers_right(built):
    out, _ = built
    checked = verify_folder(out, numeric=True)
    assert checked.good
    assert checked.limit == 1e-4
    assert 0 <= checked.errors["transformer"].max_rel < 1e-5
    assert json.loads(json.dumps(checked.to_dict()))["good"] is True


def test_verify_names_what_was_altered(built, tmp_path):
    out, _ = built
    subprocess.run(["cp", "-r", str(out), str(tmp_path / "engine")], check=True)
    path = next((tmp_path / "engine" / "components" / "vae").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"components/vae/.*was altered"):
        verify_folder(tmp_path / "engine")


def test_the_engine_folder_holds_data_only(built):
    out, _ = built
    kinds = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".html", ".model"}
    manifest = read_manifest(out)
    assert manifest["target"] == "cpu"
    assert set(manifest["modules"]) == {"transformer"}
    assert {"vae", "text_encoder", "tokenizer", "scheduler"} <= set(manifest["components"])
    text = (out / "manifest.json").read_text() + (out / "report.json").read_text()
    assert "/tmp/" not in text


def test_the_printed_graph_of_every_pass_is_there(built):
    out, report = built
    names = {p.stem for p in (out / "graphs").iterdir()}
    assert "transformer-normalize" in names
    assert {f"transformer-{n}" for n, row in report.to_dict()["passes"].items() if row["rewritten"]} <= names
    assert "turbocompile.adaln(" in (out / "graphs" / "transformer-adaln.txt").read_text()


def test_the_same_recipe_gives_the_same_engine_to_the_bit(built, tmp_path):
    out, _ = built
    optimize_recipe(recipe(), tmp_path / "again")
    one, two = (read_manifest(folder) for folder in (out, tmp_path / "again"))
    changing = {"report.json", "report.html"}  # they hold the seconds
    assert {k: v for k, v in one["files"].items() if k not in changing} == {
        k: v for k, v in two["files"].items() if k not in changing
    }


def test_several_shapes_share_the_weights(tmp_path):
    shapes = [SMALL, {**SMALL, "width": 96}, {**SMALL, "num_frames": 9, "batch": 2}]
    optimize_recipe(recipe(shapes=shapes, components="none"), tmp_path / "engine")
    engine = load(tmp_path / "engine")
    assert len(engine.programs) == 3
    model = open_source(recipe()).transformers["transformer"].load()
    for i in range(3):
        inputs = call(engine, i)
        with torch.no_grad():
            expected = model(**inputs, return_dict=False)[0]
        assert (engine(**inputs).sample - expected).abs().max() <= 1e-5 * expected.abs().max()
    shards = list((tmp_path / "engine").glob("weights-*"))
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    # RoPE tables stand beside the parameters; nothing is stored once a shape.
    assert sum(p.stat().st_size for p in shards) < 1.2 * one


@pytest.mark.parametrize(
    ("passes", "limit"),
    [
        # Limits on the relative L1 of the whole answer: the residual stream hides a site's error (0.012, 0.037, 0.04).
        ({"w8a8": "int8"}, 0.012),
        ({"w8a8": "int8_block"}, 0.0135),
        ({"w8a8": "fp8"}, 0.037),
        ({"attention": {"kind": "sage", "pv": "fp16"}}, 0.013),
        ({"attention": {"kind": "sage", "pv": "fp8"}}, 0.04),
        ({"attention": "sage", "w8a8": "int8"}, 0.05),
    ],
    ids=str,
)
def test_quantizing_passes_run_on_the_cpu_where_they_are_named(tmp_path, passes, limit):
    report = optimize_recipe(recipe(passes=passes, components="none"), tmp_path / "engine")
    engine = load(tmp_path / "engine")
    model = open_source(recipe()).transformers["transformer"].load()
    inputs = call(engine)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    error = (engine(**inputs).sample - expected).abs().sum() / expected.abs().sum()
    assert 1e-6 < error < limit
    rows = report.to_dict()["passes"]
    for name in passes:
        assert rows[name]["rewritten"] > 0
        assert 1e-6 < rows[name]["error"]["rel_l1"] < 0.05
    found = verify_folder(tmp_path / "engine", numeric=True)
    assert found.limit is None  # shown, not judged
    assert found.errors["transformer"].rel_l1 > 1e-6


def paying_from(monkeypatch, tokens):
    """On sm90, Sage is twice as fast as SDPA from so many queries and keys on."""
    rows = sage_speeds("fp8", 1, 128, (tokens, tokens, 2.0))
    monkeypatch.setattr(hardware, "_SAGE_SPEEDUP", {"sm90": rows})


def test_what_is_measured_is_what_auto_chose_at_the_engines_shapes(monkeypatch):
    """The twin has 192 tokens, one shape of the engine fewer and one more: only the largest pays."""
    sizes = [SMALL, {"height": 128, "width": 160, "num_frames": 17}]  # 32 and 400 tokens
    made = {"target": "sm90", "shapes": sizes, "components": "none", "passes": {"w8a8": "off"}}
    for tokens, kind in ((300, "sage"), (1000, "native")):
        paying_from(monkeypatch, tokens)
        for shapes in (sizes, sizes[::-1]):
            report = optimize_recipe(recipe(**{**made, "shapes": shapes}), None, dry_run=True)
            done = report.passes["attention"]
            assert (done.rewritten, done.sites) == (4, 4)
            # FP8 and INT8 show as a percent at the site; SDPA in bf16 differs from itself by nothing
            assert (done.error["rel_l1"] > 0.01) == (kind == "sage")
            row = next(a for a in report.attention if a.role == "self")
            assert row.kind == (kind if row.queries == 400 else "native")


def test_the_report_has_a_row_for_each_attention(tmp_path):
    report = optimize_recipe(recipe(components="none"), tmp_path / "engine")
    assert load(tmp_path / "engine").report.attention == report.attention
    rows = [(a.site, a.count, a.kind, a.role, a.queries, a.keys, a.heads, a.head_dim) for a in report.attention]
    assert rows == [
        ("blocks:attn1", 2, "native", "self", 32, 32, 4, 64),
        ("blocks:attn2", 2, "native", "cross", 32, 512, 4, 64),
    ]
    assert {a.why for a in report.attention} == {"8-bit attention does not pay on cpu"}
    assert all(a.seconds is None for a in report.attention)
    assert (report.measured_on, "measure" in report.stages) == ("", False)
    # the same figures as the table of operations has
    costs = {(op.name, op.shapes): op for op in report.ops}
    for a in report.attention:
        op = costs[a.cost.name, a.cost.shapes]
        assert (a.cost.work, a.cost.bytes, a.cost.count) == (op.work, op.bytes, op.count)


def test_the_two_cross_attentions_of_an_image_model_are_two_rows():
    made = recipe(model={"preset": "wan-tiny-i2v-image", "weights": "synthetic"})
    rows = optimize_recipe(made, None, dry_run=True).attention
    assert [a.site for a in rows] == ["blocks:attn1", "blocks:attn2", "blocks:attn2#2"]
    assert [a.role for a in rows] == ["self", "cross", "cross"]
    assert len({a.keys for a in rows}) == 3


def test_an_engine_without_rewrites_says_so_of_its_attentions():
    report = optimize_recipe(recipe(passes={"enabled": False}), None, dry_run=True)
    assert {a.why for a in report.attention} == {"no pass looked at it"}
    report = optimize_recipe(recipe(passes={"attention": {"enabled": False}}), None, dry_run=True)
    assert {a.why for a in report.attention} == {"switched off in the recipe (enabled: false)"}


def test_the_attentions_are_timed_on_the_card_that_the_engine_is_for(tmp_path, monkeypatch):
    asked = []

    def times(program, device):
        asked.append(device.type)
        return {"blocks:attn1": 0.25, "blocks:attn2": 0.125}

    monkeypatch.setattr(measure, "time_attentions", times)
    monkeypatch.setattr(measure, "tune", lambda programs, device: {"linears": {}})  # tests/test_tuning.py
    monkeypatch.setattr(from_recipe, "device_of", lambda target: torch.device("cpu"))  # where weights are computed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    for target, measured in (("sm90", [0.5, 0.25]), ("sm80", [None, None]), ("cpu", [None, None])):
        folder = tmp_path / target
        report = optimize_recipe(recipe(target=target, components="none", verify="off"), folder)
        assert [a.seconds for a in report.attention] == measured
        assert report.measured_on == ("NVIDIA H100 80GB HBM3" if target == "sm90" else "")
        assert [a.seconds for a in load(folder).report.attention] == measured
    assert asked == ["cuda"]

    def out_of_memory(program, device):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(measure, "time_attentions", out_of_memory)
    report = optimize_recipe(recipe(target="sm90", components="none", verify="off"), tmp_path / "full")
    assert report.attention[0].seconds is None
    assert "too little free memory" in report.warnings[-1]


def test_an_untuned_sla_is_refused_site_by_site_unless_it_is_allowed(tmp_path):
    report = optimize_recipe(recipe(passes={"attention": "sla"}), None, dry_run=True)
    assert ["no SLA" in w for w in report.warnings] == [True]
    refused = report.to_dict()["passes"]
    assert refused["attention"]["rewritten"] == refused["attention"]["sites"] or any(
        "allow_untuned" in s["reason"] for s in refused["attention"]["skipped"]
    )
    assert (refused["sla"]["rewritten"], refused["sla"]["skipped"][0]["count"]) == (0, 2)
    allowed = {"attention": {"kind": "sla", "allow_untuned": True, "topk": 0.5}}
    report = optimize_recipe(recipe(passes=allowed, components="none"), tmp_path / "engine")
    assert ["not trained with SLA" in w for w in report.warnings] == [True]
    assert attentions.untuned(report.attention) == ["blocks:attn1"]
    assert torch.isfinite(load(tmp_path / "engine")(**call(load(tmp_path / "engine"))).sample).all()


def test_two_experts_stand_in_one_engine(tmp_path):
    made = recipe(model={"preset": "wan-tiny-i2v-experts", "weights": "synthetic"}, components="none")
    report = optimize_recipe(made, tmp_path / "engine")
    engine = load(tmp_path / "engine")
    assert set(engine.experts) == {"transformer", "transformer_2"}
    assert set(report.others) == {"transformer_2"}
    source = open_source(made)
    for name, expert in engine.experts.items():
        inputs = call(expert)
        with torch.no_grad():
            expected = source.transformers[name].load()(**inputs, return_dict=False)[0]
        assert (expert(**inputs).sample - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert read_manifest(tmp_path / "engine")["boundary_ratio"] == 0.9


def test_a_folder_with_sharded_weights_gives_the_engine_of_the_preset(built, tmp_path):
    from diffusers import WanTransformer3DModel

    path = write_example(tmp_path / "wan")
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "wan" / "transformer")
    for old in (tmp_path / "wan" / "transformer").glob("*.safetensors"):
        old.unlink()
    transformer.save_pretrained(tmp_path / "wan" / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "wan" / "transformer").glob("*.safetensors"))) > 1
    made = load_recipe(path, [f"shapes=[{json.dumps(SMALL)}]", "target=cpu"])
    optimize_recipe(made, tmp_path / "engine")
    engine, reference = load(tmp_path / "engine"), load(built[0])
    inputs = call(engine)
    assert torch.equal(engine(**inputs).sample, reference(**inputs).sample)


def test_passes_off_is_the_source_model_to_the_bit(tmp_path):
    optimize_recipe(recipe(passes="off", components="none"), tmp_path / "engine")
    engine = load(tmp_path / "engine")
    model = open_source(recipe()).transformers["transformer"].load()
    inputs = call(engine)
    with torch.no_grad():
        assert torch.equal(engine(**inputs).sample, model(**inputs, return_dict=False)[0])
    assert verify_folder(tmp_path / "engine", numeric=True).errors["transformer"].max_abs == 0


def test_bf16_engines_keep_what_diffusers_keeps_in_float32(tmp_path):
    optimize_recipe(recipe(dtype="bfloat16", passes="off", components="none"), tmp_path / "engine")
    engine = load(tmp_path / "engine")
    model = open_source(recipe(dtype="bfloat16")).transformers["transformer"].load()
    inputs = call(engine)
    with torch.no_grad():
        assert torch.equal(engine(**inputs).sample, model(**inputs, return_dict=False)[0])
    dtypes = {t.dtype for t in engine.weights.values()}
    assert dtypes == {torch.bfloat16, torch.float32}


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("turbocompile.build.write.seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimize_recipe(recipe(components="none"), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_nothing_that_looks_like_an_engine(tmp_path):
    script = (
        "import os, sys, pathlib, turbocompile.build.write as b\n"
        "from turbocompile.build.from_recipe import optimize_recipe\n"
        "from turbocompile.recipe.schema import Recipe\n"
        "b.seal = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        f"optimize_recipe(Recipe.from_dict({recipe(components='none').to_dict()!r}), pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "engine")], capture_output=True, timeout=900)
    assert done.returncode == -9
    assert not (tmp_path / "engine").exists()
    for left in tmp_path.iterdir():
        with pytest.raises(EngineError, match="no manifest"):
            load(left)


def test_an_existing_folder_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.txt").write_text("keep")
    with pytest.raises(EngineError, match="exists already"):
        optimize_recipe(recipe(), tmp_path / "engine")
    assert (tmp_path / "engine" / "mine.txt").read_text() == "keep"


DRY = """
import json, resource
from turbocompile import hardware
from turbocompile.report import attentions
from turbocompile.build import from_recipe, measure
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import Recipe
report = optimize_recipe(Recipe.from_dict(json.loads(input())), None, dry_run=True)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_maxrss * 1024, report.to_dict()]))
"""


@pytest.mark.slow
def test_the_true_1_3b_is_planned_in_4_gb():
    made = {
        "model": {"preset": "wan2.1-t2v-1.3b", "weights": "synthetic"},
        "shapes": [{"height": 480, "width": 832, "num_frames": 81}],
        "target": "sm90",
    }
    out = subprocess.run(
        [sys.executable, "-c", DRY], input=json.dumps(made), capture_output=True, text=True, check=True, timeout=900
    ).stdout
    memory, report = json.loads(out.strip().splitlines()[-1])
    assert memory < 4e9
    assert report["passes"]["attention"]["rewritten"] == 60
    assert report["passes"]["w8a8"]["rewritten"] == 300


def maximum_error(made, dtype=torch.float32):
    """The engine's and eager's errors against float64, as parts of the largest value, and between each other."""
    engine_folder = made[1]
    engine = load(engine_folder)
    model = open_source(made[0]).transformers["transformer"].load()
    inputs = call(engine)
    with torch.no_grad():
        eager = model(**inputs, return_dict=False)[0].double()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        truth = model.double()(**wide, return_dict=False)[0]
    found = engine(**inputs).sample.double()
    top = truth.abs().max()
    return [float((a - b).abs().max() / top) for a, b in ((found, truth), (eager, truth), (found, eager))]


def test_thirty_layers_of_exact_rewrites_stay_within_1e_4(tmp_path):
    made = recipe(model={"preset": "wan-tiny", "weights": "synthetic", "config": {"num_layers": 30}}, components="none")
    report = optimize_recipe(made, tmp_path / "engine")
    assert report.to_dict()["passes"]["residual_norm"]["rewritten"] == 90
    _, _, between = maximum_error((made, tmp_path / "engine"))
    assert between <= 1e-4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_exact_rewrites_in_bf16_round_no_more_than_eager_does(tmp_path, head_dim):
    """The bound is derived from eager itself: a fused op rounds where its parts did, or less often.

    Two ways of rounding at the same places differ at random, so the largest of some thousand errors may be larger by
    chance; twice eager's own distance from the float64 truth is far beyond that chance and far below any wrong rewrite.
    """
    preset = "wan-tiny" if head_dim == 64 else "wan-tiny-128"
    made = recipe(
        model={"preset": preset, "weights": "synthetic"}, dtype="bfloat16", components="none",
        passes={"attention": "native", "w8a8": "off"},
    )  # fmt: skip
    optimize_recipe(made, tmp_path / "engine")
    engine_error, eager_error, _ = maximum_error((made, tmp_path / "engine"))
    assert 1e-4 < eager_error < 0.1
    assert engine_error <= 2 * eager_error


def test_a_recipe_compares_its_blocks_two_by_two_with_their_own_weights(tmp_path, monkeypatch):
    made = recipe(model={"preset": "wan-tiny", "weights": "synthetic", "config": {"num_layers": 5}}, components="none")
    assert re.match(r"[245] of 5 blocks: 2 calls", optimize_recipe(made, tmp_path / "short").compared)
    monkeypatch.setattr(from_recipe, "COMPARED_SHARE", 100.0)
    assert optimize_recipe(made, tmp_path / "long").compared.startswith("5 of 5 blocks: 2 calls of the module")
    source = open_source(made).transformers["transformer"].tensors
    last = BlocksFrom(source, 3)
    assert torch.equal(last.get("blocks.1.ffn.net.2.weight"), source.get("blocks.4.ffn.net.2.weight"))
    assert not any(name.startswith("blocks.2.") for name in last.keys())  # noqa: SIM118 (no mapping)
    unmeasured = Recipe.from_dict({**made.to_dict(), "verify": "off"})
    assert not optimize_recipe(unmeasured, tmp_path / "off").compared
