"""The fields of a Wan transformer's configuration, and what of it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What diffusers' WanTransformer3DModel takes; here so that recipes are checked without importing diffusers.
TRANSFORMER_FIELDS = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "qk_norm",
    "eps",
    "image_dim",
    "added_kv_proj_dim",
    "rope_max_seq_len",
    "pos_embed_seq_len",
)
VACE_FIELDS = ("vace_layers", "vace_in_channels")  # what WanVACETransformer3DModel takes besides

_COUNTS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim",
    "num_layers", "rope_max_seq_len",
)  # fmt: skip
_COUNTS_OR_NONE = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


def wrong_field(config: Mapping[str, Any]) -> str | None:
    """What no transformer can be made of, as a sentence that names the field; None where all is right."""
    for name in (*_COUNTS, *_COUNTS_OR_NONE):
        value = config.get(name, None if name in _COUNTS_OR_NONE else 1)
        if value is None and name in _COUNTS_OR_NONE:
            continue
        if type(value) is not int or value < 1:
            return f"{name} must be a whole number of at least 1, not {value!r}"
    if config.get("attention_head_dim", 2) % 2:
        return f"attention_head_dim must be even, since rotary turns pairs, not {config['attention_head_dim']!r}"
    patch = config.get("patch_size", (1, 2, 2))
    if not isinstance(patch, (list, tuple)) or len(patch) != 3 or any(type(p) is not int or p < 1 for p in patch):
        return f"patch_size must be three whole numbers of at least 1 (frames, height, width), not {patch!r}"
    eps = config.get("eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        return f"eps must be a number between 0 and 1, not {eps!r}"
    if type(config.get("cross_attn_norm", True)) is not bool:
        return f"cross_attn_norm must be true or false, not {config['cross_attn_norm']!r}"
    return _wrong_vace(config) if is_vace(config) else None


def is_vace(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of diffusers' WanVACETransformer3DModel."""
    return "vace_layers" in config


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some fields changed. VACE's blocks of layers that are left out are left out."""
    made = {**config, **changes}
    layers, given = made["num_layers"], made.get("vace_layers")
    if given is not None and "vace_layers" not in changes and type(layers) is int:
        made["vace_layers"] = tuple(layer for layer in given if layer < layers)
    return made


def _wrong_vace(config: Mapping[str, Any]) -> str | None:
    layers, channels = config["vace_layers"], config.get("vace_in_channels", 96)
    if type(channels) is not int or channels < 1:
        return f"vace_in_channels must be a whole number of at least 1, not {channels!r}"
    last = config.get("num_layers", 40) - 1
    whole = isinstance(layers, (list, tuple)) and all(type(i) is int and 0 <= i <= last for i in layers)
    if not whole or 0 not in layers or sorted(set(layers)) != list(layers):
        return f"vace_layers must be layers rising from 0 to at most {last} (num_layers - 1), not {layers!r}"
    return None
