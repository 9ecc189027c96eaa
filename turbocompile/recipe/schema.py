"""The recipe: what to compile, for which shapes and card, with which rewrites. YAML in, typed and checked objects out.

`load_recipe` reads a file. Every field is a dataclass field with its default and its meaning (`metadata["help"]`);
`reference()` prints them all. A mistake ends in one sentence that names the file and line, or the override, the field
and the nearest valid name. What says `host` or `auto` about the machine is resolved here, when the recipe is made, so
that a recipe always means the same afterwards; `auto` of a pass is resolved by the pass, for `target`.
"""

# ruff: noqa: RUF009 (_field calls dataclasses.field; the default instances are frozen)

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from turbocompile.errors import RecipeError, UnsupportedError
from turbocompile.hardware import TARGETS, host_target
from turbocompile.recipe.presets import PRESETS, TRANSFORMER_FIELDS, Geometry, wrong_field

FP8_TARGETS = ("cpu", "sm89", "sm90", "sm120")  # Ampere has no FP8 arithmetic; on a CPU the references emulate it
PLAN_TARGETS = ("sm86", "sm89", "sm120")  # the RTX cards that tensorrt_rtx builds plans for
RCM_MID_STEPS = (1.5, 1.4, 1.0)  # TrigFlow times between atan(sigma_max) and 0 (the released checkpoints' sampler)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.pth)(?<!\.pt)(?<!\.safetensors)(?<!\.gguf)")  # owner/name
MAX_DEPTH = 16  # of nesting in a recipe; a legal one has 4 levels

_T = TypeVar("_T")


class _FieldError(RecipeError):
    """A check of a dataclass failed; the builder adds where the field stands."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name} {text}".strip())
        self.name, self.text = name, text


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its meaning; `choices`, `minimum`, `above`, `maximum`, `path` are checked."""
    return field(default=default, metadata={"help": help, **metadata})


