"""The evaluation on videos whose verdict is known, and the sentences for what it cannot evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from torch import nn
from videos import read_video

import turbocompile.wan_mini.evaluate as evaluation
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.cli import main
from turbocompile.errors import TurbocompileError, UnsupportedError
from turbocompile.recipe.schema import Recipe
from turbocompile.video.results import GenerateResult
from turbocompile.video.vae import to_frames
from turbocompile.wan.example import write_example
from turbocompile.wan_mini import world
from turbocompile.wan_mini.evaluate import evaluate, evaluate_vae, evaluate_videos, write_sheet
from turbocompile.wan_mini.world import Combination, evaluation_set

FULL = {"height": 256, "width": 256, "num_frames": 33}
SMALL = {"height": 64, "width": 64, "num_frames": 5}


class Truth:
    """Draws what is asked for, with scans that the judge was trained on, so that every digit is read."""

    def __init__(self) -> None:
        self.scans = world.load_scans(train=True)
        self.masks = world.enlarge(self.scans.images)

    def __call__(self, combination: Combination, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return to_frames(world.render(world.draw_scenes([combination], self.scans, generator), self.masks))[0]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


@pytest.fixture(scope="module")
def videos(truth) -> list[torch.Tensor]:
    return [truth(c, seed) for seed, c in enumerate(evaluation_set(4))]


@pytest.fixture(scope="module")
def found(videos) -> evaluation.Evaluation:
    return evaluate_videos(videos, evaluation_set(4))


# ----------------------------------------------------------------------------------------------------------- the layer


def test_true_videos_are_right_in_everything(found):
    assert found.prompts == 4
    for aspect in evaluation.ASPECTS:
        row = found.shares[aspect]
        assert {g: (row[g].right, row[g].total) for g in row} == {"seen": (2, 2), "held out": (2, 2), "all": (4, 4)}
    assert (found.psnr, found.ssim, found.vae_psnr) == (None, None, None)
    assert [clip.seed for clip in found.clips] == list(range(4))


def test_a_maker_videos_and_batches_give_the_same(truth, videos, found):
    wanted = evaluation_set(4)
    made = evaluate_videos(truth, wanted)
    batches = evaluate_videos(iter([torch.stack(videos[:3]), torch.stack(videos[3:])]), wanted)
    assert found.to_dict() == made.to_dict() == batches.to_dict()


def test_videos_of_other_prompts_are_wrong(videos):
    """Each prompt with the next one's video: nothing is right by chance but what both prompts say."""
    wanted = evaluation_set(4)
    moved = evaluate_videos([*videos[1:], videos[0]], wanted)
    pairs = list(zip(wanted, [*wanted[1:], wanted[0]], strict=True))
    motions = [(a.direction, a.bounces) == (b.direction, b.bounces) for a, b in pairs]
    assert moved.shares["digit"]["all"].right == sum(a.digit == b.digit for a, b in pairs)
    assert moved.shares["colour"]["all"].right == sum(a.colour == b.colour for a, b in pairs)
    assert moved.shares["motion"]["all"].right == sum(motions)
    assert moved.shares["all"]["all"].right == 0


def test_a_reference_gives_psnr_and_ssim(videos):
    wanted = evaluation_set(4)[:2]
    brighter = [(v + 5) for v in videos[:2]]  # no value is above 245
    same = evaluate_videos(videos[:2], wanted, reference=iter(videos[:2]))
    other = evaluate_videos(videos[:2], wanted, reference=lambda c, seed: brighter[seed])
    assert (same.psnr.value, same.psnr.count) == (120.0, 2)
    assert same.ssim.value == pytest.approx(1.0, abs=1e-6)
    assert other.psnr.value == pytest.approx(34.15, abs=0.01)  # 10 log10(255^2 / 25)
    assert other.ssim.value < 0.999


