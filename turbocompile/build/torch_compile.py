"""`torch.compile(model, backend="turbocompile")`.

Dynamo's torch-level graph is captured again like any module: its parameters, which arrive as inputs, become weights by
their module paths, and the paths recorded on its nodes let the repeated blocks be found.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from turbocompile.errors import CaptureError, UnsupportedError

NAMED = "turbocompile_named"
_PART = re.compile(r"\.(\w+)|\[['\"]?(\w+)['\"]?\]")


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compiles a graph that Dynamo captured. options: `recipe`, `target` and `backend` as `turbocompile.optimize` takes
    them.

    Dynamo calls the graph of a block with the parameters of every block of its kind, where it met the blocks one by one
    (regional compilation): each set of parameters gets an engine. What cannot be captured, as a part that writes into
    what it is given, runs as it is, with a warning that says why.

    Raises UnsupportedError under autograd: an engine is for inference.
    """
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    static = [i for i, n in enumerate(placeholders) if _is_static(n, inputs[i])]
    if torch.is_grad_enabled() and any(isinstance(inputs[i], torch.Tensor) and inputs[i].requires_grad for i in static):
        raise UnsupportedError(
            "torch.compile(backend='turbocompile') compiles for inference; "
            "call the model under torch.no_grad(), or model.requires_grad_(False)"
        )
    fixed = set(static)
    compiled: dict[tuple[Any, ...], _Made] = {}

    def run(*given: Any) -> Any:
        from turbocompile.build.from_module import optimize

        tensors = [a for i, a in enumerate(given) if i not in fixed and isinstance(a, torch.Tensor)]
        if not tensors:  # it makes tensors and nothing else
            return graph(*given)
        sizes = {i: int(a) for i, a in enumerate(given) if not isinstance(a, torch.Tensor)}
        weights = [given[i] for i in static]
        key, places = (*sizes.items(), *map(id, weights)), [*map(_place, weights)]
        made = compiled.get(key)
        if made is None or made.places != places:
            replay = Replay(graph, dict(zip(static, weights, strict=True)), sizes, placeholders)
            made = compiled[key] = _Made(optimize(replay, **dict(options or {})), weights, places)
        if made.engine is not None:
            try:
                return made.engine(*tensors)  # its first call of a shape compiles
            except (CaptureError, UnsupportedError) as error:
                warnings.warn(f"a part of the model runs as it is, not compiled: {error}", RuntimeWarning, stacklevel=2)
                made.engine = None
        return graph(*given)

    return run


@dataclass
class _Made:
    """What computes a graph with some weights; engine None: the graph itself. The weights are kept, so that no other
    tensor takes the identity of one; `places` tells them from themselves with other data.
    """

    engine: Callable[..., Any] | None
    weights: list[torch.Tensor]
    places: list[int]


def _place(weight: torch.Tensor) -> int:
    """The address of its data; 0 for one of several parts, as torchao's are."""
    return weight.data_ptr() if type(weight) in (torch.Tensor, nn.Parameter, nn.Buffer) else 0


def _is_static(node: fx.Node, value: Any) -> bool:
    """Whether a placeholder is a parameter or buffer, which stays the same tensor from call to call."""
    if not isinstance(value, torch.Tensor):
        return False
    from torch._dynamo.utils import get_static_address_type

    example = node.meta.get("example_value", value)
    return isinstance(value, nn.Parameter) or get_static_address_type(example) is not None


def module_name(source: str) -> str:
    """`L['self']._modules['blocks']._modules['0']._parameters['w']` -> `blocks.0.w`; the first part is a variable."""
    parts = [a or b for a, b in _PART.findall(source)]
    return ".".join(p for p in parts[1:] if p not in ("__dict__", "_modules", "_parameters", "_buffers"))


class Replay(nn.Module):
    """Dynamo's graph as a module: its parameters by name, its tensors as arguments, its sizes fixed."""

    graph_module: fx.GraphModule

    def __init__(
        self,
        graph: fx.GraphModule,
        weights: Mapping[int, Any],
        sizes: Mapping[int, int],
        placeholders: Sequence[fx.Node],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "graph_module", graph)
        for node in graph.graph.nodes if not graph.meta.get(NAMED) else ():
            stack = node.meta.get("nn_module_stack") or {}
            named = {k: (f"model.{module_name(path)}", kind) for k, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = named
        graph.meta[NAMED] = True  # several modules replay one graph
        self.places: dict[int, str] = {}
        self.sizes = dict(sizes)
        self.count = len(placeholders)
        for i, value in weights.items():
            self.places[i] = _source_name(placeholders[i])
            *path, leaf = self.places[i].split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            # A buffer over the same memory: the model's own parameter is not touched, and any dtype is allowed.
            module.register_buffer(leaf, value.detach())

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        arguments: list[Any] = []
        for i in range(self.count):
            if i in self.places:
                arguments.append(self.get_buffer(self.places[i]))
            else:
                arguments.append(self.sizes[i] if i in self.sizes else next(rest))
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(self.graph_module).run(*arguments)


def _source_name(node: fx.Node) -> str:
    """The parameter's path in the model, from where Dynamo found it; the node's name where that is no module's."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return module_name(name() if callable(name) else str(name)) or node.name
