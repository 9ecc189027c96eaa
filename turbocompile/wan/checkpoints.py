"""Wan checkpoints in one file: the original layout, rCM's and TurboDiffusion's, under diffusers' names.

Formats (told apart by `patch_embedding.weight`): Wan's own has the Conv3d weight of 5 dimensions; rCM and
TurboDiffusion have the equal Linear weight of 2; `condition_embedder.` marks a file that has diffusers' names already.
TurboDiffusion's may hold SLA projections (`proj_l`) and linears as `int8_weight` and `scale`, by tiles of 128 x 128.
Weights of 8 bits with another scale beside them (`weight_scale`, ...; scaled.py) are read as what they stand for.

`CheckpointTensors` gives every parameter of diffusers' WanTransformer3DModel, without copying: names are mapped, the
patch weight is reshaped, quantized linears are dequantized as they are read (and can be read quantized too).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from turbocompile.errors import EngineError
from turbocompile.ir.evaluate import TensorSource
from turbocompile.kernels.quantize.quantize import BLOCK, dequantize
from turbocompile.wan.leftovers import IRRELEVANT, is_lora, refusal
from turbocompile.wan.scaled import ScaledTensors

PREFIXES = ("net.", "net_ema.", "model.", "diffusion_model.", "module.", "transformer.")
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
AVERAGE = "net_ema."  # prefix of the averaged model in a training state, which holds other tensors, too
TRAINED = ("net.", "net_teacher.", "net_fake_score.")
HEAD_DIM = 128  # of every published Wan, because a checkpoint's shapes do not determine it
PATCH = (1, 2, 2)

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
    "attn_op.local_attn.proj_l": "proj_l",
}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    # names that other projects gave to the projections of SLA
    "attn1.attn_op.local_attn.proj_l": "attn1.proj_l",
    "attn1.attn_impl.proj_l": "attn1.proj_l",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # the affine norm before cross-attention; norm1 and the other one have no parameters
    "norm2": "norm3",
}
_SHELL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_WHOLE = {"head.modulation": "scale_shift_table", "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
_SUFFIXES = ("weight", "bias", "int8_weight", "scale")


def strip_prefix(name: str) -> str:
    """The name without the prefixes that trainers and wrappers put before it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while True:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def diffusers_name(name: str) -> str | None:
    """diffusers' name of a parameter in Wan's own layout (prefixes stripped); None for a name of no parameter."""
    if name in _WHOLE:
        return _WHOLE[name]
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    head, rest, table = (block[1], block[2], _BLOCK) if block else ("", name, _SHELL)
    if block and rest == "modulation":
        return head + "scale_shift_table"
    path, _, suffix = rest.rpartition(".")
    if suffix not in _SUFFIXES or path not in table:
        return None
    return f"{head}{table[path]}.{suffix}"


@dataclass(frozen=True)
class _Entry:
    """Where a parameter comes from: a tensor, reshaped, and the scale that dequantizes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: str | None = None


class CheckpointTensors:
    """The tensors of a checkpoint under diffusers' names. quantized: some linears are 8-bit."""

    def __init__(self, raw: TensorSource, where: str) -> None:
        """where: names the checkpoint in errors. Raises EngineError where it is no Wan transformer, or holds a tensor
        that no Wan transformer has."""
        self._raw = scaled = ScaledTensors(raw, where)
        self.notes = scaled.notes
        names = self._rename(list(scaled.keys()), where)
        self._entries: dict[str, _Entry] = {}
        for name, key in names.items():
            shape, dtype = scaled.spec(key)
            if name == "patch_embedding.weight" and len(shape) == 2:
                shape = (shape[0], shape[1] // math.prod(PATCH), *PATCH)
            self._entries[name] = _Entry(key, shape, dtype)
        self._add_dequantized(where)
        self.quantized = any(name.endswith(".int8_weight") for name in self._entries)

    @staticmethod
    def _rename(keys: list[str], where: str) -> dict[str, str]:
        """diffusers' name -> the checkpoint's own."""
        if any(k.startswith(AVERAGE) for k in keys):
            keys = [k for k in keys if not k.startswith(TRAINED)]
        stripped = {strip_prefix(k): k for k in keys}
        if len(stripped) < len(keys):
            raise EngineError(f"{where}: holds some tensors twice, under different prefixes")
        stripped = {name: key for name, key in stripped.items() if not IRRELEVANT.match(name)}
        if any(name.startswith("condition_embedder.") for name in stripped):
            return stripped
        if "patch_embedding.weight" not in stripped:
            if is_lora(stripped):
                raise refusal(where, stripped)
            raise EngineError(f"{where}: this is no Wan transformer, it has no patch_embedding.weight")
        mapped = {name: diffusers_name(name) for name in stripped}
        strange = [stripped[name] for name, theirs in mapped.items() if theirs is None]
        if strange:
            raise refusal(where, strange)
        return {theirs: stripped[name] for name, theirs in mapped.items() if theirs is not None}

    def _add_dequantized(self, where: str) -> None:
        """Adds a dequantized `weight` in bfloat16, the dtype before quantization, for each `int8_weight`."""
        for name in [n for n in self._entries if n.endswith(".int8_weight")]:
            path = name.removesuffix(".int8_weight")
            data, scale = self._entries[name], self._entries.get(f"{path}.scale")
            if scale is None:
                raise EngineError(f"{where}: {data.key} has no scale beside it")
            expected = tuple(-(-size // BLOCK) for size in data.shape)
            if scale.shape != expected:
                raise EngineError(f"{where}: {scale.key} has the shape {scale.shape}, not {expected}")
            self._entries[f"{path}.weight"] = _Entry(data.key, data.shape, torch.bfloat16, scale.key)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._entries[name]
        return entry.shape, entry.dtype

    def get(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = self._raw.get(entry.key)
        if entry.scale is None:
            return tensor.reshape(entry.shape)
        return dequantize(tensor, self._raw.get(entry.scale).float(), "int8_block", entry.dtype)


def infer_config(tensors: TensorSource, where: str) -> dict[str, Any]:
    """The transformer's configuration from its shapes. Heads are of 128 channels, as in every published Wan."""
    names = set(tensors.keys())

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise EngineError(f"{where}: the checkpoint lacks {name}")
        return tensors.spec(name)[0]

    patch = shape("patch_embedding.weight")  # (channels, in_channels, frames, height, width)
    if len(patch) != 5:
        raise EngineError(
            f"{where}: patch_embedding.weight has the shape {patch}, which is no convolution over a video"
        )
    channels = patch[0]
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in names) if m]
    if not blocks or channels % HEAD_DIM:
        raise EngineError(
            f"{where}: a Wan transformer has blocks of a multiple of {HEAD_DIM} channels, not of {channels}"
        )
    config: dict[str, Any] = {
        "patch_size": patch[2:],
        "num_attention_heads": channels // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": patch[1],
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch[2:]),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
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
    return config | _image_config(names, shape, channels)


def _image_config(names: set[str], shape: Any, channels: int) -> dict[str, Any]:
    image = "condition_embedder.image_embedder"
    more: dict[str, Any] = {}
    if f"{image}.norm1.weight" in names:
        more["image_dim"] = shape(f"{image}.norm1.weight")[0]
    if "blocks.0.attn2.add_k_proj.weight" in names or "blocks.0.attn2.add_k_proj.int8_weight" in names:
        more["added_kv_proj_dim"] = channels
    if f"{image}.pos_embed" in names:
        more["pos_embed_seq_len"] = shape(f"{image}.pos_embed")[1]
    return more
