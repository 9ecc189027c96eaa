"""Recipes: what is written is what is meant, and every mistake is one sentence that names the place."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch

from turbocompile.errors import RecipeError
from turbocompile.recipe import reference
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import PASS_NAMES, ModelSpec, Recipe, SamplerSpec, Shape, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = "model: {preset: wan-tiny}\ntarget: cpu\n"


@pytest.fixture
def load(tmp_path):
    """A function that loads a recipe from text, with overrides."""

    def load(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


def sections(cls=Recipe):
    """The recipe's dataclasses."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from sections(inner)


def test_every_field_is_documented_and_in_the_reference():
    text = reference()
    for cls in sections():
        assert cls.__doc__
        for f in dataclasses.fields(cls):
            assert f.metadata["help"], f"{cls.__name__}.{f.name}"
            assert f"{f.name}`" in text


def test_defaults_are_a_whole_recipe():
    recipe = Recipe(model=ModelSpec(preset="wan-tiny"), target="cpu")
    assert recipe.model.weights == "synthetic"
    assert recipe.shapes == (Shape(480, 832, 81, 1),)
    assert (recipe.sampler.kind, recipe.sampler.steps, recipe.sampler.guidance) == ("rcm", 4, 1.0)
    assert {f.name for f in dataclasses.fields(resolve(recipe))} > set(PASS_NAMES)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("wan*.yaml")), ids=lambda p: p.name)
def test_examples_load_and_survive_json(path):
    recipe = load_recipe(path)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_reference_recipe_shows_the_defaults():
    recipe = load_recipe(EXAMPLES / "wan21.yaml")
    plain = Recipe(model=ModelSpec(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), sampler=recipe.sampler)
    assert recipe == plain


def test_a_scalar_is_short_for_the_first_key(load):
    recipe = load(
        TINY + "passes: {attention: sage, w8a8: int8, adaln: off, norms: on}\ncomponents: none\nsampler: euler\n"
    )
    assert recipe.passes.attention.kind == "sage"
    assert recipe.passes.w8a8.format == "int8"
    assert (recipe.passes.adaln.enabled, recipe.passes.norms.enabled) == (False, True)
    assert recipe.components.source == "none"
    assert recipe.sampler == SamplerSpec(kind="euler")


def test_off_is_a_word_where_a_word_is_wanted(load):
    recipe = load(TINY + "verify: off\ncomponents: off\npasses: {w8a8: off, attention: off}\n")
    assert recipe.verify == "off"
    assert recipe.components.source == "none"
    assert recipe.passes.w8a8.format == "off"
    assert recipe.passes.attention.enabled is False
    options = resolve(recipe)
    assert options.w8a8.format == "off"
    assert not options.attention.enabled


def test_passes_off_turns_all_of_them_off(load):
    recipe = load(TINY + "passes: off\n")
    assert recipe.passes.enabled is False
    options = resolve(recipe)
    assert not options.rewrite
    assert not any(options.of(name).enabled for name in PASS_NAMES)


def test_numbers_that_yaml_reads_as_text_are_numbers(load):
    assert load(TINY + "passes: {w8a8: {budget: 1e-3}}\n").passes.w8a8.budget == 1e-3


