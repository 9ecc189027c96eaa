"""The example folder is a genuine diffusers pipeline."""

from __future__ import annotations

import pytest
import torch

from turbocompile.errors import RecipeError
from turbocompile.recipe.presets import VARIANTS
from turbocompile.recipe.schema import load_recipe
from turbocompile.wan.example import write_example
from turbocompile.wan.source import open_source

IMAGE = "WanImageToVideoPipeline"


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_opens_it_and_makes_a_video(example, variant):
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipe = DiffusionPipeline.from_pretrained(example(variant))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == {"i2v": IMAGE, "flf2v": IMAGE, "vace": "WanVACEPipeline"}.get(
        variant.partition("-")[0], "WanPipeline"
    )
    assert pipe.config.boundary_ratio == {"i2v-experts": 0.9, "t2v-experts": 0.875}.get(variant)
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    image = {"image": picture} if type(pipe).__name__ == IMAGE else {}
    image |= {"last_image": picture} if variant == "flf2v" else {}
    call = {"prompt": "A red cat", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, **image}
    frames = pipe(**call, output_type="np", generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert frames.std() > 0.05  # not one grey


@pytest.mark.parametrize("head_dim", [64, 128])
def test_its_recipe_opens_it(example, head_dim):
    folder = example("t2v", head_dim)
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.model.path == str(folder)
    assert open_source(recipe).transformers["transformer"].config["attention_head_dim"] == head_dim


def test_the_seed_decides_the_bytes(example, tmp_path):
    write_example(tmp_path / "same")
    write_example(tmp_path / "other", seed=1)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (example() / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (example() / weights).read_bytes()


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not an empty folder"):
        write_example(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="not an empty folder"):
        write_example(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert write_example(tmp_path / "empty").is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    from turbocompile.wan import example as module

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_example(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_unknown_variants_are_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="the variants are t2v, i2v"):
        write_example(tmp_path / "x", "v2v")
    with pytest.raises(RecipeError, match="head_dim of 64 or 128, not 96"):
        write_example(tmp_path / "x", head_dim=96)
    assert list(tmp_path.iterdir()) == []
