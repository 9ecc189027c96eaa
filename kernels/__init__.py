"""Operators of turbocompile: one file an op, with its reference, its kernel and its registration.

Importing the package registers all ops with torch. The package needs torch and triton alone, because it also runs on
machines that have nothing else of turbocompile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from turbocompile.kernels.attention import norm_attention, sage_attention, sla_attention
from turbocompile.kernels.linear import w8a8_linear
from turbocompile.kernels.norms import adaln, norm_quantize, residual_norm
from turbocompile.kernels.quantize import gelu_quantize, quantize
from turbocompile.kernels.rotary import qk_norm_rope, rope

_MODULES = (
    rope,
    qk_norm_rope,
    adaln,
    residual_norm,
    quantize,
    norm_quantize,
    gelu_quantize,
    w8a8_linear,
    sage_attention,
    sla_attention,
    norm_attention,
)

ops = torch.ops.turbocompile
"""The namespace of the ops in torch: ops.rope, ops.adaln, ..."""

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    overload: function for module in _MODULES for overload, function in module.decompositions().items()
}
"""Op overload -> a function that computes the op by aten operators, for backends that lack the op."""

OPS: tuple[str, ...] = tuple(overload._schema.name.split("::")[1] for overload in DECOMPOSITIONS)
"""The names of all ops."""

__all__ = ["DECOMPOSITIONS", "OPS", "ops"]