def test_videos_and_progress_are_kept(videos, tmp_path):
    seen = []
    evaluate_videos(videos[:2], evaluation_set(4)[:2], save=tmp_path / "out", progress=lambda *e: seen.append(e))
    assert seen == [("videos", 0.0), ("videos", 0.5), ("videos", 1.0)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000.mp4", "001.mp4"]
    assert read_video(tmp_path / "out" / "001.mp4")[0].shape == (33, 256, 256, 3)


@pytest.mark.parametrize(
    ("videos", "sentence"),
    [
        ([], "there are 0 videos for 2 combinations"),
        ([torch.zeros(3, 33, 256, 256, 3, dtype=torch.uint8)], "more videos than the 2"),
        ([torch.zeros(5, 64, 64, 3, dtype=torch.uint8)], r"is uint8 \(33, 256, 256, 3\), not torch.uint8 \(5, 64, 64"),
        ([torch.zeros(33, 256, 256, 3)], "not torch.float32"),
    ],
)
def test_what_cannot_be_judged_is_refused(videos, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        evaluate_videos(videos, evaluation_set(2))


def test_too_few_references_are_refused(videos):
    with pytest.raises(UnsupportedError, match="only 1 reference videos"):
        evaluate_videos(videos[:2], evaluation_set(4)[:2], reference=videos[:1])


def test_json_and_table_say_how_many(found):
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["prompts"] == 4
    assert again["shares"]["digit"]["held out"] == {
        "right": 2, "total": 2, "share": 1.0, "low": pytest.approx(0.3424, abs=1e-4), "high": 1.0,
    }  # fmt: skip
    assert again["videos"][0]["prompt"] == evaluation_set(4)[0].prompt
    assert [v["held_out"] for v in again["videos"]] == [False, True] * 2
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    text = console.export_text()
    assert "4 prompts" in text
    assert "all three" in text
    assert "100.0 (51.0 to 100.0)" in text  # 4 of 4 by Wilson


def test_the_contact_sheet_has_a_row_for_each_video(found, videos, tmp_path):
    path = write_sheet(found, tmp_path / "new" / "sheet.png")
    with Image.open(path) as opened:
        sheet = torch.from_numpy(np.array(opened.convert("RGB")))
    assert sheet.shape[0] == 4 * 132 + 4
    second = sheet[4 + 132 : 4 + 132 + 128, 4 + 2 * 132 : 4 + 2 * 132 + 128]  # row 1, column 2: frame 16
    expected = videos[1][16].float().unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)).round()
    assert torch.equal(second.float(), expected)
    with pytest.raises(UnsupportedError, match=r"ends in \.png"):
        write_sheet(found, tmp_path / "sheet.jpg")


