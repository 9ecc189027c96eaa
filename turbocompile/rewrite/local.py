"""The language of the normal form's rules.

A rule looks at one node and answers with nothing, with an existing node that has the same value, or with another call
(target, args) that gives the same value; then the node keeps its name. Most rules are a row, a pattern and what it
becomes, both in the matcher's language:

    row(lerp(x, y, b), x + (y - x) * b)
    row(op(aten.view.default)(x, ...), reshape(x, SIZES))

The pattern is matched exactly, with the casts that the graph has. In the replacement SIZES is the shape and DTYPE the
dtype of the node, and a function stands for what it computes of the variables that its arguments name (and of `node`).
A cast, reshape or expand that would change nothing is left out. The other rules are functions of a node (`local`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile.errors import TurbocompileError
from turbocompile.ir.program import dtype, infer, shape
from turbocompile.rewrite.facts import FACTS, PLACE
from turbocompile.rewrite.match import COMMUTATIVE, Bound, Op, Pattern, Var, matches, op

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types too widely to read them
Call = tuple[Any, tuple[Any, ...]]
Answer = Node | Call | None


@dataclass
class Maker:
    """Makes the helper nodes of rules, before the node `at` that a rule looks at."""

    graph: fx.Graph
    mode: FakeTensorMode
    at: Node = None

    def __call__(self, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.at):
            node = self.graph.create_node("call_function", target, args, name=target._opname.strip("_"))
        node.meta |= {key: self.at.meta[key] for key in (*PLACE, FACTS) if key in self.at.meta}
        node.meta["val"] = infer(target, node.args, {}, self.mode)
        return node

    def cast(self, node: Node, wanted: torch.dtype) -> Node:
        """node in the wanted dtype."""
        return node if dtype(node) == wanted else self(aten.to.dtype, node, wanted)


@dataclass(frozen=True)
class Local:
    """A rule for calls of the targets."""

    targets: tuple[Any, ...]
    apply: Callable[[Node, Maker], Answer]


@dataclass(frozen=True)
class Rules:
    """A named set of rules, in the order in which they are tried. Sets add up with `+`."""

    name: str
    rules: tuple[Local, ...]

    def __add__(self, other: Rules) -> Rules:
        return Rules(f"{self.name}, {other.name}", self.rules + other.rules)

    @cached_property
    def by_target(self) -> dict[Any, list[Callable[[Node, Maker], Answer]]]:
        """The rules of each overload, in order."""
        found: dict[Any, list[Callable[[Node, Maker], Answer]]] = {}
        for rule in self.rules:
            for target in rule.targets:
                found.setdefault(target, []).append(rule.apply)
        return found


def overloads(*targets: Any) -> tuple[Any, ...]:
    """The overloads of packets, and the overloads that are given."""
    each = ([getattr(t, name) for name in t.overloads()] if hasattr(t, "overloads") else [t] for t in targets)
    return tuple(overload for group in each for overload in group)


def local(*targets: Any) -> Callable[[Callable[[Node, Maker], Answer]], Local]:
    """Makes a rule of a function, for calls of the targets: overloads, or packets for all their overloads."""
    return lambda function: Local(overloads(*targets), function)


# --------------------------------------------------------------------------------------------------------------- rows

to = op(aten.to.dtype)
expand = op(aten.expand.default)


class _Of:
    """A property of the node that is replaced."""

    def __init__(self, name: str, read: Callable[[Node], Any]) -> None:
        self.name, self.read = name, read

    def __repr__(self) -> str:
        return self.name


SIZES = _Of("SIZES", lambda node: list(shape(node)))
DTYPE = _Of("DTYPE", dtype)


def row(pattern: Pattern, becomes: Any, where: Callable[..., bool] | None = None) -> Local:
    """The rule pattern -> becomes, at nodes where the condition `where` holds of the variables that it names.

    It answers nothing where the replacement is the node itself, or an existing node of another shape or dtype.
    """

    if not isinstance(pattern, Op):
        raise TurbocompileError(f"a row replaces a call, and {pattern} is none")
    first = _first_look(pattern)

    def apply(node: Node, make: Maker) -> Answer:
        if not first(node.args):
            return None
        for bound in matches(pattern, node, blind=False):
            if where is None or _called(where, bound, node):
                answer = _replacement(becomes, bound, node, make)
                if answer is not None:
                    return answer
        return None

    return Local((pattern.target,), apply)


def _first_look(pattern: Op) -> Callable[[tuple[Any, ...]], bool]:
    """Whether a call with these arguments may have the form of the pattern: a cheap test before the match.

    It asks that some argument at the place of each operand, or at either place of a commutative operator, has the type
    or the operator that the pattern wants there.
    """
    tests: list[tuple[tuple[int, ...], Any, tuple[type, ...]]] = []
    for i, part in enumerate(pattern.wanted):
        places = (0, 1) if pattern.target in COMMUTATIVE and i < 2 else (i,)
        if isinstance(part, Op):
            tests.append((places, part.target, ()))
        elif isinstance(part, Var) and part.of:
            tests.append((places, None, part.of))
        elif isinstance(part, (int, float)) and i < len(pattern.args):
            tests.append((places, None, (int, float)))

    def first(args: tuple[Any, ...]) -> bool:
        for places, target, types in tests:
            if places[-1] >= len(args):  # the argument is given by name, or has its default
                continue
            for i in places:
                value = args[i]
                if isinstance(value, types) if types else getattr(value, "target", None) is target:
                    break
            else:
                return False
        return True

    return first


def _called(function: Callable[..., Any], bound: Bound, node: Node) -> Any:
    code = function.__code__
    return function(*(node if name == "node" else bound[name] for name in code.co_varnames[: code.co_argcount]))


def _replacement(becomes: Any, bound: Bound, node: Node, make: Maker) -> Answer:
    if isinstance(becomes, Op):
        args = tuple(_built(a, bound, node, make) for a in becomes.args)
        if not _changes_nothing(becomes.target, args):
            same = node.target is becomes.target and not node.kwargs and _are_same(args, node.args)
            return None if same else (becomes.target, args)
        found = args[0]
    else:
        found = _built(becomes, bound, node, make)
    fits = found is not node and shape(found) == shape(node) and dtype(found) == dtype(node)
    return found if fits else None


def _built(part: Any, bound: Bound, node: Node, make: Maker) -> Any:
    """A part of a replacement, its nodes made."""
    if isinstance(part, Var):
        return bound[part.name]
    if isinstance(part, Op):
        args = tuple(_built(a, bound, node, make) for a in part.args)
        return args[0] if _changes_nothing(part.target, args) else make(part.target, *args)
    if isinstance(part, _Of):
        return part.read(node)
    if isinstance(part, list):
        return [_built(p, bound, node, make) for p in part]
    return _called(part, bound, node) if callable(part) else part


def _changes_nothing(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether the call is a cast to the dtype, or a reshape or expand to the shape, that its input has."""
    if target is aten.to.dtype:
        return dtype(args[0]) == args[1]
    return target in (aten.reshape.default, aten.expand.default) and list(shape(args[0])) == list(args[1])


def _are_same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same; 1, 1.0 and True are not."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_are_same, a, b))
    return type(a) is type(b) and not isinstance(a, fx.Node) and a == b


def rows(*groups: Iterable[Local] | Local) -> tuple[Local, ...]:
    """Rules and lists of rules as one tuple."""
    return tuple(rule for group in groups for rule in ([group] if isinstance(group, Local) else group))
