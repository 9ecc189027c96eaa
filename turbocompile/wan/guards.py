"""Calls that a Wan model of diffusers answers wrongly without saying so; they are refused before capture."""

from __future__ import annotations

from torch import nn

from turbocompile.errors import CaptureError
from turbocompile.program import Signature

TEXT_TOKENS = 512  # what the cross-attention of diffusers' Wan takes off the end of [image tokens, text tokens]


def check_call(model: nn.Module, signature: Signature) -> None:
    """Refuses image tokens beside a text of another length than 512.

    diffusers' Wan concatenates image and text tokens and splits them again by a literal 512, so that with another text
    length text would be attended to as image, or the other way round.
    """
    shapes = {i.path: i.shape for i in signature.inputs}
    if type(model).__name__ != "WanTransformer3DModel" or "encoder_hidden_states_image" not in shapes:
        return
    text = shapes.get("encoder_hidden_states")
    if text is not None and text[1] != TEXT_TOKENS:
        raise CaptureError(
            f"a Wan with image tokens needs exactly {TEXT_TOKENS} text tokens, and the call has {text[1]}: the model "
            f"splits image and text at {TEXT_TOKENS}; pad the text embeddings with zeros to {TEXT_TOKENS}"
        )
