"""The configurations that an engine chose for its kernels reach their launchers as arguments.

In the code that is generated for an engine, a node whose kernel has a choice calls a launcher with that configuration
instead of the operator, which launches its default. So two engines in a process run the kernels that each of them
chose.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from turbocompile.backends import Tuning
from turbocompile.kernels import ops
from turbocompile.kernels.attention import norm_attention, sage_attention, sla_attention
from turbocompile.kernels.linear import w8a8_linear

from turbocompile.errors import EngineError
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.op_schema import argument_values
from turbocompile.ir.program import is_op

LINEARS, ATTENTIONS = "linears", "attentions"

LAUNCH: dict[Any, Callable[..., Any]] = {
    ops.w8a8_linear: w8a8_linear.on_cuda,
    ops.sage_attention: sage_attention.on_cuda,
    ops.norm_sage_attention: norm_attention.sage_on_cuda,
    ops.sla_attention: sla_attention.on_cuda,
    ops.norm_sla_attention: norm_attention.sla_on_cuda,
}


@dataclass(frozen=True)
class LinearSize:
    """The size of a w8a8_linear: data (rows, k) in the format, weight (n, k), result (rows, n) in dtype."""

    format: str
    rows: int
    n: int
    k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionSize:
    """The part of a quantized attention that its configuration depends on: the format of the weights' product with V,
    and the rows of Q and of K that share a scale.
    """

    pv: str
    block_q: int
    block_k: int


def linear_size(node: fx.Node) -> LinearSize | None:
    """The size of a node that is a w8a8_linear; None of another node."""
    if not is_op(node, ops.w8a8_linear):
        return None
    a = argument_values(node)
    n, k = a["weight"].shape
    return LinearSize(a["format"], a["data"].shape[:-1].numel(), n, k, node.meta["val"].dtype)


def attention_size(node: fx.Node) -> AttentionSize | None:
    """The size of a node that is a quantized attention; None of another node."""
    if is_op(node, *SAGE):
        from turbocompile.kernels.attention.attend_triton import SAGE_BLOCKS  # here: a machine may lack Triton

        return AttentionSize(argument_values(node)["pv"], *SAGE_BLOCKS)
    if is_op(node, *SLA) and argument_values(node)["pv"] != "none":
        a = argument_values(node)
        return AttentionSize(a["pv"], a["block_q"], a["block_k"])
    return None


def card_name(device: torch.device) -> str:
    """The name of the card, with which the names of its choices begin; "cpu" of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def launchers(tuning: Tuning, device: torch.device) -> Callable[[fx.Node], Callable[..., Any] | None]:
    """A function that gives a node of a Program its launcher on `device`; None of a node without a choice.

    A launcher takes the arguments of the node's operator. Raises EngineError where the tuning chose a configuration for
    this card that the kernel does not declare.
    """
    if importlib.util.find_spec("triton") is None:  # no kernel runs without Triton
        return lambda node: None
    card = f"{card_name(device)}: "
    mine = {kind: {name: f for name, f in choices.items() if name.startswith(card)} for kind, choices in tuning.items()}
    linears, attentions = mine.get(LINEARS, {}), mine.get(ATTENTIONS, {})
    configs: dict[str, Any] = {}
    try:
        if linears:
            from turbocompile.kernels.linear import linear_choice

            configs |= {name: linear_choice.declared(name, fields) for name, fields in linears.items()}
        if attentions:
            from turbocompile.kernels.attention import attend_triton

            configs |= {name: attend_triton.declared(name, fields) for name, fields in attentions.items()}
    except ValueError as error:
        raise EngineError(f"the engine's tuning.json: {error}; tune or build the engine again") from error

    @functools.cache  # nodes with one operator and one configuration share a launcher
    def launcher(operator: torch._ops.OpOverload, config: Any) -> Callable[..., Any]:
        on_cuda = LAUNCH[operator.overloadpacket]
        names = [argument.name for argument in operator._schema.arguments]

        def launch(*args: Any, **kwargs: Any) -> Any:
            return on_cuda(*args, *(kwargs[name] for name in names[len(args) :]), config=config)

        return launch

    def of_node(node: fx.Node) -> Callable[..., Any] | None:
        name = _choice(node, device) if configs else None
        return launcher(node.target, configs[name]) if name in configs else None

    return of_node


def _choice(node: fx.Node, device: torch.device) -> str | None:
    """The name of the choice that a node's kernel is launched by; None of a node whose kernel has no choice."""
    if (linear := linear_size(node)) is not None:
        from turbocompile.kernels.linear import linear_choice

        return linear_choice.key(linear.format, linear.rows, linear.n, linear.k, linear.dtype, device)
    if (attention := attention_size(node)) is not None:
        from turbocompile.kernels.attention import attend_triton

        return attend_triton.choice_key(device, attention.pv, attention.block_k, attention.block_q)
    return None