MISTAKES = [
    ("modle: {}\n", 1, ["unknown field modle", "did you mean model?"]),
    (TINY + "shapes:\n  - {height: 480}\n  - {hieght: 480}\n", 5, ["shapes.1.hieght", "did you mean height?"]),
    (TINY + "passes:\n  attention:\n    kind: saeg\n", 5, ["passes.attention.kind", "did you mean sage?"]),
    (TINY + "sampler:\n  steps: four\n", 4, ["sampler.steps must be a whole number", "'four'"]),
    (TINY + "sampler:\n  distilled: 1\n", 4, ["sampler.distilled must be on or off"]),
    (TINY + "sampler: {steps: true}\n", 3, ["sampler.steps must be a whole number"]),
    (TINY + "shapes: {height: 480}\n", 3, ["shapes must be a list, not a mapping"]),
    (TINY + "shapes: []\n", 3, ["shapes is empty"]),
    (TINY + "passes: [sage]\n", 3, ["passes must be a mapping of fields, not a list"]),
    (TINY + "verify: on\n", 3, ["verify must be one of numeric, shapes, off"]),
    (TINY + "target: cpu\n", 3, ["target is given twice", ":2"]),
    (TINY + "passes:\n  - }\n", 4, ["not YAML"]),
    ("target: cpu\n", 1, ["model is missing"]),
    ("model: {seed: 1}\n", 1, ["model needs a path"]),
    ("model: wan-tiny\n", 1, ["write model: {preset: wan-tiny}"]),
    ("model: {preset: wan-tiny, path: x}\n", 1, ["both given"]),
    ("model:\n  preset: wan-tiny\n  weights: checkpoint\n", 3, ["none is published for wan-tiny"]),
    ("model: {preset: wan-tiny,\n  config: {num_layer: 4}}\n", 2, ["config.num_layer", "did you mean num_layers?"]),
    (TINY + "shapes:\n - height: 472\n", 4, ["shapes.0.height must be a multiple of 16", "use 464 or 480"]),
    (TINY + "shapes: [{num_frames: 80}]\n", 3, ["must be 4k + 1", "use 77 or 81"]),
    (TINY + "shapes: [{batch: 0}]\n", 3, ["shapes.0.batch must be at least 1"]),
    (TINY + "shapes: [{height: 480}, {width: 832}]\n", 3, ["shapes.1 repeats 480x832x81x1"]),
    (TINY + "passes: {attention: {topk: 0}}\n", 3, ["topk must be greater than 0"]),
    (TINY + "passes: {attention: {topk: 1.5}}\n", 3, ["topk must be at most 1"]),
    (TINY + "passes: {attention: {topk: .nan}}\n", 3, ["topk must be a finite number"]),
    (TINY + "passes: {attention: {block_q: 100}}\n", 3, ["block_q must be one of"]),
    (TINY + "passes: {attention: {kind: sage, pv: none}}\n", 3, ["pv cannot be none for sage"]),
    (TINY + "sampler: {steps: 5}\n", 3, ["must be 1 to 4 for rcm"]),
    (TINY + "sampler: {guidance: 5}\n", 3, ["guidance belongs to unipc and euler"]),
    (TINY + "sampler: {kind: unipc, sigma_max: 80}\n", 3, ["sigma_max belongs to rcm"]),
    (TINY + "sampler: {kind: euler, ode: on}\n", 3, ["ode belongs to rcm"]),
    (TINY + "sampler: {shift: 3}\n", 3, ["shift belongs to"]),
    (TINY + "sampler: {mid_steps: [1.4, 1.5, 1.0]}\n", 3, ["must fall"]),
    (TINY + "sampler: {mid_steps: [1.0], steps: 3}\n", 3, ["holds 1 times, 3 steps need 2"]),
    (TINY + "sampler: {sigma_max: 2}\n", 3, ["must fall from atan(sigma_max) = 1.1071"]),
    ("model: {preset: wan-tiny}\ntarget: sm80\npasses: {w8a8: fp8}\n", 3, ["sm80 has none", "use int8"]),
    ("model: {preset: wan-tiny}\ntarget: sm86\npasses: {attention: {pv: fp8}}\n", 3, ["sm86 has none", "use fp16"]),
    (TINY + "backend: onnx\npasses: {w8a8: fp8}\n", 4, ["fp8 runs on the triton backend only"]),
    (TINY + "backend: onnx\npasses: {attention: sla}\n", 4, ["sla runs on the triton backend only"]),
    (TINY + "backend: tensorrt\n", 3, ["not for cpu", "sm120"]),
    ("- a\n- b\n", None, ["a recipe is a mapping of fields, not a list"]),
    ("", None, ["a recipe is a mapping of fields, not nothing"]),
    ("a: " + "[" * 40 + "]" * 40, 1, ["nested more than"]),
    ("model: !!python/object/apply:os.getcwd []\n", 1, ["model"]),
    ("model: &a {config: *a}\n", 1, ["nested more than"]),
]


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_sentence_with_its_line(load, text, line, words):
    with pytest.raises(RecipeError) as caught:
        load(text)
    message = str(caught.value)
    assert "\n" not in message
    assert f"recipe.yaml:{line}: " in message if line else "recipe.yaml: " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("passes.attention.kind=saeg", ["did you mean sage?"]),
        ("passes.atention=off", ["passes.atention", "did you mean attention?"]),
        ("sampler.steps=9", ["must be 1 to 4"]),
        ("shapes.0.height=250", ["use 240 or 256"]),
        ("shapes.7.height=256", ["items 0 to 0"]),
        ("verify.depth=1", ["verify", "plain value"]),
        ("sampler", ["name.of.field=value"]),
        ("passes=[", ["not YAML"]),
    ],
)
def test_a_mistake_in_an_override_names_the_override(load, override, words):
    with pytest.raises(RecipeError) as caught:
        load(TINY + "shapes: [{height: 256}]\nverify: off\n", override)
    for word in (f"--set {override}: ", *words):
        assert word in str(caught.value)


def test_overrides_win_and_reach_into_short_forms_and_lists(load):
    text = TINY + "passes: {attention: sage, w8a8: off}\nshapes: [{height: 256, width: 256}]\n"
    recipe = load(
        text,
        "passes.attention.topk=0.2",
        "passes.w8a8=int8",
        "shapes.0.num_frames=17",
        "sampler.kind=unipc",
        "model.seed=3",
    )
    assert (recipe.passes.attention.kind, recipe.passes.attention.topk) == ("sage", 0.2)
    assert recipe.passes.w8a8.format == "int8"
    assert recipe.shapes == (Shape(256, 256, 17),)
    assert (recipe.sampler.kind, recipe.sampler.steps) == ("unipc", 50)
    assert recipe.model.seed == 3
    assert load(text, "passes=off").passes.enabled is False
    assert load(TINY + "passes: off\n", "passes.enabled=on").passes.enabled is True


