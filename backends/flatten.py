"""A Program as one module of plain ATen operators, for backends that take a whole graph.

The nodes of a block take the place of each call of it, ATen's operators take the place of turbocompile's, and a value
takes the place of the nodes that depend on constants alone (RoPE tables), once for all calls of a block.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from turbocompile.backends.plain_attention import attention
from turbocompile.kernels import DECOMPOSITIONS

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.execute import foldable
from turbocompile.ir.op_schema import argument_values
from turbocompile.ir.program import SHELL, Program, Subgraph, call, is_op, walk_tensors
from turbocompile.ir.stored_names import constant_name, stored_name
from turbocompile.ir.weights import Constant, full_name
from turbocompile.recipe.options import PassOptions
from turbocompile.rewrite.normalize import normalize
from turbocompile.rewrite.pipeline import load_pass
from turbocompile.rewrite.run_pass import run_pass

aten = torch.ops.aten

_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_QUANTIZED_INSIDE = (*SAGE, *SLA)  # their inputs and outputs are floating point


def _where_bool(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (condition & a) | (~condition & b)


def _where_int16(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a.int(), b.int()).to(torch.int16)


def _or(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(a).bool() | torch.as_tensor(b).bool()


# Operators in dtypes that torch has, and ONNX or onnxruntime lacks -> the same in operators that these have.
_INSTEAD: dict[Any, dict[torch.dtype, Any]] = {
    aten.where.self: {torch.bool: _where_bool, torch.int16: _where_int16},
    aten.add.Tensor: {torch.bool: _or},
}


@dataclass(frozen=True)
class Flat:
    """A Program as one module: `module(*tensors) -> tuple of tensors`.

    names: the module's buffers -> the names under which the engine stores them; tables that are computed here have
    names that start with "folded.". example: inputs with the Program's shapes and dtypes, of arbitrary values.
    """

    module: fx.GraphModule
    names: dict[str, str]
    example: tuple[torch.Tensor, ...]


def flatten(program: Program, weights: Mapping[str, torch.Tensor], backend: str) -> Flat:
    """The Program and its weights (stored name -> tensor) as one module on the CPU; the Program is left as it is.

    Raises UnsupportedError for an operator that computes in 8 bits, because plain operators would be slower than the
    model without it; EngineError where a weight is missing.
    """
    refuse_quantized(program, backend)
    plain = _plain(program, weights)
    flat = _Flattener(plain, weights)
    flat.inline(SHELL, "", [flat.graph.placeholder(n.name) for n in plain.shell.inputs()])
    module = fx.GraphModule(flat.root, flat.graph)
    example = tuple(torch.empty(i.shape, dtype=i.dtype) for i in program.signature.inputs)
    return Flat(module, flat.names, example)


def refuse_quantized(program: Program, backend: str) -> None:
    """Raises UnsupportedError, with the operator and the option to switch off, where a graph computes in 8 bits."""
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            if getattr(node.target, "namespace", "") != "turbocompile":
                continue
            name = node.target._opname
            attends = is_op(node, *_QUANTIZED_INSIDE)
            read = [node, *node.all_input_nodes]
            if attends or any(t.dtype in _EIGHT_BITS for n in read for t in walk_tensors(n.meta["val"])):
                off = "passes.attention: native" if attends else "passes.w8a8: off"
                raise UnsupportedError(
                    f"the {backend} backend holds standard floating-point operators alone, and the program uses "
                    f"turbocompile::{name}; set {off}, or use backend: triton"
                )


def _plain(program: Program, weights: Mapping[str, torch.Tensor]) -> Program:
    """A copy in normal form without turbocompile's operators, whose constants have their values."""
    plain = program.copy()
    for name, sub in plain.graphs.items():
        for node in sub.graph.nodes:
            if node.op == "call_function" and node.target in DECOMPOSITIONS:
                node.target = DECOMPOSITIONS[node.target]  # the normalization below traces through it
        for expr in sub.weights.values():
            for key in plain.keys(name, expr):
                if (stored := constant_name(key)) in weights:
                    plain.constants[key] = weights[stored].cpu()
    normalize(plain)
    # a norm that an operator's definition wrote out becomes one operator again
    run_pass(plain, load_pass("norms"), PassOptions(enabled=True))
    return plain


