"""Kernel choices: which sizes compete, what is kept where, and what is not believed."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from turbocompile.backends import launchers
from turbocompile.kernels.attention import attend_triton
from turbocompile.kernels.linear import linear_choice, linear_triton
from turbocompile.kernels.linear.linear_triton import CONFIGS, LinearConfig

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.cache import cache_path
from turbocompile.cli import main
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.schema import load_recipe
from turbocompile.runtime import tuning
from turbocompile.runtime.engine import load
from turbocompile.runtime.folder import read_manifest, seal
from turbocompile.tools.tune import tune_engine

EXAMPLES = Path(__file__).parents[2] / "examples"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KEY = "a card: fp8 64x256 to 256, bfloat16"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "engine"
    recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=sm90", "components=none", "passes.attention=native"])
    optimize_recipe(recipe, folder)
    return folder


# 32 tokens instead of 2,304, for calls: on a CPU, FP8 products of the full size take seconds a call.
SHORT = "shapes=[{height: 64, width: 64, num_frames: 5}]"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The engine of `folder` for a short video."""
    folder = tmp_path_factory.mktemp("tuning") / "short"
    overrides = ["target=sm90", "components=none", "passes.attention=native", "verify=off", SHORT]
    optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", overrides), folder)
    return folder


@pytest.fixture
def picks(monkeypatch):
    """Stands for the measurement: the last declared configuration of the format wins. The sizes that were asked for."""
    asked = []

    def measure(format, rows, n, k, dtype, device):
        asked.append((format, rows, n, k, dtype))
        return {config: float(i) for i, config in enumerate(reversed(CONFIGS[format]))}

    monkeypatch.setattr(linear_choice, "measure", measure)
    monkeypatch.setattr(tuning, "LEAST_PRODUCTS", 0)
    return asked


@pytest.fixture
def launched(monkeypatch):
    """The configurations that launchers were given, in the order of the launches."""
    given = []
    for packet, on_cuda in dict(launchers.LAUNCH).items():

        def spied(*args, config=None, on_cuda=on_cuda):
            given.append(config)
            return on_cuda(*args, config=config)

        monkeypatch.setitem(launchers.LAUNCH, packet, spied)
    return given


def example_call(engine):
    """A call of the first Program of an engine, on its device."""
    inputs = next(iter(engine.programs.values())).signature.inputs
    generator = torch.Generator().manual_seed(0)
    made = {i.path: torch.randn(i.shape, generator=generator).to(engine.device, i.dtype) for i in inputs}
    return {**made, "return_dict": False}


def call_once(engine):
    return engine(**example_call(engine))[0]


def choices(engine, config):
    """A tuning that chooses one configuration for every linear of the engine, on its device."""
    names = [linear_choice.key(*astuple(one), engine.device) for one in tuning.linears(engine.programs)]
    return {"linears": dict.fromkeys(names, asdict(config))}


def test_two_engines_launch_the_kernels_that_each_of_them_chose(short, launched):
    """In turns in one process: each linear of an engine's four blocks is given that engine's configuration."""
    first, second, plain = load(short), load(short), load(short)
    one, other = CONFIGS["fp8"][0], CONFIGS["fp8"][1]
    first.tuning, second.tuning = choices(first, one), choices(second, other)
    out = call_once(first)
    count = len(launched)
    assert count > 0
    assert launched == [one] * count
    launched.clear()
    assert torch.equal(call_once(second), out)
    assert torch.equal(call_once(first), out)
    assert launched == [other] * count + [one] * count
    launched.clear()
    assert torch.equal(call_once(copy.deepcopy(second)), out)
    assert launched == [other] * count
    launched.clear()
    assert torch.equal(call_once(plain), out)  # without a choice the operator runs, which launches its default
    assert launched == []


def test_choices_of_another_card_are_not_looked_at(short, launched):
    engine = load(short)
    engine.tuning = {"linears": {KEY: {"path": "none of this card"}}}
    call_once(engine)
    assert launched == []


def test_each_size_of_the_blocks_competes_once(folder):
    """wan-mini: q, k, v together, the three of 256 x 256, the FFN's two, and k, v of 512 tokens of text."""
    found = tuning.linears(load(folder).programs)
    sizes = {(one.rows, one.k, one.n) for one in found}
    assert sizes == {(2304, 256, 768), (2304, 256, 256), (2304, 256, 1024), (2304, 1024, 256), (512, 256, 512)}
    assert len(found) == len(sizes)
    assert {(one.format, one.dtype) for one in found} == {("fp8", torch.bfloat16)}


def test_the_winner_of_each_size_is_kept(folder, picks):
    programs = load(folder).programs
    found = tuning.tune(programs, torch.device("cpu"))
    assert sorted(picks, key=str) == sorted((astuple(one) for one in tuning.linears(programs)), key=str)
    assert set(found) == {"linears"}
    assert len(found["linears"]) == 5
    assert all(config == asdict(CONFIGS["fp8"][-1]) for config in found["linears"].values())


