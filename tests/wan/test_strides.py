"""Videos have the size that was asked for, whatever the VAE's strides and the transformer's patches are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from PIL import Image

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe, recorded_shape
from turbocompile.errors import EngineError, RecipeError, TurbocompileError, UnsupportedError
from turbocompile.numerics.recording import read_inputs
from turbocompile.recipe.presets import Geometry, published_vae, vae_strides
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.video.record import record_inputs
from turbocompile.video.session import generate
from turbocompile.wan.source import open_source

pytestmark = pytest.mark.filterwarnings("ignore:rcm is for rCM-distilled")
TI2V = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
VAES = {
    "stride 4": ({"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "scale_factor_spatial": 4}, (4, 4)),
    "stride 8": ({}, (8, 4)),
    "stride 16": ({"dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False, False, True, True]}, (16, 4)),
    "stride 16 by patches": (TI2V, (16, 4)),
    "8 frames": ({"temperal_downsample": [True, True, True], "scale_factor_temporal": 8}, (8, 8)),
    "2 frames": ({"temperal_downsample": [False, False, True], "scale_factor_temporal": 2}, (8, 2)),
    "1 frame": ({"temperal_downsample": [False, False, False]}, (8, 1)),
}


def small_vae(channels: int = 16, **config) -> AutoencoderKLWan:
    """A VAE with few channels. Statistics that are not 0 and 1 show whether they are used."""
    statistics = {"latents_mean": [0.25] * channels, "latents_std": [2.0] * channels}
    torch.manual_seed(0)
    small = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**{**small, "z_dim": channels, **statistics, **config}).eval().requires_grad_(False)


@pytest.fixture
def pipeline(example, tmp_path):
    """A function that writes the example with another VAE and other fields of the transformer and the index."""

    def make(vae=None, transformer=None, index=None, variant="t2v"):
        folder = tmp_path / "wan"
        shutil.copytree(example(variant), folder)
        if vae is not None:
            shutil.rmtree(folder / "vae")
            vae.save_pretrained(folder / "vae")
        if transformer is not None:
            old = json.loads((folder / "transformer" / "config.json").read_text())
            shutil.rmtree(folder / "transformer")
            torch.manual_seed(1)
            config = {k: v for k, v in old.items() if k[0] != "_"} | transformer
            WanTransformer3DModel(**config).save_pretrained(folder / "transformer")
        if index is not None:
            path = folder / "model_index.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | index))
        return folder

    return make


def recipe(folder, height=64, width=96, frames=9, **fields):
    size = {"height": height, "width": width, "num_frames": frames}
    sampler = {"kind": "unipc", "steps": 2, "guidance": 1.0}
    plain = {"passes": "off", "verify": "off", "sampler": sampler, "target": "cpu"}
    return Recipe.from_dict({"model": {"path": str(folder)}, "shapes": [size], **plain, **fields})


@pytest.mark.parametrize(("config", "strides"), VAES.values(), ids=VAES)
def test_strides_are_those_of_the_layers(config, strides):
    vae = small_vae(4, **config)
    with torch.no_grad():
        video = vae.decode(torch.zeros(1, 4, 3, 2, 3)).sample
    spatial, temporal = vae_strides(vae.config)
    assert (spatial, temporal) == strides
    assert video.shape == (1, 3, 1 + 2 * temporal, 2 * spatial, 3 * spatial)
    without = {k: v for k, v in vae.config.items() if not k.startswith("scale_factor")}  # folders of older versions
    assert vae_strides(without) == strides


@pytest.mark.parametrize(("config", "strides"), VAES.values(), ids=VAES)
def test_a_video_has_the_size_that_was_asked_for(pipeline, tmp_path, config, strides):
    folder = pipeline(small_vae(**config))
    optimize_recipe(recipe(folder), tmp_path / "engine")
    engine = turbocompile.load(tmp_path / "engine")
    (program,) = engine.programs.values()
    hidden = next(i for i in program.signature.inputs if i.path == "hidden_states")
    assert hidden.shape == (1, 16, 1 + 8 // strides[1], 64 // strides[0], 96 // strides[0])
    assert generate(engine, "a cat").video.shape == (1, 9, 64, 96, 3)


@pytest.mark.parametrize(("patch", "measured"), [((1, 4, 4), "off"), ((1, 1, 1), "off"), ((3, 2, 1), "numeric")])
def test_patches_of_other_sizes_run(pipeline, tmp_path, patch, measured):
    """measured: `numeric` makes a small twin, which has to have whole patches too."""
    folder = pipeline(transformer={"patch_size": list(patch)})
    passes = {"enabled": measured == "numeric"}
    optimize_recipe(recipe(folder, passes=passes, verify=measured), tmp_path / "engine")
    assert generate(tmp_path / "engine", "a cat", steps=1).video.shape == (1, 9, 64, 96, 3)


def test_ti2v_of_text_alone_makes_the_video_of_the_diffusers_pipeline(pipeline, tmp_path):
    """Wan2.2 TI2V 5B: 48 channels at stride 16; diffusers gives each token the same timestep, here there is one."""
    channels = {"in_channels": 48, "out_channels": 48}
    folder = pipeline(small_vae(48, **TI2V), channels, {"expand_timesteps": True})
    report = optimize_recipe(recipe(folder, model={"path": str(folder), "text_only": True}), tmp_path / "engine")
    assert any("expand_timesteps=False" in warning for warning in report.warnings)
    engine = turbocompile.load(tmp_path / "engine")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    expected = pipe("a cat", **call, generator=torch.Generator().manual_seed(3), output_type="pt").frames
    found = generate(engine, "a cat", seed=3).video
    difference = found.float() - expected.permute(0, 1, 3, 4, 2) * 255
    assert difference.abs().max() <= 0.51  # bytes against numbers that are not rounded


@pytest.mark.parametrize("kind", ["stride 4", "stride 16", "2 frames", "1 frame"])
def test_an_image_becomes_channels_of_any_stride(pipeline, tmp_path, kind):
    config, (_, temporal) = VAES[kind]
    folder = pipeline(small_vae(**config), {"in_channels": 32 + temporal}, variant="i2v")
    optimize_recipe(recipe(folder), tmp_path / "engine")
    picture = Image.new("RGB", (80, 60), (200, 30, 30))
    assert generate(tmp_path / "engine", "a cat", image=picture, steps=1).video.shape == (1, 9, 64, 96, 3)


def test_recorded_inputs_are_of_the_models_own_latents(pipeline, tmp_path):
    folder = pipeline(small_vae(**VAES["stride 4"][0]))
    record_inputs(recipe(folder), tmp_path / "calls.safetensors", ["a cat"], calls=1, steps=1)
    recorded = read_inputs(tmp_path / "calls.safetensors")
    assert recorded.calls[0]["hidden_states"].shape == (1, 16, 3, 16, 24)
    assert recorded_shape(recorded, Geometry(spatial=4)) == Shape(64, 96, 9)
    with pytest.raises(RecipeError, match=r"latent of no video: num_frames must be 8k \+ 5, not 9"):
        recorded_shape(recorded, Geometry(patch=(2, 2, 2)))


@pytest.mark.parametrize(
    ("kind", "size", "sentence"),
    [
        (
            "stride 16",
            {"height": 48},
            r"shapes\.0\.height must be a multiple of 32 \(VAE 16 times patch 2\), not 48; use",
        ),
        (
            "stride 4",
            {"width": 100},
            r"shapes\.0\.width must be a multiple of 8 \(VAE 4 times patch 2\), not 100; use 96",
        ),
        ("8 frames", {"frames": 5}, r"shapes\.0\.num_frames must be 8k \+ 1, not 5; use 1 or 9"),
        ("stride 8", {"height": 8}, r"multiple of 16 \(VAE 8 times patch 2\), not 8; use 16"),
    ],
)
def test_sizes_that_make_no_whole_tokens_are_refused_by_name(pipeline, kind, size, sentence):
    folder = pipeline(small_vae(**VAES[kind][0]))
    with pytest.raises(RecipeError, match=sentence):
        open_source(recipe(folder, **size))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p(small_vae(48, **TI2V)), r"makes latents of 16 channels .* its VAE decodes 48"),
        (lambda p: p(transformer={"in_channels": 48, "out_channels": 48}), "latents of 48 channels .* decodes 16"),
        (lambda p: p(transformer={"in_channels": 33}), r"takes 33 channels .* image-to-video is 36"),
        (lambda p: p(transformer={"in_channels": 12}), r"takes 12 channels .* makes 16"),
        (lambda p: p(small_vae(**VAES["8 frames"][0]), {"in_channels": 40}), "one latent frame of 8, and diffusers"),
        (
            lambda p: p(transformer={"in_channels": 36}, index={"expand_timesteps": True}),
            "takes 36 channels .* makes 16",
        ),
        (lambda p: p(transformer={"patch_size": [3, 2, 1]}, index={"expand_timesteps": True}), "tokens of its own"),
        (lambda p: p(small_vae(latents_mean=[0.0] * 3)), "latents_mean has 3 values for the 16 channels"),
        (lambda p: p(small_vae(temperal_downsample=[False, True, True, True])), "more entries than dim_mult has steps"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_work(pipeline, make, sentence):
    with pytest.raises((EngineError, UnsupportedError), match=sentence) as caught:
        open_source(recipe(make(pipeline)))
    assert "\n" not in str(caught.value)


def test_without_a_vae_the_channels_say_the_stride(example, tmp_path):
    folder = tmp_path / "t"
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=32, ffn_dim=256, num_layers=1, in_channels=48,
        out_channels=48,
    ).save_pretrained(folder)  # fmt: skip
    source = open_source(recipe(folder, components="none"))
    assert source.geometry == Geometry(16, 4, (1, 2, 2))
    assert source.transformers["transformer"].example_inputs(Shape(64, 96, 9))[1]["hidden_states"].shape[2:] == (
        3,
        4,
        6,
    )
    assert vae_strides(published_vae(16)) == (8, 4)


def test_the_vae_of_a_folder_counts_where_its_components_are_left_out(pipeline):
    folder = pipeline(small_vae(**VAES["stride 4"][0]))
    assert open_source(recipe(folder, components="none")).geometry.spatial == 4


def test_a_changed_preset_gets_a_vae_of_its_channels():
    made = Recipe.from_dict({"model": {"preset": "wan-tiny", "config": {"in_channels": 8, "out_channels": 8}}})
    assert open_source(made).components.vae_config()["z_dim"] == 8
    with pytest.raises(TurbocompileError, match=r"multiple of 32 \(VAE 8 times patch 4\)"):
        Recipe.from_dict(
            {"model": {"preset": "wan-tiny", "config": {"patch_size": [1, 4, 4]}}, "shapes": [{"height": 48}]}
        )


def test_a_decoder_of_other_strides_than_its_configuration_is_caught(pipeline, tmp_path, monkeypatch):
    from turbocompile.video import memory as module

    folder = pipeline()
    optimize_recipe(recipe(folder), tmp_path / "engine")
    monkeypatch.setattr(module.wan_vae, "decode", lambda vae, z: torch.zeros(1, 3, 9, 32, 48))
    with pytest.raises(EngineError, match=r"made videos of 9 x 32 x 48 .* where 64x96x9x1 was asked for"):
        generate(tmp_path / "engine", "a cat", steps=1)
