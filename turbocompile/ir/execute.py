"""A Program as generated Python, which any machine runs: code over ATen's and turbocompile's operators.

The graph of a block is generated once and runs with the weights of each of its calls. The values that depend on
constants alone (RoPE tables) are computed once for a device, because they are the same in every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir.program import SHELL, Call, Program, Subgraph, call, walk_tensors
from turbocompile.ir.stored_names import stored_name
from turbocompile.ir.weights import Constant, Expr, is_relative

LAYER_BYTES = 1 << 20  # of a tensor that a layer computes from its constants and keeps: a table of 4096 x 64
Launcher = Callable[[fx.Node], Callable[..., Any] | None]
Around = Callable[[Call], "tuple[Callable[[], None], Callable[[], None]] | None"]
SOURCE = "source"  # in the meta of a node of generated code: the program's node that it comes from


class Runner:
    """Runs a Program: `runner(*tensors)` returns the output tensors, flat. Tensors are on the runner's device."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        launcher: Launcher = lambda node: None,
        around: Around = lambda call: None,
    ) -> None:
        """launcher: gives a node the function that runs in the place of its operator; None: the operator runs.

        around: gives a call of a block what runs before it and after it; None: nothing.
        """
        self.blocks = {
            name: _Compiled(sub, name, device, weights, launcher)
            for name, sub in program.graphs.items()
            if name != SHELL
        }
        calls = {c.node.name: self.blocks[c.graph].bound(c.prefix, weights, around(c)) for c in program.calls()}
        self.shell = _Compiled(program.shell, SHELL, device, weights, launcher, calls).bound("", weights)
        self.weights, self.bindings = weights, [*calls.values(), self.shell]

    def refresh(self, names: Collection[str]) -> None:
        """Computes anew, in place, what was folded from weights that were written to. names: their stored names."""
        for bound in self.bindings:
            bound.refresh(self.weights, names)

    def release(self) -> None:
        """Drops the weights; the runner cannot be called any more. Its code is a circle of references, which would hold
        the weights' memory until the garbage collector comes by."""
        for bound in self.bindings:
            bound.operands.clear()
        self.weights = {}

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), _supported():
            return self.shell.run(tensors)


@contextlib.contextmanager
def _supported() -> Iterator[None]:
    """Raises UnsupportedError for an operator that torch lacks for a device or a dtype, which shapes do not tell."""
    try:
        yield
    except NotImplementedError as error:
        reason = next(iter(str(error).splitlines()), "no reason given")[:200]
        raise UnsupportedError(
            f"torch cannot compute an operator of the engine here ({reason}); run it on another device, or build it "
            "again in another dtype"
        ) from error


