"""Records inputs of a recipe's original transformers while they sample, to calibrate a build on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from turbocompile.defaults import CALIBRATION_CALLS, SEED
from turbocompile.errors import RecipeError
from turbocompile.files import check_file
from turbocompile.numerics.recording import MAX_TOKENS, Recording, recording_calls
from turbocompile.recipe.presets import boundary_of
from turbocompile.recipe.schema import Recipe
from turbocompile.video.components import held, placed
from turbocompile.video.given import Given, check_given, fitting, sizes_for
from turbocompile.video.latents import Pipeline, Progress, Request, Stages, make_latents
from turbocompile.video.request import choose_sampler, prompts_of
from turbocompile.wan.source import open_source


@torch.no_grad()
def record_inputs(
    recipe: Recipe,
    out: str | Path,
    prompts: Sequence[str],
    *,
    negative_prompt: str | None = None,
    image: Any = None,
    calls: int = CALIBRATION_CALLS,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = SEED,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    **images: Any,
) -> Recording:
    """Samples with a recipe's original model, in eager PyTorch, and writes some of its inputs to `out` (recording.py).

    prompts: one video each, at the recipe's first shape, with its sampler. calls: how many are kept, spread over all
    steps of all videos. image, images, steps, guidance: as for `generate`. device: by default a GPU where there is one.

    Raises TurbocompileError.
    """
    recording, stages = Recording(calls), Stages(progress)
    out = check_file(out, ".safetensors")
    if not prompts:
        raise RecipeError("calibrate: there is no prompt; give one at least")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with stages("open"):
        source = open_source(recipe)
        if not {"tokenizer", "text_encoder", "vae"} <= set(source.components.names):
            raise RecipeError("calibrate: the recipe has no text encoder, and sampling takes one; name its components")
    given = Given.of(image, **images)
    check_given(given, source.task, source.transformers["transformer"].config)
    size = sizes_for(recipe.shapes, len(given.references))[0]
    picture = fitting(given, size, source.task)
    if (tokens := source.geometry.tokens(size)) > MAX_TOKENS:
        raise RecipeError(
            f"calibrate: the shape {size.name} has {tokens} tokens, and a build measures on {MAX_TOKENS} at most; "
            "record a smaller one, as with "
            "--set shapes.0.height=256 --set shapes.0.width=256 --set shapes.0.num_frames=33"
        )
    sampler = choose_sampler(recipe.sampler, source.task, steps=steps, guidance=guidance)
    with stages("load"):
        experts = {name: t.load().to(target) for name, t in source.transformers.items()}
        parts = {name: placed(part, name, target) for name, part in source.components.load().items()}
    first = source.transformers["transformer"]
    pipeline = Pipeline(
        experts, first.config, recipe.torch_dtype, target, held(parts), source.geometry, task=source.task
    )
    boundary = None
    if len(experts) > 1:
        boundary = boundary_of(source.boundary_ratio, source.task)
    with recording_calls(recording, *experts.values()):
        for number, prompt in enumerate(prompts):
            texts = prompts_of(prompt, size.batch)
            asked = Request(texts, negative_prompt, picture, sampler, size, boundary, seed + number)
            make_latents(pipeline, asked, stages)
    recording.save(out)
    return recording
