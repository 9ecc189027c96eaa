"""From a prompt to a video, by an engine: text, image, noise, steps, pixels, file.

`generate` is what `turbocompile run` and examples/run_engine.py call. Only what a stage needs is in memory beside the
engine: the text encoder (11 GB for Wan) is gone before the first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.files import check_file, check_folder
from turbocompile.numerics.recording import CALLS, MAX_TOKENS, Recording, recording_calls
from turbocompile.recipe.presets import Geometry, boundary_of, task_of, vae_strides
from turbocompile.recipe.schema import Recipe, SamplerSpec, Shape
from turbocompile.report.attentions import untuned
from turbocompile.report.report import Report
from turbocompile.runtime.engine import Engine, load
from turbocompile.runtime.folder import check_files, check_strangers
from turbocompile.sampling import SamplingWarning, flow, rcm
from turbocompile.video import file as video_file
from turbocompile.video import image as wan_image
from turbocompile.video import text as wan_text
from turbocompile.video import vae as wan_vae
from turbocompile.wan.components import load_components, vae_config
from turbocompile.wan.source import open_source
from turbocompile.wan.transformer import images_of

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class GenerateResult:
    """What was made.

    video: uint8 (B, F, H, W, 3), RGB. timings: seconds by stage ("load", "text", "image", "denoise", "decode",
    "write"; those that ran). paths: the files, one a video.
    """

    video: torch.Tensor
    timings: dict[str, float]
    paths: tuple[Path, ...] = ()

    @property
    def path(self) -> Path | None:
        """The first file; None where nothing was written."""
        return self.paths[0] if self.paths else None


@dataclass(frozen=True)
class _Conditions:
    """What the transformer is given beside the noisy latent, in its dtype and on its device.

    text, negative: (B, 512, text_dim); negative is None without guidance. channels: (B, 20, T, H, W), mask and latent
    of the first frame. tokens: (B, N, image_dim), the image's CLIP tokens.
    """

    text: torch.Tensor
    negative: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Pipeline:
    """What makes latents: transformers by name, an engine's or eager, and the components around them.

    config: of the transformers. component: gives one by its name, on the device. geometry: of videos and latents.
    """

    experts: Mapping[str, Any]
    config: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    component: Callable[[str], Any]
    geometry: Geometry

    @classmethod
    def of_engine(cls, engine: Engine) -> Pipeline:
        assert engine.folder is not None
        row = check_component(engine, "vae")
        strides = vae_strides(vae_config(engine.folder / "components" / row.get("folder", "vae")))
        geometry = Geometry(*strides, tuple(engine.config["patch_size"]))
        return cls(
            engine.experts, engine.config, engine.dtype, engine.device, lambda name: component(engine, name), geometry
        )


class Stages:
    """Times the stages; progress(stage, fraction) is told 0 at the start of one and 1 at its end."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress: Progress = progress or (lambda stage, fraction: None)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.progress(name, 0.0)
        yield
        self.seconds[name] = time.perf_counter() - started
        self.progress(name, 1.0)


