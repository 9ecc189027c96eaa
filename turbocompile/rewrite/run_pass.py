"""Runs one pass over all graphs of a Program: finds its sites, rewrites them, cleans up, and says why others stayed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from turbocompile.errors import RecipeError, TurbocompileError, UnsupportedError, brief
from turbocompile.ir.program import Program, Subgraph, module_path
from turbocompile.rewrite import lineage
from turbocompile.rewrite.match import Match, Outcome, Pass, Rule, is_cast
from turbocompile.rewrite.normalize import clean
from turbocompile.rewrite.results import PassResult, Rewrite

aten = torch.ops.aten


class PassFailed(TurbocompileError):
    """A pass raised an error. sites: the sites that it was at; reason: the error in a few words."""

    def __init__(self, name: str, sites: Sequence[str], error: BaseException) -> None:
        self.sites = tuple(sites)
        self.reason = str(error) if isinstance(error, TurbocompileError) else f"the pass failed here: {brief(error)}"
        super().__init__(f"pass {name!r} failed at {', '.join(sites)}: {self.reason}")


# Errors that are no fault of a pass at a site: the user asks for the impossible, or the machine is too small.
NOT_OF_A_SITE = (RecipeError, UnsupportedError, torch.OutOfMemoryError, MemoryError)


def run_pass(program: Program, pass_: Pass, options: Any, veto: Mapping[str, str] | None = None) -> PassResult:
    """Runs one pass over all graphs, in place, but for the graphs that are built as they were captured.

    options: of this pass. veto: sites to leave alone -> why; the site `everywhere(graph)` is the whole
    graph. Raises PassFailed where the pass raises an error; the program is then half rewritten.
    """
    started = time.perf_counter()
    veto = veto or {}
    done = Sites()
    raw: dict[str, tuple[Subgraph, list[Rewrite]]] = {}
    rewrites: list[Rewrite] = []
    for graph, sub in program.graphs.items():
        if sub.left:
            continue
        if everywhere(graph) in veto:
            done.skipped.append((everywhere(graph), veto[everywhere(graph)], program.count(graph)))
            continue
        found = run_on_graph(program, graph, pass_, options, veto)
        done.rewritten += found.rewritten
        done.skipped += found.skipped
        if found.rewrites:
            raw[graph] = (sub.copy(), found.rewrites)
            with _failing(pass_, [r.site for r in found.rewrites]):
                moved = clean(sub, program.fake_mode)
            rewrites += [_followed(r, moved, sub.graph) for r in found.rewrites]
    return PassResult(
        pass_.name, pass_.kind_of(options), done.count, done.rewritten, tuple(done.skipped), tuple(rewrites),
        time.perf_counter() - started, raw,
    )  # fmt: skip


def everywhere(graph: str) -> str:
    """The name of all sites of a graph together, for a pass that fails before it is at one of them."""
    return f"{graph}:*"


@contextlib.contextmanager
def _failing(pass_: Pass, sites: Sequence[str]) -> Iterator[None]:
    """Turns an error into a PassFailed that names the pass and its sites."""
    try:
        yield
    except (PassFailed, *NOT_OF_A_SITE):
        raise
    except Exception as error:
        raise PassFailed(pass_.name, sites, error) from error


@dataclass
class Sites:
    """The sites of a pass: how many it rewrote, those it skipped as (site, reason, count), and its rewrites."""

    rewritten: int = 0
    skipped: list[tuple[str, str, int]] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.rewritten + sum(count for _, _, count in self.skipped)


def run_on_graph(program: Program, graph: str, pass_: Pass, options: Any, veto: Mapping[str, str]) -> Sites:
    """Rewrites the sites of a pass in one graph, without clean-up. Raises PassFailed."""
    sub, calls = program.graphs[graph], program.count(graph)
    names = _Names(graph)
    found = Sites()
    done: set[str] = set()
    refused: dict[str, tuple[list[str], int]] = {}
    for rule in pass_.rules:
        with _failing(pass_, [everywhere(graph)]):
            roots = list(rule.candidates(sub))
        for root in roots:
            if root._erased:  # an earlier rewrite of this pass replaced it
                continue
            site = names.of(root)
            if site in done:
                continue
            count = rule.count(root) * calls
            with _failing(pass_, [site]):
                match, outcome = _attempt(program, graph, site, root, rule, options, veto)
                if isinstance(outcome, str):
                    _undo(match, sub.graph)
                    reasons, _ = refused.setdefault(site, ([], count))
                    reasons += [outcome] if outcome not in reasons else []
                    continue
                done.add(site)
                refused.pop(site, None)
                found.rewrites.append(_carry_out(match, outcome, pass_.name))
            found.rewritten += count
    if found.rewrites:
        with _failing(pass_, [r.site for r in found.rewrites]):
            sort(sub.graph)
    found.skipped = [(site, "; ".join(reasons), count) for site, (reasons, count) in refused.items()]
    return found


def _carry_out(match: Match, outcome: fx.Node | dict[fx.Node, fx.Node], name: str) -> Rewrite:
    """Puts the new nodes in the place of the old nodes, and erases these with the nodes that they alone read."""
    replaced = outcome if isinstance(outcome, dict) else {match.root: outcome}
    lineage.follow(name, match.made, replaced.items())
    rewrite = Rewrite(match.graph, match.site, tuple(_replace(match, replaced)))
    _erase_dead(match.sub.graph, [match.root, *replaced])
    return rewrite


class _Names:
    """Names sites by module path: `block:attn1`, `block:attn1#2`. The same graph gives the same names at any shape."""

    def __init__(self, graph: str) -> None:
        self.graph = graph
        self.names: dict[str, str] = {}
        self.seen: dict[str, int] = {}

    def of(self, node: fx.Node) -> str:
        if node.name not in self.names:
            path = module_path(node)
            k = self.seen[path] = self.seen.get(path, 0) + 1
            self.names[node.name] = f"{self.graph}:{path}" + (f"#{k}" if k > 1 else "")
        return self.names[node.name]


def _attempt(
    program: Program,
    graph: str,
    site: str,
    root: fx.Node,
    rule: Rule,
    options: Any,
    veto: Mapping[str, str],
) -> tuple[Match, Outcome]:
    made: list[fx.Node] = []  # shared by the attempts at one site, so that `_undo` finds the nodes of refused ones

    def make(bound: dict[str, Any]) -> Match:
        return Match(root, graph, site, program, options, bound, made)

    if not options.enabled:
        return make({}), "switched off in the recipe (enabled: false)"
    if site in veto:
        return make({}), veto[site]
    return rule.apply(make, root)


def _undo(match: Match, graph: fx.Graph) -> None:
    """Erases the nodes and weights that a rule made before it refused."""
    for node in reversed(match.made):
        if not node.users:
            if node.op == "get_attr":
                match.sub.weights.pop(str(node.target), None)
            graph.erase_node(node)


def _replace(match: Match, replaced: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[str, str]]:
    """Has the readers of each old node read its new node; yields (old name, new name) of equal values."""
    made = set(match.made)
    for old, new in replaced.items():
        if old is new:
            continue
        _check_shape(match, old, new)
        was, now = old.meta["val"], new.meta["val"]
        if not isinstance(was, torch.Tensor) or was.dtype == now.dtype:
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
            yield old.name, new.name
            continue
        # Another dtype: the casts go where all readers cast to it anyway; else a cast keeps the old dtype.
        users = [u for u in old.users if u not in made]
        if all(is_cast(u) and u.meta["val"].dtype == now.dtype for u in users):
            for user in users:
                user.replace_all_uses_with(new)
                lineage.absorb(new, user)
                _erase_dead(match.sub.graph, [user])
                yield user.name, new.name
        else:
            cast = match.op(aten.to.dtype, new, was.dtype)
            lineage.absorb(cast, new)
            made.add(cast)
            old.replace_all_uses_with(cast, delete_user_cb=lambda user: user not in made)
            yield old.name, cast.name


def _erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erases the nodes that have no reader, and the nodes that only these read; weights and inputs stay."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            stack += inputs


def _check_shape(match: Match, old: fx.Node, new: fx.Node) -> None:
    was, now = old.meta["val"], new.meta["val"]
    if isinstance(was, torch.Tensor) and tuple(was.shape) != tuple(now.shape):
        raise TurbocompileError(
            f"{match.site}: the rewrite of {old.name} ({old.target}) has shape {tuple(now.shape)} "
            f"instead of {tuple(was.shape)}; the pass that made it is wrong"
        )


def _followed(rewrite: Rewrite, moved: Mapping[str, str], graph: fx.Graph) -> Rewrite:
    """The rewrite with the names that its new nodes have after clean-up, without the nodes that are gone."""
    alive = {n.name for n in graph.nodes}
    pairs = []
    for old, new in rewrite.replaced:
        while new not in alive and new in moved:
            new = moved[new]
        if new in alive:
            pairs.append((old, new))
    return Rewrite(rewrite.graph, rewrite.site, tuple(pairs))


def sort(graph: fx.Graph) -> None:
    """Moves as few nodes as possible, so that each node follows its inputs."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    if all(place[a] < i for n, i in place.items() for a in n.all_input_nodes):
        return
    order = nx.DiGraph()
    order.add_nodes_from(place)
    order.add_edges_from((a, n) for n in place for a in n.all_input_nodes)
    last = None
    for node in nx.lexicographical_topological_sort(order, key=place.__getitem__):
        if last is not None:
            last.append(node)
        last = node
