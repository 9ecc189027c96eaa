"""The keys of LoRA files, in the styles of those who train and convert them, as tables.

    transformer.blocks.0.attn1.to_q.lora_A.default.weight       PEFT, diffusers
    lora_unet_blocks_0_self_attn_q.lora_down.weight             kohya: the path with underscores
    diffusion_model.blocks.0.self_attn.q.lora_A.weight          ComfyUI: Wan's own names
    ------------------------------------------- path
                                                ------          part

A key is a prefix (which may name an expert), the path of a module or of a parameter, and a part. `split` takes a key
apart; `Names` finds the tensor of the model that a path means, whichever style it is written in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from turbocompile.wan.checkpoints import WRAPPERS, diffusers_name

HIGH, LOW = "high", "low"

# The prefixes of a path, and the expert that they name where a file holds a LoRA for each.
PREFIXES = {
    "transformer_2.": LOW,
    "low_noise_model.": LOW,
    "low_noise.": LOW,
    "lora_transformer_2_": LOW,
    "transformer.": HIGH,
    "high_noise_model.": HIGH,
    "high_noise.": HIGH,
    "base_model.model.": None,
    "diffusion_model.": None,
    "model.": None,
    "pipe.dit.": None,
    "dit.": None,
    "net.": None,
    "unet.": None,
    "module.": None,
    "lora_unet_": None,
    "lora_transformer_": None,
    "lora_dit_": None,
    "lycoris_": None,
}
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(lora_te\d?_|text_encoder(_\d)?\.|te\d?\.|cond_stage_model\.)")

_ADAPTER = r"(?:\.(?P<adapter>[\w-]+))??"  # PEFT's name of an adapter, as in lora_A.default.weight
# The end of a key -> its part of the LoRA.
PARTS = tuple(
    (re.compile(rf"(?P<path>.+)\.{pattern}"), part)
    for pattern, part in {
        rf"lora_A{_ADAPTER}\.weight": "down",
        rf"lora_B{_ADAPTER}\.weight": "up",
        rf"lora_B{_ADAPTER}\.bias": "up_bias",
        r"lora_down\.weight": "down",
        r"lora_up\.weight": "up",
        r"lora_up\.bias": "up_bias",
        r"lora\.down\.weight": "down",
        r"lora\.up\.weight": "up",
        r"alpha": "alpha",
        rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?": "magnitude",  # DoRA in PEFT
        r"dora_scale": "dora_scale",  # DoRA in kohya, LyCORIS and ComfyUI
        r"diff": "diff",
        r"diff_b": "diff_b",
        r"diff_m": "diff_m",
        r"w_norm": "diff",  # LyCORIS
        r"b_norm": "diff_b",
        r"set_weight": "set",
        r"set_bias": "set_b",
    }.items()
)
_SAVED = re.compile(r"(?P<path>.+)\.(?:modules_to_save(?:\.[\w-]+)?\.)?(?P<leaf>weight|bias)")  # PEFT: whole tensors

# What a key belongs to that is another kind of adapter.
OTHERS = {
    re.compile(r"\.lokr_"): "a LoKr (Kronecker products)",
    re.compile(r"\.hada_"): "a LoHa (Hadamard products)",
    re.compile(r"\.oft_|\.boft_|\.oft\w*\."): "an OFT (orthogonal factors)",
    re.compile(r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$"): "a GLoRA",
    re.compile(r"\.on_input$|\.ia3_"): "an (IA)3 (factors of activations)",
    re.compile(r"\.lora_mid\."): "a LoRA of three factors (lora_mid)",
    re.compile(r"\.lora_embedding_"): "a LoRA of an embedding",
    re.compile(r"\.reshape_weight$"): "an adapter that changes the shapes of the model",
    re.compile(r"vera_|\.lora_(diag|XS)"): "a VeRA or another adapter of shared factors",
}

_ATTENTION = ("q", "k", "v", "o", "k_img", "v_img", "norm_q", "norm_k", "norm_k_img")
_OF_BLOCK = (
    *(f"{attention}.{leaf}" for attention in ("self_attn", "cross_attn") for leaf in _ATTENTION),
    *("self_attn.attn_op.local_attn.proj_l", "ffn.0", "ffn.2", "norm3", "modulation"),
)
_OF_SHELL = (
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("time_projection.1", "head.head", "head.modulation", "img_emb.emb_pos"),
    *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)),
)
_PARTS_OF = {"diff": "weight", "set": "weight", "diff_b": "bias", "set_b": "bias", "up_bias": "bias"}


@dataclass(frozen=True)
class Key:
    """A key taken apart. expert: the one that its prefix names. adapter: PEFT's name of it."""

    key: str
    path: str
    part: str
    expert: str | None = None
    adapter: str = ""


def split(key: str, saved: bool = False) -> Key | None:
    """The parts of a key; None for a key that is no LoRA's. saved: whether whole weights and biases are, too (PEFT's
    `modules_to_save`).
    """
    name = key
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    found = next(((m, part) for pattern, part in PARTS if (m := pattern.fullmatch(name))), None)
    if found is None and saved and (whole := _SAVED.fullmatch(name)):
        found = whole, "set" if whole["leaf"] == "weight" else "set_b"
    if found is None:
        return None
    match, part = found
    path, expert = match["path"], None
    while prefix := next((p for p in PREFIXES if path.startswith(p)), None):
        path = path.removeprefix(prefix)
        expert = expert or PREFIXES[prefix]
    return Key(key, path, part, expert, match.groupdict().get("adapter") or "")


def other_kind(key: str) -> str | None:
    """What another kind of adapter a key belongs to, in words."""
    if TEXT_ENCODER.match(key):
        return "a LoRA of the text encoder"
    return next((what for pattern, what in OTHERS.items() if pattern.search(key)), None)


class Names:
    """The tensors of a model, by the paths that LoRA files give them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._blocks = sorted({int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in self.names) if m})
        self._flat: dict[str, str] | None = None

    def find(self, path: str, part: str) -> str | None:
        """The name of the tensor that a part of a LoRA at `path` changes; None where the model has none."""
        leaf = _PARTS_OF.get(part, "weight")
        if part == "diff_m":
            path, leaf = f"{path}{'.' if '.' in path or path == 'head' else '_'}modulation", ""
        return self._named(path, leaf) or self._named(self._underscored(path), leaf)

    def _named(self, path: str | None, leaf: str) -> str | None:
        if path is None:
            return None
        given = [f"{path}.{leaf}", f"{path}.base_layer.{leaf}"]
        given += [path] if leaf != "bias" else []  # a parameter that is no module's weight, as a modulation
        theirs = [diffusers_name(name) for name in given]
        return next((name for name in (*given, *theirs) if name in self.names), None)

    def _underscored(self, path: str) -> str | None:
        """The path with dots of one that kohya wrote with underscores."""
        if self._flat is None:
            paths = [re.sub(r"(\.base_layer)?\.(weight|bias)$", "", name) for name in self.names]
            paths += [f"blocks.{i}.{rest}" for i in self._blocks for rest in _OF_BLOCK]
            self._flat = {p.replace(".", "_"): p for p in (*paths, *_OF_SHELL)}
        return self._flat.get(path)