class Section:
    """Base of the recipe's dataclasses: checks each field against its metadata. Raises RecipeError."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value is None:
                continue
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise _FieldError(f.name, _not_one_of(value, choices))
            for item in value if isinstance(value, tuple) else (value,):
                _check_bounds(f, item)
        self.check()

    def check(self) -> None:
        """Checks that concern several fields."""

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _check_bounds(f: dataclasses.Field[Any], value: Any) -> None:
    low, above, high = (f.metadata.get(k) for k in ("minimum", "above", "maximum"))
    if isinstance(value, float) and not math.isfinite(value):
        raise _FieldError(f.name, f"must be a finite number, not {value}")
    if low is not None and value < low:
        raise _FieldError(f.name, f"must be at least {low}, not {value}")
    if above is not None and value <= above:
        raise _FieldError(f.name, f"must be greater than {above}, not {value}")
    if high is not None and value > high:
        raise _FieldError(f.name, f"must be at most {high}, not {value}")


@dataclass(frozen=True)
class ModelSpec(Section):
    """Where the transformer comes from."""

    path: str | None = _field(
        None,
        "a diffusers folder, a checkpoint file (Wan, rCM or TurboDiffusion; .safetensors or .pth) or a hub id",
        path=True,
    )
    preset: str | None = _field(None, "a configuration by name, instead of path", choices=tuple(PRESETS))
    weights: str = _field(
        "auto",
        "checkpoint reads them, synthetic makes seeded random ones of the same shapes; auto is checkpoint where one is "
        "published or given, else synthetic",
        choices=("auto", "checkpoint", "synthetic"),
    )
    seed: int = _field(0, "seed of synthetic weights", minimum=0)
    revision: str | None = _field(None, "branch, tag or commit of a hub id")
    transformer_2: str | None = _field(
        None,
        "checkpoint file of the low-noise expert (Wan2.2), where path is the file of the high-noise one",
        path=True,
    )
    config: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of the transformer's configuration to change, as in {num_layers: 4}"},
    )

    def check(self) -> None:
        if self.path and self.preset:
            raise _FieldError("preset", "and path are both given; keep one of them")
        if not self.path and not self.preset:
            raise _FieldError(
                "", "needs a path (folder, checkpoint file or hub id) or a preset, as in model: {preset: wan-tiny}"
            )
        if self.path is not None and self.path in PRESETS and not Path(self.path).exists():
            raise _FieldError("path", f"is a preset's name; write model: {{preset: {self.path}}}")
        published = self.path is not None or PRESETS[self.preset or ""].hub_id is not None
        if self.weights == "auto":
            self._resolve("weights", "checkpoint" if published else "synthetic")
        elif self.weights == "checkpoint" and not published:
            raise _FieldError("weights", f"cannot be checkpoint, none is published for {self.preset}; use synthetic")
        if self.transformer_2 and not self.path:
            raise _FieldError("transformer_2", "belongs to a path, not to a preset")
        for name in self.config:
            if name not in TRANSFORMER_FIELDS:
                raise _FieldError(
                    f"config.{name}", "is not a field of the transformer" + _hint(name, TRANSFORMER_FIELDS)
                )


@dataclass(frozen=True)
class ComponentsSpec(Section):
    """Where what surrounds the transformer comes from: text encoder, tokenizer, VAE, scheduler, image encoder."""

    source: str = _field(
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

    height: int = _field(480, "pixels, a multiple of the VAE's stride times the patch (16; TI2V 5B: 32)", minimum=1)
    width: int = _field(832, "pixels, a multiple of the VAE's stride times the patch (16; TI2V 5B: 32)", minimum=1)
    num_frames: int = _field(
        81, "frames, 4k + 1 (the VAE makes one latent frame of the first, then one of every 4)", minimum=1
    )
    batch: int = _field(1, "videos at once", minimum=1)

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
        """As in `480x832x81x1` (height, width, frames, batch)."""
        return f"{self.height}x{self.width}x{self.num_frames}x{self.batch}"


@dataclass(frozen=True)
class SamplerSpec(Section):
    """How noise becomes a latent video."""

    kind: str = _field(
        "rcm",
        "rcm: 1 to 4 steps of a distilled model; unipc, euler: the flow ODE of a teacher",
        choices=("rcm", "unipc", "euler"),
    )
    steps: int | None = _field(
        None, "steps: 4 for rcm, 50 for unipc and euler where not given", minimum=1, maximum=1000
    )
    guidance: float | None = _field(
        None,
        "classifier-free guidance of unipc and euler, 5.0 where not given (1.0: one forward a step); rcm has none",
        minimum=1.0,
    )
    sigma_max: float | None = _field(
        None, "rcm: the first noise level; 80 for text-to-video, 200 for image-to-video where not given", above=0.0
    )
    distilled: bool = _field(False, "says that the checkpoint is rCM-distilled; without it rcm warns")
    ode: bool = _field(False, "rcm: follow the ODE instead of drawing new noise at each step")
    mid_steps: tuple[float, ...] | None = _field(
        None, "rcm: TrigFlow times between the first and the last, falling; [1.5, 1.4, 1.0] where not given", above=0.0
    )
    shift: float | None = _field(
        None, "unipc, euler: timestep shift, 5.0 where not given (Wan: 3.0 at 480p)", above=0.0
    )

    def check(self) -> None:
        self._check_rcm() if self.kind == "rcm" else self._check_teacher()

    def _check_rcm(self) -> None:
        if self.guidance is not None and self.guidance != 1.0:
            raise _FieldError("guidance", "belongs to unipc and euler; rcm samples without classifier-free guidance")
        if self.shift is not None:
            raise _FieldError("shift", "belongs to unipc and euler; the times of rcm are sigma_max and mid_steps")
        steps = 4 if self.steps is None else self.steps
        if steps > 4:
            raise _FieldError("steps", f"must be 1 to 4 for rcm, not {steps}; unipc and euler take more")
        mid = RCM_MID_STEPS if self.mid_steps is None else self.mid_steps
        if len(mid) < steps - 1:
            raise _FieldError("mid_steps", f"holds {len(mid)} times, {steps} steps need {steps - 1}")
        first = math.atan(self.sigma_max) if self.sigma_max is not None else math.pi / 2
        times = (first, *mid[: steps - 1])
        if any(b >= a for a, b in itertools.pairwise(times)):
            raise _FieldError("mid_steps", f"must fall from atan(sigma_max) = {first:.4f} on, not {list(mid)}")
        self._resolve("steps", steps)
        self._resolve("guidance", 1.0)

    def _check_teacher(self) -> None:
        for name, unset in (("sigma_max", None), ("mid_steps", None), ("ode", False)):
            if getattr(self, name) != unset:
                raise _FieldError(name, f"belongs to rcm, not to {self.kind}")
        self._resolve("steps", 50 if self.steps is None else self.steps)
        self._resolve("guidance", 5.0 if self.guidance is None else self.guidance)
        self._resolve("shift", 5.0 if self.shift is None else self.shift)

    def for_task(self, task: str) -> SamplerSpec:
        """With what depends on the task, "t2v" or "i2v", filled in: rCM's sigma_max and mid_steps."""
        if self.kind != "rcm":
            return self
        sigma_max = (200.0 if task == "i2v" else 80.0) if self.sigma_max is None else self.sigma_max
        mid = RCM_MID_STEPS if self.mid_steps is None else self.mid_steps
        return dataclasses.replace(self, sigma_max=sigma_max, mid_steps=mid)


