"""What the rewrites know of a node beyond its value: one frozen record a node, in the node's meta.

A copy of a graph shares the records of its nodes. A rewrite hands the record of the old node on to the new node
(`lineage.follow`), and a rule of the normal form gives it to all nodes that it makes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

FACTS = "facts"  # the key in a node's meta
PLACE = ("nn_module_stack", "stack_trace")  # keys of torch.export: the module and the source line that made a node


@dataclass(frozen=True)
class Facts:
    """The facts of a node.

    site: the name of the attention that the node computes, as in "blocks:attn1"; empty for other nodes.
    reason: why that attention has the form that it has. linears: how many linears of the model a linear stands for.
    origins: the names of the nodes before the passes whose work the node does. passes: the passes that made the node,
    the last one last; empty for a node of the normal form.
    """

    site: str = ""
    reason: str = ""
    linears: int = 1
    origins: frozenset[str] = frozenset()
    passes: tuple[str, ...] = ()


NOTHING = Facts()


def facts(node: fx.Node) -> Facts:
    """The facts of a node; of a node without a record, the record that says nothing."""
    return node.meta.get(FACTS, NOTHING)


def note(node: fx.Node, **changes: Any) -> fx.Node:
    """Replaces fields of a node's record, and returns the node."""
    node.meta[FACTS] = replace(facts(node), **changes)
    return node


def give_place(node: fx.Node, like: fx.Node) -> None:
    """Gives a new node the place in the model, module and source line, of another node."""
    node.meta |= {key: like.meta[key] for key in PLACE if key in like.meta}


def hand_on(old: fx.Node, new: fx.Node) -> None:
    """Gives the node that replaces `old` its site, reason and linears, where the new node has none of its own."""
    was, now = facts(old), facts(new)
    if (was.site or was.linears > 1) and not now.site and now.linears == 1:
        note(new, site=was.site, reason=was.reason, linears=was.linears)


def decided(node: fx.Node, site: str, reason: str) -> fx.Node:
    """Notes on an attention node that a pass made at a site why the pass chose this form; returns the node."""
    return note(node, site=site, reason=reason)
