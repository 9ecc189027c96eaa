"""The recipe: what to compile, for which shapes and card, with which rewrites. YAML in, typed and checked objects out.

`load_recipe` reads a file. Every field is a dataclass field with its default and its meaning (`metadata["help"]`);
`turbocompile.recipe.reference()` prints them all. A mistake ends in one sentence that names the file and line, or the
override, the field and the nearest valid name. `host` and `auto` of the machine are resolved here, when the recipe is
made, so that a recipe always means the same afterwards; `options.resolve` resolves `auto` of the passes.
"""

# ruff: noqa: RUF009 (described() calls dataclasses.field; the default instances are frozen)

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from turbocompile.errors import RecipeError, UnsupportedError
from turbocompile.hardware import TARGETS, host_target
from turbocompile.recipe.configuration import TRANSFORMER_FIELDS, VACE_FIELDS, with_changes, wrong_field
from turbocompile.recipe.fields import FieldError, Section, described, kind_of, nearest, plain
from turbocompile.recipe.parse import append, from_plain, make, override, parse
from turbocompile.recipe.presets import (
    PRESETS,
    Geometry,
)

FP8_TARGETS = ("cpu", "sm89", "sm90", "sm120")  # Ampere has no FP8 arithmetic; on a CPU the references emulate it
PLAN_TARGETS = ("sm86", "sm89", "sm120")  # the RTX cards that tensorrt_rtx builds plans for
RCM_MID_STEPS = (1.5, 1.4, 1.0)  # TrigFlow times between atan(sigma_max) and 0 (the released checkpoints' sampler)


@dataclass(frozen=True)
class ModelSpec(Section):
    """Where the transformer comes from."""

    path: str | None = described(
        None,
        "a folder (diffusers' or Wan's own), a checkpoint file (.safetensors, .pth or .gguf) or a hub id",
        path=True,
    )
    preset: str | None = described(None, "a configuration by name, instead of path", choices=tuple(PRESETS))
    weights: str = described(
        "auto",
        "checkpoint reads them, synthetic makes seeded random ones of the same shapes; auto is checkpoint where one is "
        "published or given, else synthetic",
        choices=("auto", "checkpoint", "synthetic"),
    )
    seed: int = described(0, "seed of synthetic weights", minimum=0)
    revision: str | None = described(None, "branch, tag or commit of a hub id")
    transformer_2: str | None = described(
        None,
        "checkpoint file of the low-noise expert (Wan2.2), where path is the file of the high-noise one",
        path=True,
    )
    config: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of the transformer's configuration to change, as in {num_layers: 4}"},
    )
    text_only: bool = described(
        False,
        "of TI2V 5B: makes videos from text alone, with one timestep for all tokens; else each token has its own, and "
        "a video may start from an image",
    )

    def check(self) -> None:
        if self.path and self.preset:
            raise FieldError("preset", "and path are both given; keep one of them")
        if not self.path and not self.preset:
            raise FieldError(
                "", "needs a path (folder, checkpoint file or hub id) or a preset, as in model: {preset: wan-tiny}"
            )
        if self.path is not None and self.path in PRESETS and not Path(self.path).exists():
            raise FieldError("path", f"is a preset's name; write model: {{preset: {self.path}}}")
        published = self.path is not None or PRESETS[self.preset or ""].hub_id is not None
        if self.weights == "auto":
            self._resolve("weights", "checkpoint" if published else "synthetic")
        elif self.weights == "checkpoint" and not published:
            raise FieldError("weights", f"cannot be checkpoint, none is published for {self.preset}; use synthetic")
        if self.transformer_2 and not self.path:
            raise FieldError("transformer_2", "belongs to a path, not to a preset")
        known = (*TRANSFORMER_FIELDS, *VACE_FIELDS)
        for name in self.config:
            if name not in known:
                raise FieldError(f"config.{name}", "is not a field of the transformer" + nearest(name, known))


@dataclass(frozen=True)
class ComponentsSpec(Section):
    """Where what surrounds the transformer comes from: text encoder, tokenizer, VAE, scheduler, image encoder."""

    source: str = described(
        "model",
        "model: from where the transformer comes; none: build without them; else a diffusers folder or a hub id",
        path=True,
        words=("model", "none", "off"),
    )

    def check(self) -> None:
        if self.source == "off":
            self._resolve("source", "none")


