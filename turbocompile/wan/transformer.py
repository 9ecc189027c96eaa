"""One Wan transformer before its weights are read: its configuration, how to build it, and where its weights are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.ir.program import Program
from turbocompile.recipe.configuration import is_vace
from turbocompile.recipe.presets import TEXT_TOKENS, Geometry
from turbocompile.recipe.schema import Shape
from turbocompile.wan import vace
from turbocompile.wan.as_stored import with_stored
from turbocompile.wan.keys import PROJECTIONS, listed
from turbocompile.wan.leftovers import refusal
from turbocompile.wan.lora_branch import add_branches
from turbocompile.wan.scaled import Stored

PUBLISHED = Geometry()
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TransformerSource:
    """One transformer: its configuration, how to build it, and where its weights are.

    dtype: as in `from_pretrained(torch_dtype=...)`. image_tokens: CLIP tokens of one image; None for a transformer
    without images. where: names the checkpoint in errors. geometry: maps the size of a video to the size of its latent.
    notes: sentences about the parts of the checkpoint that the build does not use. branches: the ranks of the adapters
    that stay beside their linears, by `lora_branch.general` name. per_token: each token has its own timestep (TI2V).
    """

    name: str
    config: Mapping[str, Any]
    tensors: TensorSource
    dtype: torch.dtype
    image_tokens: int | None = None
    where: str = ""
    geometry: Geometry = PUBLISHED
    notes: tuple[str, ...] = ()
    branches: Mapping[str, int] = field(default_factory=dict)
    per_token: bool = False

    def build(self) -> nn.Module:
        """diffusers' transformer with parameters on meta, in from_pretrained's dtypes, and real buffers.

        Raises EngineError where the weights do not fit the configuration, or some are left over.
        """
        model = build_transformer(self.config, self.dtype)
        add_branches(model, self.branches)
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
        available = set(self.tensors.keys())
        left = self._unused(available, set(wanted))
        said = self._misfits(available, wanted)
        if left and not said:
            raise refusal(self.where, left)
        if said:
            more = [str(refusal("", left)).removeprefix(": ")] if left else []
            raise EngineError(f"{self.where}: {'; '.join([*said, *more])}")
        return model

    def _misfits(self, available: set[str], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is missing, is no weight, or has another shape than the configuration asks for: parts of a sentence."""
        said = []
        lost = [name for name in wanted if name not in available]
        if lost:
            said.append(f"the checkpoint lacks {listed(lost)}, which its configuration asks for")
        known = {name: self.tensors.spec(name) for name in wanted if name in available}
        whole = [f"{name} ({stored})" for name, (_, stored) in known.items() if not stored.is_floating_point]
        if whole:
            said.append(f"{listed(whole)} holds whole numbers, which are no weights by themselves")
        other = [
            f"{name} has the shape {shape}, the configuration asks for {wanted[name]}"
            for name, (shape, _) in known.items()
            if shape != wanted[name]
        ]
        return said + ([listed(other)] if other else [])

    def _unused(self, available: set[str], parameters: set[str]) -> list[str]:
        """The tensors that are no parameter, and belong to no block that the recipe leaves out (num_layers)."""
        layers, control = self.config["num_layers"], len(self.config.get("vace_layers", ()))

        def used(name: str) -> bool:
            block, beside = re.fullmatch(r"blocks\.(\d+)\.(.+)", name), vace.OF_CONTROL.fullmatch(name)
            like = f"blocks.0.{block[2]}" if block and int(block[1]) >= layers else name
            like = f"vace_blocks.0.{beside[2]}" if beside and control and int(beside[1]) >= control else like
            return like in parameters or PROJECTIONS.fullmatch(like) is not None

        return [name for name in available if not used(name)]

    def as_stored(self, program: Program) -> Program:
        """The Program with the weights of the blocks' linears as the checkpoint stores them, where a kernel takes them.

        A weight is the same number: an expression that dequantizes data and scale. A pass that quantizes takes them
        as they are. Layers whose weights are stored in other formats get graphs of their own.
        """
        return with_stored(program, self.stored)

    @property
    def stored(self) -> Mapping[str, Stored]:
        """How the checkpoint stores its quantized weights, by name."""
        return getattr(self.tensors, "stored", {})

    def load(self) -> nn.Module:
        """The model with its weights, on the CPU: the eager model that an engine is compared with."""
        model = self.build()
        for key, parameter in list(model.named_parameters()):
            path, _, leaf = key.rpartition(".")
            value = self.tensors.get(key).to(parameter.dtype).clone()
            setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        return model

    def example_inputs(self, shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call that diffusers' pipelines make, as tensors without storage (device meta).

        hidden_states (B, C, T, H, W) with T, H, W the latent's; timestep (B,) float32, or (B, tokens) where each token
        has its own; encoder_hidden_states (B, 512, text_dim); encoder_hidden_states_image (B, image_tokens, image_dim)
        where the model takes it; (2 B, image_tokens, image_dim) for a model of first and last frames; of VACE its
        control (vace.inputs).
        """
        frames, height, width = self.geometry.latent(shape)

        def empty(*size: int, dtype: torch.dtype = self.dtype, images: int = 1) -> torch.Tensor:
            return torch.empty(images * shape.batch, *size, dtype=dtype, device="meta")

        kwargs: dict[str, Any] = {
            "hidden_states": empty(self.config["in_channels"], frames, height, width),
            "timestep": empty(*([self.geometry.tokens(shape)] if self.per_token else []), dtype=torch.float32),
            "encoder_hidden_states": empty(TEXT_TOKENS, self.config["text_dim"]),
        }
        if self.image_tokens is not None:
            kwargs["encoder_hidden_states_image"] = empty(
                self.image_tokens, self.config["image_dim"], images=images_of(self.config)
            )
        if is_vace(self.config):
            kwargs |= vace.inputs(self.config, shape.batch, (frames, height, width), self.dtype)
        kwargs["return_dict"] = False
        return (), kwargs

    def shallow(self) -> TransformerSource:
        """The transformer with the first layers alone, as many as show what repeats: two, of VACE three."""
        layers = min(vace.SHOWN if is_vace(self.config) else 2, self.config["num_layers"])
        config = {**self.config, "num_layers": layers}
        return replace(self, config=vace.shallow(config, layers) if is_vace(config) else config)


def build_transformer(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """WanTransformer3DModel (of VACE WanVACETransformer3DModel) for inference: parameters on meta, buffers real.

    As in diffusers, a parameter stays in float32 if a component of its name is in `_keep_in_fp32_modules`.
    """
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    with torch.device("meta"):
        model: Any = (WanVACETransformer3DModel if is_vace(config) else WanTransformer3DModel)(**config)
    # The module of the rotary tables is built on the CPU, because no checkpoint holds the tables.
    model.rope = type(model.rope)(config["attention_head_dim"], tuple(config["patch_size"]), config["rope_max_seq_len"])
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if lost:
        raise UnsupportedError(
            f"this version of diffusers has the table {lost[0]} in its Wan transformer, which is not known"
        )
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    return model.eval().requires_grad_(False)


def images_of(config: Mapping[str, Any]) -> int:
    """The number of images whose CLIP tokens the transformer takes: 2 (first and last frame), or 1.

    A transformer of two images has a table of positions, which diffusers' WanImageEmbedding adds to pairs of images.
    """
    return 2 if config.get("pos_embed_seq_len") is not None else 1


class BlocksFrom:
    """The tensors of a checkpoint with `count` blocks from `first` on, under the names of blocks from 0 on.

    Of VACE's blocks it has those of the first layers.
    """

    def __init__(self, tensors: TensorSource, first: int, count: int = 2) -> None:
        self._tensors = tensors
        self._names: dict[str, str] = {}
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            block = _OF_BLOCK.fullmatch(name)
            if block is None:
                self._names[name] = name
            elif first <= int(block[1]) < first + count:
                self._names[f"blocks.{int(block[1]) - first}.{block[2]}"] = name

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._tensors.spec(self._names[name])

    def get(self, name: str) -> torch.Tensor:
        return self._tensors.get(self._names[name])
