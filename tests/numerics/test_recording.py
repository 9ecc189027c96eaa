"""Recorded inputs: what is kept of many calls, the file and its mistakes, and what is measured on it."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe, recorded_of
from turbocompile.cli import main
from turbocompile.errors import RecipeError
from turbocompile.numerics.recording import Recording, given_inputs, read_inputs, record
from turbocompile.recipe.schema import Recipe
from turbocompile.wan.source import open_source

STYLE = zoo.Style(batch=1)
INT8 = {"passes": {"w8a8": "int8"}}
RECIPE = """\
model: {preset: wan-tiny}
shapes: [{height: 64, width: 64, num_frames: 5}]
sampler: {kind: unipc, steps: 4, guidance: 3.0}
target: cpu
passes: {w8a8: int8}
"""


class Count(nn.Module):
    """Its input is its output."""

    def forward(self, x, places=None):
        return x


# ---------------------------------------------------------------------------------------------------------- recording


@settings(deadline=None, max_examples=40)
@given(made=st.integers(1, 200), calls=st.integers(1, 9))
def test_the_calls_that_are_kept_are_spread_over_all(made, calls):
    recording, model = Recording(calls), Count()
    for i in range(made):
        recording.add(model, (torch.tensor([float(i)]),), {})
        assert len(recording.kept) < 3 * calls + 1  # bounded, however many come
    kept = [int(c["x"]) for c in recording.chosen()]
    assert len(kept) == min(made, calls)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    stride = recording.stride
    assert all(gap <= 2 * max(stride, -(-made // calls) * 2) for gap in gaps)
    assert made - kept[-1] <= max(stride, 1) if calls > 1 else True


def test_a_guided_run_is_recorded_with_both_of_its_forwards():
    recording, model = Recording(4), Count()
    for i in range(100):  # even: with the prompt, odd: without
        recording.add(model, (torch.tensor([float(i)]),), {})
    assert {int(c["x"]) % 2 for c in recording.chosen()} == {0, 1}


def test_what_is_recorded_is_a_copy_of_the_first_shape(tmp_path):
    x = torch.zeros(3)
    with record(Count(), tmp_path / "new" / "inputs.safetensors") as recording:
        model_call(recording, x, places={"a": torch.ones(1), "b": [torch.ones(2), 3]})
        model_call(recording, torch.zeros(4), places={"a": torch.ones(1), "b": [torch.ones(2), 3]})
        x += 1
    found = load_file(tmp_path / "new" / "inputs.safetensors")
    assert set(found) == {"0.x", "0.places.a", "0.places.b.0"}
    assert torch.equal(found["0.x"], torch.zeros(3))


def model_call(recording, *args, **kwargs):
    recording.add(Count(), args, kwargs)


def test_a_module_is_recorded_while_the_with_lasts_and_not_after(tmp_path):
    model = zoo.build(STYLE)
    with turbocompile.record(model, tmp_path / "a.safetensors", calls=2) as recording:
        for seed in range(3):
            model(*zoo.example(STYLE, seed))
    model(*zoo.example(STYLE, 3))
    assert recording.seen == 3
    first, last = read_inputs(tmp_path / "a.safetensors").calls
    for call, seed in ((first, 0), (last, 2)):
        for name, tensor in zip(("x", "timestep", "text"), zoo.example(STYLE, seed), strict=True):
            assert torch.equal(call[name], tensor)


def test_nothing_recorded_and_absurd_counts_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="nothing was recorded"), record(Count(), tmp_path / "a.safetensors"):
        pass
    for calls in (0, 65):
        with pytest.raises(RecipeError, match="calls must be 1 to 64"):
            Recording(calls)


def test_where_the_run_fails_no_file_is_left(tmp_path):
    with pytest.raises(AttributeError), record(Count(), tmp_path / "a.safetensors") as recording:
        model_call(recording, torch.zeros(1)).fails()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ to an engine


@pytest.fixture(scope="module")
def model():
    return zoo.build(STYLE)


def calls(count=3):
    return [zoo.example(STYLE, seed) for seed in range(count)]


def test_a_file_a_list_a_function_and_pairs_are_the_same_inputs(model, tmp_path):
    with record(model, tmp_path / "a.safetensors"):
        for call in calls():
            model(*call)
    names = ("x", "timestep", "text")
    ways = [
        tmp_path / "a.safetensors",
        calls(),
        lambda: iter(calls()),
        [dict(zip(names, call, strict=True)) for call in calls()],
        [(call[:1], {"timestep": call[1], "text": call[2]}) for call in calls()],
    ]
    reports = []
    for way in ways:
        engine = turbocompile.optimize(model, zoo.example(STYLE), recipe=INT8, calibration=way)
        reports.append(engine.report.passes["w8a8"].site_errors)
        assert engine.report.passes["w8a8"].inputs == "3 recorded inputs"
        assert "on 3 recorded inputs" in str(engine.report)
    assert all(r == reports[0] for r in reports)


def test_the_errors_are_those_of_the_inputs_and_the_worst_input_counts(model):
    def errors(calibration):
        engine = turbocompile.optimize(model, zoo.example(STYLE), recipe=INT8, calibration=calibration)
        return {e.site: [x.error["rel_l1"] for x in e.layers] for e in engine.report.passes["w8a8"].site_errors}

    one, other = errors(calls()[:1]), errors(calls()[1:2])
    both = errors(calls()[:2])
    assert one != other
    for site, found in both.items():
        assert found == [max(pair) for pair in zip(one[site], other[site], strict=True)]


def test_a_model_that_is_captured_at_its_first_call_is_calibrated_too(model):
    lazy = turbocompile.optimize(model, recipe=INT8, calibration=calls(1))
    lazy(*zoo.example(STYLE))
    assert lazy.report.passes["w8a8"].inputs == "1 recorded input"


def test_recorded_calls_may_be_smaller_than_the_engines(model):
    small = zoo.Style(batch=1, grid=(2, 2))
    style_args = zoo.example(STYLE)
    engine = turbocompile.optimize(model, style_args, recipe=INT8, calibration=[zoo.example(small)])
    assert engine.report.passes["w8a8"].inputs == "1 recorded input"
    assert engine(*style_args).shape == model(*style_args).shape


def altered(tmp_path, change):
    tensors = {f"{i}.{n}": t for i, c in enumerate(calls(2)) for n, t in zip(("x", "timestep", "text"), c, strict=True)}
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


MISTAKES = {
    "unknown name": (lambda t: t.update({"1.y": torch.zeros(1)}), r"no input 'y' \(1\.y\); it takes x, timestep, text"),
    "missing": (lambda t: t.pop("1.text"), r"the tensor '1\.text' is missing"),
    "missing in the first": (lambda t: t.pop("0.x"), r"the tensor '0\.x' is missing"),
    "shape": (lambda t: t.update({"1.x": torch.zeros(1, 4, 2, 4)}), r"'1\.x' has the shape \[1, 4, 2, 4\] and '0\.x'"),
    "channels": (
        lambda t: t.update({f"{i}.text": torch.zeros(1, 5, 8) for i in range(2)}),
        r"the model does not take these inputs \(Dit cannot be captured: .* reduction dim",
    ),
    "dtype": (
        lambda t: t.update({"1.x": torch.zeros(1, 4, 3, 4, dtype=torch.int32)}),
        r"'1\.x' is int32, the model takes float32",
    ),
    "infinite": (lambda t: t["1.x"].view(-1)[0:1].fill_(float("inf")), r"'1\.x' has a value that is no finite number"),
    "a gap": (lambda t: t.update({"3.x": torch.zeros(1)}), "there is a call 3 and no call 2"),
    "no number": (lambda t: t.update({"x": torch.zeros(1)}), r"'x' is not named as in '0\.hidden_states'"),
    "no call": (lambda t: t.clear(), "there is no call in it"),
    "too many": (lambda t: t.update({f"{i}.x": torch.zeros(1) for i in range(65)}), "65 calls, more than 64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_that_names_it(model, tmp_path, mistake):
    change, sentence = MISTAKES[mistake]
    path = altered(tmp_path, change)
    with pytest.raises(RecipeError, match=sentence) as error:
        turbocompile.optimize(model, zoo.example(STYLE), recipe=INT8, calibration=path)
    assert str(error.value).startswith(f"calibration: {path}: ")


@pytest.mark.parametrize("given_", [torch.zeros(1), {"x": torch.zeros(1)}, 3, ["text"], [3]])
def test_what_is_no_list_of_calls_is_refused(model, given_):
    with pytest.raises(RecipeError, match="calibration: "):
        given_inputs(given_, model)


# --------------------------------------------------------------------------------------------------------- to a recipe


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "tiny.yaml").write_text(RECIPE)
    done = CliRunner().invoke(
        main, ["calibrate", str(folder / "tiny.yaml"), "-o", str(folder / "inputs.safetensors"), "--calls", "3"]
    )
    assert done.exit_code == 0, done.output
    assert "3 of 8 calls" in done.stdout  # four steps, with the prompt and without
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_recipe_is_measured_on_what_its_model_was_called_with(recorded):
    (recorded / "named.yaml").write_text(RECIPE + "calibration: inputs.safetensors\n")
    done = invoke("optimize", recorded / "named.yaml", "-o", recorded / "engine")
    assert done.exit_code == 0, done.output
    engine = turbocompile.load(recorded / "engine")
    assert engine.report.passes["w8a8"].inputs == "3 recorded inputs"
    assert "3 recorded inputs" in invoke("explain", recorded / "engine").stdout
    call = read_inputs(recorded / "inputs.safetensors").calls[0]
    assert engine(**{k: t.float() for k, t in call.items()}, return_dict=False)[0].isfinite().all()


def test_the_inputs_of_the_original_model_were_recorded(recorded):
    found = read_inputs(recorded / "inputs.safetensors").calls
    times = [float(c["timestep"]) for c in found]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3
    assert [tuple(c["hidden_states"].shape) for c in found] == [(1, 16, 2, 8, 8)] * 3
    # The first step has noise, and only the calls with the prompt have its text.
    assert float(found[0]["hidden_states"].std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none.safetensors", "there is no such file; `turbocompile calibrate RECIPE -o"),
        ("tiny.yaml", "this is no safetensors file"),
    ],
)
def test_a_recipe_with_a_wrong_file_ends_with_exit_code_2(recorded, name, sentence):
    done = invoke(
        "optimize", recorded / "tiny.yaml", "-o", recorded / "none", "--set", f"calibration={recorded / name}"
    )
    assert done.exit_code == 2
    assert done.stdout == ""
    assert sentence in done.stderr
    assert not (recorded / "none").exists()


def save(path, **tensors):
    save_file({f"0.{name}": t for name, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("latent", "sentence"),
    [
        (None, "'0.hidden_states' is missing"),
        (torch.zeros(1, 16, 8, 8), r"'0.hidden_states' is of the shape \[1, 16, 8, 8\]"),
        (torch.zeros(1, 16, 2, 7, 8), "'0.hidden_states' is the latent of no video: height must be a multiple of 16"),
        (torch.zeros(1, 12, 2, 8, 8), r"'0.hidden_states' has the shape \[1, 12, 2, 8, 8\], the model takes"),
        (torch.zeros(1, 16, 5, 58, 58), "the calls have 4205 tokens, and a build measures on 4096 at most"),
    ],
)
def test_latents_of_no_video_are_refused(tmp_path, latent, sentence):
    other = {"timestep": torch.ones(1), "encoder_hidden_states": torch.zeros(1, 512, 64)}
    path = save(tmp_path / "a.safetensors", **other, **({} if latent is None else {"hidden_states": latent}))
    fields = {"model": {"preset": "wan-tiny"}, "target": "cpu", "calibration": str(path), "passes": {"w8a8": "int8"}}
    recipe = Recipe.from_dict({**fields, "shapes": [{"height": 64, "width": 64, "num_frames": 5}]})
    with pytest.raises(RecipeError, match=sentence):
        optimize_recipe(recipe, tmp_path / "engine")


def test_each_of_two_experts_gets_the_calls_of_its_timesteps(tmp_path):
    times = [999, 950, 899, 10]
    tensors = {f"{i}.timestep": torch.tensor([t]) for i, t in enumerate(times)}
    save_file(tensors, tmp_path / "a.safetensors")
    recipe = Recipe.from_dict(
        {"model": {"preset": "wan-tiny-i2v-experts"}, "target": "cpu", "calibration": str(tmp_path / "a.safetensors")}
    )
    found = recorded_of(recipe, open_source(recipe))
    assert {k: [int(c["timestep"]) for c in v.calls] for k, v in found.items()} == {
        "transformer": [999, 950],
        "transformer_2": [899, 10],
    }
    save_file({"0.timestep": torch.tensor([950])}, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="no call has a timestep below 900, as those of transformer_2 have"):
        recorded_of(recipe, open_source(recipe))


def test_calibration_without_measuring_is_a_mistake():
    for changes in ({"verify": "off"}, {"passes": "off"}):
        with pytest.raises(RecipeError, match="calibration is of use where rewrites are measured"):
            Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": "cpu", "calibration": "a", **changes})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "components=none"), "the recipe has no text encoder"),
        (("--image", "a.png"), "makes videos from text alone"),
        (("--set", "model.preset=wan-tiny-i2v"), "makes videos from an image; give one"),
        (("--steps", "0"), "steps must be at least 1"),
        (
            ("--set", "shapes.0.height=1024", "--set", "shapes.0.width=1040"),
            "has 8320 tokens, and a build measures on 4096",
        ),
    ],
)
def test_what_cannot_be_recorded_is_one_sentence(recorded, arguments, sentence):
    done = invoke("calibrate", recorded / "tiny.yaml", "-o", recorded / "no.safetensors", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert not (recorded / "no.safetensors").exists()
