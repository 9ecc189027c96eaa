"""The names of a Wan transformer's tensors, as tables: from Wan's own layout to diffusers', and what surrounds names.

Wan's own layout is also that of rCM, TurboDiffusion, ComfyUI and GGUF files; these differ in the prefixes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIXES = ("net.", "net_ema.", "model.", "diffusion_model.", "module.", "transformer.")
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
AVERAGE = "net_ema."  # prefix of the averaged model in a training state, which holds other tensors, too
TRAINED = ("net.", "net_teacher.", "net_fake_score.")
WHOLE_FILE = "model.diffusion_model."  # prefix of the transformer in ComfyUI's files, which may hold a whole pipeline
PARTS = re.compile(r"(first_stage_model|vae|cond_stage_model|conditioner|text_encoders?|clip|image_encoder)\.")
VSA = re.compile(r"blocks\.\d+\.((self_attn|attn1)\.)?to_gate_compress\.(weight|bias)")  # FastVideo's sparse attention
PROJECTIONS = re.compile(r"blocks\.\d+\.attn1\.proj_l\.(weight|bias)")  # SLA's

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
_VACE_BLOCK = {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}
_SHELL = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
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
_SUFFIXES = ("weight", "bias")

# config.json of Wan's own layout -> diffusers' configuration
CONFIG_FIELDS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "eps": "eps",
    "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm",
    "vace_layers": "vace_layers",
    "vace_in_dim": "vace_in_channels",
}


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
    block = re.fullmatch(r"((vace_)?blocks\.\d+\.)(.+)", name)
    head, rest, table = (block[1], block[3], _VACE_BLOCK if block[2] else _BLOCK) if block else ("", name, _SHELL)
    if block and rest == "modulation":
        return head + "scale_shift_table"
    path, _, suffix = rest.rpartition(".")
    if suffix not in _SUFFIXES or path not in table:
        return None
    return f"{head}{table[path]}.{suffix}"


def listed(names: Iterable[str], most: int = 10) -> str:
    """Some names for a message: in order, and behind the first `most` how many more there are."""
    known = sorted(names, key=_in_order)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