@dataclass(frozen=True)
class Shape(Section):
    """One size of video that the engine can make."""

    height: int = described(480, "pixels, a multiple of the VAE's stride times the patch (16; TI2V 5B: 32)", minimum=1)
    width: int = described(832, "pixels, a multiple of the VAE's stride times the patch (16; TI2V 5B: 32)", minimum=1)
    num_frames: int = described(
        81, "frames, 4k + 1 (the VAE makes one latent frame of the first, then one of every 4)", minimum=1
    )
    batch: int = described(1, "videos at once", minimum=1)
    references: int = described(0, "of VACE: reference images, each of which takes a latent frame", minimum=0)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width under the VAE of Wan2.1 (`Geometry.latent` for others)."""
        return Geometry().latent(self)

    @property
    def tokens(self) -> int:
        """Tokens that the transformer sees, under Wan2.1's VAE and patches (`Geometry.tokens` for others)."""
        return Geometry().tokens(self)

    @property
    def name(self) -> str:
        """As in `480x832x81x1` (height, width, frames, batch); with two references `480x832x81x1r2`."""
        references = f"r{self.references}" if self.references else ""
        return f"{self.height}x{self.width}x{self.num_frames}x{self.batch}{references}"


@dataclass(frozen=True)
class SamplerSpec(Section):
    """How noise becomes a latent video."""

    kind: str = described(
        "rcm",
        "rcm: 1 to 4 steps of a distilled model; unipc, euler: the flow ODE of a teacher",
        choices=("rcm", "unipc", "euler"),
    )
    steps: int | None = described(
        None, "steps: 4 for rcm, 50 for unipc and euler where not given", minimum=1, maximum=1000
    )
    guidance: float | None = described(
        None,
        "classifier-free guidance of unipc and euler, 5.0 where not given (1.0: one forward a step); rcm has none",
        minimum=1.0,
    )
    guidance_2: float | None = described(
        None, "guidance of the low-noise expert of two (Wan2.2); guidance where not given", minimum=1.0
    )
    sigma_max: float | None = described(
        None, "rcm: the first noise level; 80 for text-to-video, 200 for image-to-video where not given", above=0.0
    )
    distilled: bool = described(False, "says that the checkpoint is rCM-distilled; without it rcm warns")
    ode: bool = described(False, "rcm: follow the ODE instead of drawing new noise at each step")
    mid_steps: tuple[float, ...] | None = described(
        None, "rcm: TrigFlow times between the first and the last, falling; [1.5, 1.4, 1.0] where not given", above=0.0
    )
    shift: float | None = described(
        None, "unipc, euler: timestep shift, 5.0 where not given (Wan: 3.0 at 480p)", above=0.0
    )

    def check(self) -> None:
        self._check_rcm() if self.kind == "rcm" else self._check_teacher()

    def _check_rcm(self) -> None:
        if self.guidance is not None and self.guidance != 1.0:
            raise FieldError("guidance", "belongs to unipc and euler; rcm samples without classifier-free guidance")
        if self.guidance_2 is not None and self.guidance_2 != 1.0:
            raise FieldError("guidance_2", "belongs to unipc and euler; rcm samples without classifier-free guidance")
        if self.shift is not None:
            raise FieldError("shift", "belongs to unipc and euler; the times of rcm are sigma_max and mid_steps")
        steps = 4 if self.steps is None else self.steps
        if steps > 4:
            raise FieldError("steps", f"must be 1 to 4 for rcm, not {steps}; unipc and euler take more")
        mid = RCM_MID_STEPS if self.mid_steps is None else self.mid_steps
        if len(mid) < steps - 1:
            raise FieldError("mid_steps", f"holds {len(mid)} times, {steps} steps need {steps - 1}")
        first = math.atan(self.sigma_max) if self.sigma_max is not None else math.pi / 2
        times = (first, *mid[: steps - 1])
        if any(b >= a for a, b in itertools.pairwise(times)):
            raise FieldError("mid_steps", f"must fall from atan(sigma_max) = {first:.4f} on, not {list(mid)}")
        self._resolve("steps", steps)
        self._resolve("guidance", 1.0)

    def _check_teacher(self) -> None:
        for name, unset in (("sigma_max", None), ("mid_steps", None), ("ode", False)):
            if getattr(self, name) != unset:
                raise FieldError(name, f"belongs to rcm, not to {self.kind}")
        self._resolve("steps", 50 if self.steps is None else self.steps)
        self._resolve("guidance", 5.0 if self.guidance is None else self.guidance)
        self._resolve("shift", 5.0 if self.shift is None else self.shift)

    @property
    def is_guided(self) -> bool:
        """Whether a step calls the network for the negative prompt, too."""
        return any(g is not None and g != 1.0 for g in (self.guidance, self.guidance_2))

    def for_task(self, task: str) -> SamplerSpec:
        """With what depends on the task (presets.task_of) filled in: rCM's sigma_max and mid_steps."""
        if self.kind != "rcm":
            return self
        sigma_max = (200.0 if task == "i2v" else 80.0) if self.sigma_max is None else self.sigma_max
        mid = RCM_MID_STEPS if self.mid_steps is None else self.mid_steps
        return dataclasses.replace(self, sigma_max=sigma_max, mid_steps=mid)


