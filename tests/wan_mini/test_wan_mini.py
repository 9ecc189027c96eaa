"""The weights in examples/wan-mini: the folder is what it is said to be, and its videos show what their prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from videos import read_video

from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.recipe.schema import load_recipe
from turbocompile.video.session import generate
from turbocompile.wan_mini.judge import judge
from turbocompile.wan_mini.statistics import Share
from turbocompile.wan_mini.train import FLOW_SHIFT, GUIDANCE

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "wan-mini"
MIB = 2**20


def test_the_folder_is_small_and_its_weights_are_bfloat16():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 26e6
    assert max(p.stat().st_size for p in files) < 16 * MIB
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pickle")]


def test_diffusers_opens_it_and_its_linears_suit_every_8_bit_format():
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    pipe = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    kinds = (WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel)
    assert tuple(map(type, (pipe.transformer, pipe.vae, pipe.text_encoder))) == kinds
    config = pipe.transformer.config
    assert (config.attention_head_dim, config.qk_norm) == (64, "rms_norm_across_heads")
    assert 4 <= config.num_layers <= 8
    assert (pipe.vae.config.scale_factor_spatial, pipe.vae.config.scale_factor_temporal) == (8, 4)
    widths = {m.in_features for block in pipe.transformer.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert widths
    assert all(width % 128 == 0 for width in widths)  # int8_block has blocks of 128


def shown_right(name: str, aspect: str, held_out: bool) -> Share:
    """Counted from the verdicts of an evaluation, and the same as its own sum."""
    found = json.loads((FOLDER / "training" / f"{name}.json").read_text())
    videos = [v for v in found["videos"] if v["held_out"] is held_out]
    share = Share(sum(v["right"][aspect] for v in videos), len(videos))
    assert found["shares"][aspect]["held out" if held_out else "seen"]["right"] == share.right
    return share


def test_the_log_is_of_the_runs_that_the_page_tells_of():
    """Seconds and steps of the stages, the judge's shares and the autoencoder's PSNR are those of README.md."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    total = 0.0
    for stage in ("vae-short", "vae-long", "transformer-short", "transformer"):
        last = json.loads((FOLDER / "training" / f"{stage}.jsonl").read_text().splitlines()[-1])
        total += last["seconds"]
        row = next(line for line in page.splitlines() if line.startswith(f"| {stage}:"))
        assert f"| {last['step']:,} |" in row
        assert row.endswith(f"| {last['seconds']:.0f} |")
    assert f"{total:.0f} s in the four stages" in page
    aspects = ("digit", "colour", "motion")
    for aspect in aspects:
        cells = []
        for held_out in (False, True):
            share = shown_right("evaluation", aspect, held_out)
            low, high = (100 * bound for bound in share.interval)
            cells.append(f"{100 * share.value:.0f} % ({low:.1f} - {high:.1f})")
        assert f"| {aspect} | {' | '.join(cells)} |" in page
    for name in ("evaluation", "evaluation-engine", "evaluation-sage", "evaluation-all"):
        counts = [f"{shown_right(name, a, False).right}, {shown_right(name, a, True).right}" for a in aspects]
        assert f" | {' | '.join(counts)} |" in page
    psnr = json.loads((FOLDER / "training" / "vae_psnr.json").read_text())
    assert f"{psnr['mean']:.1f} dB ({psnr['low']:.1f} - {psnr['high']:.1f})" in page


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    recipe = load_recipe(EXAMPLES / "wan-mini.yaml", ["target=cpu"])
    folder = tmp_path_factory.mktemp("wan-mini") / "engine"
    optimize_recipe(recipe, folder)
    return folder


def test_the_recipe_samples_as_the_weights_were_judged():
    sampler = load_recipe(EXAMPLES / "wan-mini.yaml").sampler
    assert (sampler.kind, sampler.steps) == ("unipc", 50)
    assert (sampler.guidance, sampler.shift) == (GUIDANCE, FLOW_SHIFT)


def test_a_video_made_on_the_cpu_shows_its_prompt(engine, tmp_path):
    """The README's prompt and seed in 10 steps, judged from the file that a user would open."""
    prompt = "a red seven moves left and bounces"
    generate(engine, prompt, seed=0, steps=10, out=tmp_path / "out.mp4", device="cpu")
    frames, _ = read_video(tmp_path / "out.mp4")
    (verdict,) = judge(frames[None])
    assert (verdict.digit, verdict.colour) == (7, "red")
    assert (verdict.direction, verdict.bounces) == ("left", True)
