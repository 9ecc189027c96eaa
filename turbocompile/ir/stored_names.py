"""The names of what an engine stores: weights, constants, and the files (shards) that hold both.

A weight of a block is stored once a call, under the prefix of the call and its local name; one that is equal in all
calls is stored once. A constant is stored under its key, with a head that no checkpoint's tensor has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from turbocompile.ir.program import SHELL, Program
from turbocompile.ir.weights import Constant, Expr, Load, full_name, is_relative

SHARDS = "weights-*.safetensors"  # the shards of all modules of a folder


def shard_stem(module: str) -> str:
    """The name of a module's shards without their number, as in "weights-transformer"."""
    return SHARDS.partition("*")[0] + module


def constant_name(key: str) -> str:
    """The name under which the value of a `Constant` is stored. key: a key of `Program.constants`."""
    return f"constants.{key}"


def stored_name(graph: str, local: str, expr: Expr, prefix: str) -> str:
    """The name under which a weight is stored.

    graph: the name of the graph that reads the weight. local: the weight's key in `Subgraph.weights`. expr: the
    weight's expression. prefix: the prefix of the call; the shell has the empty one.
    """
    if isinstance(expr, Constant):
        return constant_name(full_name(expr.key, prefix))
    if graph == SHELL or is_relative(expr):
        return prefix + local
    return expr.name if isinstance(expr, Load) else f"shared.{graph}.{local}"


@dataclass(frozen=True)
class StoredWeight:
    """A weight that a call of a graph reads: its stored name, its expression, and the prefix of the call."""

    name: str
    expr: Expr
    prefix: str


def stored_weights(program: Program) -> Iterator[StoredWeight]:
    """Every weight that the nodes of the Program read, once a call; calls that share a weight give its name again."""
    for graph, sub in program.graphs.items():
        read = sorted({str(n.target) for n in sub.graph.nodes if n.op == "get_attr"})
        for prefix in program.prefixes(graph):
            for local in read:
                expr = sub.weights[local]
                yield StoredWeight(stored_name(graph, local, expr, prefix), expr, prefix)