@dataclass(frozen=True)
class LoraSpec(Section):
    """An adapter (LoRA) that is added to the weights before anything else is done to them."""

    path: str = field(
        metadata={"help": "a LoRA's file (.safetensors, .pth), or its folder (PEFT's, diffusers')", "path": True}
    )
    weight: float = described(1.0, "how much of it is added; 0 adds nothing")
    expert: str = described(
        "both",
        "of two experts the one that gets it: high (transformer), low (transformer_2); both: each, and of a file that "
        "holds a LoRA for each, its own",
        choices=("both", "high", "low", "transformer", "transformer_2"),
    )

    mode: str = described(
        "merge",
        "merge: into the weights, before they are quantized; branch: a LoRA of a linear stays beside it, in the "
        "engine's dtype, and is computed in each call (anything else is merged)",
        choices=("merge", "branch"),
    )

    def check(self) -> None:
        if not self.path:
            raise FieldError("path", "is empty; name the LoRA's file or folder")
        self._resolve("expert", {"transformer": "high", "transformer_2": "low"}.get(self.expert, self.expert))

    @classmethod
    def of_text(cls, text: str) -> dict[str, str]:
        """`PATH[:WEIGHT]`: what follows the last colon is the weight where it is a number and no file has that name."""
        path, colon, weight = text.rpartition(":")
        try:
            float(weight)
        except ValueError:
            return {"path": text}
        if not colon or not path or Path(text).expanduser().exists():
            return {"path": text}
        return {"path": path, "weight": weight}


@dataclass(frozen=True)
class PassSpec(Section):
    """The options of a pass that computes the same function: it runs, or it does not."""

    GONE: ClassVar = {"budget": "is of no use: an exact rewrite is held to the model's own rounding"}

    enabled: bool = described(True, "whether the pass runs")


@dataclass(frozen=True)
class AttentionSpec(Section):
    """Which attention."""

    kind: str = described(
        "auto",
        "native; sage: 8-bit SageAttention; sla: sparse-linear, for checkpoints that were trained with it; "
        "auto: sla where the checkpoint has proj_l, else for each site what was measured to be faster on the target",
        choices=("auto", "native", "sage", "sla"),
    )
    topk: float = described(
        0.1, "sla: share of the key blocks that each query block attends to", above=0.0, maximum=1.0
    )
    block_q: int = described(128, "sla: queries a block", choices=(16, 32, 64, 128, 256))
    block_k: int = described(64, "sla: keys a block", choices=(16, 32, 64, 128, 256))
    allow_untuned: bool = described(False, "sla on a checkpoint that was not trained with it (the picture suffers)")
    pv: str = described(
        "auto",
        "format of the product with V: fp8, fp16, none (sla in floating point); auto: fp8 where the target has it",
        choices=("auto", "fp8", "fp16", "none"),
    )
    enabled: bool = described(True, "whether the pass runs")
    budget: float | None = described(
        None, "largest relative L1 error of a site; 0.04 with fp8, 0.02 with fp16 where not given", above=0.0
    )

    def check(self) -> None:
        if self.kind == "sage" and self.pv == "none":
            raise FieldError("pv", "cannot be none for sage, which is quantized; use fp8 or fp16, or kind: native")


