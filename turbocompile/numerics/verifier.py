"""Verification: numbers, not shapes, say whether a rewrite is right.

The truth is the captured graph in float64. The normal form of each graph (normal_forms.py), each site of an exact pass
and each graph after such a pass (exact_sites.py) must be equal to it but for rounding. Two questions are asked of them:

* Is it the same function? The graphs before and after are computed in float64 from the same inputs, with the weights of
  the first call and of the last. They may differ by TIGHT of the largest value, so that a fault is found even if it is
  small beside the rounding of the model's own dtype. The float64 run drops casts between floating dtypes, except the
  casts of constants.
* Does it round no more? Both are run in the model's dtype. The error after may be ALLOWED times the error before, which
  is measured at the same site and on the same inputs, plus a floor, because an error before may be zero by chance.

A quantizing pass has a budget: the relative L1 of each site in the engine's dtypes. A site that fails stays as it was;
a graph whose normal form fails stays as it was captured. A semantic pass makes another function, and means to: the
graph after it is the new truth. The error at the output of the block, which is run as a whole, is a second figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from turbocompile.errors import TurbocompileError, brief
from turbocompile.ir.attention_ops import SAGE, SLA
from turbocompile.ir.program import Program, Subgraph, is_op
from turbocompile.kernels import ops
from turbocompile.numerics.errors import NATIVE, Error, compare, worst
from turbocompile.numerics.exact_sites import Results, RewrittenGraph
from turbocompile.numerics.inputs import random_inputs
from turbocompile.numerics.interpreter import Interpreter, Uncomputed, Values
from turbocompile.numerics.program_values import (
    Weights,
    as_engine,
    first_and_last,
    given_to,
    run_widest,
)
from turbocompile.recipe.options import CompileOptions, PassOptions
from turbocompile.rewrite.results import Judgement, PassResult, Verdict

aten = torch.ops.aten


def refused(sites: list[str], reason: str) -> Judgement:
    """The judgement that refuses all sites for one reason."""
    return Judgement(refused=dict.fromkeys(sites, reason))


class Verifier:
    """Judges the passes that rewrite a Program, which may be a twin of the built one at a small shape.

    weights: gives the weights' values. options: for the budgets of passes. inputs: the tensors of a call in the
    Program's dtypes; random by default. The shell and the first call of each kind of block are run, and the block is
    given the shell's own values. `truth` has the float64 value of each node of the present graphs, so that each new
    site is judged on exact inputs. Raises Uncomputed where the Program cannot be computed on the inputs.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        options: CompileOptions | None = None,
        inputs: list[torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.options = options
        self.inputs = inputs or random_inputs(program, seed)
        self.weights = weights
        self.learned: dict[str, Values] = {}
        self.results: dict[str, Results] = {}  # of the present graphs as wholes, where an exact pass computed them
        self.after_pass: dict[str, Results] = {}
        self._rebase(program)

    def after(self, program: Program, before: Program, result: PassResult) -> Judgement:
        """Measures a pass; returns its verdict, and the sites to leave alone with the reasons.

        Raises torch.OutOfMemoryError, because a machine that is too small says nothing of the pass.
        """
        everything = [r.site for _, rewrites in result.raw.values() for r in rewrites]
        if result.kind == "semantic":
            try:
                self._rebase(program)
            except (Uncomputed, TurbocompileError) as error:
                return refused(everything, f"the rewritten graph cannot be computed ({_reason(error)})")
            return Judgement(Verdict(error_reason="another function by intent; later passes are measured against it"))
        self.learned, self.after_pass = {}, {}
        if result.kind == "exact":
            errors, bad = self._exact(program, before, result)
            site_errors: dict[str, tuple[Error, float]] = {}
        else:
            errors, bad, site_errors = self._quantized(program, before, result)
        if bad:
            return Judgement(Verdict(site_errors=site_errors), bad)
        try:
            output = self._output_error(program, result)
        except (Uncomputed, TurbocompileError) as raised:
            return refused(everything, f"the rewritten graph cannot be computed ({_reason(raised)})")
        self.results = self.results | self.after_pass if result.kind == "exact" else {}
        self._adopt(program)
        largest = worst(errors)
        figures = None if largest is None else largest.to_dict()
        reason = "no site left to measure" if largest is None else None
        return Judgement(Verdict(figures, output.to_dict(), reason, site_errors))

    # ------------------------------------------------------------------------------------------------ values

    def _weight(
        self, program: Program, graph: str, wide: torch.dtype | None = None
    ) -> Callable[[fx.Node], torch.Tensor]:
        return self.weights(program.graphs[graph], first_and_last(program, graph)[0], wide)

    def _true_inputs(self, program: Program, graph: str) -> Values:
        """The true values that a graph is given, in the engine's dtypes."""
        return {n.name: as_engine(self.truth[graph][n.name], n) for n in given_to(program, graph)}

    def _rebase(self, program: Program) -> None:
        """Takes the Program's float64 values as the truth."""
        self.results = {}
        self.truth, self.wide = run_widest(program, self.weights, self.inputs)
        self.outputs = {g: [self.truth[g][n.name] for n in program.graphs[g].outputs()] for g in self.truth}

    def _output_error(self, program: Program, result: PassResult) -> Error:
        """The error of the rewritten graphs' outputs, each run as a whole in the engine's dtypes, from exact inputs."""
        errors = []
        for graph in result.raw:
            if graph not in self.truth:
                continue
            sub = program.graphs[graph]
            given, outputs = self._true_inputs(program, graph), {n.name for n in sub.outputs()}
            values = Interpreter(sub, self._weight(program, graph), None)(given, given_call(given), outputs)
            pairs = zip(sub.outputs(), self.outputs[graph], strict=True)
            errors += [compare(values[n.name], true) for n, true in pairs]
        return worst(errors) or Error(1.0, 0.0, 0.0, 0.0)

    # ------------------------------------------------------------------------------------------------- sites

    def _exact(self, program: Program, before: Program, result: PassResult) -> tuple[list[Error], dict[str, str]]:
        """The errors of an exact pass's sites, and site -> why it is wrong."""
        errors: list[Error] = []
        bad: dict[str, str] = {}
        for graph, (sub, rewrites) in result.raw.items():
            if graph not in self.truth:
                continue
            replaced = {old: new for r in rewrites for old, new in r.replaced}
            rewritten = RewrittenGraph(before, sub, graph, replaced, self.truth[graph], self.weights, self.wide)
            *sites, (_, changed_in_place) = rewritten.judge([r.replaced for r in rewrites])
            errors += [error for error, _ in sites if error is not None]
            wrong = {r.site: reason for r, (_, reason) in zip(rewrites, sites, strict=True) if reason}
            if not wrong:
                reason = changed_in_place
                if not reason:
                    reason, self.after_pass[graph] = rewritten.whole(program, graph, self.results.get(graph))
                wrong = {r.site: f"the graph as a whole: {reason}" for r in rewrites} if reason else {}
            bad |= wrong
            for node in sub.graph.nodes:
                old = next((old for old, new in replaced.items() if new == node.name), None)
                if old in self.truth[graph]:
                    self._learn(graph, node, self.truth[graph][old])
        return errors, bad

    def _quantized(
        self, program: Program, before: Program, result: PassResult
    ) -> tuple[list[Error], dict[str, str], dict[str, tuple[Error, float]]]:
        """The errors of a quantizing pass's sites, site -> why it is refused, and site -> (error, budget)."""
        options = PassOptions(True) if self.options is None else self.options.of(result.name)
        errors: list[Error] = []
        bad: dict[str, str] = {}
        site_errors: dict[str, tuple[Error, float]] = {}
        for graph, (sub, rewrites) in result.raw.items():
            if graph not in self.truth:
                continue
            try:
                found = self._graph_sites(program, graph, sub, rewrites)
            except Uncomputed as failed:
                sites = [r.site for r in rewrites if failed.node in _made_for(sub, r)]
                reason = f"the rewritten site cannot be computed ({failed.reason})"
                bad |= dict.fromkeys(sites or [r.site for r in rewrites], reason)
                continue
            for rewrite in rewrites:
                error = worst([found[new] for _, new in rewrite.replaced if new in found])
                if error is None:
                    continue
                errors.append(error)
                formats = _formats(sub, rewrite)
                budget = options.budget(formats)
                if formats != {NATIVE}:  # an attention that stayed in floating point is no quantized site
                    site_errors[rewrite.site] = (error, budget)
                if not error.rel_l1 <= budget:
                    bad[rewrite.site] = f"relative L1 {error.rel_l1:.4f} is over its budget of {budget:g}"
        return errors, bad, site_errors

    def _graph_sites(self, program: Program, graph: str, sub: Subgraph, rewrites: list[Any]) -> dict[str, Error]:
        """New node -> its error on true inputs, of the nodes that stand for an old one.

        The nodes run in order in the engine's dtypes. A measured node hands the truth on, not its own value, so that
        one site's error is in no other's.
        """
        truth = self.truth[graph]
        was = {new: old for rewrite in rewrites for old, new in rewrite.replaced if old in truth}
        interpreter = Interpreter(sub, self.weights(sub, first_and_last(program, graph)[0], None), None)
        nodes = [n for n in sub.graph.nodes if n.op != "output"]
        computed = {n for n in nodes if n.op != "get_attr" and (n.name in was or n.name not in truth)}
        readers = {n: sum(user in computed for user in n.users) for n in nodes}
        errors: dict[str, Error] = {}
        values: Values = {}
        for node in nodes:
            if node.op == "get_attr":
                if readers[node] or node.name in was:
                    values[node.name] = interpreter.parameter(node)
            elif node not in computed:
                if readers[node]:
                    values[node.name] = as_engine(truth[node.name], node)
            else:
                args, kwargs = self._arguments(node, values)
                with torch.no_grad():
                    values[node.name] = interpreter.run_node(node, args, kwargs)
                del args, kwargs
                for read in node.all_input_nodes:
                    readers[read] -= 1
                    if not readers[read]:
                        del values[read.name]
            if node.name in was:
                true = truth[was[node.name]]
                self._learn(graph, node, true)
                if isinstance(true, torch.Tensor):
                    errors[node.name] = compare(values[node.name], true)
                values[node.name] = as_engine(true, node)
        return errors

    def _learn(self, graph: str, node: fx.Node, true: Any) -> None:
        """Notes the true value of a new node, and of the new nodes behind it that it only lays out anew or casts.

        Clean-up may remove the last permute of a site. The operator before it must have its true value, too, because
        the next pass would be charged with the error of this one otherwise.
        """
        learned = self.learned.setdefault(graph, {})
        while True:
            learned[node.name] = true
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_function" or source.name in self.truth[graph]:
                return
            if is_op(node, aten.permute):
                order = [d % true.dim() for d in node.args[1]]  # type: ignore[union-attr]
                true = true.permute([order.index(d) for d in range(true.dim())])
            elif is_op(node, aten.reshape):
                true = true.reshape(source.meta["val"].shape)
            elif not is_op(node, aten.to.dtype):
                return
            node = source

    def _arguments(self, node: fx.Node, values: Values) -> tuple[Any, Any]:
        return (
            fx.map_arg(node.args, lambda n: values[n.name]),
            fx.map_arg(dict(node.kwargs), lambda n: values[n.name]),
        )

    def _adopt(self, program: Program) -> None:
        """Gives the nodes that a pass made their true values, so that the next pass finds exact inputs."""
        for graph in list(self.truth):
            sub, truth = program.graphs[graph], self.truth[graph] | self.learned.pop(graph, {})
            known = {n.name: truth[n.name] for n in sub.graph.nodes if n.name in truth and n.op != "get_attr"}
            self.truth[graph] = Interpreter(sub, self._weight(program, graph, self.wide), self.wide)(
                known, given_call(known)
            )


def given_call(given: Values) -> Callable[[fx.Node, Any], Any]:
    """The results of the calls of blocks in a shell, where `given` holds them by the names of the calls."""
    return lambda node, args: given[node.name]


def _reason(error: Uncomputed | TurbocompileError) -> str:
    return error.reason if isinstance(error, Uncomputed) else brief(error)


def _made_for(sub: Subgraph, rewrite: Any) -> set[str]:
    """The names of all nodes that a site's new nodes are computed from."""
    todo, found = [n for n in sub.graph.nodes if n.name in {new for _, new in rewrite.replaced}], set()
    while todo:
        node = todo.pop()
        if node.name not in found:
            found.add(node.name)
            todo += node.all_input_nodes
    return found


def _formats(sub: Subgraph, rewrite: Any) -> set[str]:
    """The quantization formats that a site's new nodes, or the operators that feed them, name in their arguments."""
    names = {n.name: n for n in sub.graph.nodes}
    found: set[str] = set()
    for _, new in rewrite.replaced:
        todo, depth = [names[new]] if new in names else [], 0
        while todo and depth < 8:
            node = todo.pop()
            depth += 1
            if is_op(node, *SAGE, *SLA):
                found.add(f"sage_{node.args[-1]}")
            elif is_op(node, aten.scaled_dot_product_attention):
                found.add(NATIVE)
            elif is_op(node, ops.w8a8_linear):
                found |= {a for a in node.args if isinstance(a, str)}
            elif node.op == "call_function":
                todo += node.all_input_nodes
    return found