@dataclass(frozen=True)
class PassSpec(Section):
    """Options that every pass has."""

    enabled: bool = _field(True, "whether the pass runs")
    budget: float | None = _field(
        None,
        "largest relative L1 error of a site that a quantizing pass may cause; the pass's own where not given",
        above=0.0,
    )


@dataclass(frozen=True)
class AttentionSpec(Section):
    """Which attention."""

    kind: str = _field(
        "auto",
        "native; sage: 8-bit SageAttention; sla: sparse-linear, for checkpoints that were trained with it; "
        "auto: sla where the checkpoint has proj_l, else for each site what was measured to be faster on the target",
        choices=("auto", "native", "sage", "sla"),
    )
    topk: float = _field(0.1, "sla: share of the key blocks that each query block attends to", above=0.0, maximum=1.0)
    block_q: int = _field(128, "sla: queries a block", choices=(16, 32, 64, 128, 256))
    block_k: int = _field(64, "sla: keys a block", choices=(16, 32, 64, 128, 256))
    allow_untuned: bool = _field(False, "sla on a checkpoint that was not trained with it (the picture suffers)")
    pv: str = _field(
        "auto",
        "format of the product with V: fp8, fp16, none (sla in floating point); auto: fp8 where the target has it",
        choices=("auto", "fp8", "fp16", "none"),
    )
    enabled: bool = _field(True, "whether the pass runs")
    budget: float | None = _field(
        None, "largest relative L1 error of a site; 0.04 with fp8, 0.02 with fp16 where not given", above=0.0
    )

    def check(self) -> None:
        if self.kind == "sage" and self.pv == "none":
            raise _FieldError("pv", "cannot be none for sage, which is quantized; use fp8 or fp16, or kind: native")


@dataclass(frozen=True)
class W8A8Spec(Section):
    """8-bit weights and activations of the linears."""

    format: str = _field(
        "auto",
        "int8: per token and channel; int8_block: 128 x 128 tiles (TurboDiffusion's); fp8: per token and channel; off; "
        "auto: the checkpoint's, else the target's",
        choices=("auto", "int8", "int8_block", "fp8", "off"),
    )
    enabled: bool = _field(True, "whether the pass runs")
    budget: float | None = _field(
        None,
        "largest relative L1 error of a site; 0.02 for int8 and int8_block, 0.05 for fp8 where not given",
        above=0.0,
    )
    layers: str = _field(
        "all",
        "where a site's error is measured: all: in each layer, and those over the budget stay wide; first: in the "
        "first layer, which stands for all",
        choices=("all", "first"),
    )
    smooth: str = _field(
        "auto",
        "SmoothQuant, where what makes an input can take its scales: auto tries alpha 0.3, 0.5 and 0.7 for each site "
        "and layer on recorded inputs (calibration), and keeps what helps; a number is the one alpha to try; off",
    )

    def check(self) -> None:
        if self.smooth not in ("auto", "off") and not _is_share(self.smooth):
            raise _FieldError("smooth", f"must be auto, off or a number from 0 to 1, not {self.smooth!r}")


def _is_share(text: str) -> bool:
    """Whether text is a number from 0 to 1."""
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


