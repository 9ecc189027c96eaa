"""Tensors of a checkpoint that no model reads: an error says in one sentence what they are.

A checkpoint's tensor is used, or it is known to say nothing (`IRRELEVANT`), or the checkpoint is refused: a scale or a
LoRA that is left out makes another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from turbocompile.errors import EngineError, TurbocompileError, UnsupportedError
from turbocompile.wan.keys import PARTS, listed

# Of a transformer: tables that are computed from the configuration, what trainers and other runtimes keep besides.
IRRELEVANT = re.compile(
    r"(pos_embedder|rope|freqs)(\.|$)|.*\.(_extra_state|attn_op\.cp_)"
    r"|.*\.norm_added_q\."  # diffusers' own conversions have it; Wan's image attention has no query of its own
)


@dataclass(frozen=True)
class _Kind:
    """A kind of tensor, recognized by its name. what: completes "the tensor X ..."; mend: tells the user what to do."""

    pattern: re.Pattern[str]
    what: str
    mend: str
    error: type[TurbocompileError] = EngineError


_LORA = _Kind(
    re.compile(
        r"(^|[._])(lora|dora|loha|lokr|hada|oft|boft|glora|ia3)_|(^|[._])lora\.|\.lora\w*$"
        r"|\.(diff|diff_b|diff_m|alpha|set_weight|reshape_weight|base_layer\.\w+)$"
    ),
    "belongs to a LoRA, which is no model by itself and no part of one",
    "give the model without it, and the LoRA in a file of its own as `lora: PATH` in the recipe (or --lora)",
    UnsupportedError,
)
_VACE = _Kind(
    re.compile(r"(^|\.)vace_"),
    "belongs to VACE's blocks, and the configuration is of a model without these (vace_layers lists the layers that "
    "have one)",
    "give the configuration that belongs to the weights",
    UnsupportedError,
)
_SCALE = _Kind(
    re.compile(
        r"(^|[._])(\w*scales?(?!_shift)|scaled|scale_inv|amax|absmax|zeros?_?points?|quant\w*|qzeros|g_idx|nested)($|[._])"
    ),
    "is a scale, or another part, of a quantized weight in a way of storing that turbocompile does not read (it reads "
    "8-bit weights with one scale, or one a row or block, as weight_scale, scale_weight, scale or weight_scale_inv)",
    "give the checkpoint that was not quantized",
)
_PARTS = _Kind(
    PARTS,
    "belongs to another part of a pipeline than the transformer",
    "give the transformer's own file, and the other parts as components.source",
)
_OTHER = _Kind(
    re.compile(""),
    "belongs to no Wan transformer that turbocompile knows",
    "load the model by its own library and give it to turbocompile.optimize(model, ...), or, where the tensor does not "
    "count, leave it out of the file",
)
_KINDS = (_LORA, _VACE, _SCALE, _PARTS, _OTHER)


def is_lora(names: Iterable[str]) -> bool:
    """Whether one of the names is a LoRA's."""
    return any(_LORA.pattern.search(name) for name in names)


def refusal(where: str, names: Collection[str], owner: str = "") -> TurbocompileError:
    """The error for tensors that nothing reads: names them, and says what the first one is and what to do.

    owner: the model that the tensors should belong to, if it is no transformer, as in "the text encoder of the class
    UMT5EncoderModel".
    """
    kind, name = next((k, n) for k in _KINDS for n in sorted(names) if k.pattern.search(n))
    others = set(names) - {name}
    more = f" (and {len(others)} more: {listed(others)})" if others else ""
    what, mend = kind.what, kind.mend
    if owner and kind in (_OTHER, _PARTS):
        what = f"belongs to another model than {owner}"
        mend = "its configuration and its weights must be of one model; download it again"
    return kind.error(f"{where}: the tensor {name}{more} {what}; {mend}")
