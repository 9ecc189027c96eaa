"""From a prompt to a video, by an engine: text, image, noise, steps, pixels, file.

`generate` is what `turbocompile run` and examples/run_engine.py call. A component is in memory only during
the stage that needs it: the text encoder (11 GB for Wan) is freed before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbocompile.defaults import SEED
from turbocompile.files import check_folder
from turbocompile.recipe.presets import task_of
from turbocompile.recipe.schema import Shape
from turbocompile.runtime.engine import Engine, load
from turbocompile.runtime.folder import read_manifest
from turbocompile.runtime.memory_plan import MemoryPlan, parse_size
from turbocompile.video import file as video_file
from turbocompile.video.given import Given, fitting, sizes_for
from turbocompile.video.latents import Pipeline, Progress, Stages, make_latents
from turbocompile.video.memory import decoded, enough_memory, peak_taken, plan_video
from turbocompile.video.request import (
    check_request,
    check_size,
    choose_sampler,
    choose_shape,
    expert_boundary,
    prompts_of,
    recipe_of,
    tell_quality,
)


@dataclass(frozen=True)
class GenerateResult:
    """The videos of one call, and how long each stage took.

    video: uint8 (B, F, H, W, 3), RGB. timings: seconds by stage ("load", "lora", "plan", "text", "image", "denoise",
    "decode", "write"; those that ran). paths: the files, one a video. memory: the plan that the engine
    followed, and `memory_peak` the most that was taken of the GPU, in bytes; None without a plan.
    """

    video: torch.Tensor
    timings: dict[str, float]
    paths: tuple[Path, ...] = ()
    memory: MemoryPlan | None = None
    memory_peak: int | None = None

    @property
    def path(self) -> Path | None:
        """The first file; None where nothing was written."""
        return self.paths[0] if self.paths else None


@torch.no_grad()
def generate(
    engine: Engine | str | Path,
    prompt: str | Sequence[str],
    negative_prompt: str | None = None,
    *,
    seed: int = SEED,
    shape: Shape | str | None = None,
    image: Any = None,
    last_image: Any = None,
    control: Any = None,
    mask: Any = None,
    reference: Any = None,
    control_scale: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    frames: str | Path | None = None,
    device: torch.device | str | None = None,
    lora: Any = None,
    vram: str | int | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """Makes the videos of one batch of an engine.

    engine: its folder, or the result of `turbocompile.load`. prompt: one for all videos of the batch, or one for each.
    negative_prompt: the text that guidance leads away from; empty by default. shape: one of the engine's, as in
    "480x832x81" (height, width, frames; the batch may follow); the first by default. image: a PIL image or its path,
    for image-to-video; last_image: the last frame, for models that take one. control, mask, reference, control_scale:
    of VACE, as `Given` takes them. steps, guidance: instead of the recipe's. out: an .mp4 file; with several videos -1,
    -2 ... follow its name. frames: a folder for PNG frames. device: by default the engine's; for a folder the GPU,
    where the engine was built for one. lora: adapters for this call, as `Engine.set_lora` takes them; none given: those
    that are set. vram: the memory of the GPU that all of it may take, as in "12GB" or "auto" (memory_plan.py); the plan
    is told to `say` in sentences.

    The same seed gives the same video, to the bit, on one device. Raises TurbocompileError before any work for what the
    engine cannot do.
    """
    out = video_file.check_path(out) if out is not None else None
    frames = check_folder(frames) if frames is not None else None
    stages = Stages(progress)
    kept = engine.kept if isinstance(engine, Engine) else None
    engine, target = _opened(engine, device, vram, stages)
    recipe = recipe_of(engine)
    task = str(engine.manifest.get("task") or task_of(engine.config))
    sampler = choose_sampler(recipe.sampler, task, steps, guidance)
    given = Given.of(image, last_image, control, mask, reference, control_scale)
    check_request(engine, task, sampler, negative_prompt, given)
    size = choose_shape(sizes_for(recipe.shapes, len(given.references)), shape)
    prompts = prompts_of(prompt, size.batch)
    picture = fitting(given, size, task)
    tell_quality(recipe, engine.report)

    if vram is not None or engine.memory is not None:
        with stages("plan"):
            plan_video(engine, vram, size, picture is not None, target, say)
    pipeline, boundary = Pipeline.of_engine(engine, kept), expert_boundary(engine, task)
    with _adapted(engine, lora, stages), enough_memory(engine):
        latents = make_latents(pipeline, prompts, negative_prompt, picture, sampler, size, boundary, seed, stages)
        with stages("decode"):
            pipeline.make_room("decode")
            made = decoded(pipeline, latents)
    check_size(made, size)
    paths = _write(made, out, frames, task, stages)
    return GenerateResult(made, stages.seconds, paths, engine.memory, peak_taken(engine))


def _opened(
    engine: Engine | str | Path, device: torch.device | str | None, vram: str | int | None, stages: Stages
) -> tuple[Engine, torch.device | None]:
    """The engine, and the device that was asked for; it is there already, unless a plan is to place its weights."""
    if isinstance(vram, str):
        parse_size(vram)  # a mistake is told before any work
    target, planned = torch.device(device) if device is not None else None, vram is not None
    if isinstance(engine, Engine):
        return (engine if planned or target is None else engine.to(target)), target
    target = target or torch.device(default_device(engine))
    with stages("load"):
        return load(engine, device=None if planned else target), target


@contextlib.contextmanager
def _adapted(engine: Engine, lora: Any, stages: Stages) -> Iterator[None]:
    """The body runs with the adapters of a call, and the engine has its own again afterwards."""
    if lora is None:
        yield
        return
    before = engine.lora
    with stages("lora"):
        engine.set_lora(lora)
    try:
        yield
    finally:
        engine.set_lora(before)


def default_device(folder: str | Path) -> str:
    """ "cuda" where torch has a GPU and the engine was not built for the CPU; else "cpu"."""
    target = read_manifest(Path(folder)).get("target")
    return "cuda" if target != "cpu" and torch.cuda.is_available() else "cpu"


def _write(
    videos: torch.Tensor, out: Path | None, frames: str | Path | None, task: str, stages: Stages
) -> tuple[Path, ...]:
    """Writes each video of the batch, if asked to. Returns the paths of the mp4 files, or else of the folders of
    frames."""
    if out is None and frames is None:
        return ()
    files, folders, fps = [], [], video_file.FPS_OF.get(task, video_file.FPS)
    with stages("write"):
        for number, made in enumerate(videos):
            suffix = f"-{number}" if number else ""
            if out is not None:
                files.append(video_file.write_video(out.with_stem(out.stem + suffix), made, fps))
            if frames is not None:
                folder = Path(frames) if not number else Path(f"{frames}{suffix}")
                video_file.write_frames(folder, made)
                folders.append(folder)
    return tuple(files or folders)
