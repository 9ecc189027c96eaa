"""Kernel choices: which sizes compete, what is kept where, and what is not believed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from turbocompile.kernels.attention import attend_triton
from turbocompile.kernels.linear import linear_choice, linear_triton
from turbocompile.kernels.linear.linear_triton import CONFIGS, LinearConfig

from turbocompile.build.compile import optimize_recipe
from turbocompile.cache import cache_path
from turbocompile.cli import main
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.schema import load_recipe
from turbocompile.runtime import tuning
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import read_manifest, seal

EXAMPLES = Path(__file__).parents[2] / "examples"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KEY = "a card: fp8 64x256 to 256, bfloat16"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = linear_choice.saved()
    linear_choice.forget()
    attend_triton.forget()
    yield
    attend_triton.forget()
    linear_choice.forget()
    linear_choice.restore(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "engine"
    recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=sm90", "components=none", "passes.attention=native"])
    optimize_recipe(recipe, folder)
    return folder


@pytest.fixture
def picks(monkeypatch):
    """In the place of the measurement: the last declared configuration of the format wins. What it was asked."""
    asked = []

    def choose(format, rows, n, k, dtype, device):
        asked.append((format, rows, n, k, dtype))
        name = linear_choice.key(format, rows, n, k, dtype, device)
        linear_choice.restore({name: asdict(CONFIGS[format][-1])})

    monkeypatch.setattr(linear_choice, "choose", choose)
    return asked


def test_each_size_of_the_blocks_competes_once(folder):
    """wan-mini: q, k, v together, the three of 256 x 256, the FFN's two, and k, v of 512 tokens of text."""
    found = tuning.linears(load(folder).programs)
    sizes = {(one.rows, one.k, one.n) for one in found}
    assert sizes == {(2304, 256, 768), (2304, 256, 256), (2304, 256, 1024), (2304, 1024, 256), (512, 256, 512)}
    assert len(found) == len(sizes)
    assert {(one.format, one.dtype) for one in found} == {("fp8", torch.bfloat16)}


def test_the_winners_are_those_of_this_engine(folder, picks):
    linear_choice.restore({KEY: asdict(CONFIGS["fp8"][0])})  # another engine's
    programs = load(folder).programs
    found = tuning.tune(programs, torch.device("cpu"))
    assert sorted(picks, key=str) == [tuple(one) for one in tuning.linears(programs)]
    assert set(found) == {"linears"}
    assert len(found["linears"]) == 5
    assert KEY not in found["linears"]


def test_what_no_kernel_takes_does_not_compete(folder, picks, monkeypatch):
    programs = load(folder).programs
    taken = [one for one in tuning.linears(programs) if one.k == 256]
    monkeypatch.setattr(linear_triton, "takes", lambda format, dtype, k, device: k == 256)
    found = tuning.tune(programs, torch.device("cpu"))
    assert len(picks) == len(found["linears"]) == len(taken) == 4


def test_a_build_keeps_them_in_the_folder_and_a_load_takes_them(tmp_path, picks, monkeypatch):
    """As on a machine that has the card: build.py asks for it before it measures."""

    def measure(item, recipe, stages):
        item.tuning = tuning.tune(item.programs, torch.device("cpu"))

    monkeypatch.setattr("turbocompile.build.compile.measure", measure)
    overrides = ["target=sm90", "components=none", "passes.attention=native", "verify=off"]
    optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", overrides), tmp_path / "engine")
    kept = json.loads((tmp_path / "engine" / tuning.FILE).read_text())
    assert len(kept["linears"]) == 5
    engine = load(tmp_path / "engine")
    assert engine.tuning == kept
    linear_choice.forget()
    tuning.restore(engine.tuning, "tuning.json")
    assert linear_choice.saved() == kept["linears"]


