"""From an engine and a prompt to a video."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from videos import read_video

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.errors import EngineError, TurbocompileError, UnsupportedError
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.sampling import SamplingWarning, rcm
from turbocompile.video import text as wan_text
from turbocompile.video import vae as wan_vae
from turbocompile.video.components import placed
from turbocompile.video.request import choose_shape
from turbocompile.video.session import generate
from turbocompile.wan.components import load_components
from turbocompile.wan.source import open_source

SIZE = {"height": 64, "width": 64, "num_frames": 5}
PROMPT = "a cat walking on the beach"
pytestmark = pytest.mark.filterwarnings("ignore:the weights are synthetic")


def recipe(preset: str = "wan-tiny", **fields) -> Recipe:
    return Recipe.from_dict(
        {"model": preset and {"preset": preset}, "shapes": [SIZE], "target": "cpu", "passes": "off", "verify": "off"}
        | fields
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the engine of recipe(...) once: build(name, ...) -> folder."""
    made: dict[str, Path] = {}

    def make(name: str, *args, **fields) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("engines") / name
            optimize_recipe(recipe(*args, **fields), made[name])
        return made[name]

    return make


@pytest.fixture
def t2v(build) -> Path:
    return build("t2v", shapes=[SIZE, SIZE | {"batch": 2}])


@pytest.fixture
def teacher(build) -> Path:
    return build("teacher", sampler={"kind": "unipc", "steps": 3, "guidance": 5.0, "shift": 3.0})


def test_a_prompt_becomes_an_mp4(t2v, tmp_path):
    seen: list[tuple[str, float]] = []
    result = generate(t2v, PROMPT, out=tmp_path / "out.mp4", progress=lambda *event: seen.append(event))
    assert result.video.shape == (1, 5, 64, 64, 3)
    assert result.video.dtype == torch.uint8
    assert result.path == tmp_path / "out.mp4"
    frames, fps = read_video(result.path)
    assert (frames.shape, fps) == ((5, 64, 64, 3), 16)
    assert list(result.timings) == ["load", "text", "denoise", "decode", "write"]
    assert all(seconds > 0 for seconds in result.timings.values())
    assert [event for event in seen if event[0] == "denoise"][:5] == [("denoise", i / 4) for i in range(5)]


def test_same_seed_same_bits_and_every_input_counts(t2v, tmp_path):
    engine = turbocompile.load(t2v)
    base = generate(engine, PROMPT, seed=3, out=tmp_path / "a.mp4")
    again = generate(t2v, PROMPT, seed=3, out=tmp_path / "b.mp4")
    assert torch.equal(base.video, again.video)
    assert base.path.read_bytes() == again.path.read_bytes()
    for other in (generate(engine, PROMPT, seed=4), generate(engine, PROMPT, seed=3, steps=3)):
        assert not torch.equal(base.video, other.video)


def test_equals_the_eager_model_to_the_bit(t2v):
    source = open_source(recipe())
    model, parts = source.transformers["transformer"].load(), source.components.load()
    text = wan_text.encode_prompt(PROMPT, parts["tokenizer"], parts["text_encoder"], dtype=torch.float32)

    def denoise(x, timestep, expert):
        return model(x.float(), timestep, text, return_dict=False)[0]

    sampler = recipe().sampler.for_task("t2v")
    given = {"steps": sampler.steps, "sigma_max": sampler.sigma_max, "mid_steps": sampler.mid_steps}
    latents = rcm.sample(denoise, (1, 16, 2, 8, 8), generator=torch.Generator().manual_seed(5), **given)
    expected = wan_vae.to_frames(wan_vae.decode(parts["vae"], latents))
    assert torch.equal(generate(t2v, PROMPT, seed=5).video, expected)


def test_the_prompt_reaches_the_transformer(t2v, monkeypatch):
    """The tiny model's videos hardly depend on the text, so that its embeddings are looked at."""
    engine, seen = turbocompile.load(t2v), []
    forward = type(engine).forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs["encoder_hidden_states"].clone())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(engine), "forward", spy)
    generate(engine, [PROMPT, "a red boat"], shape="64x64x5x2", steps=1)
    generate(engine, PROMPT, steps=1)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.allclose(seen[0][0], seen[0][1], atol=1e-2)


