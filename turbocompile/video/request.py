"""What a call of `generate` asks for, completed by the engine's recipe and checked before any work."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.recipe.presets import SIZES, boundary_of
from turbocompile.recipe.schema import Recipe, SamplerSpec, Shape
from turbocompile.report.attentions import untuned
from turbocompile.report.report import Report
from turbocompile.runtime.engine import Engine
from turbocompile.sampling import SamplingWarning
from turbocompile.video.components import check_component
from turbocompile.video.given import Given, check_given


def recipe_of(engine: Engine) -> Recipe:
    if "recipe" not in engine.manifest or not engine.manifest.get("components"):
        raise EngineError(
            "the engine holds no text encoder and VAE, so it makes no videos by itself; build it from a recipe "
            "without `components: none`, or call it in a pipeline of your own"
        )
    return Recipe.from_dict(engine.manifest["recipe"], f"the recipe of {engine.folder}")


def choose_sampler(spec: SamplerSpec, task: str, **changes: Any) -> SamplerSpec:
    """The recipe's sampler, complete for the task. changes: fields to set; None leaves the recipe's value.

    Raises RecipeError for a value that the sampler does not take.
    """
    if changes.get("guidance") is not None:  # of both experts
        spec = dataclasses.replace(spec, guidance_2=None)
    changed = dataclasses.replace(spec, **{k: v for k, v in changes.items() if v is not None})
    return changed.for_task(task)


def choose_shape(shapes: Sequence[Shape], wanted: Shape | str | None) -> Shape:
    """The shape of the engine that `wanted` names; the first shape for None.

    wanted: as in "480x832x81" (height, width, frames; the batch may follow), or a resolution by name and an aspect
    ratio (width : height), as in "480p" and "720p 9:16". Raises UnsupportedError for another.
    """
    if wanted is None:
        return shapes[0]
    name = wanted.name if isinstance(wanted, Shape) else wanted.lower().strip()
    found = re.fullmatch(r"(\d+p)(?:[ ,@]?(\d+:\d+))?", name)
    size = _named_size(found[1], found[2]) if found else None
    name = name.replace(" ", "")
    for shape in shapes:
        if name in (shape.name, shape.name.rpartition("x")[0]) or size == (shape.height, shape.width):
            return shape
    known = ", ".join(shape.name for shape in shapes)
    named = f" ({size[0]}x{size[1]})" if size else " (height x width x frames, and the batch)"
    raise UnsupportedError(
        f"the engine has no shape {wanted if size else name}{named}; it has {known}: "
        "take one of these or add it to the recipe's shapes and build again"
    )


def _named_size(resolution: str, aspect: str | None) -> tuple[int, int]:
    """Height and width of a resolution by name. Raises UnsupportedError for an unknown one."""
    sizes = SIZES.get(resolution)
    if sizes is None:
        raise UnsupportedError(
            f"there is no resolution {resolution}; name one of {', '.join(SIZES)}, or the size itself"
        )
    if (aspect or "16:9") not in sizes:
        raise UnsupportedError(f"{resolution} has no aspect ratio {aspect}; name one of {', '.join(sizes)}")
    return sizes[aspect or "16:9"]


def prompts_of(prompt: str | Sequence[str], batch: int) -> list[str]:
    prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
    if len(prompts) != batch:
        raise UnsupportedError(f"this shape of the engine makes {batch} videos at once, and got {len(prompts)} prompts")
    return prompts


def check_request(engine: Engine, task: str, sampler: SamplerSpec, negative_prompt: str | None, given: Given) -> None:
    if negative_prompt and not sampler.is_guided:
        raise UnsupportedError(
            f"a negative prompt works through guidance, and the sampler {sampler.kind} has none here; leave it out"
        )
    check_given(given, task, engine.config)
    missing = [n for n in _needed(engine) if n not in engine.manifest["components"]]
    if missing:
        raise EngineError(f"the engine lacks its component {missing[0]}; build it from a complete pipeline")
    for name in _needed(engine):
        if name != "text_encoder":  # the largest, and the first to be read
            check_component(engine, name)


def check_size(made: torch.Tensor, size: Shape) -> None:
    """Raises EngineError where the VAE made a video of another size than the shape's."""
    asked = (size.batch, size.num_frames, size.height, size.width)
    if tuple(made.shape[:4]) != asked:
        found = " x ".join(map(str, made.shape[1:4]))
        raise EngineError(
            f"the VAE made videos of {found} (frames, height, width) where {size.name} was asked for: its strides are "
            "not what its configuration says; build the engine with the VAE that belongs to the model"
        )


def _needed(engine: Engine) -> list[str]:
    """The names of the components that making a video needs."""
    image = ["image_encoder", "image_processor"] if engine.config.get("image_dim") is not None else []
    return ["tokenizer", "text_encoder", "vae", *image]


def tell_quality(recipe: Recipe, report: Report | None) -> None:
    """Warns (SamplingWarning) where the video cannot be good.

    The causes are synthetic weights, rCM sampling of a model that was not distilled, and SLA of a model that was not
    trained with SLA.
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


def expert_boundary(engine: Engine, task: str) -> float | None:
    """The flow time below which the low-noise expert takes over; None with one transformer."""
    if "transformer_2" not in engine.experts:
        return None
    return boundary_of(engine.manifest.get("boundary_ratio"), task)