@dataclass(frozen=True)
class W8A8Spec(Section):
    """8-bit weights and activations of the linears."""

    format: str = described(
        "auto",
        "int8: per token and channel; int8_block: 128 x 128 tiles (TurboDiffusion's); fp8: per token and channel; off; "
        "auto: the checkpoint's, else the target's",
        choices=("auto", "int8", "int8_block", "fp8", "off"),
    )
    enabled: bool = described(True, "whether the pass runs")
    budget: float | None = described(
        None,
        "largest relative L1 error of a site; 0.02 for int8 and int8_block, 0.05 for fp8 where not given",
        above=0.0,
    )
    layers: str = described(
        "all",
        "where a site's error is measured: all: in each layer, and those over the budget stay wide; first: in the "
        "first layer, which stands for all",
        choices=("all", "first"),
    )
    smooth: str = described(
        "auto",
        "SmoothQuant, where what makes an input can take its scales: auto tries alpha 0.3, 0.5 and 0.7 for each site "
        "and layer on recorded inputs (calibration), and keeps what helps; a number is the one alpha to try; off",
    )

    def check(self) -> None:
        if self.smooth not in ("auto", "off") and not _is_share(self.smooth):
            raise FieldError("smooth", f"must be auto, off or a number from 0 to 1, not {self.smooth!r}")


def _is_share(text: str) -> bool:
    """Whether text is a number from 0 to 1."""
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


@dataclass(frozen=True)
class Passes(Section):
    """The rewrites, in the order they run. `passes: off` skips all of them, and normalize too."""

    enabled: bool = described(True, "whether anything is rewritten")
    lora: PassSpec = described(PassSpec(), "adapters (LoRA) of a model are added to the weights beside which they run")
    norms: PassSpec = described(PassSpec(), "LayerNorm and RMSNorm written by hand become the one op")
    rope: PassSpec = described(PassSpec(), "rotary embeddings in any style become the one op")
    attention: AttentionSpec = described(AttentionSpec(), "SDPA or softmax attention")
    fuse_qkv: PassSpec = described(PassSpec(), "linears that feed one attention and share an input become one")
    w8a8: W8A8Spec = described(W8A8Spec(), "8-bit linears")
    qk_norm_rope: PassSpec = described(PassSpec(), "norm, rotary and layout of q and k in one op")
    adaln: PassSpec = described(PassSpec(), "LayerNorm and its modulation in one op")
    residual_norm: PassSpec = described(PassSpec(), "gated residual and the norm behind it in one op")
    gelu_quant: PassSpec = described(PassSpec(), "GELU before a quantize in one op")
    norm_attention: PassSpec = described(PassSpec(), "an 8-bit attention takes in its k's norm and rotary")


PASS_NAMES = tuple(f.name for f in dataclasses.fields(Passes) if f.name != "enabled")


@dataclass(frozen=True)
class Settings(Section):
    """How a model is compiled, whichever model it is."""

    dtype: str = described(
        "auto",
        "of activations and unquantized weights; auto: float32 on cpu, else bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    target: str = described(
        "host", "the card to build for; host: this machine's, cpu where it has none", choices=("host", *TARGETS)
    )
    passes: Passes = described(Passes(), "the rewrites")
    calibration: str | None = described(
        None,
        "a file of inputs that `turbocompile calibrate` or `turbocompile.record` wrote, to measure 8-bit linears on; "
        "random tensors where not given",
        path=True,
    )
    verify: str = described(
        "numeric",
        "numeric: measure each rewrite; shapes: check shapes alone; off",
        choices=("numeric", "shapes", "off"),
    )
    backend: str = described("triton", "what runs the graphs", choices=("triton", "onnx", "tensorrt"))

    def check(self) -> None:
        if self.target == "host":
            try:
                self._resolve("target", host_target())
            except UnsupportedError as error:
                raise FieldError("target", f"cannot be host: {error}") from error
        if self.dtype == "auto":
            self._resolve("dtype", "float32" if self.target == "cpu" else "bfloat16")
        if self.calibration is not None and (self.verify != "numeric" or not self.passes.enabled):
            raise FieldError(
                "calibration", "is of use where rewrites are measured; leave it out, or set verify: numeric"
            )
        self._check_formats()
        self._check_backend()

    def _check_formats(self) -> None:
        """The target must have the arithmetic of the formats that are named."""
        if not self.passes.enabled or self.target in FP8_TARGETS:
            return
        why = f"needs a card with FP8, {self.target} has none"
        if self.passes.w8a8.enabled and self.passes.w8a8.format == "fp8":
            raise FieldError("passes.w8a8.format", f"fp8 {why}; use int8")
        if self.passes.attention.enabled and self.passes.attention.pv == "fp8":
            raise FieldError("passes.attention.pv", f"fp8 {why}; use fp16")

    def _check_backend(self) -> None:
        """ONNX files and TensorRT plans hold standard operators alone, so that quantizing ops have no place there."""
        if self.backend == "triton":
            return
        if self.backend == "tensorrt" and self.target not in PLAN_TARGETS:
            raise FieldError(
                "backend",
                f"tensorrt builds plans for {', '.join(PLAN_TARGETS)}, not for {self.target}; set target to one",
            )
        passes = self.passes
        if not passes.enabled:
            return
        if passes.attention.enabled and passes.attention.kind in ("sage", "sla"):
            raise FieldError(
                "passes.attention.kind", f"{passes.attention.kind} runs on the triton backend only; use native"
            )
        if passes.w8a8.enabled and passes.w8a8.format not in ("auto", "off"):
            raise FieldError("passes.w8a8.format", f"{passes.w8a8.format} runs on the triton backend only; use off")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON holds; `from_dict` gives an equal one."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """The object of plain values. Relative paths stay as they are. Raises RecipeError."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where}: a recipe is a mapping of fields, not {kind_of(values)}")
        return make(cls, from_plain(values, where))