class _Flattener:
    """Copies graphs into one, each call with its own weights; all calls of a block share its tables."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor]) -> None:
        self.program, self.weights = program, weights
        self.graph, self.root = fx.Graph(), nn.Module()
        self.names: dict[str, str] = {}
        self.buffers: dict[str, fx.Node] = {}  # stored name -> the node that reads the buffer
        self.folded = {
            name: _fold(sub, lambda n, s=sub, g=name: self._weight(n, s, g, "")) for name, sub in program.graphs.items()
        }

    def inline(self, name: str, prefix: str, args: Sequence[fx.Node]) -> list[fx.Node]:
        """Copies the graph `name` for one call and returns its outputs. The shell's become the flat graph's outputs."""
        sub = self.program.graphs[name]
        kept, skip = self.folded[name]
        env: dict[fx.Node, Any] = dict(zip(sub.inputs(), args, strict=True))
        for node, value in kept.items():
            env[node] = self._table(f"folded.{name}.{node.name}", value)
        for node in sub.graph.nodes:
            if node in env or node in skip or node.op == "placeholder":
                continue
            if node.op == "get_attr":
                if any(u not in skip for u in node.users):
                    env[node] = self._buffer(*self._weight(node, sub, name, prefix))
            elif node.op == "output":
                outputs = fx.map_arg(list(node.args[0]), env.__getitem__)
            elif node.target is call:
                graph, inner, _, *given = node.args
                results = self.inline(graph, inner, [env[n] for n in given])
                env[node] = results if isinstance(node.meta["val"], (tuple, list)) else results[0]
            elif node.target is operator.getitem and isinstance(env[node.args[0]], list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                mapped = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                env[node] = self._operation(node, *mapped)
        if name == SHELL:
            self.graph.output(tuple(outputs))
        return outputs

    def _operation(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A node's copy. Where runtimes lack the operator in this form or dtype, the copy calls a function of plain
        operators, which the export traces through. Raises UnsupportedError for a dropout.
        """
        dtype = getattr(node.meta["val"], "dtype", None)
        target = node.target
        if target is aten.scaled_dot_product_attention.default:
            if argument_values(node)["dropout_p"]:
                raise UnsupportedError(
                    f"the attention {node.name!r} drops weights at random (dropout_p), which no ONNX file does; "
                    "call the model in eval mode with dropout_p=0.0, or use backend: triton"
                )
            target = attention
        elif dtype in _INSTEAD.get(target, {}):
            target = _INSTEAD[target][dtype]
        elif dtype == torch.float64 and isinstance(target, torch._ops.OpOverload):
            # The number becomes a buffer, because ONNX's exporter writes numbers in float32, whatever the dtype.
            args = tuple(
                self._buffer(f"folded.{a!r}", torch.tensor(a, dtype=dtype))
                if isinstance(a, float) and isinstance(given.type, torch.TensorType) else a
                for a, given in zip(args, target._schema.arguments, strict=False)
            )  # fmt: skip
        return self.graph.call_function(target, args, kwargs)

    def _weight(self, node: fx.Node, sub: Subgraph, graph: str, prefix: str) -> tuple[str, torch.Tensor]:
        """The stored name and the values of a weight. A constant of the normal form has a name of its own."""
        local = str(node.target)
        expr = sub.weights[local]
        key = stored_name(graph, local, expr, prefix)
        if key in self.weights:
            return key, self.weights[key].cpu()
        if isinstance(expr, Constant) and (own := full_name(expr.key, prefix)) in self.program.constants:
            return f"folded.{own}", self.program.constants[own]
        raise EngineError(f"the engine lacks the weight {key!r}; it is damaged, build it again")

    def _buffer(self, name: str, value: torch.Tensor) -> fx.Node:
        if name not in self.buffers:
            attribute = f"buffer_{len(self.buffers)}"
            self.root.register_buffer(attribute, value)
            self.names[attribute] = name
            self.buffers[name] = self.graph.get_attr(attribute)
        return self.buffers[name]

    def _table(self, name: str, value: torch.Tensor) -> fx.Node:
        """The node of a folded value. Of a broadcast the small tensor is held, and the graph broadcasts it."""
        small = value
        for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
            if size > 1 and stride == 0:
                small = small.narrow(dim, 0, 1)
        node = self._buffer(name, small.contiguous())
        return (
            node
            if small.shape == value.shape
            else self.graph.call_function(aten.expand.default, (node, list(value.shape)))
        )


def _fold(sub: Subgraph, weight: Any) -> tuple[dict[fx.Node, torch.Tensor], set[fx.Node]]:
    """The values of the nodes that depend on constants alone and that other nodes read, and all such nodes."""
    folded = foldable(sub)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in sub.graph.nodes:
            if node in folded:
                for n in node.all_input_nodes:
                    if n not in env:
                        env[n] = weight(n)[1]
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {n: env[n] for n in folded if any(u not in folded for u in n.users)}, folded