def test_a_teacher_equals_the_diffusers_pipeline(teacher):
    from diffusers import WanPipeline

    engine = turbocompile.load(teacher)
    parts = load_components(teacher / "components", engine.manifest["components"])
    parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config, flow_shift=3.0)
    pipe = WanPipeline(**parts, transformer=engine)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT, "blurry", height=64, width=64, num_frames=5, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1), output_type="pt",
    ).frames  # fmt: skip
    found = generate(engine, PROMPT, "blurry", seed=1).video
    difference = found.float() - expected.permute(0, 1, 3, 4, 2) * 255
    # The latents are equal; the pipeline divides by 1 / std before the VAE and does not round to bytes.
    assert difference.abs().max() <= 0.51


def test_two_experts_both_run(build):
    folder = build("experts", "wan-tiny-i2v-experts")
    engine, seen = turbocompile.load(folder), []
    for name, expert in engine.experts.items():
        expert.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    image = Image.new("RGB", (80, 60), (200, 30, 30))
    generate(engine, PROMPT, image=image)
    assert seen == ["transformer", "transformer", "transformer_2", "transformer_2"]
    with pytest.warns(SamplingWarning, match="low-noise expert is never used"):
        generate(engine, PROMPT, image=image, steps=2)


def test_an_image_and_its_clip_tokens_reach_the_transformer(build, tmp_path, monkeypatch):
    folder = build("image", "wan-tiny-i2v-image")
    path = tmp_path / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    engine, seen = turbocompile.load(folder), []
    forward = type(engine).forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(engine), "forward", spy)
    result = generate(engine, PROMPT, image=path, steps=1)
    generate(engine, PROMPT, image=Image.new("RGB", (80, 60), (10, 30, 200)), steps=1)
    assert "image" in result.timings
    red, blue = seen
    assert red["hidden_states"].shape == (1, 36, 2, 8, 8)
    mask = red["hidden_states"][:, 16:20]
    assert mask[:, :, 0].eq(1).all()
    assert mask[:, :, 1:].eq(0).all()
    assert not torch.allclose(red["hidden_states"][:, 20:], blue["hidden_states"][:, 20:])
    assert not torch.allclose(red["encoder_hidden_states_image"], blue["encoder_hidden_states_image"])


