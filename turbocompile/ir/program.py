"""A Program: one model at one shape, as a shell graph, one graph per kind of repeated block, and calls between them.

In memory a graph is a `torch.fx.Graph` in which

* a `placeholder` is an activation,
* a `get_attr` is a weight; its target is the weight's local name, a key of `Subgraph.weights`,
* a `call_function` has an ATen or `turbocompile::` overload as target, or `call`,
* every node carries `meta["val"]`, a FakeTensor (or a tuple of them), and `meta["nn_module_stack"]` where it came from
a module.

`call(graph, prefix, phase, *args)` runs the named graph with the weights whose names start with `prefix`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from turbocompile.ir.weights import Constant, Expr, full_name, leaves

SHELL = "shell"


def call(graph: str, prefix: str, phase: str, *args: torch.Tensor) -> Any:
    """Marks a call of another graph in a shell. Nobody runs this function: backends run the named graph instead."""
    raise RuntimeError(f"turbocompile::call of {graph!r} at {prefix!r} was run as a function; run it through a backend")


@dataclass(frozen=True)
class Call:
    """One use of a block: `node` of the shell runs `graph` with the weights under `prefix`."""

    node: fx.Node
    graph: str
    prefix: str
    phase: str


@dataclass
class Subgraph:
    """A graph and the weights that it reads: local name -> expression over checkpoint tensors.

    A name in a `Load` leaf that starts with "." is relative to the prefix of the call.
    left: the reason why the graph stays as it was captured and no pass rewrites it; empty for a graph in normal form.
    """

    graph: fx.Graph
    weights: dict[str, Expr] = field(default_factory=dict)
    left: str = ""

    def inputs(self) -> list[fx.Node]:
        """The placeholders, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    def outputs(self) -> list[fx.Node]:
        """The nodes that the graph returns, in order."""
        return list(self.output().args[0])  # type: ignore[arg-type]

    def copy(self) -> Subgraph:
        """A copy with the same node names, so that nodes can be followed across a rewrite by their names."""
        return Subgraph(copy_graph(self.graph), dict(self.weights), self.left)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` whose nodes keep their names and share their (immutable by convention) meta values."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args = fx.map_arg(node.args, env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, env.__getitem__)
        made = new.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.name = node.name  # create_name may have added a suffix where a name looks numbered
        made.meta = copy.copy(node.meta)
        env[node] = made
    return new


@dataclass(frozen=True)
class Input:
    """One tensor of the call. path: where the bound arguments hold the tensor, as `hidden_states` or `kwargs.freqs.0`.

    cast: whether a tensor of another dtype is cast to `dtype` (timesteps); otherwise such a tensor is refused. number:
    whether the call passes a Python float there.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cast: bool = False
    number: bool = False


@dataclass(frozen=True)
class Signature:
    """How the model is called, as data.

    parameters: (name, kind, has_default, default) of `forward`, kind as in `inspect.Parameter.kind.name`; a default
        that is a tuple, list or dict is {"container": kind, "keys": [...], "items": [...]}, one that is no data
        {"container": "default", "keys": []}.
    inputs: the tensors, in the order of the shell's placeholders.
    guards: path -> plain value of every other argument, fixed at capture.
    output: a tree: {"kind": "tensor", "index": i} | {"kind": "none"} | {"kind": "value", "value": v}
        | {"kind": "tuple"|"list", "items": [...]} | {"kind": "dict", "keys": [...], "items": [...]}
        | {"kind": "class", "name": "module.Class", "keys": [...], "items": [...]}, and
        "named_tuple": True of one.
    return_dict: whether `forward` has that parameter and it selects the wrapper only.
    """

    parameters: tuple[tuple[str, str, bool, Any], ...]
    inputs: tuple[Input, ...]
    guards: dict[str, Any]
    output: dict[str, Any]
    return_dict: bool = False


@dataclass
class Program:
    """A model at one shape. `graphs[SHELL]` is the shell; `constants` holds the values of `Constant` leaves."""

    graphs: dict[str, Subgraph]
    signature: Signature
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    fake_mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @property
    def shell(self) -> Subgraph:
        return self.graphs[SHELL]

    def calls(self) -> list[Call]:
        """The calls of blocks, in the order in which they run."""
        found = []
        for node in self.shell.graph.nodes:
            if node.op == "call_function" and node.target is call:
                graph, prefix, phase = node.args[:3]
                found.append(Call(node, graph, prefix, phase))
        return found

    def count(self, graph: str) -> int:
        """How often a graph runs in one forward (the shell once)."""
        return 1 if graph == SHELL else sum(c.graph == graph for c in self.calls())

    def prefixes(self, graph: str) -> list[str]:
        """The weight prefixes under which a graph runs; the shell has the empty one."""
        return [""] if graph == SHELL else [c.prefix for c in self.calls() if c.graph == graph]

    def keys(self, graph: str, expr: Expr) -> list[str]:
        """The keys of `constants` that an expression of the graph reads: a relative key gives one key a call."""
        found = [leaf.key for leaf in leaves(expr) if isinstance(leaf, Constant)]
        return list(dict.fromkeys(full_name(key, prefix) for key in found for prefix in self.prefixes(graph) or [""]))

    def constants_read(self) -> set[str]:
        """The keys of `constants` that the graphs read."""
        weights = [(graph, expr) for graph, sub in self.graphs.items() for expr in sub.weights.values()]
        return {key for graph, expr in weights for key in self.keys(graph, expr)}

    def split(self, graph: str, names: Mapping[str, str]) -> None:
        """Points some calls of a graph to copies of the graph, which passes may then rewrite differently.

        names: the prefix of a call -> the name of the graph that the call runs from now on. Other calls do not change.
        """
        for made in dict.fromkeys(names.values()):
            if made != graph:
                self.graphs[made] = self.graphs[graph].copy()
        for use in self.calls():
            if use.graph == graph and use.prefix in names:
                use.node.args = (names[use.prefix], *use.node.args[1:])

    def copy(self) -> Program:
        """A copy that shares constants and fake tensors, with the same node names."""
        graphs = {name: sub.copy() for name, sub in self.graphs.items()}
        return Program(graphs, self.signature, dict(self.constants), self.fake_mode)


def drop_unread(sub: Subgraph) -> None:
    """Drops the weights that no node reads.

    A weight is dropped by its readers, not when one reader goes, because equal constants share a name.
    """
    read = {str(node.target) for node in sub.graph.nodes if node.op == "get_attr"}
    for name in [n for n in sub.weights if n not in read]:
        del sub.weights[name]


def val(node: fx.Node) -> Any:
    """The FakeTensor, or the tuple of them, that the node computes."""
    return node.meta["val"]


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def is_op(node: Any, *targets: Any) -> bool:
    """Whether node calls one of the targets: an overload, or any overload of a packet."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is t or packet is t for t in targets)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that made the node, as in `blocks.0.attn1.to_q`; "" for a node without a path.

    Capture rewrites the paths of a block's nodes to be relative to the block ("attn1.to_q").
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    for head in ("L['self'].", "L['self']"):
        path = path.removeprefix(head)
    return path


def infer(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """The result of `target` for the arguments, as FakeTensors of `mode`."""

    def unwrap(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, fx.Node) else a

    real_args = fx.node.map_aggregate(args, unwrap)
    real_kwargs = fx.node.map_aggregate(kwargs, unwrap)
    with mode:
        return target(*real_args, **real_kwargs)


def walk_tensors(value: Any) -> Iterator[FakeTensor]:
    """The tensors of a `meta["val"]`, in order."""
    if isinstance(value, torch.Tensor):
        yield value  # type: ignore[misc]
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from walk_tensors(item)
