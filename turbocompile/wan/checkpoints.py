"""A Wan transformer's checkpoint under diffusers' names, whatever layout and whatever number format it is stored in.

Layouts: Wan's own has a Conv3d weight of 5 dimensions as `patch_embedding.weight`; rCM and TurboDiffusion have the
equal Linear weight of 2, some GGUF files fold it to 4; `condition_embedder.` marks a checkpoint that has diffusers'
names already. ComfyUI's and GGUF files have Wan's own names behind a prefix, or without one (keys.py). Number formats:
scaled.py, and gguf_file.py.

`CheckpointTensors` gives every parameter of diffusers' WanTransformer3DModel, without copying: names are mapped, the
patch weight is reshaped, quantized weights are dequantized as they are read. The weight `a.weight` of a linear whose
numbers a kernel reads as they are stored is there as `a.weight.qdata` and `a.weight.scale`, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from turbocompile.capture.module_weights import DATA, SCALE
from turbocompile.errors import EngineError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.kernels.quantize.quantize import BLOCK, FORMATS
from turbocompile.wan import vace
from turbocompile.wan.keys import (
    AVERAGE,
    PARTS,
    TRAINED,
    VSA,
    WHOLE_FILE,
    diffusers_name,
    listed,
    strip_prefix,
)
from turbocompile.wan.keys import WRAPPERS as WRAPPERS
from turbocompile.wan.leftovers import IRRELEVANT, is_lora, refusal
from turbocompile.wan.scaled import ScaledTensors, Stored

HEAD_DIM = 128  # of every published Wan, because a checkpoint's shapes do not determine it
PATCH = (1, 2, 2)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor comes from: another one's name, and the shape that it is given. part: "data" or "scale" of one
    that stays quantized."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str = ""


class CheckpointTensors:
    """The tensors of a checkpoint under diffusers' names.

    keys: the parameters, and SLA's projections. stored: how each quantized weight is stored, by name; one of a kernel's
    format can be read by its parts, too. aside: tensors that belong to the model and that no engine
    reads (the gates of VSA), by name. notes: sentences about what is not used.
    """

    def __init__(self, raw: TensorSource, where: str) -> None:
        """where: names the checkpoint in errors. Raises EngineError where it is no Wan transformer, or holds a tensor
        that no Wan transformer has."""
        chosen = _Transformer(raw)
        self._raw = scaled = ScaledTensors(chosen, where)
        names = self._rename(list(scaled.keys()), where)
        self.aside = {name: key for name, key in names.items() if VSA.fullmatch(name)}
        self._entries: dict[str, _Entry] = {}
        for name, key in names.items():
            if name in self.aside:
                continue
            shape, dtype = scaled.spec(key)
            if name in ("patch_embedding.weight", "vace_patch_embedding.weight"):
                shape = self._patch(shape, names.get(name.replace("weight", "bias")))
            self._entries[name] = _Entry(key, shape, dtype)
        self._parts: dict[str, _Entry] = {}
        self.stored: Mapping[str, Stored] = {
            name: self._with_parts(name, entry, scaled.stored[entry.key])
            for name, entry in self._entries.items()
            if entry.key in scaled.stored
        }
        self.notes = (*scaled.notes, *chosen.notes(where), *self._notes(where))

    def _patch(self, shape: tuple[int, ...], bias: str | None) -> tuple[int, ...]:
        """The shape of the patch embedding as a convolution over videos. bias: the checkpoint's name of its bias.

        It may be a linear over flattened patches (rCM), or have no more than four axes (GGUF).
        """
        channels = math.prod(self._raw.spec(bias)[0]) if bias is not None else shape[0] if shape else 0
        size = channels * math.prod(PATCH)
        if len(shape) in (2, 3, 4) and size and math.prod(shape) % size == 0:
            return (channels, math.prod(shape) // size, *PATCH)
        return shape

    @staticmethod
    def _rename(keys: list[str], where: str) -> dict[str, str]:
        """diffusers' name -> the checkpoint's own."""
        if any(k.startswith(AVERAGE) for k in keys):
            keys = [k for k in keys if not k.startswith(TRAINED)]
        stripped = {strip_prefix(k): k for k in keys}
        if len(stripped) < len(keys):
            twice = [k for k in keys if stripped[strip_prefix(k)] != k]
            raise EngineError(f"{where}: holds some tensors twice, under different prefixes: {listed(twice)}")
        stripped = {name: key for name, key in stripped.items() if not IRRELEVANT.match(name)}
        if any(name.startswith("condition_embedder.") for name in stripped):
            return stripped
        if "patch_embedding.weight" not in stripped:
            if is_lora(stripped):
                raise refusal(where, stripped)
            raise EngineError(f"{where}: this is no Wan transformer, it has no patch_embedding.weight")
        mapped = {name: name if VSA.fullmatch(name) else diffusers_name(name) for name in stripped}
        strange = [stripped[name] for name, theirs in mapped.items() if theirs is None]
        if strange:
            raise refusal(where, strange)
        return {theirs: stripped[name] for name, theirs in mapped.items() if theirs is not None}

    def _with_parts(self, name: str, entry: _Entry, stored: Stored) -> Stored:
        """How a weight is stored. The data and the scale of a linear of the blocks become readable by their names, if
        a kernel takes them as they are; of other weights none does.
        """
        if stored.format is None or len(entry.shape) != 2 or not re.match(r"blocks\.\d+\.", name):
            return replace(stored, format=None)
        rows, columns = entry.shape
        tiles = (-(-rows // BLOCK), -(-columns // BLOCK))
        scale = tiles if stored.format == "int8_block" else (rows, 1)
        self._parts[name + DATA] = _Entry(entry.key, entry.shape, FORMATS[stored.format], "data")
        self._parts[name + SCALE] = _Entry(entry.key, scale, torch.float32, "scale")
        return stored

    def _notes(self, where: str) -> tuple[str, ...]:
        if not self.aside:
            return ()
        return (
            f"{where}: {len(self.aside)} tensors of VSA's gates (as {min(self.aside)}) are not used, because an engine "
            "has no video sparse attention: its self-attentions take all tokens, which that attention approximates",
        )

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name in self.aside:
            return self._raw.spec(self.aside[name])
        entry = self._parts.get(name) or self._entries[name]
        return entry.shape, entry.dtype

    def get(self, name: str) -> torch.Tensor:
        if name in self.aside:
            return self._raw.get(self.aside[name])
        entry = self._parts.get(name) or self._entries[name]
        if entry.part:
            return self._raw.data(entry.key) if entry.part == "data" else self._raw.scale(entry.key)
        return self._raw.get(entry.key).reshape(entry.shape)


class _Transformer:
    """The tensors of a file without those of a pipeline's other parts, which ComfyUI's whole checkpoints hold."""

    def __init__(self, raw: TensorSource) -> None:
        self._raw = raw
        names = list(raw.keys())
        whole = any(name.startswith(WHOLE_FILE) for name in names)
        self._others = {name for name in names if whole and PARTS.match(name)}
        self._names = [name for name in names if name not in self._others]
        self.metadata: Mapping[str, str] = getattr(raw, "metadata", {})
        self.stored: Mapping[str, Stored] = getattr(raw, "stored", {})

    def notes(self, where: str) -> tuple[str, ...]:
        if not self._others:
            return ()
        return (
            f"{where}: {len(self._others)} tensors of other parts of a pipeline (as {min(self._others)}) are not read; "
            "components.source names the folder of the text encoder and the VAE",
        )

    def keys(self) -> Iterable[str]:
        return self._names

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self._raw.spec(name)

    def get(self, name: str) -> torch.Tensor:
        return self._raw.get(name)


def infer_config(tensors: TensorSource, where: str, heads: int | None = None) -> dict[str, Any]:
    """The transformer's configuration from its shapes. heads: where they are known; else each has 128 channels, as in
    every published Wan.
    """
    names = set(tensors.keys())
    _check_essential(tensors, where)

    def shape(name: str) -> tuple[int, ...]:
        return tensors.spec(name)[0]

    patch = shape("patch_embedding.weight")  # (channels, in_channels, frames, height, width)
    if len(patch) != 5:
        raise EngineError(
            f"{where}: patch_embedding.weight has the shape {patch}, which is no convolution over a video"
        )
    channels = patch[0]
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in names) if m]
    if heads is None and channels % HEAD_DIM:
        raise EngineError(
            f"{where}: a Wan transformer has blocks of a multiple of {HEAD_DIM} channels, not of {channels}"
        )
    heads = heads or channels // HEAD_DIM
    config: dict[str, Any] = {
        "patch_size": patch[2:],
        "num_attention_heads": heads,
        "attention_head_dim": channels // heads,
        "in_channels": patch[1],
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch[2:]),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[-1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[-1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in names,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    control = shape("vace_patch_embedding.weight") if "vace_patch_embedding.weight" in names else ()
    more = vace.infer(names, config["num_layers"], control[1] if len(control) == 5 else 0, where)
    return config | _image_config(names, shape, channels) | more


_ESSENTIAL = (
    "patch_embedding.weight",
    "proj_out.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "condition_embedder.time_embedder.linear_1.weight",
    "blocks.0.ffn.net.0.proj.weight",
)


def _check_essential(tensors: TensorSource, where: str) -> None:
    """Raises EngineError where a tensor is missing, or is no matrix, whose shape says the configuration."""
    names = set(tensors.keys())
    lost = [name for name in _ESSENTIAL if name not in names]
    if lost:
        raise EngineError(f"{where}: the checkpoint lacks {listed(lost)}; get the whole checkpoint again")
    flat = [name for name in _ESSENTIAL if len(tensors.spec(name)[0]) < 2 or 0 in tensors.spec(name)[0]]
    if flat:
        said = listed(f"{name} {list(tensors.spec(name)[0])}" for name in flat)
        raise EngineError(f"{where}: {said} is no weight of a linear or convolution; get the whole checkpoint again")


def _image_config(names: set[str], shape: Any, channels: int) -> dict[str, Any]:
    image = "condition_embedder.image_embedder"
    more: dict[str, Any] = {}
    if f"{image}.norm1.weight" in names:
        more["image_dim"] = math.prod(shape(f"{image}.norm1.weight"))
    if "blocks.0.attn2.add_k_proj.weight" in names:
        more["added_kv_proj_dim"] = channels
    if f"{image}.pos_embed" in names:
        more["pos_embed_seq_len"] = math.prod(shape(f"{image}.pos_embed")[:-1])
    return more
