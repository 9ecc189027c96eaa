"""From a prompt to a video, by an engine: text, image, noise, steps, pixels, file.

`generate` is what `turbocompile run` and examples/run_engine.py call. A component is in memory only during
the stage that needs it: the text encoder (11 GB for Wan) is freed before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from turbocompile.defaults import SEED
from turbocompile.errors import UnsupportedError
from turbocompile.recipe.presets import task_of
from turbocompile.recipe.schema import Shape
from turbocompile.runtime.engine import Engine, load
from turbocompile.runtime.folder import read_manifest
from turbocompile.runtime.memory_plan import parse_size
from turbocompile.video.given import Given, fitting, sizes_for
from turbocompile.video.latents import Pipeline, Progress, Request, Stages, make_latents
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
from turbocompile.video.results import GenerateResult, Places, metadata_of


@torch.no_grad()
def generate(
    engine: Engine | str | Path,
    prompt: str | Sequence[str],
    negative_prompt: str | None = None,
    *,
    seed: int = SEED,
    shape: Shape | str | None = None,
    image: Any = None,
    steps: int | None = None,
    guidance: float | None = None,
    sigma_max: float | None = None,
    ode: bool | None = None,
    out: str | Path | None = None,
    frames: str | Path | None = None,
    latents: str | Path | None = None,
    device: torch.device | str | None = None,
    lora: Any = None,
    vram: str | int | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    number: int = 0,
    **images: Any,
) -> GenerateResult:
    """Makes the videos of one batch of an engine.

    engine: its folder, or the result of `turbocompile.load`. prompt: one for all videos of the batch, or one for each.
    negative_prompt: the text that guidance leads away from; empty by default. shape: one of the engine's, as in
    "480x832x81" (height, width, frames; the batch may follow) or "480p 16:9"; the first by default. image: a PIL image
    or its path, for image-to-video. images: last_image, control, mask, reference, control_scale, as `Given.of` takes
    them. steps, guidance, sigma_max, ode: instead of the recipe's. out, frames, latents: an
    .mp4 file, a folder for PNG frames, a .safetensors file, each of which says how it was made. number: of the first
    video; from 1 on it is in the names, as -1. device: by default the engine's; for a folder the GPU, where the engine
    was built for one. lora: adapters for this call, as `Engine.set_lora` takes them. vram: the memory of the GPU that
    all of it may take, as in "12GB" or "auto" (memory_plan.py); the plan is told to `say` in sentences.

    The same seed gives the same video, to the bit, on one device. Raises TurbocompileError before any work for what the
    engine cannot do.
    """
    places = Places.checked(out, frames, latents)
    stages = Stages(progress)
    kept = engine.kept if isinstance(engine, Engine) else None
    engine, target = _opened(engine, device, vram, stages)
    recipe = recipe_of(engine)
    task = str(engine.manifest.get("task") or task_of(engine.config))
    sampler = choose_sampler(recipe.sampler, task, steps=steps, guidance=guidance, sigma_max=sigma_max, ode=ode)
    given = Given.of(image, **images)
    check_request(engine, task, sampler, negative_prompt, given)
    size = choose_shape(sizes_for(recipe.shapes, len(given.references)), shape)
    prompts, picture = prompts_of(prompt, size.batch), fitting(given, size, task)
    tell_quality(recipe, engine.report)
    if vram is not None or engine.memory is not None:
        with stages("plan"):
            plan_video(engine, vram, size, picture is not None, target, say)
    asked = Request(prompts, negative_prompt, picture, sampler, size, expert_boundary(engine, task), seed)
    with enough_memory(engine), _adapted(engine, lora, stages):
        result = _made(engine, Pipeline.of_engine(engine, kept), asked, stages)
    return result if not places else _written(result, places, prompts, number, stages)


def _made(engine: Engine, pipeline: Pipeline, asked: Request, stages: Stages) -> GenerateResult:
    """The videos of a call, of which nothing is written yet."""
    latents = make_latents(pipeline, asked, stages)
    with stages("decode"):
        pipeline.make_room("decode")
        video = decoded(pipeline, latents)
    check_size(video, asked.size)
    said = metadata_of(engine, asked)
    return GenerateResult(video, latents.cpu(), stages.seconds, (), said, engine.memory, peak_taken(engine))


def _written(
    result: GenerateResult, places: Places, prompts: Sequence[str], number: int, stages: Stages
) -> GenerateResult:
    with stages("write"):
        return replace(result, paths=places.write(result, prompts, number))


def generate_all(
    engine: Engine | str | Path,
    prompts: Sequence[str],
    *,
    samples: int | None = None,
    seed: int = SEED,
    shape: Shape | str | None = None,
    device: torch.device | str | None = None,
    vram: str | int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[GenerateResult]:
    """Makes videos of several prompts, and several of each; the engine is loaded once. Yields each call's result.

    samples: videos of each prompt, a multiple of the shape's batch; one call's by default. The calls of a prompt have
    the seeds `seed`, `seed` + 1 and so on. Other options are those of `generate`. Raises TurbocompileError.
    """
    if not prompts:
        raise UnsupportedError("there is no prompt; give one at least")
    Places.checked(*(options.get(name) for name in ("out", "frames", "latents")))  # before the engine is loaded
    stages = Stages(progress)
    opened, target = _opened(engine, device, vram, stages)
    references = Given.of(reference=options.get("reference")).references
    batch = choose_shape(sizes_for(recipe_of(opened).shapes, len(references)), shape).batch
    samples = batch if samples is None else samples
    if samples < 1 or samples % batch:
        raise UnsupportedError(
            f"this shape of the engine makes {batch} videos at once, so that {samples} of each prompt are no whole "
            f"number of calls; ask for a multiple of {batch}"
        )
    number = 0
    for prompt in prompts:
        for turn in range(samples // batch):
            result = generate(
                opened, prompt, seed=seed + turn, shape=shape, device=target, vram=vram, progress=progress,
                number=number, **options,
            )  # fmt: skip
            if not number:
                result = replace(result, timings={**stages.seconds, **result.timings})
            yield result
            number += batch


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
        for expert in engine.experts.values() if engine.memory is not None and engine.memory.streams else ():
            expert.park()  # the sums take some weights' memory in float32
        engine.set_lora(lora)
    try:
        yield
    finally:
        engine.set_lora(before)


def default_device(folder: str | Path) -> str:
    """ "cuda" where torch has a GPU and the engine was not built for the CPU; else "cpu"."""
    target = read_manifest(Path(folder)).get("target")
    return "cuda" if target != "cpu" and torch.cuda.is_available() else "cpu"
