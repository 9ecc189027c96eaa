"""The tensors of a module as a source of weights; weights that torchao quantized are recognized and taken as they are.

`quantize_` replaces the weights of linears by tensor subclasses. They are recognized on the module, before it is
captured (once exported, such a linear is 23 operations), by where their class is defined: torchao is not imported here.
What is taken is the weight alone:

    Int8Tensor     data int8 (N, K), scale (N, 1)    w8a8 format int8
    Float8Tensor   data e4m3 (N, K), scale (N, 1)    w8a8 format fp8

One scale for a whole weight is the same scale in each row. Activations are quantized as the engine does it, per token
and symmetrically; what the weight asks for instead and that does not stand for (a static scale, a zero point, a clamp)
is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.kernels.quantize.quantize import FORMATS

DATA, SCALE = ".qdata", ".scale"  # what a weight's name is followed by in the names of its parts
CLASSES = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}  # torchao's class: our format
CONFIGS = "Int8DynamicActivationInt8WeightConfig or Float8DynamicActivationFloat8WeightConfig"


@dataclass(frozen=True)
class Quantized:
    """A weight (N, K) that torchao quantized: data in the dtype of `format`, scale float32 (N, 1)."""

    format: str
    data: torch.Tensor
    scale: torch.Tensor


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters and buffers by the names that they have in the module, and whether a checkpoint holds them.

    Shared ones come once a name. Neither `state_dict` nor `named_parameters` is asked, because a class may override
    them: to save halves, or to leave its own level out of the names.
    """
    for path, part in nn.Module.named_modules(module, remove_duplicate=False):
        prefix = path + "." if path else ""
        for held, saved in ((part._parameters, None), (part._buffers, part._non_persistent_buffers_set)):
            for name, tensor in held.items():
                if tensor is not None:
                    yield prefix + name, tensor, saved is None or name not in saved


def is_torchao(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of one of torchao's classes."""
    return any(c.__module__.partition(".")[0] == "torchao" for c in type(tensor).__mro__)


def quantized(name: str, tensor: torch.Tensor) -> Quantized | None:
    """The parts of a state's tensor where torchao made it, else None. Raises UnsupportedError for what has no format.

    name: the tensor's, as in "blocks.0.attn.to_q.weight".
    """
    if not is_torchao(tensor):
        return None
    refusal = _refusal(tensor)
    if refusal is not None:
        raise UnsupportedError(
            f"torchao quantized {name!r} {refusal}, or leave the module out by quantize_'s filter_fn"
        )
    weight: Any = tensor  # an Int8Tensor or a Float8Tensor
    scale = weight.scale.detach().to(torch.float32).reshape(-1, 1)
    return Quantized(CLASSES[type(tensor).__name__], weight.qdata.detach(), scale.expand(tensor.shape[0], 1))


def _refusal(weight: Any) -> str | None:
    """How a weight is quantized that no format of ours holds, and what to do; None for one that can be taken."""
    kind = type(weight).__name__
    if kind not in CLASSES:
        return (
            f"as {kind}, which has no format here; quantize the model with {CONFIGS} (in torchao 0.17 with version=2)"
        )
    format, rows = CLASSES[kind], weight.shape[0]
    if weight.dim() != 2:
        return f"in {weight.dim()} dimensions, and only weights of linears are taken; quantize linears alone"
    if weight.qdata.dtype != FORMATS[format]:
        return f"to {weight.qdata.dtype}; quantize the model with weight_dtype={FORMATS[format]}"
    if weight.scale.numel() != 1 and tuple(weight.scale.shape) not in ((rows,), (rows, 1)):
        return f"in blocks of {list(weight.block_size)}; quantize the model with granularity=PerRow()"
    if format == "fp8" and not weight.scale.is_meta and not bool(weight.scale.all()):
        return f"to NaN, as it does rows of zeros in FP8; quantize the model with {CONFIGS.partition(' ')[0]}"
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None and not zero_point.is_meta and bool(zero_point.any()):
        return "with a zero point; quantize the model with MappingType.SYMMETRIC"
    for key in ("act_quant_scale", "act_pre_scale"):
        if getattr(weight, key, None) is not None:
            return f"for activations with fixed scales ({key}); quantize the model with {CONFIGS}"
    return _activation_refusal(weight.act_quant_kwargs, format)


def _activation_refusal(asked: Any, format: str) -> str | None:
    """The same for what a weight asks of activations. Scales per tensor or reduced ranges are refined, which is fine;
    with a weight that asks for nothing (weight-only) the engine decides.
    """
    if asked is None:
        return None
    if getattr(getattr(asked, "mapping_type", None), "name", "SYMMETRIC") != "SYMMETRIC":
        return "for asymmetric activations; quantize the model with act_mapping_type=MappingType.SYMMETRIC"
    if type(asked.granularity).__name__ not in ("PerRow", "PerToken", "PerTensor"):
        return f"for activations by {asked.granularity}; quantize the model with granularity=PerRow()"
    if getattr(asked, "float8_dtype", FORMATS[format]) != FORMATS[format]:
        return f"for activations in {asked.float8_dtype}; quantize the model with activation_dtype={FORMATS[format]}"
    if any(getattr(asked, key, None) is not None for key in ("hp_value_lb", "hp_value_ub")):
        return "for activations that are clamped; quantize the model without activation_value_lb and _ub"
    return None


class ModuleTensors:
    """A module's parameters and buffers as a `TensorSource`; a weight that torchao quantized is its data and its scale.

    device: where `get` puts the values; None: on the CPU.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._state: dict[str, torch.Tensor] = {}
        self._addresses: set[int] | None = None
        for name, tensor, saved in named_tensors(module):
            if saved:
                parts = quantized(name, tensor)
                self._state |= {name: tensor} if parts is None else {name + DATA: parts.data, name + SCALE: parts.scale}

    def keys(self) -> Iterable[str]:
        return self._state.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._state[name].shape), self._state[name].dtype

    def get(self, name: str) -> torch.Tensor:
        tensor = self._state[name].detach()
        if tensor.device.type == "meta":
            raise EngineError(
                f"the parameter {name!r} is on the meta device, so it has no values; load the weights first"
            )
        return tensor.to(self._device)

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory of the module: a later write to the module would change it, too."""
        if self._addresses is None:
            self._addresses = {t.untyped_storage().data_ptr() for t in self._state.values() if t.device.type == "cpu"}
        return tensor.untyped_storage().data_ptr() in self._addresses