@pytest.mark.parametrize(
    ("attention", "blocks"),
    [("{kind: sage}", "64x128"), ("{kind: sla, allow_untuned: true, block_q: 128, block_k: 64}", "128x64")],
)
def test_an_engine_goes_on_with_the_attention_that_it_was_built_with(tmp_path, picks, attention, blocks):
    """The configuration is kept as it was, also where the default is another one by then."""
    overrides = ["target=sm90", "components=none", f"passes.attention={attention}", "passes.w8a8=off", "verify=off"]
    optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", overrides), tmp_path / "engine")
    device = torch.device("cpu")
    kept = tuning.tune(load(tmp_path / "engine").programs, device)["attentions"]
    (name,) = kept
    block_q, block_k = map(int, blocks.split("x"))
    assert name == f"cpu: fp8 blocks {blocks}"
    default = attend_triton.default_config(device, "fp8", block_k, block_q)
    assert kept[name] == asdict(default)
    other = next(c for c in attend_triton.PORTABLE_CONFIGS if c != default)
    tuning.restore({"attentions": {name: asdict(other)}}, "tuning.json")
    assert attend_triton.chosen_config(device, "fp8", block_k, block_q) == other
    assert attend_triton.chosen_config(device, "fp16", block_k, block_q) == default
    strange = asdict(replace(other, warps=3))
    with pytest.raises(EngineError, match="no declared configuration of the attention"):
        tuning.restore({"attentions": {name: strange}}, "tuning.json")


def altered(folder: Path, tmp_path: Path, text: str) -> Path:
    """A copy of the engine with that tuning.json, sealed as if it had been built so."""
    import shutil

    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    manifest = read_manifest(copy)
    (copy / tuning.FILE).write_text(text)
    own = {k: v for k, v in manifest.items() if k not in ("digest", "files", "schema", "version")}
    seal(copy, own)
    return copy


@pytest.mark.parametrize("text", ["[]", '{"linears": 3}', '{"linears": {"x": [1]}}', "3"])
def test_a_folder_with_something_else_is_refused(folder, tmp_path, text):
    with pytest.raises(EngineError, match="is no tuning"):
        load(altered(folder, tmp_path, text))


def test_only_declared_configurations_are_taken(folder, tmp_path):
    strange = asdict(LinearConfig("descriptor", 4096, 4096))
    engine = load(altered(folder, tmp_path, json.dumps({"linears": {KEY: strange}})))
    with pytest.raises(EngineError, match=r"tuning\.json.*no declared configuration"):
        tuning.restore(engine.tuning, "tuning.json")
    assert not linear_choice.saved()


def test_the_cache_comes_before_the_folder_and_damage_in_it_is_no_error(folder):
    digest = read_manifest(folder)["digest"]
    path = cache_path("tuning", digest)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"linears": {KEY: asdict(CONFIGS["fp8"][1])}}))
    assert load(folder).tuning["linears"][KEY] == asdict(CONFIGS["fp8"][1])
    assert tuning.merge({"linears": {KEY: {"a": 1}, "x": {}}}, load(folder).tuning)["linears"].keys() == {KEY, "x"}
    path.write_text("{")
    assert load(folder).tuning == {}


def test_tuning_needs_a_gpu_and_a_linear(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="on a GPU"):
        tuning.tune_engine(load(folder))
    made = CliRunner().invoke(main, ["tune", str(folder), "--device", "cpu"])
    assert made.exit_code == 2
    assert "name a GPU" in made.stderr


class TestCuda:
    pytestmark = on_gpu

    def test_the_command_chooses_and_later_loads_run_the_winners(self, folder):
        made = CliRunner().invoke(main, ["tune", str(folder), "--json"])
        assert made.exit_code == 0, made.output
        found = json.loads(made.stdout)["linears"]
        assert len(found) == 5
        linear_choice.forget()
        engine = load(folder, device="cuda")
        assert engine.tuning == {"linears": found}
        engine.compiled(next(iter(engine.programs)))
        assert linear_choice.saved() == found

    def test_an_engine_without_8_bit_linears_has_nothing_to_tune(self, tmp_path):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none", "passes.w8a8=off"])
        optimize_recipe(recipe, tmp_path / "engine")
        with pytest.raises(UnsupportedError, match="nothing to tune"):
            tuning.tune_engine(load(tmp_path / "engine", device="cuda"))

    def test_a_build_on_the_card_measures(self, tmp_path):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none"])
        optimize_recipe(recipe, tmp_path / "engine")
        assert len(load(tmp_path / "engine").tuning["linears"]) == 5