def test_paths_are_relative_to_the_recipe_and_hub_ids_stay(load, tmp_path):
    (tmp_path / "here").mkdir()
    assert load("model: here\n").model.path == str(tmp_path / "here")
    assert load("model: ./gone\n").model.path == str(tmp_path / "gone")
    assert load("model: sub/x.pth\n").model.path == str(tmp_path / "sub" / "x.pth")
    assert load("model: owner/name-1.3B\n").model.path == "owner/name-1.3B"
    assert load("model: here\ncomponents: model\n").components.source == "model"


def test_paths_in_overrides_are_relative_to_the_working_directory(load, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "mine").mkdir(parents=True)
    monkeypatch.chdir(work)
    assert load("model: here\n", "model.path=mine").model.path == str(work / "mine")


def test_a_missing_recipe_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("capability", "target", "dtype"),
    [
        (None, "cpu", "float32"),
        ((9, 0), "sm90", "bfloat16"),
        ((12, 1), "sm120", "bfloat16"),
        ((8, 7), "sm86", "bfloat16"),
    ],
)
def test_host_and_dtype_resolve_to_the_machine(load, monkeypatch, capability, target, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    recipe = load("model: {preset: wan-tiny}\n")
    assert (recipe.target, recipe.dtype) == (target, dtype)
    assert recipe.torch_dtype is getattr(torch, dtype)


def test_a_card_without_a_target_is_refused_in_one_sentence(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RecipeError, match=r"target cannot be host: .* compute capability 7\.5"):
        load("model: {preset: wan-tiny}\n")


def test_backends_without_quantizing_ops_turn_auto_off(load):
    options = resolve(load(TINY + "backend: onnx\n"))
    assert options.attention.others.kind == "native"
    assert not options.attention.quantizes
    assert options.w8a8.format == "off"
    assert options.w8a8.off_reason == "the backend onnx has standard operators alone"


def test_rcm_depends_on_the_task_only_where_nothing_is_given():
    assert SamplerSpec().for_task("t2v").sigma_max == 80.0
    assert SamplerSpec().for_task("i2v").sigma_max == 200.0
    assert SamplerSpec(sigma_max=120.0).for_task("i2v").sigma_max == 120.0
    assert SamplerSpec().for_task("t2v").mid_steps == (1.5, 1.4, 1.0)


def test_tokens_count_the_patches():
    # 1 + 80 / 4 latent frames of 480 / 16 by 832 / 16 patches
    assert Shape(480, 832, 81).tokens == 21 * 30 * 52
    assert Shape(480, 832, 81).latent == (21, 60, 104)


LORAS = {
    "a.safetensors:0.8": ("a.safetensors", 0.8),
    "a.safetensors:-1e-1": ("a.safetensors", -0.1),
    "a.safetensors": ("a.safetensors", 1.0),
    r"C:\loras\a.safetensors": (r"C:\loras\a.safetensors", 1.0),
    r"C:\loras\a.safetensors:2": (r"C:\loras\a.safetensors", 2.0),
    "a:b": ("a:b", 1.0),
    "there:2": ("there:2", 1.0),  # a file of that name exists
}


@pytest.mark.parametrize("text", LORAS)
def test_a_lora_is_a_path_and_a_weight_after_a_colon(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:2").touch()
    path, weight = LORAS[text]
    model = {"model": {"preset": "wan-tiny"}, "target": "cpu"}
    for given in (text, [text], {"path": path, "weight": weight}, [{"path": path, "weight": weight}]):
        recipe = Recipe.from_dict({**model, "lora": given})
        assert [(x.path, x.weight, x.expert) for x in recipe.lora] == [(path, weight, "both")]
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {preset: wan-tiny}\ntarget: cpu\nlora: {path: b.safetensors, expert: transformer_2}\n")
    found = load_recipe(file, loras=[text]).lora
    assert [(Path(x.path).name, x.weight, x.expert) for x in found] == [
        ("b.safetensors", 1.0, "low"), (Path(path).name, weight, "both"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("a:nan", "lora.0.weight must be a finite number"),
        ("", "lora.0.path is empty"),
        ([{"weight": 1.0}], "lora.0.path is missing"),
        ([{"path": "a", "expert": "medium"}], "lora.0.expert must be one of both, high, low"),
        ([{"path": "a", "wieght": 1.0}], "unknown field lora.0.wieght; did you mean weight"),
        ([{"path": "a", "weight": "much"}], "lora.0.weight must be a number"),
    ],
)
def test_a_lora_that_means_nothing_is_refused(lora, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"model": {"preset": "wan-tiny"}, "target": "cpu", "lora": lora})
