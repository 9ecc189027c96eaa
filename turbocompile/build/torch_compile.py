"""`torch.compile(model, backend="turbocompile")`.

Dynamo traces a model into a graph of torch-level calls, and gives it to `backend`. That graph is captured like any
module. Its parameters arrive as inputs; `Replay` turns them into buffers under their module paths, so that they become
weights, and the paths that Dynamo recorded on the nodes let capture find the repeated blocks.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback

from turbocompile.errors import CaptureError, UnsupportedError

MOST_SIZES = 8  # engines that are kept for one set of weights; Dynamo keeps as many graphs of a function
NAMED = "turbocompile_named"
_PART = re.compile(r"\.(\w+)|\[['\"]?(\w+)['\"]?\]")
Run = Callable[..., Any]
Sizes = tuple[tuple[int, int], ...]  # the place of each whole number among a graph's inputs, and the number


def backend(graph: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Run:
    """Compiles a graph that Dynamo traced, at its first call and again at calls with other sizes.

    options: `recipe`, `target` and `backend` as `turbocompile.optimize` takes them.

    Under regional compilation (`block.compile()`) Dynamo traces one block and calls the result with the parameters of
    every block of that kind; each set of parameters then gets an engine of its own. A graph that cannot be captured,
    because it writes into its inputs for example, runs uncompiled, with a RuntimeWarning that says why.

    Raises UnsupportedError where a parameter needs a gradient under autograd, because an engine is for inference.
    """
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    static = [i for i, n in enumerate(placeholders) if _is_static(n, inputs[i])]
    if torch.is_grad_enabled() and any(isinstance(inputs[i], torch.Tensor) and inputs[i].requires_grad for i in static):
        raise UnsupportedError(
            "torch.compile(backend='turbocompile') compiles for inference; "
            "call the model under torch.no_grad(), or model.requires_grad_(False)"
        )
    fixed = set(static)
    engines = Engines()

    def run(*given: Any) -> Any:
        from turbocompile.build.from_module import optimize

        tensors = [a for i, a in enumerate(given) if i not in fixed and isinstance(a, torch.Tensor)]
        if not tensors:  # the graph makes tensors out of nothing, so that there is no call to capture
            return graph(*given)
        sizes = {i: int(a) for i, a in enumerate(given) if not isinstance(a, torch.Tensor)}
        weights = [given[i] for i in static]

        def make() -> Run:
            return optimize(
                Replay(graph, dict(zip(static, weights, strict=True)), sizes, placeholders), **options or {}
            )

        engine = engines.of(weights, tuple(sizes.items()), make)
        if engine is graph:
            return graph(*given)
        try:
            return engine(*tensors)  # compiles at the first call
        except (CaptureError, UnsupportedError) as error:
            warnings.warn(f"a part of the model runs as it is, not compiled: {error}", RuntimeWarning, stacklevel=2)
            engines.replace(weights, tuple(sizes.items()), graph)
        return graph(*given)

    return run


class Engines:
    """The engines of one graph, by the weights and the sizes that it is called with.

    The engines of a set of weights go when one of these tensors is freed, or when it gets other data. A set of weights
    has the engines of the MOST_SIZES sizes that were used last, because each holds weights of its own.
    """

    def __init__(self) -> None:
        self._of_weights: dict[tuple[int, ...], _OfWeights] = {}
        self._lock = threading.RLock()

    def of(self, weights: Sequence[torch.Tensor], sizes: Sizes, make: Callable[[], Run]) -> Run:
        """The engine for weights and sizes, which `make` makes where there is none. Warns where another goes for it."""
        with self._lock:
            known = self._known(weights)
            if sizes not in known.engines:
                known.engines[sizes] = make()
                if len(known.engines) > MOST_SIZES:
                    known.engines.popitem(last=False)
                    warnings.warn(
                        f"torch.compile(backend='turbocompile') keeps {MOST_SIZES} sizes of a part of the model, and "
                        "it was called with more; the one used longest ago is compiled anew when it comes again",
                        RuntimeWarning,
                        stacklevel=4,
                    )
            known.engines.move_to_end(sizes)
            return known.engines[sizes]

    def replace(self, weights: Sequence[torch.Tensor], sizes: Sizes, engine: Run) -> None:
        """Puts another callable in the place of an engine."""
        with self._lock:
            self._known(weights).engines[sizes] = engine

    def _known(self, weights: Sequence[torch.Tensor]) -> _OfWeights:
        """The entry of a set of weights, new where there is none or where a tensor has other data than before."""
        key, addresses = tuple(map(id, weights)), [*map(_address, weights)]
        known = self._of_weights.get(key)
        if known is None or known.addresses != addresses:
            known = self._of_weights[key] = _OfWeights(weights, addresses, lambda _: self._of_weights.pop(key, None))
        return known


class _OfWeights:
    """The engines of one set of weights, by sizes, the one used longest ago first.

    freed: called when one of the weights is freed, before another tensor can get its identity.
    """

    def __init__(self, weights: Sequence[torch.Tensor], addresses: list[int], freed: Callable[[Any], Any]) -> None:
        self.addresses = addresses
        self.engines: OrderedDict[Sizes, Run] = OrderedDict()
        self._references = [weakref.ref(weight, freed) for weight in weights]


def _address(weight: torch.Tensor) -> int:
    """The address of a tensor's data; 0 of a tensor that consists of several, as torchao's do."""
    return weight.data_ptr() if type(weight) in (torch.Tensor, nn.Parameter, nn.Buffer) else 0


def _is_static(node: fx.Node, value: Any) -> bool:
    """Whether a placeholder is a parameter or buffer, which stays the same tensor from call to call."""
    if not isinstance(value, torch.Tensor):
        return False
    from torch._dynamo.utils import get_static_address_type

    example = node.meta.get("example_value", value)
    return isinstance(value, nn.Parameter) or get_static_address_type(example) is not None


def module_name(source: str) -> str:
    """The module path in one of Dynamo's sources, whose first part is a variable.

    `L['self']._modules['blocks']._modules['0']._parameters['w']` -> `blocks.0.w`
    """
    parts = [a or b for a, b in _PART.findall(source)]
    return ".".join(p for p in parts[1:] if p not in ("__dict__", "_modules", "_parameters", "_buffers"))


class Replay(nn.Module):
    """Dynamo's graph as a module: parameters are buffers with their names, tensors are arguments, sizes are fixed."""

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
        graph.meta[NAMED] = True  # because several modules replay one graph, and a path is rewritten once
        self.names: dict[int, str] = {}
        self.sizes = dict(sizes)
        self.count = len(placeholders)
        for i, value in weights.items():
            self.names[i] = _source_name(placeholders[i])
            *path, leaf = self.names[i].split(".")
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
            if i in self.names:
                arguments.append(self.get_buffer(self.names[i]))
            else:
                arguments.append(self.sizes[i] if i in self.sizes else next(rest))
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(self.graph_module).run(*arguments)


def _source_name(node: fx.Node) -> str:
    """The parameter's path in the model; the node's name where Dynamo found the parameter in no module."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return module_name(name() if callable(name) else str(name)) or node.name
