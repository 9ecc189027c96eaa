"""Reads a Program from JSON data that anyone may have written.

Nothing in the data is trusted: operators, names, kinds of arguments and sizes are checked, and the shapes are computed
anew with fake tensors and must equal the recorded ones.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile.errors import EngineError
from turbocompile.ir import reading
from turbocompile.ir.allowed_ops import ALLOWED, MEMORY_FORMATS, parse_dtype
from turbocompile.ir.check_ops import check_arguments, fix_dtype, infer_checked, is_tensor, specs
from turbocompile.ir.deserialize_signature import check_output, read_signature
from turbocompile.ir.deserialize_weights import expr_from_json
from turbocompile.ir.program import SHELL, Program, Subgraph, call
from turbocompile.ir.reading import Unreadable, entry, items, one_of, plain, table, text, whole
from turbocompile.ir.serialize import VERSION
from turbocompile.ir.sizes import check_size, read_shape

MAX_NODES = 200_000
DEFAULT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def from_json(data: Any) -> Program:
    """The Program that `to_json` wrote, checked. Raises EngineError, in one sentence, for any other data."""
    try:
        with _quiet():
            return _program(table(data, "the program"))
    except (Unreadable, RecursionError, OverflowError) as error:
        raise EngineError(f"the program is not readable ({error}); build it again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's log of operators that refuse their arguments, because the error says so in one sentence."""
    log = logging.getLogger(fake_tensor.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _program(data: dict[str, Any]) -> Program:
    version = entry(data, "version", "the program")
    if type(version) is not int or version != VERSION:
        raise EngineError(
            f"the program has format {reading.shown(version)}, and this version reads {VERSION}; rebuild it"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = Program({}, read_signature(entry(data, "signature", "the program")), fake_mode=mode)
    graphs = table(entry(data, "graphs", "the program"), "the graphs")
    if SHELL not in graphs:
        raise EngineError("the program has no shell graph; the engine is damaged, build it again")
    for name in [*(g for g in graphs if g != SHELL), SHELL]:
        program.graphs[name] = _Reader(program, name).read(graphs[name])
    program.graphs = {SHELL: program.graphs[SHELL], **{k: v for k, v in program.graphs.items() if k != SHELL}}
    check_output(program.signature.output, len(program.shell.outputs()))
    return program


class _Reader:
    """Reads one graph of a program node by node; the shapes of a node are computed before the next node is read."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.where = f"the graph {name[:60]!r}"
        self.env: dict[str, fx.Node] = {}
        self.inputs = iter(program.signature.inputs if name == SHELL else ())

    def read(self, value: Any) -> Subgraph:
        data = table(value, self.where)
        nodes = items(entry(data, "nodes", self.where), f"the nodes of {self.where}")
        if len(nodes) > MAX_NODES:
            raise EngineError(f"{self.where} has {len(nodes)} nodes, more than {MAX_NODES}; build it again")
        exprs = table(entry(data, "weights", self.where), f"the weights of {self.where}")
        self.sub = Subgraph(fx.Graph(), {name: expr_from_json(expr) for name, expr in exprs.items()})
        for one in nodes[:-1]:
            self._node(table(one, "a node"))
        self._output(nodes[-1] if nodes else None)
        if next(self.inputs, None) is not None:
            raise EngineError(f"{self.where} takes fewer tensors than the signature has; build the engine again")
        return self.sub

    def _output(self, value: Any) -> None:
        """Reads the last node, the output: a list of tensors."""
        if not isinstance(value, dict) or value.get("op") != "output":
            raise EngineError(f"{self.where} has no output; the engine is damaged, build it again")
        args = _arg(items(entry(value, "args", "the output"), "the output"), self.env)
        if len(args) != 1 or not isinstance(args[0], list) or not all(map(is_tensor, args[0])):
            raise Unreadable(f"the output of {self.where} is no list of tensors")
        self.sub.graph.output(tuple(args[0]))

    def _node(self, data: dict[str, Any]) -> None:
        op, label = entry(data, "op", "a node"), entry(data, "name", "a node")
        if not _is_label(label) or label in self.env:
            raise EngineError(f"{self.where} has a node named {str(label)[:40]!r}; build the engine again")
        if op not in ("placeholder", "get_attr", "call_function"):
            raise EngineError(f"{self.where} has a node of kind {str(op)[:40]!r}; build the engine again")
        recorded = self._recorded(data, label)
        node = getattr(self, f"_{op}")(data, label, recorded)
        node.name = label
        if op == "placeholder" and self.name == SHELL:
            recorded = [(self.expected.shape, self.expected.dtype)]
        self._compare(node, recorded)
        if "module" in data:
            place = reading.texts(data["module"], "the module of a node")
            if len(place) != 2:
                raise Unreadable(f"the module of the node {label!r} is no path and kind")
            node.meta["nn_module_stack"] = {"module": (place[0], place[1])}
        self.env[label] = node

    def _recorded(self, data: dict[str, Any], label: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
        found = []
        for value in items(entry(data, "val", f"the node {label!r}"), "val"):
            if len(items(value, "val")) != 2:
                raise Unreadable(f"the node {label!r} has a value that is no shape and dtype")
            shape, dtype = read_shape(value[0]), parse_dtype(value[1])
            check_size(shape, dtype, self.where)
            found.append((shape, dtype))
        return found

    def _placeholder(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        if len(recorded) != 1:
            raise Unreadable(f"the input {label!r} is {len(recorded)} tensors, and should be one")
        if self.name == SHELL:
            expected = next(self.inputs, None)
            if expected is None:
                raise EngineError(f"{self.where} takes more tensors than the signature has; build the engine again")
            self.expected = expected
        node = self.sub.graph.create_node("placeholder", label, name=label)
        node.meta["val"] = _fake(self.program, *recorded[0])
        return node

    def _get_attr(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        target = one_of(entry(data, "target", f"the node {label!r}"), "a weight that a node reads", self.sub.weights)
        expr = self.sub.weights[target]
        node = self.sub.graph.create_node("get_attr", target, name=label)
        node.meta["val"] = _fake(self.program, expr.shape, expr.dtype)
        return node

    def _call_function(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        target = entry(data, "target", f"the node {label!r}")
        if not isinstance(target, str) or target not in ALLOWED:
            raise EngineError(
                f"the engine calls {str(target)[:60]!r}, which is not an operator that an engine may hold"
            )
        args = tuple(_arg(items(data.get("args", []), "the arguments"), self.env))
        named = table(data.get("kwargs", {}), "the named arguments")
        kwargs = {k: _arg(v, self.env) for k, v in named.items()}
        op = ALLOWED[target]
        if isinstance(op, torch._ops.OpOverload):
            check_arguments(op, args, kwargs, f"the node {label!r} of {self.where}")
            fix_dtype(op, args, kwargs, recorded)
        elif kwargs:
            raise Unreadable(f"the node {label!r} names arguments that {target!r} does not have")
        node = self.sub.graph.create_node("call_function", op, args, kwargs, name=label)
        if op is call:
            if self.name != SHELL or hasattr(nn.Module, label):
                raise EngineError(f"{self.where} has a call {label!r} where none can be; build the engine again")
            node.meta["val"] = _call_value(node, self.program)
        elif op is operator.getitem:
            node.meta["val"] = _item(args, label)
        else:
            node.meta["val"] = infer_checked(node, self.program, self.where, label)
        return node

    def _compare(self, node: fx.Node, recorded: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        found = specs(node.meta["val"])
        if found == recorded:
            return
        fitting = _fitting_default(node, self.program, recorded)
        if fitting is not None:
            raise EngineError(
                f"the engine was built while torch's default dtype was {fitting}, and it is "
                f"{torch.get_default_dtype()} now: the node {node.name!r} of {self.where} gives {found[0][1]}; call "
                f"torch.set_default_dtype({fitting}) before the engine is loaded, or build it again"
            )
        raise EngineError(
            f"the node {node.name!r} of {self.where} gives {str(found)[:200]}, and the engine records "
            f"{str(recorded)[:200]}; the engine is damaged, build it again"
        )


def _is_label(label: Any) -> bool:
    """Whether a text can be the name of a variable in generated code."""
    return isinstance(label, str) and len(label) < 1000 and label.isascii() and label.isidentifier()


def _fake(program: Program, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    with program.fake_mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


def _arg(value: Any, env: Mapping[str, fx.Node]) -> Any:
    """The argument that `_arg_json` wrote. Raises Unreadable or EngineError for any other data."""
    if isinstance(value, list):
        return [_arg(v, env) for v in value]
    if not isinstance(value, dict) or set(value) == {"float"}:
        return plain(value, "an argument")
    if len(value) != 1:
        raise Unreadable(f"an argument is {reading.shown(value)}, which is none")
    ((kind, item),) = value.items()
    if kind == "node":
        if not isinstance(item, str) or item not in env:
            raise Unreadable(f"an argument is the node {reading.shown(item)}, which does not come before it")
        return env[item]
    if kind == "dtype":
        return parse_dtype(item)
    if kind == "memory_format":
        return MEMORY_FORMATS[one_of(item, "a memory format", MEMORY_FORMATS)]
    if kind == "layout" and item == "torch.strided":
        return torch.strided
    if kind == "complex" and len(items(item, "a complex number")) == 2:
        return complex(*(reading.number(v, "a part of a complex number") for v in item))
    raise EngineError(f"the engine has an argument of an unknown kind {str(kind)[:40]!r}; build it again")


def _item(args: tuple[Any, ...], label: str) -> Any:
    """The value of `getitem`: one result of an operator that has several."""
    of = args[0].meta["val"] if args and isinstance(args[0], fx.Node) else None
    if len(args) != 2 or not isinstance(of, (tuple, list)):
        raise Unreadable(f"the node {label!r} takes an item of what has none")
    return of[whole(args[1], f"the item that the node {label!r} takes", 0, len(of) - 1)]


def _call_value(node: fx.Node, program: Program) -> Any:
    """The value of a call: the outputs of the graph that the call names.

    Raises EngineError where the call's arguments are no inputs of that graph.
    """
    if len(node.args) < 3:
        raise Unreadable(f"the call {node.name!r} names no graph, prefix and phase")
    graph, prefix, phase, *args = node.args
    if not isinstance(graph, str) or graph not in program.graphs:
        raise EngineError(f"the call {node.name!r} names a graph {str(graph)[:40]!r} that is not there; build it again")
    text(prefix, f"the prefix of the call {node.name!r}")
    one_of(phase, f"the phase of the call {node.name!r}", ("prompt", "step"))
    if not all(map(is_tensor, args)):
        raise Unreadable(f"the call {node.name!r} gives the graph {graph!r} something else than tensors")
    sub = program.graphs[graph]
    given = [spec for a in args for spec in specs(a.meta["val"])]  # type: ignore[union-attr]
    wanted = [spec for n in sub.inputs() for spec in specs(n.meta["val"])]
    if given != wanted:
        raise EngineError(
            f"the call {node.name!r} gives {str(given)[:200]} to the graph {graph!r}, which takes {str(wanted)[:200]}"
        )
    values = tuple(n.meta["val"] for n in sub.outputs())
    return values[0] if len(values) == 1 else values


def _fitting_default(node: fx.Node, program: Program, recorded: Any) -> torch.dtype | None:
    """The default dtype under which a node has its recorded value; None where no default dtype helps."""
    before = torch.get_default_dtype()
    try:
        for dtype in DEFAULT_DTYPES if isinstance(node.target, torch._ops.OpOverload) else ():
            torch.set_default_dtype(dtype)
            if specs(infer_checked(node, program, "", "")) == recorded:
                return dtype
    except EngineError:
        return None
    finally:
        torch.set_default_dtype(before)
    return None
