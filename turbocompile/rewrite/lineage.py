"""What merged into what: the nodes before the passes that each node after the passes stands for.

While passes run, the facts of a node name the nodes before the passes whose work it does (`origins`) and the passes
that made it (`passes`). `graph_views` makes the data of it that an engine keeps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx

from turbocompile.ir.graph_view import CALL, INPUT, OUTPUT, GraphView, NodeView
from turbocompile.ir.node_cost import node_cost
from turbocompile.ir.node_text import tensor_text
from turbocompile.ir.op_schema import op_name
from turbocompile.ir.printer import code
from turbocompile.ir.program import SHELL, Program, call, module_path
from turbocompile.rewrite.facts import facts, hand_on, note

# --------------------------------------------------------------------------------------------------- while passes run


def begin(program: Program) -> None:
    """From here every node stands for itself, and no pass has made it."""
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            note(node, origins=frozenset([node.name]), passes=())


def absorb(into: fx.Node, node: fx.Node) -> None:
    """`into` takes over the work of `node`, which is about to go. A node that no pass made stays such a node."""
    gone, kept = facts(node), facts(into)
    if gone.origins or gone.passes:
        passes = _joined(gone.passes, kept.passes) if kept.passes else ()
        note(into, origins=kept.origins | gone.origins, passes=passes)


def follow(name: str, made: Sequence[fx.Node], pairs: Iterable[tuple[fx.Node, fx.Node]]) -> None:
    """Notes that the pass `name` made new nodes in the place of old nodes.

    made: the new nodes. pairs: (old, new) of equal values, before the old nodes go. A new node takes over the site, the
    reason and the linears of its old node, and the work of all nodes that the old node is computed by, down to the
    nodes that the new nodes read. Of the new nodes, the last one that computes something takes the work over, because
    the others prepare its inputs or look at its output.
    """
    new_ones = set(made)
    for node in made:
        note(node, passes=facts(node).passes or (name,))
    for old, new in pairs:
        hand_on(old, new)
        inside = _above(new, lambda n: n in new_ones)
        read = {n for m in inside for n in m.all_input_nodes}
        done = _above(old, lambda n, read=read: n not in read and n.op == "call_function" and n.target is not call)  # type: ignore[misc]
        views = _above(new, lambda n: n in new_ones and not any(node_cost(n)[0].values()))
        into = new if new not in views else next((n for n in inside if n not in views), new)
        for node in done:
            absorb(into, node)


def _above(node: fx.Node, within: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """`node` and the nodes that it is computed by, as far as they are `within`."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in found and within(top):
            found[top] = None
            stack += top.all_input_nodes
    return list(found)


def _joined(earlier: tuple[str, ...], later: tuple[str, ...]) -> tuple[str, ...]:
    """The names of both in the order in which the passes ran, each once."""
    return (*(name for name in earlier if name not in later), *later)


# --------------------------------------------------------------------------------------------------- after the passes


def graph_views(before: Program, after: Program) -> dict[str, GraphView]:
    """All graphs that run, the blocks' first. before: the normalized program, on whose copy the passes ran."""
    names = sorted((g for g in after.graphs if after.count(g)), key=lambda name: name == SHELL)
    found = {}
    for name in names:
        places: dict[str, int] = {}
        old = _views(before, name, places, {})
        found[name] = GraphView(after.count(name), old, _views(after, name, {}, places))
    return found


def _views(program: Program, graph: str, places: dict[str, int], before: Mapping[str, int]) -> tuple[NodeView, ...]:
    """The nodes that a reader wants to see; fills places: name -> place of each node.

    Weights stand in the code of what reads them. One output of several, and a call that continues a call of the same
    graph, are part of the node that they come from.
    """
    made: list[NodeView] = []
    runs: dict[int, list[str]] = {}  # the calls that are one node: graph and prefixes
    paths = iter([i.path for i in program.signature.inputs] if graph == SHELL else [])
    for node in program.graphs[graph].graph.nodes:
        if node.op == "get_attr":
            continue
        reads = tuple(sorted({places[n.name] for n in node.all_input_nodes if n.op != "get_attr"}))
        origins = tuple(sorted(before[o] for o in facts(node).origins if o in before))
        passes = facts(node).passes if before else ()
        if node.target is operator.getitem or (
            node.target is call and runs.get(max(reads, default=-1), [""])[0] == node.args[0]
        ):
            place = max(reads)
            one = made[place]
            reads = tuple(sorted({*one.reads, *reads} - {place}))
            origins = tuple(sorted({*one.origins, *origins}))
            made[place] = replace(one, reads=reads, origins=origins, passes=_joined(one.passes, passes))
        else:
            place = len(made)
            path = next(paths, "") if node.op == "placeholder" else module_path(node)
            work, moved = node_cost(node)
            texts = (node.name, _op(node), code(node), tensor_text(node.meta.get("val")), path)
            made.append(NodeView(*texts, sum(work.values()), moved, reads, origins, passes))
        if node.target is call:
            run = runs.setdefault(place, [str(node.args[0])])
            run.append(str(node.args[1]))
            made[place] = replace(made[place], code=f"{run[0]} x {len(run) - 1}: {run[1]} to {run[-1]}")
        places[node.name] = place
    return tuple(made)


def _op(node: fx.Node) -> str:
    if node.op != "call_function":
        return {"placeholder": INPUT, "output": OUTPUT}[node.op]
    return CALL if node.target is call else op_name(node)