class Coarse(nn.Module):
    """A VAE whose latent is the video at an eighth of its size, and its first frames."""

    class config:
        latents_mean, latents_std = [0.0] * 3, [1.0] * 3

    def __init__(self, error: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error = error

    def encode(self, video):
        class Out:
            class latent_dist:
                @staticmethod
                def mode():
                    return video

        return Out

    def decode(self, z, return_dict):
        return (z + self.error,)


def test_the_vaes_psnr_is_that_of_its_error():
    """Off by 10 levels of 255 everywhere: 10 log10(255^2 / 100) = 28.13 dB; by none: equal."""
    events = []
    found = evaluate_vae(Coarse(10 / 127.5), 2, lambda *e: events.append(e))
    assert found.value == pytest.approx(28.13, abs=0.01)
    assert events == [("vae", 0.5), ("vae", 1.0)]
    assert evaluate_vae(Coarse(0.0), 1).value == 120.0


# ----------------------------------------------------------------------------------------------------------- an engine


def write_thin_vae(folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    config = AutoencoderKLWan.load_config(folder)
    torch.manual_seed(0)
    AutoencoderKLWan.from_config({**config, "base_dim": 2}).save_pretrained(folder)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds an engine from an example pipeline: build(name, shapes, variant, ...) -> folder, once for each name."""
    made: dict[str, Path] = {}
    pipelines: dict[str, Path] = {}

    def make(name: str, shapes=(FULL,), variant="t2v", **fields) -> Path:
        if variant not in pipelines:
            pipelines[variant] = tmp_path_factory.mktemp("pipelines") / variant
            write_example(pipelines[variant], variant)
            if variant == "t2v":  # videos of 256 x 256 by a VAE of a quarter of the channels take a quarter of the time
                write_thin_vae(pipelines[variant] / "vae")
        if name not in made:
            model = {"path": str(pipelines[variant])} if "model" not in fields else fields.pop("model")
            data = {"model": model, "shapes": list(shapes), "target": "cpu", "passes": "off", "verify": "off"}
            made[name] = tmp_path_factory.mktemp("engines") / name
            optimize_recipe(Recipe.from_dict(data | fields), made[name])
        return made[name]

    make.pipelines = pipelines
    return make


@pytest.fixture
def engine(build) -> Path:
    return build("engine", sampler={"kind": "euler", "steps": 1, "guidance": 1.0})


@pytest.fixture
def drawing(truth, monkeypatch) -> list[dict]:
    """Videos are drawn where the engine would make them, and the VAE is perfect; the calls that were made."""
    calls: list[dict] = []

    def draw(engine, prompt, *, seed, shape, steps, guidance, progress):
        calls.append({"prompt": prompt, "seed": seed, "shape": shape, "steps": steps, "guidance": guidance})
        progress("denoise", 0.5)
        video = truth(next(c for c in world.combinations() if c.prompt == prompt), seed)[None]
        return GenerateResult(video, torch.zeros(1), {})

    monkeypatch.setattr(evaluation, "generate", draw)
    monkeypatch.setattr(evaluation, "component", lambda engine, name: Coarse(0.0))
    return calls


def test_an_engine_is_asked_for_each_prompt_with_its_place_as_the_seed(engine, drawing):
    found = evaluate(engine, prompts=2, steps=3, guidance=2.0)
    assert drawing == [
        {"prompt": c.prompt, "seed": i, "shape": "256x256x33x1", "steps": 3, "guidance": 2.0}
        for i, c in enumerate(evaluation_set(2))
    ]
    assert found.shares["all"]["all"].right == 2
    assert (found.vae_psnr.value, found.vae_psnr.count) == (120.0, 2)
    assert found.settings["engine"] == str(engine)
    assert (found.settings["sampler"]["steps"], found.settings["sampler"]["guidance"]) == (3, 2.0)


def test_another_engine_is_a_reference_by_its_own_recipe(engine, drawing):
    found = evaluate(engine, prompts=2, steps=3, reference=engine)
    assert found.psnr.value == 120.0
    assert [(call["seed"], call["steps"]) for call in drawing] == [(0, 3), (0, None), (1, 3), (1, None)]


def call(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_prints_a_table_a_sheet_and_json(engine, drawing, tmp_path):
    result = call("evaluate", engine, "--prompts", 2, "--sheet", tmp_path / "sheet.png", "--save", tmp_path / "videos")
    assert result.exit_code == 0, result.output
    assert "2 prompts, every second held out" in result.stdout
    assert f"sheet: {tmp_path / 'sheet.png'}" in result.stdout
    assert "videos" in result.stderr
    assert (tmp_path / "sheet.png").is_file()
    assert (tmp_path / "videos" / "001.mp4").is_file()
    as_json = json.loads(call("evaluate", engine, "--prompts", 2, "--reference", engine, "--json").stdout)
    assert as_json["shares"]["all"]["all"]["right"] == 2
    assert as_json["ssim"]["mean"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": 3}, "an even number of prompts"),
        ({"prompts": 0}, "an even number of prompts"),
        ({"steps": 0}, "steps"),
        ({"reference": "{folder}/nowhere"}, "neither an engine nor a diffusers pipeline"),
        ({"reference": "{small}"}, "has the shapes 64x64x5x1"),
    ],
)
def test_what_an_engine_cannot_be_asked_is_one_sentence(build, engine, drawing, tmp_path, options, sentence):
    small = build("small", shapes=(SMALL,))
    options = {k: v.format(folder=tmp_path, small=small) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(TurbocompileError, match=sentence):
        evaluate(engine, **options)
    assert not drawing


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("small", {"shapes": (SMALL,)}, "build it with that shape"),
        ("pairs", {"shapes": (FULL | {"batch": 2},)}, "one video at once"),
        ("synthetic", {"model": {"preset": "wan-tiny"}}, "are synthetic, so there is nothing to judge"),
        ("images", {"variant": "i2v", "shapes": (SMALL,)}, "makes videos from images"),
        ("bare", {"shapes": (SMALL,), "components": "none"}, "holds no text encoder"),
    ],
)
def test_an_engine_that_makes_no_digits_is_one_sentence_and_exit_code_2(build, tmp_path, name, fields, sentence):
    result = call("evaluate", build(name, **fields), "--prompts", 2, "--save", tmp_path / "videos")
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in line
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), "is no folder"),
        (("{engine}", "--sheet", "sheet.gif"), "ends in .png"),
        (("{engine}", "--device", "tpu"), "there is no device 'tpu'"),
        (("{engine}", "--prompts", "9"), "even number"),
        (("{engine}", "--prompts", "x"), "not a valid integer"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(engine, arguments, sentence):
    result = call("evaluate", *(a.format(engine=engine) for a in arguments))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in line


@pytest.mark.slow
def test_an_engine_and_its_pipeline_make_the_same_videos(build, engine):
    """Random weights: nothing is right, and the two differ by rounding alone (60 dB is a quarter of a level)."""
    found = evaluate(engine, prompts=2, reference=build.pipelines["t2v"])
    assert found.shares["digit"]["all"].right == 0
    assert found.psnr.low > 60
    assert found.vae_psnr.count == 2