class _Bound(nn.Module):
    """The generated code of a graph, with the weights of one call."""

    code: fx.GraphModule
    graph: _Compiled

    def __init__(
        self,
        graph: _Compiled,
        prefix: str,
        operands: Sequence[torch.Tensor],
        single: bool,
        around: tuple[Callable[[], None], Callable[[], None]] | None = None,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        object.__setattr__(self, "graph", graph)  # shared by all calls, so it is not a child of each
        object.__setattr__(self, "code", graph.code)
        self.operands = list(operands)
        self.single = single
        self.around = around

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self.code.forward(*self.operands, *tensors)

    def forward(self, *tensors: torch.Tensor) -> Any:
        if self.around is None:
            out = self.run(tensors)
        else:
            before, after = self.around
            before()
            out = self.run(tensors)
            after()
        return out[0] if self.single else out

    def refresh(self, weights: Mapping[str, torch.Tensor], names: Collection[str]) -> None:
        """As `Runner.refresh`."""
        if not self.graph.folds(names):
            return
        folded = self.operands[len(self.graph.locals) :]
        for kept, value in zip(folded, self.graph.folded_values(self.prefix, weights, anew=True), strict=True):
            if isinstance(kept, torch.Tensor) and value.data_ptr() != kept.data_ptr():  # a view follows the weight
                kept.copy_(value)


class _Compiled:
    """One graph as generated code. Its arguments are the weights, the folded constants, then the activations."""

    def __init__(
        self,
        sub: Subgraph,
        name: str,
        device: torch.device,
        weights: Mapping[str, torch.Tensor],
        launcher: Launcher,
        calls: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.sub, self.name = sub, name
        self.single = len(sub.outputs()) == 1
        self.device = device
        folded = self.folded = foldable(sub)
        self.of_layer = foldable_in_layer(sub, folded)
        gone = folded | self.of_layer
        self.values = _evaluate(sub, folded, _read_outside(folded), device, lambda n: self._weight(n, "", weights))
        self.locals, kept, self.kept_of_layer = (
            [n for n in sub.graph.nodes if n in some and any(u not in gone for u in n.users)]
            for some in ({n for n in sub.graph.nodes if n.op == "get_attr"}, folded, self.of_layer)
        )
        self.kept = kept
        self.constants = [self.values[n] for n in kept]
        root, graph = nn.Module(), fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate([*self.locals, *kept, *self.kept_of_layer]):
            env[node] = graph.placeholder(f"w{i}")
        for node in sub.graph.nodes:
            if node in env or node in gone or (node.op == "get_attr"):
                continue
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(dict(node.kwargs), env.__getitem__)
            if node.target is call and node.op == "call_function":
                root.add_module(node.name, (calls or {})[node.name])
                env[node] = graph.call_module(node.name, tuple(args[3:]))
            else:
                target = launcher(node) or node.target
                env[node] = graph.create_node(node.op, target, args, with_device(node, kwargs, device), name=node.name)
            env[node].meta[SOURCE] = node
        self.code = fx.GraphModule(root, graph)

    def _weight(self, node: fx.Node, prefix: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        local = str(node.target)
        key = stored_name(self.name, local, self.sub.weights[local], prefix)
        if key not in weights:
            raise EngineError(f"the engine lacks the weight {key!r}; it is damaged, build it again")
        return weights[key]

    def bound(
        self,
        prefix: str,
        weights: Mapping[str, torch.Tensor],
        around: tuple[Callable[[], None], Callable[[], None]] | None = None,
    ) -> _Bound:
        own = [self._weight(n, prefix, weights) for n in self.locals]
        return _Bound(self, prefix, [*own, *self.folded_values(prefix, weights)], self.single, around)

    def folded_values(self, prefix: str, weights: Mapping[str, torch.Tensor], anew: bool = False) -> list[Any]:
        """The folded constants of one call. anew: also those that all calls share, because weights were written to."""

        def weight(node: fx.Node) -> torch.Tensor:
            return self._weight(node, prefix, weights)

        values = self.values
        if anew:
            values = _evaluate(self.sub, self.folded, _read_outside(self.folded), self.device, weight)
        own = _evaluate(self.sub, self.of_layer, self.kept_of_layer, self.device, weight, values)
        return [*(values[n] for n in self.kept), *(own[n] for n in self.kept_of_layer)]

    def folds(self, names: Collection[str]) -> bool:
        """Whether a constant was folded from one of these stored weights."""
        read = {str(n.target) for node in self.folded for n in node.all_input_nodes if n.op == "get_attr"}
        return any(stored_name(self.name, n, self.sub.weights[n], "") in names for n in read)


def with_device(node: fx.Node, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The keyword arguments of a node; with the device, for an operator that makes a tensor of no other tensor."""
    overload = isinstance(node.target, torch._ops.OpOverload) and not node.all_input_nodes
    if overload and any(a.name == "device" for a in node.target._schema.arguments):  # type: ignore[union-attr]
        return {**kwargs, "device": device}
    return kwargs


def foldable(sub: Subgraph) -> set[fx.Node]:
    """The operations whose value is the same in every call, because they read only weights that all calls share.

    None in a graph that writes in place, because a folded tensor could be written to.
    """
    found: set[fx.Node] = set()
    for node in _pure(sub):
        if all(n in found or (n.op == "get_attr" and not is_relative(_expr(sub, n))) for n in node.all_input_nodes):
            found.add(node)
    return found


def foldable_in_layer(sub: Subgraph, folded: set[fx.Node]) -> set[fx.Node]:
    """The operations whose value is the same in every run of a layer: they read its constants and folded values alone.

    A value of more than LAYER_BYTES is computed anew in each run, because every layer would hold one.
    """
    found: set[fx.Node] = set()
    for node in _pure(sub):
        fixed = (
            n in found or n in folded or (n.op == "get_attr" and _is_fixed(_expr(sub, n))) for n in node.all_input_nodes
        )
        if node not in folded and all(fixed) and sum(t.nbytes for t in walk_tensors(node.meta["val"])) <= LAYER_BYTES:
            found.add(node)
    return found


def _expr(sub: Subgraph, node: fx.Node) -> Expr:
    return sub.weights[str(node.target)]


def _is_fixed(expr: Expr) -> bool:
    return isinstance(expr, Constant) or not is_relative(expr)


def _pure(sub: Subgraph) -> list[fx.Node]:
    """The operations that call no block and draw no random numbers; none in a graph that writes in place."""
    operations = [n for n in sub.graph.nodes if n.op == "call_function"]
    schemas = [n.target._schema for n in operations if isinstance(n.target, torch._ops.OpOverload)]
    if any(s.is_mutable for s in schemas):
        return []
    seeded = torch.Tag.nondeterministic_seeded
    return [n for n in operations if n.target is not call and seeded not in getattr(n.target, "tags", ())]


def _read_outside(nodes: set[fx.Node]) -> list[fx.Node]:
    """The nodes of the set that nodes outside it read."""
    return [n for n in nodes if any(u not in nodes for u in n.users)]


def _evaluate(
    sub: Subgraph,
    folded: set[fx.Node],
    kept: list[fx.Node],
    device: torch.device,
    weight: Callable[[fx.Node], torch.Tensor],
    known: Mapping[fx.Node, Any] = {},
) -> dict[fx.Node, Any]:
    """The values of the kept nodes, computed from weights and known values; other values are freed at the end."""
    env: dict[fx.Node, Any] = dict(known)
    with torch.no_grad(), _supported():
        for node in sub.graph.nodes:
            if node in folded:
                for n in node.all_input_nodes:
                    if n not in env:
                        env[n] = weight(n)
                args = fx.map_arg(node.args, env.__getitem__)
                kwargs = with_device(node, fx.map_arg(dict(node.kwargs), env.__getitem__), device)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {n: _own(env[n]) for n in kept}


def _own(value: Any) -> Any:
    """A copy of a small slice of a large table, so that the table is freed; any other value as it is."""
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 2 * value.nbytes:
        return value.clone()
    return value