@torch.no_grad()
def generate(
    engine: Engine | str | Path,
    prompt: str | Sequence[str],
    negative_prompt: str | None = None,
    *,
    seed: int = 0,
    shape: Shape | str | None = None,
    image: Any = None,
    steps: int | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    frames: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """Makes the videos of one batch of an engine.

    engine: the folder, or what `turbocompile.load` gave of it. prompt: one for all videos of the batch, or one for
    each. negative_prompt: what guidance leads away from; empty by default. shape: one of the engine's, as in
    "480x832x81" (height, width, frames; the batch may follow); the first by default. image: a PIL image or its path,
    for image-to-video. steps, guidance: instead of the recipe's. out: an .mp4 file; with several videos -1, -2 ...
    follow its name. frames: a folder for PNG frames. device: by default the engine's; for a folder the GPU, where the
    engine was built for one.

    The same seed gives the same video, to the bit, on one device. Raises TurbocompileError before any work for what the
    engine cannot do.
    """
    out = video_file.check_path(out) if out is not None else None
    frames = check_folder(frames) if frames is not None else None
    stages = Stages(progress)
    if not isinstance(engine, Engine):
        with stages("load"):
            engine = load(engine, device=device or default_device(engine))
    elif device is not None:
        engine.to(device)
    recipe = recipe_of(engine)
    task = str(engine.manifest.get("task") or task_of(engine.config))
    sampler = choose_sampler(recipe.sampler, task, steps, guidance)
    size = choose_shape(recipe.shapes, shape)
    prompts = _prompts(prompt, size.batch)
    _check_request(engine, task, sampler, negative_prompt, image)
    _tell_quality(recipe, engine.report)
    picture = open_image(image) if image is not None else None

    pipeline, boundary = Pipeline.of_engine(engine), _boundary(engine, task)
    latents = make_latents(pipeline, prompts, negative_prompt, picture, sampler, size, boundary, seed, stages)
    with stages("decode"):
        made = wan_vae.to_frames(wan_vae.decode(component(engine, "vae"), latents)).cpu()
    _check_size(made, size)
    paths: tuple[Path, ...] = ()
    if out is not None or frames is not None:
        with stages("write"):
            paths = _write(made, out, frames)
    return GenerateResult(made, stages.seconds, paths)


def make_latents(
    pipeline: Pipeline,
    prompts: list[str],
    negative_prompt: str | None,
    picture: Any,
    sampler: SamplerSpec,
    size: Shape,
    boundary: float | None,
    seed: int,
    stages: Stages,
) -> torch.Tensor:
    """Normalized latents (B, out_channels, T, H, W), float32. picture: a PIL image, for image-to-video."""
    with stages("text"):
        conditions = _text(pipeline, prompts, negative_prompt or "" if sampler.guidance != 1.0 else None)
    if picture is not None:
        with stages("image"):
            conditions = _with_image(pipeline, conditions, picture, size)
    with stages("denoise"):
        return _sample(pipeline, conditions, sampler, size, boundary, seed, stages.progress)


@torch.no_grad()
def record_inputs(
    recipe: Recipe,
    out: str | Path,
    prompts: Sequence[str],
    *,
    negative_prompt: str | None = None,
    image: Any = None,
    calls: int = CALLS,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Samples with a recipe's original model, in eager PyTorch, and writes some of its inputs to `out` (recording.py).

    prompts: one video each, at the recipe's first shape, with its sampler. calls: how many are kept, spread over all
    steps of all videos. image, steps, guidance: as for `generate`. device: by default a GPU where there is one.

    Raises TurbocompileError.
    """
    recording, stages = Recording(calls), Stages(progress)
    out = check_file(out, ".safetensors")
    if not prompts:
        raise RecipeError("calibrate: there is no prompt; give one at least")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with stages("open"):
        source = open_source(recipe)
        if not {"tokenizer", "text_encoder", "vae"} <= set(source.components.names):
            raise RecipeError("calibrate: the recipe has no text encoder, and sampling takes one; name its components")
    if (image is None) == (source.task == "i2v"):
        what = "needs an image to start from (--image)" if image is None else "makes videos from text alone, no image"
        raise UnsupportedError(f"calibrate: the model {what}")
    _check_images(source.transformers["transformer"].config)
    size = recipe.shapes[0]
    if (tokens := source.geometry.tokens(size)) > MAX_TOKENS:
        raise RecipeError(
            f"calibrate: the shape {size.name} has {tokens} tokens, and a build measures on {MAX_TOKENS} at most; "
            "record a smaller one, as with "
            "--set shapes.0.height=256 --set shapes.0.width=256 --set shapes.0.num_frames=33"
        )
    sampler = choose_sampler(recipe.sampler, source.task, steps, guidance)
    with stages("load"):
        experts = {name: t.load().to(place) for name, t in source.transformers.items()}
        parts = {name: _placed(part, name, place) for name, part in source.components.load().items()}
    first = source.transformers["transformer"]
    pipeline = Pipeline(experts, first.config, recipe.torch_dtype, place, parts.__getitem__, source.geometry)
    boundary = None
    if len(experts) > 1:
        boundary = boundary_of(source.boundary_ratio, source.task)
    picture = open_image(image) if image is not None else None
    with recording_calls(recording, *experts.values()):
        for number, prompt in enumerate(prompts):
            given = (_prompts(prompt, size.batch), negative_prompt, picture)
            make_latents(pipeline, *given, sampler, size, boundary, seed + number, stages)
    recording.save(out)
    return recording


# ------------------------------------------------------------------------------------------------------ what to make


def recipe_of(engine: Engine) -> Recipe:
    if "recipe" not in engine.manifest or not engine.manifest.get("components"):
        raise EngineError(
            "the engine holds no text encoder and VAE, so it makes no videos by itself; build it from a recipe "
            "without `components: none`, or call it in a pipeline of your own"
        )
    return Recipe.from_dict(engine.manifest["recipe"], f"the recipe of {engine.folder}")


def default_device(folder: str | Path) -> str:
    """The GPU, where there is one and the engine was built for one."""
    from turbocompile.runtime.folder import read_manifest

    target = read_manifest(Path(folder)).get("target")
    return "cuda" if target != "cpu" and torch.cuda.is_available() else "cpu"


def choose_sampler(spec: SamplerSpec, task: str, steps: int | None, guidance: float | None) -> SamplerSpec:
    """The recipe's sampler with the given steps and guidance, complete for the task. Raises RecipeError."""
    changes: dict[str, Any] = {"steps": steps, "guidance": guidance}
    changed = dataclasses.replace(spec, **{k: v for k, v in changes.items() if v is not None})
    return changed.for_task(task)


def choose_shape(shapes: Sequence[Shape], wanted: Shape | str | None) -> Shape:
    """The shape of the engine that is meant; the first where nothing is said. Raises UnsupportedError."""
    if wanted is None:
        return shapes[0]
    name = wanted.name if isinstance(wanted, Shape) else wanted.lower().replace(" ", "")
    for shape in shapes:
        if name in (shape.name, shape.name.rpartition("x")[0]):
            return shape
    known = ", ".join(shape.name for shape in shapes)
    raise UnsupportedError(
        f"the engine has no shape {name} (height x width x frames, and the batch); it has {known}: "
        "take one of these or add it to the recipe's shapes and build again"
    )


def _prompts(prompt: str | Sequence[str], batch: int) -> list[str]:
    prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
    if len(prompts) != batch:
        raise UnsupportedError(f"this shape of the engine makes {batch} videos at once, and got {len(prompts)} prompts")
    return prompts


def _check_request(engine: Engine, task: str, sampler: SamplerSpec, negative_prompt: str | None, image: Any) -> None:
    if negative_prompt and sampler.guidance == 1.0:
        raise UnsupportedError(
            f"a negative prompt works through guidance, and the sampler {sampler.kind} has none here; leave it out"
        )
    if task == "i2v" and image is None:
        raise UnsupportedError("the engine makes videos from an image; give one with image= (--image)")
    if task != "i2v" and image is not None:
        raise UnsupportedError("the engine makes videos from text alone; leave the image out")
    _check_images(engine.config)
    missing = [n for n in _needed(engine) if n not in engine.manifest["components"]]
    if missing:
        raise EngineError(f"the engine lacks its component {missing[0]}; build it from a complete pipeline")
    for name in _needed(engine):
        if name != "text_encoder":  # the largest, and the first to be read
            check_component(engine, name)


def _check_images(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a transformer of first and last frames (FLF2V)."""
    if images_of(config) != 1:
        raise UnsupportedError(
            "the model goes from a first frame to a last one (it has positions for two images: pos_embed_seq_len), and "
            "here one image is given; call the engine in diffusers' WanImageToVideoPipeline(image=..., last_image=...)"
        )


def _check_size(made: torch.Tensor, size: Shape) -> None:
    """Raises EngineError where the VAE made a video of another size than was asked for."""
    asked = (size.batch, size.num_frames, size.height, size.width)
    if tuple(made.shape[:4]) != asked:
        found = " x ".join(map(str, made.shape[1:4]))
        raise EngineError(
            f"the VAE made videos of {found} (frames, height, width) where {size.name} was asked for: its strides are "
            "not what its configuration says; build the engine with the VAE that belongs to the model"
        )


def _needed(engine: Engine) -> list[str]:
    """The components that a video takes."""
    image = ["image_encoder", "image_processor"] if engine.config.get("image_dim") is not None else []
    return ["tokenizer", "text_encoder", "vae", *image]


def _tell_quality(recipe: Recipe, report: Report | None) -> None:
    """Warns where the video cannot be good: random weights; else rCM of a model that was not distilled, SLA of one that
    was not trained with it.
    """
    if recipe.model.weights == "synthetic":
        warnings.warn("the weights are synthetic, so the picture is noise", SamplingWarning, stacklevel=4)
        return
    if recipe.sampler.kind == "rcm" and not recipe.sampler.distilled:
        warnings.warn(
            "rcm is for rCM-distilled checkpoints, and the recipe does not say that this is one "
            "(sampler.distilled: true); others need kind: unipc and some 50 steps",
            SamplingWarning,
            stacklevel=4,
        )
    modules = [report, *report.others.values()] if report is not None else []
    if sites := untuned(site for module in modules for site in module.attention):
        warnings.warn(
            f"the checkpoint was not trained with SLA, which the engine has at {', '.join(sites)}, so the picture is "
            "wrong; build with passes.attention.kind: auto",
            SamplingWarning,
            stacklevel=4,
        )


def _boundary(engine: Engine, task: str) -> float | None:
    """The flow time below which the low-noise expert takes over; None with one transformer."""
    if "transformer_2" not in engine.experts:
        return None
    return boundary_of(engine.manifest.get("boundary_ratio"), task)


# --------------------------------------------------------------------------------------------------------- the stages


def check_component(engine: Engine, name: str) -> Mapping[str, str]:
    """Its row of the manifest. Raises EngineError where one of its files was altered, is gone, or is one too many."""
    assert engine.folder is not None
    row: Mapping[str, str] = engine.manifest["components"][name]
    place = f"components/{row.get('folder', name)}"
    check_files(engine.folder, engine.manifest, [f for f in engine.manifest["files"] if f.startswith(place + "/")])
    check_strangers(engine.folder, engine.manifest, place)
    return row


def component(engine: Engine, name: str) -> Any:
    """A component of the engine's folder on the engine's device, after its files were checked."""
    assert engine.folder is not None
    row = check_component(engine, name)
    return _placed(load_components(engine.folder / "components", {name: row})[name], name, engine.device)


def _placed(part: Any, name: str, device: torch.device) -> Any:
    """A component on the device.

    On a CPU it computes in float32, whatever its files hold: one that has no instructions for 16 bits took 300 times as
    long for a convolution of Wan's VAE in bfloat16. The text encoder has the dtype that was asked for.
    """
    if not isinstance(part, torch.nn.Module):
        return part
    return part.float() if device.type == "cpu" and name != "text_encoder" else part.to(device)


def _text(pipeline: Pipeline, prompts: list[str], negative_prompt: str | None) -> _Conditions:
    tokenizer, encoder = pipeline.component("tokenizer"), pipeline.component("text_encoder")

    def encode(texts: list[str]) -> torch.Tensor:
        unique = wan_text.encode_prompt(sorted(set(texts)), tokenizer, encoder, dtype=pipeline.dtype)
        return unique[[sorted(set(texts)).index(t) for t in texts]]

    negative = encode([negative_prompt] * len(prompts)) if negative_prompt is not None else None
    return _Conditions(encode(prompts), negative)


def open_image(image: Any) -> Any:
    """A PIL image of a path or of itself."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UnsupportedError(f"{image} cannot be read as an image ({error})") from error


def _with_image(pipeline: Pipeline, conditions: _Conditions, image: Any, size: Shape) -> _Conditions:
    """Adds the first frame's latent and mask, and its CLIP tokens where the transformer takes them."""
    pixels = wan_image.image_tensor(image, size.height, size.width).to(pipeline.device)
    channels = wan_image.image_condition(pipeline.component("vae"), pixels, size.num_frames)
    tokens = None
    if pipeline.config.get("image_dim") is not None:
        encoder, processor = pipeline.component("image_encoder"), pipeline.component("image_processor")
        tokens = wan_image.image_embeddings(encoder, processor, image)
        tokens = tokens.to(pipeline.dtype).expand(size.batch, -1, -1)
    return dataclasses.replace(
        conditions, channels=channels.to(pipeline.dtype).expand(size.batch, -1, -1, -1, -1), tokens=tokens
    )


def _sample(
    pipeline: Pipeline,
    conditions: _Conditions,
    sampler: SamplerSpec,
    size: Shape,
    boundary: float | None,
    seed: int,
    progress: Progress,
) -> torch.Tensor:
    """Normalized latents (B, out_channels, T, H, W), float32."""

    def velocity(x: torch.Tensor, timestep: torch.Tensor, expert: str, conditional: bool = True) -> torch.Tensor:
        module = pipeline.experts[expert]
        hidden = x.to(module.dtype)
        if conditions.channels is not None:
            hidden = torch.cat([hidden, conditions.channels], dim=1)
        inputs: dict[str, Any] = {
            "hidden_states": hidden,
            "timestep": timestep,
            "encoder_hidden_states": conditions.text if conditional else conditions.negative,
        }
        if conditions.tokens is not None:
            inputs["encoder_hidden_states_image"] = conditions.tokens
        with module.cache_context("cond" if conditional else "uncond"):
            return module(**inputs, return_dict=False)[0]

    common: dict[str, Any] = {
        "generator": torch.Generator(pipeline.device).manual_seed(seed),
        "steps": sampler.steps,
        "boundary": boundary,
        "progress": lambda done, total: progress("denoise", done / total),
    }
    shape = (size.batch, pipeline.config["out_channels"], *pipeline.geometry.latent(size))
    if sampler.kind == "rcm":
        assert sampler.sigma_max is not None
        assert sampler.mid_steps is not None
        return rcm.sample(
            velocity, shape, sigma_max=sampler.sigma_max, mid_steps=sampler.mid_steps, ode=sampler.ode, **common
        )
    assert sampler.guidance is not None
    assert sampler.shift is not None
    denoise = flow.guided(velocity, sampler.guidance)
    return flow.sample(denoise, shape, kind=sampler.kind, shift=sampler.shift, **common)


def _write(videos: torch.Tensor, out: Path | None, frames: str | Path | None) -> tuple[Path, ...]:
    """Writes each video of the batch; the paths of the mp4 files, or of the folders of frames where there are none."""
    files, folders = [], []
    for number, made in enumerate(videos):
        suffix = f"-{number}" if number else ""
        if out is not None:
            files.append(video_file.write_video(out.with_stem(out.stem + suffix), made))
        if frames is not None:
            folder = Path(frames) if not number else Path(f"{frames}{suffix}")
            video_file.write_frames(folder, made)
            folders.append(folder)
    return tuple(files or folders)