def test_what_no_kernel_takes_does_not_compete(folder, picks, monkeypatch):
    programs = load(folder).programs
    taken = [one for one in tuning.linears(programs) if one.k == 256]
    monkeypatch.setattr(linear_triton, "takes", lambda format, dtype, k, device: k == 256)
    found = tuning.tune(programs, torch.device("cpu"))
    assert len(picks) == len(found["linears"]) == len(taken) == 4


def test_a_build_keeps_them_in_the_folder_and_a_load_takes_them(tmp_path, picks, monkeypatch):
    """As on a machine that has the card, for which a build asks before it measures."""

    def measured(item, settings, stages):
        return replace(item, tuning=tuning.tune(item.programs, torch.device("cpu")))

    monkeypatch.setattr("turbocompile.build.from_recipe.measured", measured)
    overrides = ["target=sm90", "components=none", "passes.attention=native", "verify=off"]
    optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", overrides), tmp_path / "engine")
    kept = json.loads((tmp_path / "engine" / tuning.FILE).read_text())
    assert len(kept["linears"]) == 5
    assert load(tmp_path / "engine").tuning == kept


@pytest.mark.parametrize(
    ("attention", "blocks"),
    [("{kind: sage}", "64x128"), ("{kind: sla, allow_untuned: true, block_q: 128, block_k: 64}", "128x64")],
)
def test_an_engine_goes_on_with_the_attention_that_it_was_built_with(tmp_path, picks, launched, attention, blocks):
    """The configuration is kept as it was, also where the default is another one by then."""
    overrides = [
        "target=sm90",
        "components=none",
        f"passes.attention={attention}",
        "passes.w8a8=off",
        "verify=off",
        SHORT,
    ]
    optimize_recipe(load_recipe(EXAMPLES / "wan-mini.yaml", overrides), tmp_path / "engine")
    device = torch.device("cpu")
    engine = load(tmp_path / "engine")
    kept = tuning.tune(engine.programs, device)["attentions"]
    (name,) = kept
    block_q, block_k = map(int, blocks.split("x"))
    assert name == f"cpu: fp8 blocks {blocks}"
    default = attend_triton.default_config(device, "fp8", block_k, block_q)
    assert kept[name] == asdict(default)
    other = next(c for c in attend_triton.PORTABLE_CONFIGS if c != default)
    engine.tuning = {"attentions": {name: asdict(other)}}
    call_once(engine)
    assert set(launched) == {other}
    engine = load(tmp_path / "engine")
    engine.tuning = {"attentions": {name: asdict(replace(other, warps=3))}}
    with pytest.raises(EngineError, match="no declared configuration of the attention"):
        call_once(engine)


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
    name = "cpu: fp8 64x256 to 256, bfloat16"
    engine = load(altered(folder, tmp_path, json.dumps({"linears": {name: strange}})))
    with pytest.raises(EngineError, match=r"tuning\.json.*no declared configuration"):
        engine.compiled(next(iter(engine.programs)))


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
        tune_engine(load(folder))
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
        engine = load(folder, device="cuda")
        assert engine.tuning == {"linears": found}
        plain = load(folder, device="cuda")
        plain.tuning = {}
        assert call_once(engine).isfinite().all()
        assert call_once(plain).isfinite().all()

    def test_two_engines_launch_the_kernels_that_each_of_them_chose(self, folder, launched):
        """Also in the CUDA graphs that their second calls record."""
        first, second = load(folder, device="cuda"), load(folder, device="cuda")
        configs = linear_triton.candidates("fp8", 256, 256, torch.bfloat16, first.device)
        for engine, config in ((first, configs[0]), (second, configs[-1])):
            engine.tuning = choices(engine, config)
        outs = {first: call_once(first), second: call_once(second)}
        count = len(launched) // 2
        assert launched == [configs[0]] * count + [configs[-1]] * count
        for _ in range(3):
            for engine in (second, first):
                assert torch.equal(call_once(engine), outs[engine])
        assert all(g.recorded for engine in outs for g in engine._graphs.values())
        assert launched[2 * count :] == [configs[-1]] * count + [configs[0]] * count

    def test_an_engine_without_8_bit_linears_has_nothing_to_tune(self, tmp_path):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none", "passes.w8a8=off"])
        optimize_recipe(recipe, tmp_path / "engine")
        with pytest.raises(UnsupportedError, match="nothing to tune"):
            tune_engine(load(tmp_path / "engine", device="cuda"))

    def test_a_build_on_the_card_measures_large_linears(self, tmp_path, monkeypatch):
        recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=host", "components=none"])
        optimize_recipe(recipe, tmp_path / "small")
        assert load(tmp_path / "small").tuning["linears"] == {}
        monkeypatch.setattr(tuning, "LEAST_PRODUCTS", 0)
        optimize_recipe(recipe, tmp_path / "engine")
        assert len(load(tmp_path / "engine").tuning["linears"]) == 5
