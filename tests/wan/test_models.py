"""Each of Wan's models, at a tiny size, from recipe to frames: the numbers of diffusers' own pipeline of that model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from videos import read_video

import turbocompile
from turbocompile.build.from_recipe import optimize_recipe
from turbocompile.cli import main
from turbocompile.errors import TurbocompileError, UnsupportedError
from turbocompile.recipe.presets import PRESETS
from turbocompile.recipe.schema import Recipe, load_recipe
from turbocompile.video.file import write_video
from turbocompile.video.session import generate
from turbocompile.wan.keys import diffusers_name
from turbocompile.wan.source import open_source

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
def test_an_engine_makes_the_video_of_diffusers_pipeline(case, example, built):
    pipeline, ours, theirs = CASES[case]
    variant = case.split(",")[0]
    pipe = eager(example(variant), pipeline)
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    given = ours if theirs is None else theirs
    engine = turbocompile.load(built(variant, len(ours.get("reference", ()))))
    result = generate(engine, PROMPT, "blurry", seed=1, **ours)
    expected = pipe(
        prompt=PROMPT, negative_prompt="blurry", **call, **given, generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).frames[:, :, len(ours.get("reference", ())) :]  # fmt: skip
    assert result.latents.shape == expected.shape
    assert (result.latents - expected).abs().max() <= CLOSE * expected.abs().max()
    assert result.video.shape == (1, 9, 64, 64, 3)


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


def test_ti2v_keeps_the_image_as_its_first_frame_and_has_24_frames_a_second(built, tmp_path):
    """The first latent frame of the result is the image's, which the VAE alone changes."""
    engine = turbocompile.load(built("ti2v"))
    one, other = (generate(engine, PROMPT, image=FIRST, seed=seed, out=tmp_path / f"{seed}.mp4") for seed in (1, 2))
    assert torch.equal(one.latents[:, :, 0], other.latents[:, :, 0])
    assert not torch.equal(one.latents[:, :, 1:], other.latents[:, :, 1:])
    assert read_video(one.path)[1] == 24


def test_a_ti2v_engine_takes_one_timestep_a_token(built):
    (shapes,) = turbocompile.load(built("ti2v")).shapes
    assert shapes["timestep"] == [1, 3 * 2 * 2]  # 9 frames of 64 x 64 pixels: 3 x 4 x 4 latents, of which 2 x 2 a token


def test_a_control_may_be_files(built, tmp_path):
    """A folder of pictures, one mask for all frames and a reference's file give what the images themselves give."""
    engine = turbocompile.load(built("vace", 1))
    for i, image in enumerate(VIDEO):
        (tmp_path / "frames").mkdir(exist_ok=True)
        image.save(tmp_path / "frames" / f"{i:02}.png")
    MASK[4].save(tmp_path / "mask.png")
    LAST.save(tmp_path / "reference.png")
    names = {"control": tmp_path / "frames", "mask": tmp_path / "mask.png", "reference": tmp_path / "reference.png"}
    images = {"control": VIDEO, "mask": [MASK[4]] * 9, "reference": LAST}
    found, expected = (generate(engine, PROMPT, steps=1, **given) for given in (names, images))
    assert torch.equal(found.latents, expected.latents)
    assert found.metadata["given"] == ["control", "mask", "references"]


def test_run_takes_a_video_as_control(built, tmp_path):
    """By the command line; the video is one frame longer than the engine's, and its first frames count."""
    frames = torch.from_numpy(np.stack([np.asarray(image) for image in [*VIDEO, FIRST]]))
    write_video(tmp_path / "control.mp4", frames)
    LAST.save(tmp_path / "reference.png")
    command = ["run", str(built("vace", 1)), "--prompt", PROMPT, "--steps", "1", "-o", str(tmp_path / "out.mp4")]
    given = ["--control", str(tmp_path / "control.mp4"), "--reference", str(tmp_path / "reference.png")]
    result = CliRunner().invoke(main, [*command, *given])
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "out.mp4")[0].shape == (9, 64, 64, 3)


@pytest.mark.parametrize(
    ("variant", "given", "sentence"),
    [
        ("flf2v", {"image": FIRST}, "positions for two: pos_embed_seq_len.*--last-image"),
        ("flf2v", {}, "makes videos from an image"),
        ("i2v-image", {"image": FIRST, "last_image": LAST}, "takes no last one"),
        ("ti2v", {"image": FIRST, "last_image": LAST}, "takes no last one"),
        ("ti2v", {"last_image": LAST}, "takes no last one"),
        ("t2v", {"last_image": LAST}, "from text alone"),
        ("t2v", {"control": VIDEO}, "no VACE model, so that it takes no control"),
        ("i2v", {"image": FIRST, "reference": LAST}, "takes no reference"),
        ("ti2v", {"control_scale": 2.0}, "takes no --control-scale"),
        ("vace", {"image": FIRST}, "takes no first image; give a control video"),
        ("vace", {"mask": MASK}, "give --control, too"),
        ("vace", {"control": VIDEO[:5]}, "the control has 5 frames, and the video has 9"),
        ("vace", {"control": VIDEO, "mask": MASK[:2]}, "the mask has 2 frames"),
        ("vace", {"reference": LAST}, "for 0 reference images, and there are 1"),
        ("vace", {"control": "no.mp4"}, "no.mp4 cannot be read as a video"),
        ("vace", {"control": Path(__file__).parent}, "the folder holds no pictures"),
    ],
)
def test_what_a_model_does_not_take_is_said_in_a_sentence(built, variant, given, sentence):
    with pytest.raises(TurbocompileError, match=sentence) as caught:
        generate(built(variant), PROMPT, **given)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- opening and building