@dataclass(frozen=True)
class Passes(Section):
    """The rewrites, in the order they run. `passes: off` skips all of them, and normalize too."""

    enabled: bool = _field(True, "whether anything is rewritten")
    lora: PassSpec = _field(PassSpec(), "adapters (LoRA) of a model are added to the weights beside which they run")
    norms: PassSpec = _field(PassSpec(), "LayerNorm and RMSNorm written by hand become the one op")
    rope: PassSpec = _field(PassSpec(), "rotary embeddings in any style become the one op")
    attention: AttentionSpec = _field(AttentionSpec(), "SDPA or softmax attention")
    fuse_qkv: PassSpec = _field(PassSpec(), "linears that feed one attention and share an input become one")
    w8a8: W8A8Spec = _field(W8A8Spec(), "8-bit linears")
    qk_norm_rope: PassSpec = _field(PassSpec(), "norm, rotary and layout of q and k in one op")
    adaln: PassSpec = _field(PassSpec(), "LayerNorm and its modulation in one op")
    residual_norm: PassSpec = _field(PassSpec(), "gated residual and the norm behind it in one op")
    gelu_quant: PassSpec = _field(PassSpec(), "GELU before a quantize in one op")
    norm_attention: PassSpec = _field(PassSpec(), "an 8-bit attention takes in its k's norm and rotary")


PASS_NAMES = tuple(f.name for f in dataclasses.fields(Passes) if f.name != "enabled")


