"""From a prompt to latents: text, image, noise and steps, by an engine's transformers or eager ones."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from turbocompile.recipe.presets import Geometry, vae_strides
from turbocompile.recipe.schema import SamplerSpec, Shape
from turbocompile.runtime.engine import Engine
from turbocompile.sampling import flow, rcm
from turbocompile.video import image as wan_image
from turbocompile.video import text as wan_text
from turbocompile.video.components import Parts, check_component
from turbocompile.wan.components import folder_name, vae_config

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Conditions:
    """The inputs of the transformer beside the noisy latent, in its dtype and on its device.

    text, negative: (B, 512, text_dim); negative is None without guidance. channels: (B, 20, T, H, W), mask and latent
    of the first frame. tokens: (B, N, image_dim), the image's CLIP tokens.
    """

    text: torch.Tensor
    negative: torch.Tensor | None = None
    channels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Pipeline:
    """The parts that make latents: transformers by name, an engine's or eager ones, and the components around them.

    config: of the transformers. component: has the component of a name be on the device while the body of a `with`
    runs. geometry: of videos and latents. leaves: the stages in which the transformers leave the device.
    """

    experts: Mapping[str, Any]
    config: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    component: Callable[[str], contextlib.AbstractContextManager[Any]]
    geometry: Geometry
    leaves: frozenset[str] = frozenset()

    def make_room(self, stage: str) -> None:
        """Takes the transformers off the device, where a memory plan says so of the stage."""
        for expert in self.experts.values() if stage in self.leaves else ():
            expert.park()

    @classmethod
    def of_engine(cls, engine: Engine, kept: dict[str, Any] | None = None) -> Pipeline:
        """kept: the components that stay in memory between videos; None reads each when it is needed."""
        assert engine.folder is not None
        row = check_component(engine, "vae")
        strides = vae_strides(vae_config(engine.folder / "components" / folder_name("vae", row)))
        geometry = Geometry(*strides, tuple(engine.config["patch_size"]))
        leaves = engine.memory.leaves if engine.memory is not None else frozenset()
        parts = Parts(engine, kept)
        return cls(engine.experts, engine.config, engine.dtype, engine.device, parts, geometry, leaves)


class Stages:
    """Measures the seconds of each stage; calls progress(stage, 0.0) at its start and (stage, 1.0) at its end."""

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


@dataclass(frozen=True)
class Request:
    """What latents are made of. picture: a PIL image, for image-to-video. boundary: as in `expert_boundary`."""

    prompts: list[str]
    negative_prompt: str | None
    picture: Any
    sampler: SamplerSpec
    size: Shape
    boundary: float | None
    seed: int


def make_latents(pipeline: Pipeline, asked: Request, stages: Stages) -> torch.Tensor:
    """Normalized latents (B, out_channels, T, H, W), float32."""
    negative = asked.negative_prompt or "" if asked.sampler.guidance != 1.0 else None
    with stages("text"):
        pipeline.make_room("text")
        conditions = _text(pipeline, asked.prompts, negative)
    if asked.picture is not None:
        with stages("image"):
            pipeline.make_room("image")
            conditions = _with_image(pipeline, conditions, asked.picture, asked.size)
    with stages("denoise"):
        return _sample(pipeline, conditions, asked, stages.progress)


def _text(pipeline: Pipeline, prompts: list[str], negative_prompt: str | None) -> _Conditions:
    with pipeline.component("tokenizer") as tokenizer, pipeline.component("text_encoder") as encoder:

        def encode(texts: list[str]) -> torch.Tensor:
            unique = wan_text.encode_prompt(sorted(set(texts)), tokenizer, encoder, dtype=pipeline.dtype)
            return unique[[sorted(set(texts)).index(t) for t in texts]]

        negative = encode([negative_prompt] * len(prompts)) if negative_prompt is not None else None
        return _Conditions(encode(prompts), negative)


def _with_image(pipeline: Pipeline, conditions: _Conditions, image: Any, size: Shape) -> _Conditions:
    """Adds the first frame's latent and mask, and its CLIP tokens where the transformer takes them."""
    pixels = wan_image.image_tensor(image, size.height, size.width).to(pipeline.device)
    with pipeline.component("vae") as vae:
        channels = wan_image.image_condition(vae, pixels, size.num_frames)
    tokens = None
    if pipeline.config.get("image_dim") is not None:
        with pipeline.component("image_encoder") as encoder, pipeline.component("image_processor") as processor:
            tokens = wan_image.image_embeddings(encoder, processor, image)
        tokens = tokens.to(pipeline.dtype).expand(size.batch, -1, -1)
    return dataclasses.replace(
        conditions, channels=channels.to(pipeline.dtype).expand(size.batch, -1, -1, -1, -1), tokens=tokens
    )


def _sample(pipeline: Pipeline, conditions: _Conditions, asked: Request, progress: Progress) -> torch.Tensor:
    """Normalized latents (B, out_channels, T, H, W), float32."""
    sampler, size = asked.sampler, asked.size

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
        "generator": torch.Generator(pipeline.device).manual_seed(asked.seed),
        "steps": sampler.steps,
        "boundary": asked.boundary,
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