@pytest.mark.parametrize(
    ("variant", "fields", "sentence"),
    [
        ("t2v", {"shapes": [SIZE | {"references": 1}]}, "shapes.0.references belongs to VACE"),
        ("t2v", {"model": {"text_only": True}}, "model.text_only belongs to models of text and images"),
        ("vace", {"model": {"config": {"vace_in_channels": 48}}}, "takes 48 channels of control .* has 96"),
        ("vace", {"model": {"config": {"vace_layers": [1]}}}, "vace_layers must be layers rising from 0"),
        ("t2v", {"sampler": {"kind": "rcm", "guidance_2": 2.0}}, "guidance_2 belongs to unipc and euler"),
    ],
)
def test_a_field_of_another_model_is_refused(example, variant, fields, sentence):
    sampler = {"sampler": None} if "sampler" in fields else {}
    model = {"path": str(example(variant))} | fields.get("model", {})
    with pytest.raises(TurbocompileError, match=sentence):
        open_source(Recipe.from_dict({"shapes": [SIZE], "target": "cpu", **sampler, **fields, "model": model}))


@pytest.mark.parametrize(
    "cls",
    ["WanAnimateTransformer3DModel", "SkyReelsV2Transformer3DModel", "WanS2VTransformer3DModel", "ChronoEdit"],
)
def test_other_models_of_the_family_are_refused_by_name(example, tmp_path, cls):
    folder = tmp_path / "pipeline"
    shutil.copytree(example("t2v"), folder)
    for file, change in (
        ("transformer/config.json", {"_class_name": cls}),
        ("model_index.json", {"transformer": ["diffusers", cls]}),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **change}))
    for path in (folder, folder / "transformer"):
        with pytest.raises(UnsupportedError, match=rf"a {cls}, and recipes take .*optimize\(model") as caught:
            open_source(recipe_of(path, components="none"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("variant", "boundary"), [("t2v-experts", 0.875), ("i2v-experts", 0.9)])
def test_the_boundary_is_the_models(example, tmp_path, variant, boundary):
    assert open_source(recipe_of(example(variant))).boundary_ratio == boundary
    folder = tmp_path / "pipeline"
    shutil.copytree(example(variant), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.95}))
    optimize_recipe(recipe_of(folder, sampler={"steps": 4, "guidance": 1.0}), tmp_path / "engine")
    engine, seen = turbocompile.load(tmp_path / "engine"), []
    for name, expert in engine.experts.items():
        expert.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.append((name, float(kwargs["timestep"][0]))), with_kwargs=True
        )
    generate(engine, PROMPT, **({"image": FIRST} if variant[0] == "i" else {}))
    assert len(seen) == 4
    assert {name for name, _ in seen} == {"transformer", "transformer_2"}
    assert all((t >= 950.0) == (name == "transformer") for name, t in seen)


def test_each_expert_has_its_guidance(example, tmp_path):
    folder = example("t2v-experts")
    fields = {"steps": STEPS, "guidance": 4.0, "guidance_2": 3.0}
    optimize_recipe(recipe_of(folder, sampler=fields), tmp_path / "engine")
    pipe = eager(folder, "WanPipeline")
    expected = pipe(
        prompt=PROMPT, negative_prompt="blurry", height=64, width=64, num_frames=9, num_inference_steps=STEPS,
        guidance_scale=4.0, guidance_scale_2=3.0, generator=torch.Generator().manual_seed(1), output_type="latent",
    ).frames  # fmt: skip
    found = generate(tmp_path / "engine", PROMPT, "blurry", seed=1).latents
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    other = generate(tmp_path / "engine", PROMPT, "blurry", seed=1, guidance=4.0).latents  # of both experts
    assert (other - expected).abs().max() > 10 * CLOSE * expected.abs().max()


@pytest.mark.parametrize("variant", ["ti2v", "vace"])
def test_passes_keep_the_numbers(example, built, tmp_path, variant):
    """A build with every exact rewrite, each measured; VACE's blocks are rewritten as the transformer's own."""
    layers = {"config": {"num_layers": 4, "vace_layers": [0, 2, 3]}} if variant == "vace" else {}
    preset = "wan-tiny-" + variant
    model = {"preset": preset, **layers}
    for name, passes in (("plain", "off"), ("passes", {"w8a8": "off", "attention": "native"})):
        fields = {"shapes": [SIZE], "target": "cpu", "passes": passes}
        sampler = {"kind": "unipc", "steps": 2, "guidance": 1.0}
        recipe = Recipe.from_dict({"model": model, "sampler": sampler, **fields})
        report = optimize_recipe(recipe, tmp_path / name)
    assert report.passes["qk_norm_rope"].rewritten > 0
    if variant == "vace":
        assert report.passes["adaln"].rewritten > 0
    given = {"image": FIRST} if variant == "ti2v" else {"control": VIDEO, "mask": MASK}
    one, other = (generate(tmp_path / name, PROMPT, **given).latents for name in ("plain", "passes"))
    assert (one - other).abs().max() <= CLOSE * one.abs().max()


