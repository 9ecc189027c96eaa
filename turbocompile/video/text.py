"""From a prompt to the text embeddings that Wan's transformer attends to."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import torch

from turbocompile.recipe.presets import TEXT_TOKENS


def clean_prompt(prompt: str) -> str:
    """The prompt as in Wan's training: mended Unicode, HTML entities resolved (twice), single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@torch.no_grad()
def encode_prompt(
    prompt: str | Sequence[str],
    tokenizer: Any,
    text_encoder: Any,
    max_sequence_length: int = TEXT_TOKENS,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Embeddings (B, max_sequence_length, text_dim) of B prompts, zeros beyond each prompt's length.

    The zeros are attended to: Wan was trained so, there is no mask in its cross-attention. Longer prompts are cut.
    dtype, device: of the result; the text encoder's where not given.
    """
    prompts = [clean_prompt(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    # an encoder whose layers pass through a GPU says where it runs, because its weights do not
    encoder_device = getattr(text_encoder, "runs_on", None) or next(text_encoder.parameters()).device
    mask = tokens.attention_mask.to(encoder_device)
    hidden = text_encoder(tokens.input_ids.to(encoder_device), mask).last_hidden_state
    hidden = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0)
    return hidden.to(device=device or encoder_device, dtype=dtype or hidden.dtype)
