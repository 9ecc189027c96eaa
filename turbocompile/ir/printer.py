"""A Program as code that a person reads: one line a node, shapes behind it, blocks called in a loop.

The text is no Python program, but shows every operation of the graph. It is stable: nodes keep their names, so that a
pass changes the lines of the nodes that it rewrote and no other line.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from turbocompile.errors import TurbocompileError
from turbocompile.ir.node_text import SHORT, tensor_text
from turbocompile.ir.op_schema import schema_name
from turbocompile.ir.program import SHELL, Program, Subgraph, call, module_path
from turbocompile.ir.weights import (
    AddDiff,
    AddLora,
    Cast,
    Cat,
    Constant,
    Dequantize,
    Dora,
    Expr,
    Load,
    Mul,
    Permute,
    Quantize,
    Reshape,
    Slice,
    Zeros,
)

INDENT = "    "
_SIGNS = {
    "aten::add": "+",
    "aten::sub": "-",
    "aten::mul": "*",
    "aten::div": "/",
    "aten::matmul": "@",
    "aten::pow": "**",
}


def print_program(program: Program, graph: str | None = None) -> str:
    """All graphs of a program as Python-like text, the shell first; or the one named.

    Raises TurbocompileError where the program has no such graph.
    """
    if graph is not None and graph not in program.graphs:
        raise TurbocompileError(f"there is no graph {graph!r}; the program has {', '.join(program.graphs)}")
    names = [graph] if graph is not None else sorted(program.graphs, key=lambda name: name != SHELL)
    return "\n\n".join(_function(program, name) for name in names) + "\n"


def _function(program: Program, name: str) -> str:
    sub = program.graphs[name]
    # The shell's inputs are the model's, which have names of their own.
    paths = [f"{i.path}: " for i in program.signature.inputs] if name == SHELL else [""] * len(sub.inputs())
    parameters = [
        f"{INDENT}{n.name},  # {path}{tensor_text(n.meta['val'])}" for n, path in zip(sub.inputs(), paths, strict=True)
    ]
    lines = [f"def {_identifier(name)}(", f"{INDENT}self,", *parameters, "):"]
    if name != SHELL:
        lines.append(f'{INDENT}"""{_how_often(program.prefixes(name))}"""')
    lines += [INDENT + line for line in (*_weights(sub), *_body(sub))]
    return "\n".join(lines)


def _how_often(prefixes: Sequence[str]) -> str:
    """As in "30 calls: blocks.0 to blocks.29"."""
    if len(prefixes) < 2:
        return f"1 call: {prefixes[0].rstrip('.')}" if prefixes else "no call"
    return f"{len(prefixes)} calls: {prefixes[0].rstrip('.')} to {prefixes[-1].rstrip('.')}"


def _weights(sub: Subgraph) -> list[str]:
    """Lines for the weights that differ from the checkpoint's tensor of the same name."""
    lines = []
    for local in sorted({str(n.target) for n in sub.graph.nodes if n.op == "get_attr"}):
        expr = sub.weights[local]
        if not (isinstance(expr, Load) and expr.name.removeprefix(".") == local):
            lines.append(
                f"self.{local} = {expression(expr)}  # {_dims(expr.shape)} {SHORT.get(expr.dtype, expr.dtype)}"
            )
    return lines


def expression(expr: Expr) -> str:
    """A weight expression as text, as in `cat([.attn1.to_q.weight, .attn1.to_k.weight], 0)`."""

    def of(e: Expr) -> str:
        return expression(e)

    match expr:
        case Load():
            return expr.name
        case Constant():
            return f"constant({expr.key!r})"
        case Zeros():
            return f"zeros({list(expr.shape)})"
        case Reshape():
            return f"reshape({of(expr.of)}, {list(expr.shape)})"
        case Cast():
            return f"to({of(expr.of)}, {SHORT.get(expr.dtype, expr.dtype)})"
        case Permute():
            return f"permute({of(expr.of)}, {list(expr.dims)})"
        case Slice():
            return f"slice({of(expr.of)}, {expr.dim}, {expr.start}, {expr.stop})"
        case Cat():
            return f"cat([{', '.join(map(of, expr.of))}], {expr.dim})"
        case Mul():
            return f"{of(expr.of)} * {of(expr.by) if isinstance(expr.by, Expr) else expr.by}"
        case AddLora():
            return f"{of(expr.of)} + {expr.scale} * {of(expr.b)} @ {of(expr.a)}"
        case AddDiff():
            return f"{of(expr.of)} + {expr.scale} * {of(expr.diff)}"
        case Dora():
            return f"dora({of(expr.of)} + {expr.scale} * {of(expr.b)} @ {of(expr.a)}, {of(expr.magnitude)})"
        case Dequantize():
            return f"dequantize({of(expr.data)}, {of(expr.scale)}, {expr.format!r})"
        case Quantize():
            return f"quantize({of(expr.of)}, {expr.format!r}).{expr.part}"
    raise TurbocompileError(f"a weight is a {type(expr).__name__}, which is no weight expression")


