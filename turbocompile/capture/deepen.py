"""A Program of three equal layers becomes that of many: exporting a model takes time for each of its layers.

The first, the middle and the last call stay what they are, and the middle one is repeated. This is right where the
layers of the model differ in nothing but their weights, which whoever calls it must know; what the captured calls show
of it is looked at.
"""

from __future__ import annotations

from turbocompile.ir.program import SHELL, Call, Program
from turbocompile.ir.weights import Constant, Load, is_relative, leaves

CAPTURED = 3  # layers


def deepened(program: Program, path: str, layers: int) -> Program | None:
    """The Program of a model with `layers` layers, from the Program of the same model with three.

    path: of the list of layers, as in "blocks". The given Program is left as it was. None where the calls do not form a
    chain of one graph, in which each call reads the result of the call before it and shares the rest, or where a layer
    has constants of its own.
    """
    calls = program.calls()
    graphs = {c.graph for c in calls}
    if [c.prefix for c in calls] != [f"{path}.{i}." for i in range(CAPTURED)] or len(graphs) != 1:
        return None
    made = program.copy()
    if _owns_constants(made, graphs.pop()) or _reads_layers(made, path):
        return None
    first, middle, last = made.calls()
    chained = _chain(first, middle, last)
    if chained is None:
        return None
    before, end = middle.node, last.node
    for i in range(2, layers):
        args = tuple(before if at in chained else arg for at, arg in enumerate(middle.node.args))
        if i == layers - 1:
            node = end
        else:
            with made.shell.graph.inserting_after(before):
                node = made.shell.graph.create_node("call_function", middle.node.target)
            node.meta = dict(middle.node.meta)
        node.args = (args[0], f"{path}.{i}.", *args[2:])
        node.name = f"call_{path}_{i}".replace(".", "_")  # as capture names it
        before = node
    return made


def _chain(first: Call, middle: Call, last: Call) -> set[int] | None:
    """The places among a call's arguments where it reads the call before it; None where the calls form no chain."""
    chained: set[int] = set()
    for at, (one, two, three) in enumerate(zip(first.node.args, middle.node.args, last.node.args, strict=True)):
        if at < CAPTURED:  # graph, prefix, phase
            continue
        if two is first.node and three is middle.node:
            chained.add(at)
        elif not (one is two and two is three):
            return None
    read_by = [set(first.node.users), set(middle.node.users)]
    return chained if chained and read_by == [{middle.node}, {last.node}] else None


def _owns_constants(program: Program, graph: str) -> bool:
    """Whether a layer has values of its own that are in no checkpoint."""
    exprs = program.graphs[graph].weights.values()
    return any(isinstance(leaf, Constant) and is_relative(leaf) for expr in exprs for leaf in leaves(expr))


def _reads_layers(program: Program, path: str) -> bool:
    """Whether a weight outside the layers' relative names is a layer's."""
    return any(
        isinstance(leaf, Load) and leaf.name.startswith(f"{path}.")
        for sub in (program.graphs[SHELL], *program.graphs.values())
        for expr in sub.weights.values()
        for leaf in leaves(expr)
    )
