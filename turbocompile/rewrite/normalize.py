"""Brings every way of writing a computation to one form before any pass looks, and cleans up after each pass.

Each graph is traced again by itself: functional (a write into a slice becomes `slice_scatter`), composite operations
taken apart by torch.export's decomposition table except those in KEEP, and then the local rules of `simplify`.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from turbocompile.errors import TurbocompileError, brief
from turbocompile.ir.program import Program, Subgraph, call, infer, is_op, walk_tensors
from turbocompile.ir.weights import Constant
from turbocompile.rewrite import simplify
from turbocompile.rewrite.facts import PLACE

aten = torch.ops.aten

# Operations that stay whole, because patterns and backends read them.
KEEP = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.scaled_dot_product_attention.default,
    aten.gelu.default,
    aten.silu.default,
    aten.softmax.int,
    aten.matmul.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv3d.padding,
)

# Operations that export leaves whole, and that the normal form takes apart.
_MORE = (aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training)


def normalize(program: Program) -> dict[str, str]:
    """Brings all graphs of a captured program to normal form, in place; weights keep their names.

    Equal to the captured program up to rounding: a quotient may move by one unit in the last place of the type that it
    is computed in, reductions written out by one rounding each. A graph that has no normal form stays as it was
    captured; returns the names of such graphs -> why.
    """
    captured = program.copy()
    left: dict[str, str] = {}
    for name in list(program.graphs):
        try:
            _normalize(name, program)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of an operator's decomposition or of a rule: the captured graph is right
            left[name] = f"it has no normal form ({brief(error)})"
    leave(program, captured, left)
    return left


def _normalize(graph: str, program: Program) -> None:
    sub = program.graphs[graph]
    _retrace(sub, program.fake_mode)
    clean(sub, program.fake_mode)
    _real_constants(graph, program)
    clean(sub, program.fake_mode)
    sub.graph = _renamed(sub.graph, program.fake_mode)


def leave(program: Program, captured: Program, left: Mapping[str, str]) -> None:
    """Puts captured graphs back into a program, where no pass rewrites them. left: name of such a graph -> why."""
    for name, reason in left.items():
        program.graphs[name] = captured.graphs[name].copy()
        program.graphs[name].left = reason
    read = program.constants_read()
    known = {**captured.constants, **program.constants}
    program.constants.clear()
    program.constants.update({key: value for key, value in known.items() if key in read})


def clean(sub: Subgraph, mode: FakeTensorMode) -> dict[str, str]:
    """Applies the local rules, merges equal nodes, drops dead ones; returns replaced name -> its replacement."""
    moved: dict[str, str] = {}
    simplify.simplify(sub.graph, mode, moved)
    for node in reversed(list(sub.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            sub.graph.erase_node(node)
    read = {str(n.target) for n in sub.graph.nodes if n.op == "get_attr"}
    for name in set(sub.weights) - read:
        del sub.weights[name]
    return moved


# -------------------------------------------------------------------------------------------------------- the retrace


_LIBRARY = torch.library.Library("turbocompile_keep", "DEF")


def _opaque(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """A twin of a composite operation that functionalization does not take apart; it lives during the retrace only."""
    name = f"{target._opname}_{target._overloadname}"
    _LIBRARY.define(f"{name}({str(target._schema).split('(', 1)[1]}")
    _LIBRARY.impl(name, lambda *args, **kwargs: target(*args, **kwargs), "CompositeExplicitAutograd")
    return getattr(torch.ops.turbocompile_keep, name).default


_HIDDEN = {target: _opaque(target) for target in KEEP}
_SHOWN = {hidden: target for target, hidden in _HIDDEN.items()}


def _table() -> dict[Any, Callable[..., Any]]:
    """torch.export's decompositions, without the operators that are kept and those that the local rules know."""
    return _table_of(len(torch._C._dispatch_get_all_op_names()))