def _body(sub: Subgraph) -> list[str]:
    lines: list[str] = []
    nodes = [n for n in sub.graph.nodes if n.op in ("call_function", "output")]
    i = 0
    while i < len(nodes):
        loop = _Loop.starting_at(nodes, i)
        if loop is not None:
            lines += [*map(_line, loop.aside), *loop.lines()]
            i += loop.length
        else:
            lines.append(_line(nodes[i]))
            i += 1
    return lines


def _line(node: fx.Node) -> str:
    return code(node) + ("" if node.op == "output" else _comment(node))


def code(node: fx.Node) -> str:
    """A node as one line of code; an input is its name alone."""
    if node.op == "output":
        return f"return {_value(tuple(node.args[0]))}"  # type: ignore[arg-type]
    return f"{node.name} = {_expression(node)}" if node.op == "call_function" else node.name


def _comment(node: fx.Node) -> str:
    """Shapes and dtypes, and the module that the node comes from."""
    text, path = tensor_text(node.meta.get("val")), module_path(node) if node.op == "call_function" else ""
    notes = [text, f"[{path}]" if path else ""]
    return "".join(("  # ", " ".join(n for n in notes if n))) if any(notes) else ""


def _expression(node: fx.Node) -> str:
    if node.target is call:
        graph, prefix, phase, *args = node.args
        return _call(str(graph), repr(prefix), str(phase), [_value(a) for a in args])
    if node.target is operator.getitem:
        return f"{_value(node.args[0])}[{_value(node.args[1])}]"
    name = schema_name(node)
    kwargs = {k: v for k, v in node.kwargs.items() if v is not None}
    if name in _SIGNS and len(node.args) == 2 and not kwargs:
        return f"{_value(node.args[0])} {_SIGNS[name]} {_value(node.args[1])}"
    if name == "aten::neg" and len(node.args) == 1:
        return f"-{_value(node.args[0])}"
    if name in ("aten::slice", "aten::select") and not kwargs:
        return f"{_value(node.args[0])}[{_index(node)}]"
    given = [*map(_value, node.args), *(f"{k}={_value(v)}" for k, v in kwargs.items())]
    return f"{name.replace('::', '.')}({', '.join(given)})"


def _index(node: fx.Node) -> str:
    """The index of a slice or select as Python writes it, as in ":, 0:21" or "..., 1::2"."""
    given: list[Any] = list(node.args)
    rank = given[0].meta["val"].dim()
    dim = int(given[1]) % rank if len(given) > 1 else 0
    where = given[2:]
    if schema_name(node) == "aten::select":
        text = _value(where[0])
    else:
        start, stop, step = where + [None, None, 1][len(where) :]
        text = f"{_value(start) if start else ''}:{'' if stop is None or stop == sys.maxsize else _value(stop)}"
        text += f":{_value(step)}" if step != 1 else ""
    return "".join([":, " * dim if dim < rank - 1 else "..., " if dim else "", text])


def _call(graph: str, prefix: str, phase: str, args: Sequence[str]) -> str:
    when = [f"phase={phase!r}"] if phase != "step" else []
    return f"{_identifier(graph)}({', '.join([prefix, *args, *when])})"


