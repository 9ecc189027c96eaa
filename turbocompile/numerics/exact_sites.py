"""Is each site of an exact pass the same function as the nodes that it replaced, and does it round no more?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbocompile.errors import TurbocompileError, brief
from turbocompile.ir.program import Program, Subgraph
from turbocompile.numerics.errors import Error, compare, differs, rounds_more, worst
from turbocompile.numerics.interpreter import Interpreter, Uncomputed, Values, needed_for
from turbocompile.numerics.program_values import (
    Weights,
    as_engine,
    first_and_last,
    given_to,
    results_of,
    told_apart,
    widened,
)

Pairs = Sequence[tuple[str, str]]  # (old node, new node that gives the same value), by their names
Results = list[Any]  # the values that a graph gives, in the order of `results_of`


@dataclass
class _Site:
    """New nodes that are judged together, on true values of the old nodes that they read.

    read: those old nodes. aside: further old nodes that the old ones of `pairs` are computed from; they are given, too,
    because they lie beside the site and no new node stands for them. true: the old nodes' values in the widest dtype,
    in the first call.
    """

    pairs: list[tuple[str, str]]
    read: set[str]
    aside: set[str]
    errors: list[Error] = field(default_factory=list)
    true: Values = field(default_factory=dict)
    another: str = ""  # why the new nodes are another function than the old ones
    rounding: str = ""  # why they round too much

    @property
    def wrong(self) -> str:
        return self.another or self.rounding


class RewrittenGraph:
    """A graph before and after an exact pass. Each site is given the true values of the nodes that it reads, so that it
    is judged by itself, and no more nodes are run than those of the site.
    """

    def __init__(
        self,
        before: Program,
        after: Subgraph,
        graph: str,
        replaced: Mapping[str, str],
        truth: Values,
        weights: Weights,
        wide: torch.dtype | None,
    ) -> None:
        """before: the Program before the pass. after: its graph `graph` with the new nodes, not yet cleaned up.

        replaced: old node -> new node, by name. truth: the values of the old graph's nodes in `wide`, the widest dtype
        in which the Program can be computed; None for its own dtypes.
        """
        self.old, self.after, self.weights, self.wide = before.graphs[graph], after, weights, wide
        self.prefixes = first_and_last(before, graph)
        self.nodes = {n.name: n for n in self.old.graph.nodes}
        self.results = [n.name for n in results_of(before, graph)]
        self.truth = truth
        exact = {n.name: as_engine(truth[n.name], n) for n in given_to(before, graph)}
        self.given = told_apart(before, graph, exact)
        self.apart = any(self.given[name] is not exact[name] for name in exact)
        self.known, self.changed = self._same(replaced)

    def judge(self, sites: Sequence[Pairs]) -> list[tuple[Error | None, str]]:
        """For each site the worst error of its new nodes in the widest dtype, and why it is wrong; empty where right.

        The last one is of the nodes that the pass changed in place. Both graphs are run with the weights of the first
        call and of the last, on the true values of the first. A new node that a later rewrite of the pass removed is
        judged with the node that this rewrite made.
        """
        judged = [self._site(pairs) for pairs in [*sites, [(name, name) for name in self.changed]]]
        true = self._values_apart(judged) if self.apart else self.truth
        for prefix in self.prefixes:
            for site in judged:
                site.another = site.another or self._differ(site, true, prefix)
        for site in judged:
            if not site.another:
                site.rounding = self._round_more(site, true)
        return [(worst(site.errors), site.wrong) for site in judged]

    def _values_apart(self, sites: Sequence[_Site]) -> Values:
        """The old graph's values that the sites read, where the calls of a block have results of their own.

        The true values do not serve there, because every call has the results of the first one (see `told_apart`).
        """
        given = widened(self.given, self.wide)
        keep = {name for s in sites for name in s.read | s.aside}
        run = self._interpreter(self.old, self.prefixes[0], self.wide)
        return run(given, lambda node, args: given[node.name], keep)

    def _interpreter(self, sub: Subgraph, prefix: str, wide: torch.dtype | None) -> Interpreter:
        return Interpreter(sub, self.weights(sub, prefix, wide, keep=prefix == self.prefixes[0]), wide)

    def _same(self, replaced: Mapping[str, str]) -> tuple[set[str], list[str]]:
        """The names of the operations that the pass left as they were, and of the nodes that it changed in place."""
        known, changed = set(self.given), []
        for node in self.after.graph.nodes:
            old = self.nodes.get(node.name)
            if old is None or node.op in ("placeholder", "output") or node.name in self.given:
                continue
            if old.op == node.op == "get_attr":
                if self.old.weights[str(old.target)] != self.after.weights[str(node.target)]:
                    changed.append(node.name)
            elif old.target is not node.target or self._named(old, replaced) != self._named(node, {}):
                changed.append(node.name)
            else:
                known.add(node.name)
        return known, changed

    @staticmethod
    def _named(node: fx.Node, replaced: Mapping[str, str]) -> str:
        """The arguments of a node as text, in which the names of nodes are those after the pass."""
        return repr(fx.map_arg((node.args, dict(node.kwargs)), lambda n: replaced.get(n.name, n.name)))

    def _site(self, pairs: Pairs) -> _Site:
        """The pairs whose new nodes are there and whose old nodes are tensors, and the old nodes that these need."""
        there = {n.name for n in self.after.graph.nodes}
        pairs = [(old, new) for old, new in pairs if new in there and self._is_tensor(old)]
        read = self._read([new for _, new in pairs])
        known = read.union(self.given, self._aside(read.difference(self.given)))
        needed = needed_for(self.old, [old for old, _ in pairs], known)
        return _Site(pairs, read, (needed & known) - read)

    def _is_tensor(self, name: str) -> bool:
        return name in self.nodes and isinstance(self.nodes[name].meta.get("val"), torch.Tensor)

    def _read(self, names: Sequence[str]) -> set[str]:
        """The known nodes that the named new ones are computed from."""
        after = {n.name: n for n in self.after.graph.nodes}
        found: set[str] = set()
        seen: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in self.known:
                found.add(name)
            elif name not in seen:
                seen.add(name)
                todo += [n.name for n in after[name].all_input_nodes]
        return found

    def _aside(self, read: set[str]) -> set[str]:
        """The known operations that are computed from none of the nodes in `read`."""
        behind: set[str] = set()
        for name, node in self.nodes.items():
            if any(n.name in behind or n.name in read for n in node.all_input_nodes):
                behind.add(name)
        return {n for n in self.known - behind if self.nodes[n].op != "get_attr"}

    def _differ(self, site: _Site, true: Values, prefix: str) -> str:
        """Adds the errors of a site in the widest dtype; returns why the site is another function, if it is."""
        given = {name: true[name] for name in site.read | site.aside}
        old_nodes = self._interpreter(self.old, prefix, self.wide).reach([old for old, _ in site.pairs], given)
        new_nodes = self._reach(prefix, self.wide, site, given)
        if isinstance(new_nodes, str):
            return new_nodes
        errors = [compare(new_nodes[new], old_nodes[old]) for old, new in site.pairs]
        for (old, _), error in zip(site.pairs, errors, strict=True):
            reason = differs(error, self.nodes[old].meta["val"].dtype, self.wide)
            if reason:
                return f"changes the numbers: {reason}"
        site.errors += errors
        if prefix == self.prefixes[0]:
            site.true = {old: old_nodes[old] for old, _ in site.pairs}
        return ""

    def _round_more(self, site: _Site, true: Values) -> str:
        """How much more the new nodes round than the old ones in the engine's dtypes; empty where they do not."""
        given = {n: as_engine(true[n], self.nodes[n]) for n in site.read | site.aside}
        prefix = self.prefixes[0]
        old_nodes = self._interpreter(self.old, prefix, None).reach([old for old, _ in site.pairs], given)
        new_nodes = self._reach(prefix, None, site, given)
        if isinstance(new_nodes, str):
            return new_nodes
        for old, new in site.pairs:
            after, before = (compare(value, site.true[old]) for value in (new_nodes[new], old_nodes[old]))
            reason = rounds_more(after, [before], new_nodes[new].dtype)
            if reason:
                return f"rounds more than what it replaces: {reason}"
        return ""

    def _reach(self, prefix: str, wide: torch.dtype | None, site: _Site, given: Values) -> Values | str:
        """The values of a site's new nodes, or why they cannot be computed."""
        try:
            return self._interpreter(self.after, prefix, wide).reach([new for _, new in site.pairs], given)
        except Uncomputed as failed:
            return f"the rewritten site cannot be computed ({failed.reason})"
        except TurbocompileError as error:
            return f"the rewritten site cannot be computed ({brief(error)})"

    def whole(self, program: Program, graph: str, before: Results | None) -> tuple[str, Results]:
        """How far the cleaned-up graph is another function than the graph before, empty where it is the same; and its
        results, which are `before` for the next pass.

        program: the Program after the pass. before: the results of the graph before the pass on the given values, in
        the widest dtype; None where nobody has computed them yet.
        """
        if before is None:
            before = self._results(self.old, self.results)
        try:
            after = self._results(program.graphs[graph], [n.name for n in results_of(program, graph)])
        except Uncomputed as failed:
            return f"it cannot be computed ({failed.reason})", []
        except TurbocompileError as raised:
            return f"it cannot be computed ({brief(raised)})", []
        for old, true, value in zip(self.results, before, after, strict=True):
            reason = differs(compare(value, true), self.nodes[old].meta["val"].dtype, self.wide)
            if reason:
                return f"changes the numbers: {reason}", []
        return "", after

    def _results(self, sub: Subgraph, names: Sequence[str]) -> Results:
        """The values of the named nodes of a graph that is run as a whole on the given values, in the widest dtype."""
        given = widened(self.given, self.wide)
        run = self._interpreter(sub, self.prefixes[0], self.wide)
        values = run(given, lambda node, args: given[node.name], set(names))
        return [values[name] for name in names]
