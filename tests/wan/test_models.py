"""Each of Wan's models, at a tiny size, from recipe to frames: the numbers of diffusers' own pipeline of that model."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import Recipe
from turbocompile.video import session
from turbocompile.video.session import generate

PROMPT = "a cat walking on the beach"
SIZE = {"height": 64, "width": 64, "num_frames": 9}
STEPS = 3
# Both sides compute in float32, in another order of operations: 3 steps, each of two forwards of two blocks.
CLOSE = 1e-4  # of the largest latent
pytestmark = pytest.mark.filterwarnings("ignore:the weights are synthetic", "ignore:rcm is for rCM-distilled")


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Blocks of colour, so that the picture has edges at which resizing would show."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


FIRST, LAST = picture(1), picture(2)
VIDEO = [picture(10 + i) for i in range(9)]
MASK = [Image.fromarray(np.full((64, 64, 3), 0 if i < 3 else 255, np.uint8)) for i in range(9)]
for frame in MASK[3:6]:
    frame.paste((0, 0, 0), (8, 16, 40, 64))


def recipe_of(folder: Path, shape: dict | None = None, **fields) -> Recipe:
    sampler = {"kind": "unipc", "steps": STEPS, "guidance": 4.0, "shift": 3.0} | fields.pop("sampler", {})
    model = {"path": str(folder)} | fields.pop("model", {})
    plain = {"model": model, "shapes": [SIZE | (shape or {})], "target": "cpu", "passes": "off", "verify": "off"}
    return Recipe.from_dict(plain | {"sampler": sampler} | fields)


@pytest.fixture(scope="module")
def built(example, tmp_path_factory):
    """The engine's folder of a variant's example, built once for each shape."""
    made: dict[tuple, Path] = {}

    def build(variant: str, references: int = 0) -> Path:
        key = (variant, references)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("engines") / f"{variant}-{references}"
            optimize_recipe(recipe_of(example(variant), {"references": references}), made[key])
        return made[key]

    return build


def eager(folder: Path, pipeline: str):
    """diffusers' own pipeline of a folder, with its own transformers."""
    pipe = getattr(diffusers, pipeline).from_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(monkeypatch, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the frames of `generate`."""
    seen: list[torch.Tensor] = []
    make = session.make_latents
    monkeypatch.setattr(session, "make_latents", lambda *a: seen.append(make(*a)) or seen[-1])
    video = generate(*args, **kwargs).video
    return seen[0], video


# variant -> diffusers' pipeline, what `generate` is given, what the pipeline is given
CASES = {
    "t2v": ("WanPipeline", {}, {}),
    "t2v-experts": ("WanPipeline", {}, {}),
    "i2v": ("WanImageToVideoPipeline", {"image": FIRST}, {"image": FIRST}),
    "i2v-image": ("WanImageToVideoPipeline", {"image": FIRST}, {"image": FIRST}),
    "i2v-experts": ("WanImageToVideoPipeline", {"image": FIRST}, {"image": FIRST}),
    "i2v-experts, last": ("WanImageToVideoPipeline", {"image": FIRST, "last_image": LAST}, None),
    "flf2v": ("WanImageToVideoPipeline", {"image": FIRST, "last_image": LAST}, None),
    "ti2v": ("WanPipeline", {}, {}),
    "ti2v, image": ("WanImageToVideoPipeline", {"image": FIRST}, None),
    "vace": ("WanVACEPipeline", {}, {}),
    "vace, control": ("WanVACEPipeline", {"control": VIDEO}, {"video": VIDEO}),
    "vace, mask": ("WanVACEPipeline", {"control": VIDEO, "mask": MASK}, {"video": VIDEO, "mask": MASK}),
    "vace, weaker": (
        "WanVACEPipeline",
        {"control": VIDEO, "mask": MASK, "control_scale": 0.5},
        {"video": VIDEO, "mask": MASK, "conditioning_scale": 0.5},
    ),
    "vace, references": (
        "WanVACEPipeline",
        {"control": VIDEO, "reference": [picture(4, 32, 48), LAST]},
        {"video": VIDEO, "reference_images": [picture(4, 32, 48), LAST]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_makes_the_video_of_diffusers_pipeline(case, example, built, monkeypatch):
    pipeline, ours, theirs = CASES[case]
    variant = case.split(",")[0]
    pipe = eager(example(variant), pipeline)
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    given = ours if theirs is None else theirs
    engine = turbocompile.load(built(variant, len(ours.get("reference", ()))))
    found, video = latents_of(monkeypatch, engine, PROMPT, "blurry", seed=1, **ours)
    expected = pipe(
        prompt=PROMPT, negative_prompt="blurry", **call, **given, generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).frames[:, :, len(ours.get("reference", ())) :]  # fmt: skip
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    assert video.shape == (1, 9, 64, 64, 3)


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("i2v-experts", {"last_image": LAST}),
        ("flf2v", {"last_image": FIRST}),
        ("ti2v, image", {"image": LAST}),
        ("ti2v, image", {"image": None}),
        ("vace, control", {"control": VIDEO[::-1]}),
        ("vace, mask", {"mask": MASK[::-1]}),
        ("vace, mask", {"control_scale": 0.5}),
        ("vace, references", {"reference": [LAST, FIRST]}),
    ],
)
def test_each_image_reaches_the_video(case, changed, built):
    _, ours, _ = CASES[case]
    engine = turbocompile.load(built(case.split(",")[0], len(ours.get("reference", ()))))
    one, other = (generate(engine, PROMPT, steps=1, **given).video for given in (ours, {**ours, **changed}))
    assert not torch.equal(one, other)
