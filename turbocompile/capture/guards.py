"""Refuses models and calls, before capture, whose engine would give wrong results without an error."""

from __future__ import annotations

import torch
from torch import nn

from turbocompile.errors import CaptureError, UnsupportedError
from turbocompile.ir.program import Signature

TEXT_TOKENS = 512  # diffusers' Wan splits [image tokens, text tokens] so many tokens before the end


# The module that defines a parameter's class -> the format of its bytes. torchao's is read (module_weights.py).
_FOREIGN = {
    "diffusers.quantizers.gguf": "GGUF",
    "transformers.quantizers.quantizer_gguf": "GGUF",
    "gguf": "GGUF",
    "bitsandbytes": "bitsandbytes",
    "optimum.quanto": "quanto",
    "hqq": "HQQ",
}


def check_parameters(model: nn.Module) -> None:
    """Raises UnsupportedError for a module whose weights another library keeps as packed bytes.

    Such a parameter has another shape than its weight, and only that library's own linear can read it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = _foreign(tensor)
        if kind is not None:
            raise UnsupportedError(
                f"{name} is quantized by {kind} ({type(tensor).__name__}), and turbocompile does not read its bytes; "
                "load the model without that quantization (turbocompile quantizes linears to 8 bits itself, by "
                "passes.w8a8), or quantize it with torchao"
            )


def _foreign(tensor: torch.Tensor) -> str | None:
    """The library that packed a tensor; None for a plain tensor. No library is imported to find out."""
    for cls in type(tensor).__mro__:
        if cls.__name__ == "GGUFParameter":
            return "GGUF"
        for module, kind in _FOREIGN.items():
            if cls.__module__ == module or cls.__module__.startswith(f"{module}."):
                return kind
    return None


def check_call(model: nn.Module, signature: Signature) -> None:
    """Refuses image tokens beside a text of another length than 512.

    diffusers' Wan concatenates image and text tokens and splits them again by a literal 512. With another text length
    it would attend to text tokens as if they were of the image, or the other way round.
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