def test_vace_opens_in_wans_own_layout(example, tmp_path):
    """A file under Wan's own names, from which the layers of VACE's blocks are inferred."""
    made = open_source(recipe_of(example("vace", 128))).transformers["transformer"]
    rename = {"proj_in": "before_proj", "proj_out": "after_proj"}
    ours: dict[str, torch.Tensor] = {}
    table = {theirs: name for name in original_names(made) if (theirs := diffusers_name(name)) is not None}
    for name in made.tensors.keys():  # noqa: SIM118
        ours[table[name]] = made.tensors.get(name)
    assert any(f"vace_blocks.0.{word}.weight" in ours for word in rename.values())
    save_file(ours, tmp_path / "vace.safetensors")
    found = open_source(recipe_of(tmp_path / "vace.safetensors", components="none")).transformers["transformer"]
    assert dict(found.config) == {**made.config, "rope_max_seq_len": 1024}
    one, other = made.load().state_dict(), found.load().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def original_names(made) -> list[str]:
    """Wan's own names of all that a VACE transformer may have."""
    shell = [f"{path}.{leaf}" for path in SHELL for leaf in ("weight", "bias")] + ["head.modulation"]
    blocks = ("blocks", made.config["num_layers"]), ("vace_blocks", len(made.config["vace_layers"]))
    paths = ["ffn.0", "ffn.2", "norm3", "before_proj", "after_proj"]
    paths += [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in ("q", "k", "v", "o", "norm_q", "norm_k")]
    inner = [
        f"{kind}.{i}.{p}.{leaf}" for kind, n in blocks for i in range(n) for p in paths for leaf in ("weight", "bias")
    ]
    return shell + inner + [f"{kind}.{i}.modulation" for kind, n in blocks for i in range(n)]


SHELL = (
    "patch_embedding", "vace_patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
    "time_embedding.2", "time_projection.1", "head.head",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- recipes

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = {  # of each published model, the preset that it is built of
    "wan21": "wan2.1-t2v-1.3b",
    "wan21-t2v-14b": "wan2.1-t2v-14b",
    "wan21-i2v-480p": "wan2.1-i2v-14b",
    "wan21-i2v-720p": "wan2.1-i2v-14b-720p",
    "wan21-flf2v": "wan2.1-flf2v-14b",
    "wan21-vace-1.3b": "wan2.1-vace-1.3b",
    "wan21-vace-14b": "wan2.1-vace-14b",
    "wan22-t2v": "wan2.2-t2v-a14b",
    "wan22-i2v": "wan2.2-i2v-a14b",
    "wan22-ti2v-5b": "wan2.2-ti2v-5b",
}


def test_each_published_model_has_a_recipe():
    assert {name for name, preset in PRESETS.items() if preset.hub_id} == set(RECIPES.values())
    assert {file.stem for file in EXAMPLES.glob("wan2*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_of_its_model_and_fits_it(name):
    """With synthetic weights, of which none is made: the parts fit, and the transformer is built on meta."""
    preset = PRESETS[RECIPES[name]]
    recipe = load_recipe(EXAMPLES / f"{name}.yaml", ["model.weights=synthetic", "target=sm90"])
    assert recipe.model.path == preset.hub_id
    source = open_source(recipe)
    assert source.task == preset.task
    assert source.boundary_ratio == preset.boundary_ratio
    assert list(source.transformers) == ["transformer", "transformer_2"][: preset.experts]
    (first, *_) = source.transformers.values()
    _, call = first.example_inputs(recipe.shapes[0])
    assert {p.device.type for p in first.build().parameters()} == {"meta"}
    assert call["timestep"].dim() == (2 if preset.task == "ti2v" else 1)


# ---------------------------------------------------------------------------------------- models that no recipe takes


def animate():
    model = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, image_dim=4, added_kv_proj_dim=None, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 12, 21, 16, 16), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 12, 16), "encoder_hidden_states_image": torch.randn(1, 12, 4),
        "pose_hidden_states": torch.randn(1, 4, 20, 16, 16), "face_pixel_values": torch.randn(1, 3, 77, 16, 16),
    }  # fmt: skip
    return model, call


def skyreels():
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=256,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 2, 16, 16), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }  # fmt: skip
    return model, call


@pytest.mark.parametrize("make", [animate, skyreels])
def test_optimize_takes_wan_animate_and_skyreels(make):
    torch.manual_seed(0)
    model, call = make()
    model = model.eval().requires_grad_(False)
    engine = turbocompile.optimize(model, (), {**call, "return_dict": False})
    with torch.no_grad():
        (found,), (expected,) = engine(**call, return_dict=False), model(**call, return_dict=False)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