@dataclass(frozen=True)
class Recipe(Settings):
    """Everything that decides what an engine is."""

    ORDER: ClassVar = (
        "model", "lora", "components", "shapes", "dtype", "target", "sampler", "passes", "calibration", "verify",
        "backend",
    )  # fmt: skip

    model: ModelSpec = field(kw_only=True, metadata={"help": "the model"})
    lora: tuple[LoraSpec, ...] = described(
        (), "adapters, which add up; a text is short for one: path[:weight]", one=True
    )
    components: ComponentsSpec = described(ComponentsSpec(), "text encoder, tokenizer, VAE, scheduler")
    shapes: tuple[Shape, ...] = described((Shape(),), "the sizes that the engine can make; they share the weights")
    sampler: SamplerSpec = described(SamplerSpec(), "the sampler")

    def check(self) -> None:
        if not self.shapes:
            raise FieldError("shapes", "is empty; give at least one {height, width, num_frames}")
        for i, shape in enumerate(self.shapes):
            if shape in self.shapes[:i]:
                raise FieldError(f"shapes.{i}", f"repeats {shape.name}")
        if any(lora.mode == "branch" for lora in self.lora):
            self._resolve("passes", dataclasses.replace(self.passes, lora=PassSpec(enabled=False)))
        self._check_sizes()
        super().check()

    def _check_sizes(self) -> None:
        """The sizes must fit the preset's VAE and patches; those of a folder or file are known once it is opened."""
        if self.model.preset is None or self.components.source not in ("model", "none"):
            return
        preset = PRESETS[self.model.preset]
        config = with_changes(preset.transformer, self.model.config)
        if wrong_field(config) is None:
            self.check_sizes(dataclasses.replace(preset.geometry, patch=tuple(config["patch_size"])))

    def check_sizes(self, geometry: Geometry) -> None:
        """Raises RecipeError for a size of video that the model's geometry does not divide."""
        for i, shape in enumerate(self.shapes):
            if (wrong := geometry.wrong(shape)) is not None:
                raise FieldError(f"shapes.{i}.{wrong[0]}", wrong[1])


def load_recipe(path: str | Path, overrides: Sequence[str] = (), loras: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    overrides: `a.b.c=value` each, as given to `--set`; the value is YAML. loras: `path[:weight]` each, as given to
    `--lora`; they are added to the recipe's. Relative paths in the file are relative to the file, in overrides and
    loras to the working directory. Raises RecipeError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read as a recipe ({e})") from e
    tree = parse(text, str(path), path.parent)
    if not isinstance(tree.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, not {kind_of(tree.data)}")
    for given in overrides:
        override(tree, Recipe, given)
    for given in loras:
        append(tree, "lora", given, f"--lora {given}")
    return make(Recipe, tree)
