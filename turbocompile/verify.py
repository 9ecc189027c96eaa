"""Verification: numbers, not shapes, say whether a rewrite is right.

Truth is the captured graph's normal form in float64 (the graph as captured is compared with it first). After each pass
every site is computed anew from the true values of what it reads, in the dtype that the engine uses, and compared with
the true value of what it replaced; the block's output, run as a whole, is a second figure. Exact passes may move by a
rounding, quantizing ones have a budget, and a site over it is left alone. A semantic pass (another function, meant so)
sets a new truth: the graph after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from turbocompile.backends.triton import place
from turbocompile.errors import VerificationError
from turbocompile.kernels import ops
from turbocompile.program import SHELL, Program, Subgraph, call, is_op
from turbocompile.sites import SAGE, SLA
from turbocompile.weights import Constant, Evaluator

aten = torch.ops.aten
CPU = torch.device("cpu")
SHELL_EXACT = 2e-3
EXACT = 1e-5  # of the largest true value, in float32: a few dozen roundings of 2^-24
# Relative L1 at the worst site; the measured values of these formats on N(0,1) inputs are 0.012 (int8, int8_block),
# 0.037 (fp8), 0.013 (sage, FP16 PV) and 0.038 (sage, FP8 PV).
NATIVE = "native"
BUDGETS = {"int8": 0.02, "int8_block": 0.02, "fp8": 0.05, "sage_fp16": 0.02, "sage_fp8": 0.04}


@dataclass(frozen=True)
class Error:
    """How far numbers are from the truth: cosine, relative L1 (sum|a-b| / sum|b|), and max|a-b| / max|b|."""

    cosine: float
    rel_l1: float
    max_abs: float
    max_rel: float
    exact: bool = True  # whether rounding alone explains it

    def to_dict(self) -> dict[str, float]:
        return {"cosine": self.cosine, "rel_l1": self.rel_l1, "max_abs": self.max_abs}


def compare(found: torch.Tensor, truth: torch.Tensor) -> Error:
    """The error of `found`. A NaN or an infinity that the truth lacks makes every figure infinite."""
    a, b = found.double().flatten(), truth.double().flatten()
    if not bool(torch.isfinite(a).all()):
        return Error(0.0, math.inf, math.inf, math.inf, False)
    difference = (a - b).abs()
    total, top = float(b.abs().sum()), float(b.abs().max()) if b.numel() else 0.0
    norm = float(a.norm() * b.norm())
    same = not bool(difference.any())
    rel_l1 = float(difference.sum()) / total if total else (0.0 if same else math.inf)
    max_rel = float(difference.max()) / top if top else (0.0 if same else math.inf)
    # An 8-bit value may fall on the other side of a tie: rarely, and by one step (1 of 127, or e4m3's 32 of 448).
    exact = (rel_l1 <= 1e-4 and max_rel <= 1 / 12) if truth.dtype.itemsize == 1 else max_rel <= EXACT
    return Error(
        cosine=float(a @ b) / norm if norm else float(same),
        rel_l1=rel_l1,
        max_abs=float(difference.max()) if a.numel() else 0.0,
        max_rel=max_rel,
        exact=exact,
    )


def worst(errors: list[Error]) -> Error | None:
    """The error of the worst site, by relative L1."""
    return max(errors, key=lambda e: (e.rel_l1, e.max_rel), default=None)


def budget_of(options: Mapping[str, Any], formats: set[str]) -> float:
    """The relative L1 that a quantizing pass may reach at a site: the recipe's, else that of the formats used there.

    What `auto` resolved to stands in the graph, not in the options; an unknown format of another's pass has the widest.
    """
    if options.get("budget") is not None:
        return float(options["budget"])
    return max((BUDGETS[f] for f in formats if f in BUDGETS), default=max(BUDGETS.values()))


Values = dict[str, Any]


class Evaluation:
    """Runs one graph, recording every node's value.

    weight: a weight's value, on `device`. wide: a floating dtype in which everything is computed (float64 for truth,
    float32 for an exact rewrite of a bf16 model); None runs the graph as it is. Casts between floating types are
    dropped when wide, but for those of constants: a table cast to bf16 is meant so.
    """

    def __init__(
        self,
        sub: Subgraph,
        weight: Callable[[fx.Node], torch.Tensor],
        wide: torch.dtype | None,
        device: torch.device = CPU,
    ) -> None:
        self.sub, self.weight, self.wide, self.device = sub, weight, wide, device
        self.constant: set[fx.Node] = set()
        for node in sub.graph.nodes:
            if node.op == "get_attr":
                if isinstance(sub.weights[str(node.target)], Constant):
                    self.constant.add(node)
            elif node.op == "call_function" and node.target is not call:
                self.constant |= {node} if all(n in self.constant for n in node.all_input_nodes) else set()

    def __call__(
        self,
        given: Mapping[str, Any],
        calls: Callable[[fx.Node, Any], Any] | None = None,
        keep: Container[str] | None = None,
    ) -> Values:
        """Values by node name. given: values that are taken as they are (inputs, and nodes already known).

        calls: what a call of another graph gives. keep: the nodes whose values are wanted; all where nothing is said.
        """
        with torch.no_grad():
            run = self.steps(given, keep)
            try:
                node, args = next(run)
                while True:
                    node, args = run.send(calls(node, args) if calls is not None else node.target(*args))  # type: ignore[operator]
            except StopIteration as done:
                return done.value

    def steps(
        self, given: Mapping[str, Any], keep: Container[str] | None = None
    ) -> Generator[tuple[fx.Node, Any], Any, Values]:
        """As `__call__`, one call of another graph at a time: yields it, with its arguments, and is sent its value."""
        values: Values = {}
        left = {n: len(n.users) for n in self.sub.graph.nodes}
        for node in self.sub.graph.nodes:
            if node.op == "output":
                continue
            if node.name in given:
                values[node.name] = given[node.name]
            elif node.op == "get_attr":
                if any(u.name not in given for u in node.users):
                    values[node.name] = self.parameter(node)
            else:
                args = fx.map_arg(node.args, lambda n: values[n.name])
                kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n.name])
                values[node.name] = (yield node, args) if node.target is call else self._run(node, args, kwargs)
            for used in node.all_input_nodes:
                left[used] -= 1
                if keep is not None and not left[used] and used.name not in keep:
                    values.pop(used.name, None)
        return values

    def parameter(self, node: fx.Node) -> torch.Tensor:
        """A weight in the dtype that is computed in."""
        value = self.weight(node)
        return value if node in self.constant else self._widen(value)

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if self.wide is not None and node not in self.constant:
            if is_op(node, *SAGE, ops.norm_sla_attention):
                return _unquantized(node, fx.node.map_aggregate(args, self._widen_argument))
            if is_op(node, aten.to.dtype) and node.meta["val"].dtype.is_floating_point and args[0].is_floating_point():
                return self._widen(args[0])
            args, kwargs = (fx.node.map_aggregate(x, self._widen_argument) for x in (args, kwargs))
        return node.target(*args, **place(node, kwargs, self.device))  # type: ignore[operator]

    def _widen(self, value: torch.Tensor) -> torch.Tensor:
        narrow = value.is_floating_point() and value.dtype.itemsize > 1 and self.wide is not None
        return value.to(self.wide) if narrow else value

    def _widen_argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_complex() and self.wide is torch.float64:
                return value.to(torch.complex128)
            return self._widen(value)
        if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1:
            return self.wide
        return value


def _unquantized(node: fx.Node, args: Any) -> torch.Tensor:
    """What a quantized attention stands for, in the dtype of its arguments."""
    dtype = args[0].dtype
    if is_op(node, *SLA):  # in float64: rounding would choose another block than the truth does where two are near
        args = fx.node.map_aggregate(args, lambda t: t.double() if isinstance(t, torch.Tensor) else t)
    q, k, v, *rest = args
    if is_op(node, ops.norm_sage_attention, ops.norm_sla_attention):
        weight, eps, cos, sin, grid, *rest = rest
        k = ops.qk_norm_rope(k, weight, eps, False, v.shape[2], cos, sin, grid, True)
    if is_op(node, *SAGE):
        scale, is_causal, _ = rest
        return _attention(q, k, v, scale, is_causal)
    return ops.sla_attention(q, k, v, *rest[:-1], "none").to(dtype)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """Attention over (B, L, H, D) without quantization."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    made = aten.scaled_dot_product_attention(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=True)
    return made.transpose(1, 2)


