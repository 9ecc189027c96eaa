"""The files of videos: how they are named, what they say of their making, and several videos in one go."""

from __future__ import annotations

import json

import av
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from videos import read_video

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.cli import main
from turbocompile.errors import RecipeError, TurbocompileError, UnsupportedError
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.runtime.engine import load
from turbocompile.video import file as video_file
from turbocompile.video.request import choose_shape
from turbocompile.video.session import generate, generate_all
from turbocompile.wan.components import load_components

SIZE = {"height": 64, "width": 64, "num_frames": 5}
PROMPT = "a cat on the beach, \u00e9t\u00e9"
pytestmark = pytest.mark.filterwarnings("ignore:the weights are synthetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engines") / "engine"
    fields = {"shapes": [SIZE, SIZE | {"batch": 2}], "target": "cpu", "passes": "off", "verify": "off"}
    optimize_recipe(Recipe.from_dict({"model": {"preset": "wan-tiny"}, **fields}), made)
    return made


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder)


def said_in_mp4(path) -> dict:
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"])


def test_every_file_says_how_it_was_made(engine, tmp_path):
    places = {"out": tmp_path / "a.mp4", "frames": tmp_path / "frames", "latents": tmp_path / "a.safetensors"}
    result = generate(engine, PROMPT, seed=7, steps=2, **places)
    said = said_in_mp4(places["out"])
    assert said["prompt"] == PROMPT
    assert said["seed"] == 7
    assert said["engine"] == engine.manifest["digest"]
    assert said["sampler"]["kind"] == "rcm"
    assert said["sampler"]["steps"] == 2
    assert said["sampler"]["sigma_max"] == 80.0
    assert said["shape"] == "64x64x5x1"
    assert said["lora"] == []
    assert json.loads(Image.open(places["frames"] / "frame-0004.png").text["turbocompile"]) == said
    with safe_open(places["latents"], "pt") as file:
        assert json.loads(file.metadata()["turbocompile"]) == said
        latents = file.get_tensor("latents")
    assert torch.equal(latents, result.latents[0])
    vae = load_components(engine.folder / "components", engine.manifest["components"])["vae"]
    shown = vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (shown.latents_mean, shown.latents_std))
    with torch.no_grad():
        pixels = vae.float().decode(latents[None] * std + mean).sample[0].permute(1, 2, 3, 0)
    assert ((pixels * 127.5 + 127.5).clamp(0, 255).round() - result.video[0].float()).abs().max() <= 1


def test_a_video_is_made_again_from_what_its_file_says(engine, tmp_path):
    first = generate(engine, PROMPT, seed=3, ode=True, sigma_max=40.0, out=tmp_path / "a.mp4")
    said = said_in_mp4(tmp_path / "a.mp4")
    sampler = {name: said["sampler"][name] for name in ("steps", "sigma_max", "ode")}
    again = generate(engine, said["prompt"], seed=said["seed"], shape=said["shape"], **sampler)
    assert torch.equal(again.video, first.video)
    assert not torch.equal(generate(engine, PROMPT, seed=3).video, first.video)


def test_samples_and_prompts_are_numbered_through(engine, tmp_path):
    made = list(generate_all(engine, ["one", "two"], samples=2, seed=5, out=tmp_path / "v.mp4"))
    assert [p.name for r in made for p in r.paths] == ["v.mp4", "v-1.mp4", "v-2.mp4", "v-3.mp4"]
    assert [(r.metadata["seed"]) for r in made] == [5, 6, 5, 6]
    assert [said_in_mp4(tmp_path / n)["prompt"] for n in ("v-1.mp4", "v-2.mp4")] == ["one", "two"]
    assert torch.equal(made[3].video, generate(engine, "two", seed=6).video)


def test_batches_fill_the_samples(engine, tmp_path):
    made = list(generate_all(engine, ["one"], samples=4, shape="64x64x5x2", frames=tmp_path / "f"))
    assert [p.name for r in made for p in r.paths] == ["f", "f-1", "f-2", "f-3"]
    assert json.loads(Image.open(tmp_path / "f-3" / "frame-0000.png").text["turbocompile"])["video"] == 1
    with pytest.raises(UnsupportedError, match="a multiple of 2"):
        next(generate_all(engine, ["one"], samples=3, shape="64x64x5x2"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"out": "a.avi"}, "written as .mp4"),
        ({"latents": "a.pt"}, "written as .safetensors"),
        ({"sigma_max": -1.0}, "sigma_max"),
        ({"steps": 9}, "1 to 4 for rcm"),
        ({"shape": "480p"}, r"480p \(480x832\); it has 64x64x5x1"),
        ({"shape": "481p"}, "no resolution 481p"),
        ({"shape": "720p 5:4"}, "no aspect ratio 5:4"),
    ],
)
def test_what_cannot_be_made_is_said_before_any_work(engine, tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TurbocompileError, match=sentence):
        generate(engine, PROMPT, **given)
    assert not list(tmp_path.iterdir())


def test_shapes_have_names():
    shapes = [Shape(height=480, width=832), Shape(height=1280, width=720)]
    assert choose_shape(shapes, "480p") is shapes[0]
    assert choose_shape(shapes, "480P 16:9") is shapes[0]
    assert choose_shape(shapes, "720p 9:16") is shapes[1]
    with pytest.raises(UnsupportedError, match=r"720p \(720x1280\)"):
        choose_shape(shapes, "720p")


def test_frames_that_were_cut_short_leave_the_folder_as_it_was(tmp_path, monkeypatch):
    video_file.write_frames(tmp_path, torch.zeros(3, 8, 8, 3, dtype=torch.uint8))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save, count = Image.Image.save, iter(range(9))

    def interrupted(self, *args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video_file.write_frames(tmp_path, torch.full((3, 8, 8, 3), 9, dtype=torch.uint8))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_command_makes_the_videos_of_a_file(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red seven\n\n a blue three \n")
    out = tmp_path / "v.mp4"
    given = ["run", str(folder), "--prompt-file", str(tmp_path / "prompts.txt"), "--num-samples", "1", "-o", str(out)]
    made = CliRunner().invoke(main, [*given, "--sigma-max", "60", "--ode", "--json"])
    assert made.exit_code == 0, made.output
    calls = json.loads(made.stdout)["calls"]
    assert [c["paths"] for c in calls] == [[str(out)], [str(tmp_path / "v-1.mp4")]]
    assert said_in_mp4(tmp_path / "v-1.mp4")["prompt"] == "a blue three"
    assert len(read_video(out)[0]) == 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "there is no prompt"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt-file", "empty.txt"], "holds no prompt"),
        (["--prompt", "a", "--num-samples", "0"], "0 is not in the range"),
    ],
)
def test_the_command_refuses_in_a_sentence(folder, tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    made = CliRunner().invoke(main, ["run", str(folder), *given])
    assert made.exit_code == 2
    assert sentence in made.stderr
    assert not (tmp_path / "out.mp4").exists()


def test_a_sampler_of_the_flow_takes_no_ode(engine):
    """The recipe's sampler is rcm; of unipc the same option is an error that says so."""
    from dataclasses import replace

    from turbocompile.recipe.schema import SamplerSpec
    from turbocompile.video.request import choose_sampler

    assert choose_sampler(SamplerSpec(), "t2v", ode=True).ode
    with pytest.raises((RecipeError, ValueError), match="belongs to rcm"):
        choose_sampler(replace(SamplerSpec(kind="unipc")), "t2v", ode=True)