@dataclass(frozen=True)
class Recipe(Section):
    """Everything that decides what an engine is."""

    model: ModelSpec = field(metadata={"help": "the model"})
    components: ComponentsSpec = _field(ComponentsSpec(), "text encoder, tokenizer, VAE, scheduler")
    shapes: tuple[Shape, ...] = _field((Shape(),), "the sizes that the engine can make; they share the weights")
    dtype: str = _field(
        "auto",
        "of activations and unquantized weights; auto: float32 on cpu, else bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    target: str = _field(
        "host", "the card to build for; host: this machine's, cpu where it has none", choices=("host", *TARGETS)
    )
    sampler: SamplerSpec = _field(SamplerSpec(), "the sampler")
    passes: Passes = _field(Passes(), "the rewrites")
    calibration: str | None = _field(
        None,
        "a file of inputs that `turbocompile calibrate` or `turbocompile.record` wrote, to measure 8-bit linears on; "
        "random tensors where not given",
        path=True,
    )
    verify: str = _field(
        "numeric",
        "numeric: measure each rewrite; shapes: check shapes alone; off",
        choices=("numeric", "shapes", "off"),
    )
    backend: str = _field("triton", "what runs the graphs", choices=("triton", "onnx", "tensorrt"))

    def check(self) -> None:
        if not self.shapes:
            raise _FieldError("shapes", "is empty; give at least one {height, width, num_frames}")
        for i, shape in enumerate(self.shapes):
            if shape in self.shapes[:i]:
                raise _FieldError(f"shapes.{i}", f"repeats {shape.name}")
        self._check_sizes()
        if self.target == "host":
            try:
                self._resolve("target", host_target())
            except UnsupportedError as error:
                raise _FieldError("target", f"cannot be host: {error}") from error
        if self.dtype == "auto":
            self._resolve("dtype", "float32" if self.target == "cpu" else "bfloat16")
        if self.calibration is not None and (self.verify != "numeric" or not self.passes.enabled):
            raise _FieldError(
                "calibration", "is of use where rewrites are measured; leave it out, or set verify: numeric"
            )
        self._check_formats()
        self._check_backend()

    def _check_sizes(self) -> None:
        """The sizes must fit the preset's VAE and patches; those of a folder or file are known once it is opened."""
        if self.model.preset is None or self.components.source not in ("model", "none"):
            return
        preset = PRESETS[self.model.preset]
        config = {**preset.transformer, **self.model.config}
        if wrong_field(config) is None:
            self.check_sizes(dataclasses.replace(preset.geometry, patch=tuple(config["patch_size"])))

    def check_sizes(self, geometry: Geometry) -> None:
        """Raises RecipeError for a size of video that the model's geometry does not divide."""
        for i, shape in enumerate(self.shapes):
            if (wrong := geometry.wrong(shape)) is not None:
                raise _FieldError(f"shapes.{i}.{wrong[0]}", wrong[1])

    def _check_formats(self) -> None:
        """The target must have the arithmetic of the formats that are named."""
        if not self.passes.enabled or self.target in FP8_TARGETS:
            return
        why = f"needs a card with FP8, {self.target} has none"
        if self.passes.w8a8.enabled and self.passes.w8a8.format == "fp8":
            raise _FieldError("passes.w8a8.format", f"fp8 {why}; use int8")
        if self.passes.attention.enabled and self.passes.attention.pv == "fp8":
            raise _FieldError("passes.attention.pv", f"fp8 {why}; use fp16")

    def _check_backend(self) -> None:
        """ONNX files and TensorRT plans hold standard operators alone, so that quantizing ops have no place there."""
        if self.backend == "triton":
            return
        if self.backend == "tensorrt" and self.target not in PLAN_TARGETS:
            raise _FieldError(
                "backend",
                f"tensorrt builds plans for {', '.join(PLAN_TARGETS)}, not for {self.target}; set target to one",
            )
        passes = self.passes
        if not passes.enabled:
            return
        if passes.attention.enabled and passes.attention.kind in ("sage", "sla"):
            raise _FieldError(
                "passes.attention.kind", f"{passes.attention.kind} runs on the triton backend only; use native"
            )
        if passes.w8a8.enabled and passes.w8a8.format not in ("auto", "off"):
            raise _FieldError("passes.w8a8.format", f"{passes.w8a8.format} runs on the triton backend only; use off")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    def pass_options(self) -> dict[str, dict[str, Any]]:
        """Options by pass name, in pass order; `enabled` says whether the pass runs at all.

        `auto` is left to the pass, except that backends without quantizing ops turn it into `native` and `off`.
        """
        options = {name: dataclasses.asdict(getattr(self.passes, name)) for name in PASS_NAMES}
        if self.backend != "triton":
            if options["attention"]["kind"] == "auto":
                options["attention"]["kind"] = "native"
            if options["w8a8"]["format"] == "auto":
                options["w8a8"]["format"] = "off"
        if options["w8a8"]["format"] == "off":
            options["w8a8"]["enabled"] = False
        for o in options.values():
            o["enabled"] = o["enabled"] and self.passes.enabled
        return options

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON holds; `Recipe.from_dict` gives an equal recipe."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """The recipe of plain values. Relative paths stay as they are. Raises RecipeError."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where}: a recipe is a mapping of fields, not {_kind(values)}")
        return _make(cls, _from_plain(values, where))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    overrides: `a.b.c=value` each, as given to `--set`; the value is YAML. Relative paths in the file are relative to
    the file, in overrides to the working directory. Raises RecipeError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read as a recipe ({e})") from e
    tree = _parse(text, str(path), path.parent)
    if not isinstance(tree.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, not {_kind(tree.data)}")
    for override in overrides:
        _override(tree, override)
    return _make(Recipe, tree)


def reference() -> str:
    """Every field of a recipe as Markdown list items: name, type, default, meaning."""
    return "\n".join(_reference(Recipe, ""))


def _reference(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, item = _section_of(hints[f.name])
        name = f"{prefix}{f.name}"
        if kind:
            yield f"- `{name}`: {f.metadata['help']}"
            yield from _reference(kind, f"{name}[]." if item else f"{name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        choices = f.metadata.get("choices")
        values = f" One of {', '.join(map(str, choices))}." if choices else ""
        yield f"- `{name}` (default {_yaml(default)}): {f.metadata['help']}.{values}"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none given" if value is None else str(value)


# --- from YAML to values that know where they stand ---------------------------------------------------------------


@dataclass
class _Value:
    """A piece of YAML. data: dict of _Value, list of _Value, or a scalar; raw: the scalar as written."""

    data: Any
    raw: str
    where: str  # "recipe.yaml:12" or "--set a.b=c"
    base: Path | None  # what relative paths are relative to


def _parse(text: str, where: str, base: Path | None, line_numbers: bool = True) -> _Value:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if line_numbers and e.problem_mark else ""
        raise RecipeError(f"{where}{line}: this is not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"{where}: this is not YAML: {e}") from e
    if node is None:
        return _Value(None, "", where, base)
    constructor = yaml.SafeLoader("")

    def convert(node: yaml.Node, depth: int) -> _Value:
        at = f"{where}:{node.start_mark.line + 1}" if line_numbers else where
        if depth > MAX_DEPTH:
            raise RecipeError(f"{at}: nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.MappingNode):
            return _Value(mapping(node, depth, at), "", at, base)
        if isinstance(node, yaml.SequenceNode):
            return _Value([convert(n, depth + 1) for n in node.value], "", at, base)
        try:
            return _Value(constructor.construct_object(node), node.value, at, base)
        except (yaml.YAMLError, ValueError) as e:
            raise RecipeError(f"{at}: {node.value!r} is not a plain value") from e

    def mapping(node: yaml.MappingNode, depth: int, at: str) -> dict[str, _Value]:
        found: dict[str, _Value] = {}
        for key, value in node.value:
            line = f"{where}:{key.start_mark.line + 1}" if line_numbers else at
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{line}: a field's name must be a word")
            if key.value in found:
                raise RecipeError(f"{line}: {key.value} is given twice, first at {found[key.value].where}")
            made = convert(value, depth + 1)
            found[key.value] = dataclasses.replace(made, where=line)
        return found

    return convert(node, 0)


def _from_plain(value: Any, where: str) -> _Value:
    if isinstance(value, Mapping):
        return _Value({str(k): _from_plain(v, where) for k, v in value.items()}, "", where, None)
    if isinstance(value, (list, tuple)):
        return _Value([_from_plain(v, where) for v in value], "", where, None)
    return _Value(value, str(value), where, None)


def _override(tree: _Value, override: str) -> None:
    """Puts `a.b.c=value` into the tree; a scalar on the way becomes the section that it is short for."""
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    keys = [k.strip() for k in name.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"{where}: write an override as name.of.field=value")
    new = dataclasses.replace(_parse(text, where, Path.cwd(), line_numbers=False), where=where)
    at, kind = tree, typing.cast("type | None", Recipe)
    for i, key in enumerate(keys):
        if isinstance(at.data, list):
            if not key.isdecimal() or int(key) >= len(at.data):
                raise RecipeError(f"{where}: {'.'.join(keys[:i])} has items 0 to {len(at.data) - 1}, not {key}")
            if i == len(keys) - 1:
                at.data[int(key)] = new
            at = at.data[int(key)]
            continue
        if kind is not None and not isinstance(at.data, dict):
            at.data = {} if at.data is None else {_first_key(kind, at): dataclasses.replace(at)}
        if not isinstance(at.data, dict):
            raise RecipeError(f"{where}: {'.'.join(keys[:i])} is a plain value and has no field {key!r}")
        hint = typing.get_type_hints(kind).get(key) if kind else None
        kind = _section_of(hint)[0] if hint else None
        if i == len(keys) - 1:
            at.data[key] = new
        else:
            at = at.data.setdefault(key, _Value({}, "", where, None))


# --- from values to dataclasses -------------------------------------------------------------------------------


def _section_of(hint: Any) -> tuple[type | None, bool]:
    """The Section class in a field's type, and whether the field is a tuple of them."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and dataclasses.is_dataclass(args[0]):
        return typing.cast(type, args[0]), True
    return None, False


def _make(cls: type[_T], tree: _Value) -> _T:
    """Builds a section from the tree, with every error carrying where its field stands."""
    return _build(cls, tree, "", tree)


def _build(cls: type[_T], value: _Value, name: str, root: _Value) -> _T:
    hints = typing.get_type_hints(cls)
    data = value.data
    if data is None:
        data = {}
    elif not isinstance(data, dict):
        if isinstance(data, list):
            raise RecipeError(f"{value.where}: {name} must be a mapping of fields, not a list")
        data = {_first_key(cls, value): value}
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, item in data.items():
        if key not in hints:
            raise RecipeError(f"{item.where}: unknown field {_dotted(name, key)}{_hint(key, known)}")
        arguments[key] = _convert(hints[key], _metadata(cls, key), item, _dotted(name, key), root)
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in arguments]  # type: ignore[arg-type]
    if missing:
        raise RecipeError(f"{value.where}: {_dotted(name, missing[0])} is missing")
    try:
        return cls(**arguments)
    except _FieldError as e:
        full = _dotted(name, e.name)
        raise RecipeError(f"{_where(root, full)}: {full} {e.text}") from None


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _metadata(cls: type, name: str) -> Mapping[str, Any]:
    return next(f.metadata for f in dataclasses.fields(cls) if f.name == name)


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name and key else name or key


def _where(root: _Value, name: str) -> str:
    """Where the field, or the closest thing that encloses it, stands."""
    at, where = root, root.where
    for key in name.split("."):
        if isinstance(at.data, dict) and key in at.data:
            at = at.data[key]
        elif isinstance(at.data, list) and key.isdecimal() and int(key) < len(at.data):
            at = at.data[int(key)]
        else:
            break
        where = at.where
    return where


def _first_key(cls: type, value: _Value) -> str:
    """The field that a scalar in a section's place stands for: the first, or `enabled` for on and off."""
    first = dataclasses.fields(cls)[0]
    if isinstance(value.data, bool):
        choices = first.metadata.get("choices", ())
        names = [f.name for f in dataclasses.fields(cls)]
        if "enabled" in names and not (value.data is False and "off" in choices):
            return "enabled"
    return first.name


def _convert(hint: Any, metadata: Mapping[str, Any], value: _Value, name: str, root: _Value) -> Any:
    """The value as the field's type. Raises RecipeError."""
    if isinstance(hint, types.UnionType):
        if value.data is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    section, many = _section_of(hint)
    if section is not None and not many:
        return _build(section, value, name, root)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value.data, list):
            raise RecipeError(f"{value.where}: {name} must be a list, not {_kind(value.data)}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, metadata, v, f"{name}.{i}", root) for i, v in enumerate(value.data))
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value.data, dict):
            raise RecipeError(f"{value.where}: {name} must be a mapping, not {_kind(value.data)}")
        return _plain_value(value)
    return _scalar(hint, metadata, value, name)


def _scalar(hint: type, metadata: Mapping[str, Any], value: _Value, name: str) -> Any:
    data = value.data
    if hint is str:
        text = data
        if isinstance(data, bool):  # YAML 1.1 reads off as False; what was written counts
            text = {"False": "off", "True": "on"}.get(value.raw, value.raw.lower())
        elif isinstance(data, (int, float)):  # a revision may look like a number
            text = value.raw
        if isinstance(text, str):
            return _located(text, metadata, value)
    elif hint is bool and data in ("on", "off"):  # from Python or JSON, where YAML's words are text
        return data == "on"
    elif hint in (bool, int) and type(data) is hint:
        return data
    elif hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    elif hint is float and isinstance(data, str):
        try:
            return float(data)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
    kinds = {str: "text", bool: "on or off", int: "a whole number", float: "a number"}
    raise RecipeError(f"{value.where}: {name} must be {kinds[hint]}, not {_kind(data)}")


def _located(text: str, metadata: Mapping[str, Any], value: _Value) -> str:
    """A path made absolute, relative to where it was written; hub ids (owner/name) and words stay as they are."""
    if not metadata.get("path") or text in metadata.get("words", ()):
        return text
    path = Path(text).expanduser()
    if path.is_absolute() or value.base is None:
        return str(path)
    beside = value.base / path
    if beside.exists() or not (HUB_ID.fullmatch(text) or text in PRESETS):
        return os.path.abspath(beside)  # not resolved: a link in a hub cache has the file's name, its target a hash
    return text


def _plain_value(value: _Value) -> Any:
    if isinstance(value.data, dict):
        return {k: _plain_value(v) for k, v in value.data.items()}
    if isinstance(value.data, list):
        return [_plain_value(v) for v in value.data]
    return value.data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _kind(data: Any) -> str:
    if isinstance(data, (dict, Mapping)):
        return "a mapping"
    if isinstance(data, list):
        return "a list"
    return "nothing" if data is None else repr(data)


def _hint(name: str, known: Sequence[str]) -> str:
    """The nearest valid name, or all of them where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(known)}"


def _not_one_of(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
    more = f"; did you mean {near[0]}?" if near else ""
    return f"must be one of {', '.join(map(str, choices))}, not {value!r}{more}"