def _off(error: Error, value: torch.Tensor, graph: str) -> bool:
    """Whether an output of a captured graph is further off than rounding explains."""
    if value.dtype.itemsize <= 2:
        return error.rel_l1 > 0.05
    return error.max_rel > (SHELL_EXACT if graph == SHELL else EXACT)


class Verifier:
    """Judges passes on a Program (the twin at a small shape); the hook of `pipeline.run_passes`.

    evaluate: the weights' values. inputs: tensors of the call in the Program's dtypes; random by default. The shell and
    the first call of each kind of block are run, the block fed by the shell's own values.
    """

    def __init__(
        self,
        program: Program,
        evaluate: Evaluator,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        inputs: list[torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.evaluate = evaluate
        self.options = options or {}
        self.inputs = inputs or random_inputs(program, seed)
        self.truth: dict[str, Values] = {}
        self.base_error: dict[str, Error] = {}
        self.learned: dict[str, Values] = {}
        self._cache: dict[tuple[str, str], torch.Tensor] = {}
        self._rebase(program)

    def before(self, program: Program, pass_: Any) -> None:
        """Nothing: the truth is known from the start."""

    def after(self, program: Program, before: Program, result: Any) -> dict[str, str]:
        """Measures a pass and returns the sites to leave alone. Raises VerificationError for a wrong exact rewrite."""
        options = self.options.get(result.name, {})
        if result.kind == "semantic":
            self._rebase(program)
            result.error_reason = "another function by intent; later passes are measured against it"
            return {}
        self.learned = {}
        sites = self._sites(program, result)
        if result.kind == "exact":
            for site, (error, _) in sites.items():
                if not error.exact:
                    raise VerificationError(
                        f"the pass {result.name!r} changed the numbers at {site}: the largest difference is "
                        f"{error.max_rel:.1e} of the largest value, and rounding explains {EXACT:.0e}; "
                        f"switch it off with passes.{result.name}.enabled: false and report it"
                    )
        else:
            bad = {}
            for site, (error, formats) in sites.items():
                budget = budget_of(options, formats)
                if formats != {NATIVE}:  # an attention that stayed in floating point is no quantized site
                    result.site_errors[site] = (error, budget)
                if error.rel_l1 > budget:
                    bad[site] = f"relative L1 {error.rel_l1:.4f} is over its budget of {budget:g}"
            if bad:
                return bad
        self._record(result, worst([e for e, _ in sites.values()]), self._output_error(program, result))
        self._adopt(program)
        return {}

    def _record(self, result: Any, error: Error | None, output: Error) -> None:
        result.error = error.to_dict() if error else None
        result.error_output = output.to_dict()
        if error is None:
            result.error_reason = "no site left to measure"

    def check_captured(self, captured: Program, normal: Program) -> None:
        """Compares each graph as captured, run as it is on true inputs, with the truth: the normal form in float64.

        In float32 a block's bound is that of an exact pass. The shell's is 2e-3: time embeddings take sines of up to
        1,000 radians, where one rounding of 2^-24 is 6e-5, and more follow. In a 16-bit type some hundred roundings of
        2^-8 leave about 1%, and five times that is a wrong graph. But a model that takes those sines in a 16-bit type
        is far off by itself, so what is beyond a bound is compared with the normal form run as it is, too.
        Raises VerificationError.
        """
        for graph, sub in captured.graphs.items():
            if graph not in self.truth:
                continue
            values = self._as_it_is(captured, graph)
            again: Values = {}
            outputs = zip(sub.outputs(), normal.graphs[graph].outputs(), self.outputs[graph], strict=True)
            for node, same, true in outputs:
                value = values[node.name]
                if not value.is_floating_point() or not _off(compare(value, true), value, graph):
                    continue
                again = again or self._as_it_is(normal, graph)
                error = compare(value, again[same.name])
                if _off(error, value, graph):
                    raise VerificationError(
                        f"the normal form of the graph {graph!r} differs from what was captured (largest difference "
                        f"{error.max_rel:.1e} of the largest value); build with passes: off and report it"
                    )

    def _as_it_is(self, program: Program, graph: str) -> Values:
        """Values of a graph in its own types on true inputs."""
        return Evaluation(program.graphs[graph], self._weight(program, graph), None)(self._true_inputs(program, graph))

    def _true_inputs(self, program: Program, graph: str) -> Values:
        """True values of what a graph is given, in the engine's dtypes: its inputs, and for the shell its calls'
        results.

        Inputs and calls are alike in number and order before and after the normal form.
        """
        given, truth = list(program.graphs[graph].inputs()), self.truth[graph]
        if graph == SHELL:
            given += [c.node for c in program.calls()]
        known = self.given[graph]
        return {n.name: as_engine(truth[name], n, None) for n, name in zip(given, known, strict=True)}

    # ------------------------------------------------------------------------------------------------ values

    def _weight(self, program: Program, graph: str) -> Callable[[fx.Node], torch.Tensor]:
        prefix = program.prefixes(graph)[0] if program.prefixes(graph) else ""

        def weight(node: fx.Node) -> torch.Tensor:
            key = (graph, str(node.target))
            if key not in self._cache:
                self._cache[key] = self.evaluate(program.graphs[graph].weights[str(node.target)], prefix)
            return self._cache[key]

        return weight

    def _run_all(self, program: Program, wide: torch.dtype | None) -> dict[str, Values]:
        """Values of the shell and of the first call of each graph; later calls of a kind stand for the first."""
        found: dict[str, Values] = {}

        def run_call(node: fx.Node, args: Any) -> Any:
            name = args[0]
            sub = program.graphs[name]
            if name not in found:
                given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
                found[name] = Evaluation(sub, self._weight(program, name), wide)(given)
            outputs = tuple(found[name][n.name] for n in sub.outputs())
            return outputs[0] if len(outputs) == 1 else outputs

        shell = program.shell
        evaluation = Evaluation(shell, self._weight(program, SHELL), wide)
        given = {n.name: evaluation._widen(t) for n, t in zip(shell.inputs(), self.inputs, strict=True)}
        found[SHELL] = evaluation(given, run_call)
        return found

    def _rebase(self, program: Program) -> None:
        """Takes the Program's float64 values as the truth."""
        self.truth = self._run_all(program, torch.float64)
        self.given = {g: [n.name for n in program.graphs[g].inputs()] for g in self.truth}
        self.given[SHELL] += [c.node.name for c in program.calls()]
        self.outputs = self._outputs(program, self.truth)

    def _outputs(self, program: Program, values: Mapping[str, Values]) -> dict[str, list[Any]]:
        return {g: [values[g][n.name] for n in program.graphs[g].outputs()] for g in values}

    def _output_error(self, program: Program, result: Any) -> Error:
        """The error of the rewritten graphs' outputs, each run as a whole in the engine's dtypes, from exact inputs."""
        errors = []
        for graph in result.raw:
            if graph not in self.truth:
                continue
            sub = program.graphs[graph]
            values = Evaluation(sub, self._weight(program, graph), None)(self._true_inputs(program, graph))
            pairs = zip(sub.outputs(), self.outputs[graph], strict=True)
            errors += [compare(values[n.name], true) for n, true in pairs]
        return worst(errors) or Error(1.0, 0.0, 0.0, 0.0)

    # ------------------------------------------------------------------------------------------------- sites

    def _sites(self, program: Program, result: Any) -> dict[str, tuple[Error, set[str]]]:
        """Per site, the error of its new nodes from exact inputs, and the formats among the new nodes' arguments.

        An exact pass is computed in float32 at least, and without the quantization that it did not bring: its rounding
        is judged where one can see it.
        """
        found: dict[str, tuple[Error, set[str]]] = {}
        for graph, (sub, rewrites) in result.raw.items():
            if graph not in self.truth:
                continue
            wide = None
            if result.kind == "exact":
                wide = torch.float64 if is_float64(sub) else torch.float32
            errors = self._graph_sites(program, graph, sub, rewrites, wide)
            for rewrite in rewrites:
                mine = [errors[new] for _, new in rewrite.replaced if new in errors]
                if mine:
                    found[rewrite.site] = (worst(mine), _formats(sub, rewrite))  # type: ignore[assignment]
        return found

    def _graph_sites(
        self, program: Program, graph: str, sub: Subgraph, rewrites: list[Any], wide: torch.dtype | None
    ) -> dict[str, Error]:
        """Runs the new nodes on true inputs, in order; a measured node hands on the truth, not what it computed."""
        truth = self.truth[graph]
        was = {new: old for rewrite in rewrites for old, new in rewrite.replaced}
        evaluation = Evaluation(sub, self._weight(program, graph), wide)
        errors: dict[str, Error] = {}
        values: Values = {}
        with torch.no_grad():
            for node in sub.graph.nodes:
                if node.op == "output":
                    continue
                if node.name in was and was[node.name] in truth:
                    args, kwargs = self._arguments(node, values)
                    found = evaluation._run(node, args, kwargs)
                    true = truth[was[node.name]]
                    self._learn(graph, node, true)
                    if isinstance(true, torch.Tensor):
                        errors[node.name] = compare(found, true)
                    values[node.name] = as_engine(true, node, wide)
                elif node.name in truth and node.op != "get_attr":
                    values[node.name] = as_engine(truth[node.name], node, wide)
                elif node.op == "get_attr":
                    if any(u.name in was or u.name not in truth for u in node.users):
                        values[node.name] = evaluation.parameter(node)
                else:
                    args, kwargs = self._arguments(node, values)
                    values[node.name] = evaluation._run(node, args, kwargs)
        return errors

    def _learn(self, graph: str, node: fx.Node, true: Any) -> None:
        """Notes a new node's true value, and that of the new nodes which it only lays out anew or casts.

        Clean-up may remove the last permute of a site; the op under it must still be known to hold the truth, else the
        next pass would be charged with this one's error.
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
            sub, truth = program.graphs[graph], self.truth[graph]
            truth |= self.learned.get(graph, {})
            known = {n.name: truth[n.name] for n in sub.graph.nodes if n.name in truth and n.op != "get_attr"}
            if graph == SHELL:
                self.truth[graph] = self._run_shell(program, known)
            else:
                self.truth[graph] = Evaluation(sub, self._weight(program, graph), torch.float64)(known)

    def _run_shell(self, program: Program, known: Values) -> Values:
        evaluation = Evaluation(program.shell, self._weight(program, SHELL), torch.float64)
        return evaluation(known, lambda node, args: known[node.name])


def as_engine(value: Any, node: fx.Node, wide: torch.dtype | None = None) -> Any:
    """A true value in the dtype that the node has in the engine."""
    if isinstance(value, (tuple, list)):
        vals = node.meta["val"]
        return type(value)(_cast(v, t.dtype, wide) for v, t in zip(value, vals, strict=True))
    return _cast(value, node.meta["val"].dtype, wide)


def _cast(value: Any, dtype: torch.dtype, wide: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize == 1:
        return value
    return value.to(wide if wide is not None and dtype.is_floating_point else dtype)


def is_float64(sub: Subgraph) -> bool:
    return any(
        n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dtype == torch.float64
        for n in sub.graph.nodes
    )


def _formats(sub: Subgraph, rewrite: Any) -> set[str]:
    """The quantization formats named by a site's new nodes and what feeds them."""
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


def random_inputs(
    program: Program, seed: int = 0, example: Sequence[torch.Tensor] = (), *, zeros: bool = False
) -> list[torch.Tensor]:
    """Random tensors of the Program's inputs: N(0, 1), timesteps in (0, 1000), ones for masks and integers.

    example: the tensors of a call of these shapes. Its masks and integers are taken as they are, for what they may be
    is the model's own: indices, lengths, classes. One that is all zeros becomes ones unless `zeros` says otherwise: a
    mask of zeros would take every key away, and positions of zero would rotate nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, i in enumerate(program.signature.inputs):
        if i.number and k < len(example):
            value = example[k].detach().cpu()
        elif i.cast:
            value = torch.rand(i.shape, generator=generator) * 999.0 + 0.5
        elif i.dtype.is_floating_point:
            value = torch.randn(i.shape, generator=generator)
        else:
            given = example[k].detach().cpu() if k < len(example) and example[k].device.type != "meta" else None
            value = given if given is not None and (zeros or bool(given.any())) else torch.ones(i.shape)
        made.append(value.to(i.dtype))
    return made