def test_a_batch_makes_as_many_videos(t2v, tmp_path):
    result = generate(t2v, [PROMPT, "a red boat"], shape="64x64x5x2", out=tmp_path / "v.mp4", frames=tmp_path / "png")
    assert result.video.shape[0] == 2
    assert [p.name for p in result.paths] == ["v.mp4", "v-1.mp4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["png", "png-1", "v-1.mp4", "v.mp4"]
    assert len(list((tmp_path / "png-1").iterdir())) == 5
    assert not torch.equal(result.video[0], result.video[1])


@pytest.mark.parametrize(
    ("engine", "arguments", "sentence"),
    [
        ("t2v", {"steps": 5}, "steps must be 1 to 4 for rcm"),
        ("t2v", {"guidance": 3.0}, "guidance belongs to unipc and euler"),
        ("t2v", {"negative_prompt": "blurry"}, "leave it out"),
        ("t2v", {"image": "a.png"}, "from text alone"),
        ("t2v", {"shape": "480x832x81"}, "it has 64x64x5x1, 64x64x5x2"),
        ("t2v", {"out": "out.gif"}, "written as .mp4"),
        ("t2v", {"shape": "64x64x5x2", "prompt": ["one"]}, "makes 2 videos at once, and got 1"),
        ("teacher", {"guidance": 0.5}, "guidance must be at least 1"),
    ],
)
def test_what_the_engine_cannot_do_is_said_before_any_work(request, engine, arguments, sentence):
    stages: list[str] = []
    with pytest.raises(TurbocompileError, match=sentence):
        generate(
            request.getfixturevalue(engine), **({"prompt": PROMPT} | arguments), progress=lambda s, f: stages.append(s)
        )
    assert set(stages) <= {"load"}


def test_an_image_engine_asks_for_an_image(build):
    with pytest.raises(UnsupportedError, match="give one with image="):
        generate(build("image", "wan-tiny-i2v-image"), PROMPT)


def test_something_else_than_an_image_is_refused(build, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnsupportedError, match="cannot be read as an image"):
        generate(build("image", "wan-tiny-i2v-image"), PROMPT, image=tmp_path / "text.png")


def test_an_engine_without_components_says_so(build):
    with pytest.raises(EngineError, match="components: none"):
        generate(build("bare", components="none"), PROMPT)


def test_a_cpu_decodes_in_float32_whatever_the_files_hold(tmp_path):
    """A CPU without instructions for bfloat16 takes minutes for a convolution in it."""
    folder = tmp_path / "pipeline"
    source = open_source(recipe())
    source.components.save(folder)
    vae = load_components(folder, source.components.table())["vae"].bfloat16()
    vae.save_pretrained(folder / "vae")
    table = source.components.table()
    table["vae"]["dtype"] = "bfloat16"
    assert load_components(folder, table)["vae"].dtype == torch.bfloat16
    vae = placed(load_components(folder, table)["vae"], "vae", torch.device("cpu"))
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert placed("a tokenizer", "tokenizer", torch.device("cpu")) == "a tokenizer"


@pytest.mark.parametrize("change", ["altered", "added", "missing"])
def test_damaged_components_are_refused(t2v, tmp_path, change):
    folder = tmp_path / "engine"
    shutil.copytree(t2v, folder)
    config = folder / "components" / "text_encoder" / "config.json"
    if change == "altered":
        config.write_text(config.read_text().replace("gated-gelu", "gated-silu"))
    elif change == "added":
        (config.parent / "adapter_config.json").write_text("{}")
    else:
        config.unlink()
    sentence = {"altered": "has .* bytes|altered", "added": "not in its manifest", "missing": "lacks the file"}
    with pytest.raises(EngineError, match=sentence[change]):
        generate(folder, PROMPT, steps=1)


@pytest.mark.filterwarnings("default:the weights are synthetic")
def test_synthetic_weights_give_one_warning(t2v):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(t2v, PROMPT, steps=1)
    told = [str(w.message) for w in caught if w.category is SamplingWarning]
    assert told == ["the weights are synthetic, so the picture is noise"]


@pytest.mark.parametrize("distilled", [False, True])
def test_rcm_of_an_undistilled_checkpoint_warns(tmp_path, distilled):
    from turbocompile.wan.example import write_example

    write_example(tmp_path / "wan")
    sampler = {"kind": "rcm", "steps": 1, "distilled": distilled}
    made = recipe(None, model={"path": str(tmp_path / "wan")}, sampler=sampler)
    optimize_recipe(made, tmp_path / "engine")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(tmp_path / "engine", PROMPT)
    told = [str(w.message) for w in caught if w.category is SamplingWarning]
    assert len(told) == (not distilled)
    assert all("rCM-distilled" in sentence for sentence in told)


@pytest.mark.parametrize("untuned", [False, True])
def test_an_sla_that_the_checkpoint_was_not_trained_with_warns(tmp_path, untuned):
    from turbocompile.wan.example import write_example

    write_example(tmp_path / "wan")
    attention = {"kind": "sla", "allow_untuned": True, "topk": 0.5} if untuned else "native"
    sampler = {"kind": "unipc", "steps": 1, "guidance": 1.0}
    made = recipe(None, model={"path": str(tmp_path / "wan")}, sampler=sampler, passes={"attention": attention})
    optimize_recipe(made, tmp_path / "engine")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(tmp_path / "engine", PROMPT)
    told = [str(w.message) for w in caught if w.category is SamplingWarning]
    assert ["not trained with SLA, which the engine has at blocks:attn1" in sentence for sentence in told] == [
        True
    ] * untuned


def test_shapes_are_named_with_or_without_the_batch():
    shapes = (Shape(64, 64, 5), Shape(64, 64, 5, 2), Shape(64, 96, 5))
    assert choose_shape(shapes, None) is shapes[0]
    assert choose_shape(shapes, "64x64x5") is shapes[0]
    assert choose_shape(shapes, "64x64x5x2") is shapes[1]
    assert choose_shape(shapes, "64X96X5") is shapes[2]
    assert choose_shape(shapes, Shape(64, 96, 5)) is shapes[2]
    with pytest.raises(UnsupportedError):
        choose_shape(shapes, "96x64x5")