@functools.lru_cache(maxsize=1)
def _table_of(operators: int) -> dict[Any, Callable[..., Any]]:
    """The table while so many operators are registered; torch takes 0.08 seconds to look all of them through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = dict(torch.export.default_decompositions().items()) | get_decompositions(_MORE)
    stay = {*KEEP, *simplify.RULES, aten.empty_like.default, aten.full_like.default, aten.slice_scatter.default}
    return {target: function for target, function in table.items() if target not in stay}


def _retrace(sub: Subgraph, mode: FakeTensorMode) -> None:
    """Replaces the graph by its functional, decomposed trace.

    Calls of blocks are boundaries: their arguments are outputs of the trace, and their results are inputs.
    """
    old = sub.graph
    given = [n for n in old.nodes if n.op in ("placeholder", "get_attr") or n.target is call]
    fakes = [_fake(t, mode) for n in given for t in walk_tensors(n.meta["val"])]

    def run(*flat: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(flat)
        env: dict[fx.Node, Any] = {n: fx.node.map_aggregate(n.meta["val"], lambda _: next(rest)) for n in given}
        read: list[torch.Tensor] = []
        for node in old.nodes:
            if node.op != "call_function":
                continue
            with traceback.set_current_meta(node):
                if node.target is call:  # a copy: the tensor may be written to after the call
                    read += [env[n].clone() for n in node.args[3:]]
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = _HIDDEN.get(node.target, node.target)(*args, **kwargs)
        return [env[n] for n in sub.outputs()] + read

    def trace(function: Callable[..., Any]) -> fx.GraphModule:
        functional = torch.func.functionalize(function, remove="mutations")
        return make_fx(functional, decomposition_table=_table(), tracing_mode="real")(*fakes)

    with mode, traceback.preserve_node_meta(), torch.no_grad():
        traced = trace(run)
        if _writes(traced.graph):  # what a composite operation makes and fills itself comes out as it is written there
            traced = trace(fx.Interpreter(traced).run)
    if left := _writes(traced.graph):
        raise TurbocompileError(f"the normal form would hold {left[0].target}, which writes into a tensor; report it")
    sub.graph = _rebuild(traced.graph, sub, given)


def _writes(graph: fx.Graph) -> list[fx.Node]:
    """The operations that write into a tensor, but for the copies into inputs that end a functional trace."""
    return [
        n
        for n in graph.nodes
        if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable and not _writes_back(n)
    ]


def _writes_back(node: fx.Node) -> bool:
    return is_op(node, aten.copy_.default) and node.args[0].op == "placeholder" and not node.users  # type: ignore[union-attr]


def _fake(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _rebuild(traced: fx.Graph, sub: Subgraph, given: list[fx.Node]) -> fx.Graph:
    """The traced graph with the inputs, weights and calls of the old one, under their old names."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    flat = iter([n for n in traced.nodes if n.op == "placeholder"])
    gives = {n: [next(flat) for _ in walk_tensors(n.meta["val"])] for n in given}
    results = list(next(n for n in reversed(traced.nodes) if n.op == "output").args[0])
    reads = iter(results[len(sub.outputs()) :])
    calls = {n: [next(reads) for _ in n.args[3:]] for n in given if n.target is call}
    waiting = list(calls)

    def emit_calls() -> None:
        """Emits the calls whose arguments are there, in their order: each stands as early as possible."""
        while waiting and all(n in env for n in calls[waiting[0]]):
            node = waiting.pop(0)
            _emit_call(new, node, [env[n] for n in calls[node]], gives[node], env)

    for op in ("placeholder", "get_attr"):
        for node in given:
            if node.op == op:
                made = env[gives[node][0]] = new.create_node(op, node.target, name=node.name)
                made.meta = {**node.meta, "val": gives[node][0].meta["val"]}
    emit_calls()
    for node in traced.nodes:
        if node.op == "call_function" and not _writes_back(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
            made = env[node] = new.call_function(_SHOWN.get(node.target, node.target), args, kwargs)
            made.meta = {k: node.meta[k] for k in ("val", *PLACE) if k in node.meta}
            emit_calls()
        elif node.op == "get_attr":
            raise TurbocompileError(f"the normal form would hold the value of {node.target!r}, which is no weight")
    new.output(tuple(env[n] for n in results[: len(sub.outputs())]))
    return new


def _emit_call(
    graph: fx.Graph, old: fx.Node, args: list[fx.Node], gives: list[fx.Node], env: dict[fx.Node, fx.Node]
) -> None:
    made = graph.create_node("call_function", call, (*old.args[:3], *args), name=old.name)
    made.meta = dict(old.meta)
    if isinstance(old.meta["val"], torch.Tensor):
        env[gives[0]] = made
        return
    for i, place in enumerate(gives):
        env[place] = graph.call_function(operator.getitem, (made, i))
        env[place].meta = {"val": place.meta["val"]}


# ------------------------------------------------------------------------------------------------- complex constants


def _real_constants(graph: str, program: Program) -> None:
    """A complex constant that is read as pairs becomes a constant of pairs, so that no complex number is stored."""
    sub = program.graphs[graph]
    for node in list(sub.graph.nodes):
        if not is_op(node, aten.view_as_real.default) or node.args[0].op != "get_attr":
            continue
        name = str(node.args[0].target)
        expr = sub.weights[name]
        if isinstance(expr, Constant):
            for key in program.keys(graph, expr):
                value = program.constants[key].resolve_conj()
                program.constants[key + ".pairs"] = torch.view_as_real(value).contiguous()
            pairs = node.meta["val"]
            sub.weights[name + ".pairs"] = Constant(expr.key + ".pairs", tuple(pairs.shape), pairs.dtype)
            with sub.graph.inserting_before(node):
                made = sub.graph.create_node("get_attr", name + ".pairs")
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)


def _renamed(old: fx.Graph, mode: FakeTensorMode) -> fx.Graph:
    """The graph with nodes named by their operators, and with the strides that the rules' layout changes give."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        operation = isinstance(node.target, torch._ops.OpOverload)
        name = node.target._opname.strip("_") if operation else node.name
        made = env[node] = new.create_node(node.op, node.target, args, kwargs, name=name)
        made.meta = node.meta
        if operation:
            made.meta["val"] = infer(made.target, made.args, made.kwargs, mode)
    return new
