"""Applies the rules of the normal form to a graph until none has an answer, and merges equal nodes.

The rules (turbocompile/rewrite/rules) leave casts as `to.dtype`; layout as `permute`, `reshape`, `expand`, `slice`
(step 1), `cat` and `stack`; arithmetic as `add`, `mul`, `neg` and `pow`; reductions with their dimensions kept.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile.errors import TurbocompileError
from turbocompile.ir.program import infer, is_op
from turbocompile.rewrite import lineage
from turbocompile.rewrite.local import Maker, Node
from turbocompile.rewrite.rules import NORMAL_FORM

aten = torch.ops.aten
RULES = NORMAL_FORM.by_target
ROUNDS = 20  # a fixpoint is reached in three or four; more means that two rules undo each other


def simplify(graph: fx.Graph, mode: FakeTensorMode, moved: dict[str, str]) -> None:
    """Applies the rules until none has an answer. moved: name of each replaced node -> name of what replaced it."""
    make = Maker(graph, mode)
    for _ in range(ROUNDS):
        changed = False
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function" or node.target not in RULES:
                continue
            if not node.users:
                graph.erase_node(node)
                continue
            changed |= _simplify_node(node, make, moved)
        changed |= merge_equal(graph, moved)
        if not changed:
            return
    raise TurbocompileError("the normal form's rules do not come to an end on this graph; please report it")


def _simplify_node(node: Node, make: Maker, moved: dict[str, str]) -> bool:
    changed = False
    for _ in range(ROUNDS):
        make.at = node
        for rule in RULES.get(node.target, ()):
            answer = rule(node, make)
            if answer is not None:
                break
        else:
            return changed
        changed = True
        if isinstance(answer, fx.Node):
            _check(node, answer.target, answer.meta["val"])
            node.replace_all_uses_with(answer)
            lineage.absorb(answer, node)
            moved[node.name] = answer.name
            make.graph.erase_node(node)
            return True
        target, args = answer
        value = infer(target, args, {}, make.mode)
        _check(node, target, value)
        node.target, node.args, node.kwargs = target, args, {}
        node.meta["val"] = value
    raise TurbocompileError(f"the normal form's rules do not come to an end at {node.name} ({node.target})")


def _check(node: Node, target: Any, new: Any) -> None:
    old = node.meta["val"]
    if tuple(old.shape) != tuple(new.shape) or old.dtype != new.dtype:
        raise TurbocompileError(
            f"the normal form of {node.name} ({node.target}) would be {target} of {new.dtype} {tuple(new.shape)} "
            f"instead of {old.dtype} {tuple(old.shape)}"
        )


def merge_equal(graph: fx.Graph, moved: dict[str, str]) -> bool:
    """Common subexpressions: the later of two equal nodes becomes the earlier one."""
    seen: dict[Any, Node] = {}
    changed = False
    for node in list(graph.nodes):
        pure = (
            node.op == "get_attr" or isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        )
        if node.op not in ("call_function", "get_attr") or not pure or _random(node):
            continue
        args = node.args
        if (
            is_op(node, aten.add.Tensor, aten.mul.Tensor)
            and len(args) == 2
            and all(isinstance(a, fx.Node) for a in args)
        ):
            args = tuple(sorted(args, key=lambda a: a.name))
        key = (node.op, node.target, frozen(args), frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            lineage.absorb(first, node)
            moved[node.name] = first.name
            graph.erase_node(node)
            changed = True
    return changed


def _random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def frozen(value: Any) -> Any:
    """A hashable form of arguments in which 1, 1.0, True and 0.0, -0.0 differ."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple([frozen(v) for v in value])
    if isinstance(value, dict):
        return tuple((k, frozen(v)) for k, v in sorted(value.items()))
    return type(value), repr(value)