def _value(value: Any) -> str:
    """An argument: a node's name, a weight's, or a plain value."""
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, torch.dtype):
        return SHORT.get(value, str(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, (list, torch.Size)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    return repr(value) if isinstance(value, (int, float, complex, str, bool, type(None))) else str(value)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


class _Loop:
    """Calls of one graph, each fed by the one before, with prefixes that count up: `for i in range(30): ...`."""

    def __init__(self, calls: list[fx.Node], carried: dict[int, int | None], aside: list[fx.Node], length: int) -> None:
        self.calls = calls
        self.carried = carried  # position of an argument -> which output of the call before it is (None: the only one)
        self.aside = aside  # nodes between the calls that depend on none of them: they are printed before the loop
        self.length = length  # how many nodes the loop stands for

    @classmethod
    def starting_at(cls, nodes: Sequence[fx.Node], start: int) -> _Loop | None:
        """The longest loop that begins with nodes[start]; None where there is none of two calls."""
        first = nodes[start]
        if first.op != "call_function" or first.target is not call:
            return None
        calls, end = [first], start + 1
        carried: dict[int, int | None] = {}
        after = {first}  # nodes that depend on the calls so far
        aside: list[fx.Node] = []
        between: list[fx.Node] = []
        for i, node in enumerate(nodes[start + 1 :], start + 1):
            step = _carried(calls[-1], node) if node.target is call else None
            if step and (not carried or step == carried) and _only_feeds(calls[-1], node):
                calls, carried, end = [*calls, node], step, i + 1
                aside, between = aside + between, []
                after.add(node)
            elif node.target is operator.getitem and node.args[0] is calls[-1]:
                after.add(node)
            elif node.target is call or node.op == "output" or any(n in after for n in node.all_input_nodes):
                break
            else:
                between.append(node)
        return cls(calls, carried, aside, end - start) if carried else None

    def lines(self) -> list[str]:
        first, last = self.calls[0], self.calls[-1]
        graph, prefix, phase, *args = first.args
        single = None in self.carried.values()
        name = last.name
        if single:
            start = next(_value(args[position]) for position in self.carried)
        else:
            size = len(first.meta["val"])
            by_output = {output: position for position, output in self.carried.items()}
            items = [_value(args[by_output[k]]) if k in by_output else "None" for k in range(size)]
            start = f"({', '.join(items)}{',' if size == 1 else ''})"
        inside = [
            (name if self.carried[i] is None else f"{name}[{self.carried[i]}]") if i in self.carried else _value(a)
            for i, a in enumerate(args)
        ]
        head, number, tail = _numbered(str(prefix))  # type: ignore[misc]
        count = f"{number}, {number + len(self.calls)}" if number else f"{len(self.calls)}"
        text = _call(str(graph), f'f"{head}{{i}}{tail}"', str(phase), inside)
        return [
            f"{name} = {start}",
            f"for i in range({count}):",
            f"{INDENT}{name} = {text}{_comment(last)}",
        ]


def _numbered(prefix: str) -> tuple[str, int, str] | None:
    """ "blocks.3." -> ("blocks.", 3, "."): the last number in a prefix."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", prefix)
    return (found[1], int(found[2]), found[3]) if found else None


def _carried(one: fx.Node, two: fx.Node) -> dict[int, int | None] | None:
    """How call `two` continues call `one`: argument position -> output of `one`; None where `two` is no next turn."""
    a, b = _numbered(str(one.args[1])), _numbered(str(two.args[1]))
    if one.args[0] != two.args[0] or one.args[2] != two.args[2] or len(one.args) != len(two.args):
        return None
    if a is None or b is None or (a[0], a[1] + 1, a[2]) != b:
        return None
    found: dict[int, int | None] = {}
    for i, (mine, other) in enumerate(zip(one.args[3:], two.args[3:], strict=True)):
        if other is one:
            found[i] = None
        elif isinstance(other, fx.Node) and other.target is operator.getitem and other.args[0] is one:
            found[i] = int(other.args[1])  # type: ignore[arg-type]
        elif mine is not other:
            return None
    # One output that feeds two places would need two starting values.
    return found if len(set(found.values())) == len(found) else None


def _only_feeds(one: fx.Node, two: fx.Node) -> bool:
    """Whether call `two` is the only reader of the outputs of call `one`."""
    readers = [r for user in one.users for r in (user.users if user.target is operator.getitem else [user])]
    return all(r is two for r in readers)
