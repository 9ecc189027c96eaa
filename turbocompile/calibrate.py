"""Calibration: what 8 bits do to each linear in each layer, and which layers keep the model's dtype for it.

A block's graph stands for many layers, each with its own weights and its own, true, input. The truth is the graph
before w8a8 in float32 (errors of 1 to 4% are judged), run layer by layer with one layer's weights in memory; at each
site the 8-bit linear is computed from the true input, in the dtypes of the engine, and compared. A site over its budget
stays wide in that layer only: layers that keep the same sites share a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbocompile.kernels import ops
from turbocompile.pipeline import PASSES, load_pass, run_pass, run_passes
from turbocompile.program import SHELL, Program, Subgraph, is_op
from turbocompile.sensitivity import LayerError, SiteError, finite, ranges
from turbocompile.verify import CPU, Error, Evaluation, Values, as_engine, budget_of, compare, is_float64, worst
from turbocompile.weights import Evaluator, TensorSource

MAX_KINDS = 4  # graphs that one kind of block may become: each is compiled, tuned and read by a person


@dataclass(frozen=True)
class Inputs:
    """What the model is run on: the tensors of some calls, in the order and dtypes of the Program's inputs."""

    calls: Sequence[Sequence[torch.Tensor]]
    recorded: bool = False

    def __str__(self) -> str:
        if not self.recorded:
            return "random inputs"
        return f"{len(self.calls)} recorded input" + ("s" if len(self.calls) > 1 else "")


@dataclass(frozen=True)
class Plan:
    """What calibration decided.

    inputs: on what it was measured, in words. names: graph -> prefix of a call -> the graph it runs, where a graph is
    split. keep: site (of the split graphs) -> why it stays wide. sites: every figure, for the report.
    """

    inputs: str
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    sites: tuple[SiteError, ...] = ()

    def worst_quantized(self) -> dict[str, float] | None:
        """The largest error that 8 bits cause somewhere in the model."""
        errors = [e.error for row in self.sites for e in row.layers if e.quantized]
        return max(errors, key=lambda e: e["rel_l1"], default=None)

    def split(self, program: Program) -> None:
        """Gives the layers of a Program the graphs that they need."""
        for graph, names in self.names.items():
            program.split(graph, names)


@dataclass(frozen=True)
class Linear:
    """A linear that w8a8 would rewrite. name, x: its name before, and that of what it reads. node: the w8a8_linear."""

    site: str
    graph: str
    name: str
    x: str
    node: fx.Node
    sub: Subgraph

    @property
    def format(self) -> str:
        return str(self.node.args[5])

    @property
    def wanted(self) -> set[str]:
        """The nodes before w8a8 whose true values the measurement takes."""
        bias = self.node.args[4]
        return {self.name, self.x} | ({bias.name} if isinstance(bias, fx.Node) else set())


def calibrate(
    program: Program,
    source: TensorSource,
    options: Mapping[str, Mapping[str, Any]],
    target: str,
    inputs: Inputs,
    device: torch.device = CPU,
) -> Plan:
    """Measures a normalized Program, which is left as it was.

    options: as for `run_passes`. inputs: tensors that the Program takes. device: where to compute.
    """
    prepared = before_w8a8(program, options, target)
    linears = find_linears(prepared, options, target)
    if not linears:
        return Plan(str(inputs))
    errors = measure(prepared, source, linears, inputs, device)
    budgets = {s.site: budget_of(options.get("w8a8", {}), {s.format}) for s in linears}
    return decide(prepared, linears, errors, budgets, str(inputs))


def before_w8a8(program: Program, options: Mapping[str, Mapping[str, Any]], target: str) -> Program:
    """The Program as w8a8 finds it, but with attention in floating point: its quantization is judged by itself."""
    made = program.copy()
    attention = dict(options.get("attention", {}))
    attention |= {"pv": "none", "kind": "native" if attention.get("kind") == "sage" else attention.get("kind", "auto")}
    passes = [load_pass(name) for name in PASSES[: PASSES.index("w8a8")]]
    run_passes(made, {**options, "attention": attention}, target, passes=passes)
    return made


def find_linears(program: Program, options: Mapping[str, Mapping[str, Any]], target: str) -> list[Linear]:
    """The linears that w8a8 would rewrite."""
    result = run_pass(program.copy(), load_pass("w8a8"), {**options.get("w8a8", {}), "target": target})
    found = []
    for graph, (sub, rewrites) in result.raw.items():
        nodes = {n.name: n for n in sub.graph.nodes}
        was = {new: old for rewrite in rewrites for old, new in rewrite.replaced}
        for rewrite in rewrites:
            for old, new in rewrite.replaced:
                node = nodes[new]
                if graph != SHELL and is_op(node, ops.w8a8_linear):
                    x = node.args[0].args[0].args[0]  # type: ignore[union-attr]
                    found.append(Linear(rewrite.site, graph, old, was.get(x.name, x.name), node, sub))  # type: ignore[union-attr]
    return found


# ---------------------------------------------------------------------------------------------------------- measuring


class _Held:
    """A source that keeps what was read of one layer: its weights are asked for again, to be quantized."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.held: dict[str, torch.Tensor] = {}

    def keys(self) -> Iterable[str]:
        return self.source.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.source.spec(name)

    def get(self, name: str) -> torch.Tensor:
        if name not in self.held:
            self.held[name] = self.source.get(name)
        return self.held[name]


@dataclass(frozen=True)
class Layer:
    """One call of a block: its true values for each input, by node name, and its weights."""

    graph: str
    prefix: str
    values: list[Values]
    evaluate: Evaluator

    @property
    def name(self) -> str:
        return self.prefix.rstrip(".")


def each_layer(
    program: Program,
    source: TensorSource,
    inputs: Inputs,
    wanted: Mapping[str, set[str]],
    device: torch.device = CPU,
) -> Iterator[Layer]:
    """The calls in the order they run, each with the true values of the wanted nodes of its graph.

    All inputs go through a layer before the next one's weights are read.
    """
    held = _Held(source)
    evaluate = Evaluator(held, program.constants)
    wide = torch.float64 if is_float64(program.shell) else torch.float32

    def evaluation(sub: Subgraph, prefix: str) -> Evaluation:
        return Evaluation(sub, lambda n: evaluate(sub.weights[str(n.target)], prefix).to(device), wide, device)

    shell = evaluation(program.shell, "")
    names = [n.name for n in program.shell.inputs()]
    runs = []
    for call in inputs.calls:
        given = {k: t.to(device, wide if t.is_floating_point() else t.dtype) for k, t in zip(names, call, strict=True)}
        runs.append(shell.steps(given, keep=()))
    with torch.no_grad():
        waiting = [next(run, None) for run in runs]
    while all(w is not None for w in waiting):
        held.held.clear()
        graph, prefix = waiting[0][0].args[:2]  # type: ignore[index]
        sub = program.graphs[graph]
        block, outputs = evaluation(sub, prefix), [n.name for n in sub.outputs()]
        found = []
        for _, args in waiting:  # type: ignore[misc]
            given = {n.name: v for n, v in zip(sub.inputs(), args[3:], strict=True)}
            found.append(block(given, keep=wanted.get(graph, set()).union(outputs)))
        yield Layer(graph, prefix, found, evaluate)
        with torch.no_grad():
            for i, run in enumerate(runs):
                result = tuple(found[i][name] for name in outputs)
                waiting[i] = _sent(run, result[0] if len(result) == 1 else result)


def _sent(run: Any, value: Any) -> Any:
    """What a generator yields next; None at its end."""
    try:
        return run.send(value)
    except StopIteration:
        return None


def measure(
    program: Program,
    source: TensorSource,
    linears: Sequence[Linear],
    inputs: Inputs,
    device: torch.device = CPU,
) -> dict[str, dict[str, Error]]:
    """Site -> prefix of a call -> the error of the 8-bit linear there, on the input where it is largest."""
    wanted = _wanted(linears)
    errors: dict[str, dict[str, Error]] = {s.site: {} for s in linears}
    for layer in each_layer(program, source, inputs, wanted, device):
        for linear in linears:
            if linear.graph == layer.graph:
                errors[linear.site][layer.prefix] = _error(linear, layer, device)
    return errors


def _wanted(linears: Sequence[Linear]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for linear in linears:
        found.setdefault(linear.graph, set()).update(linear.wanted)
    return found


@torch.no_grad()
def _error(linear: Linear, layer: Layer, device: torch.device) -> Error:
    """The error of a site in a layer, on the worst input."""
    node = linear.node
    weights = [
        layer.evaluate(linear.sub.weights[str(n.target)], layer.prefix).to(device)  # type: ignore[union-attr]
        for n in node.args[2:4]
    ]
    found = []
    for values in layer.values:
        x = as_engine(values[linear.x], node.args[0].args[0].args[0])  # type: ignore[union-attr]
        bias = as_engine(values[node.args[4].name], node.args[4]) if isinstance(node.args[4], fx.Node) else None
        made = ops.w8a8_linear(*ops.quantize(x, linear.format), *weights, bias, linear.format, node.args[6])
        found.append(compare(made, values[linear.name]))
    error = worst(found)
    assert error is not None  # there is an input
    return error


# ----------------------------------------------------------------------------------------------------------- deciding


def decide(
    program: Program,
    linears: Sequence[Linear],
    errors: Mapping[str, Mapping[str, Error]],
    budgets: Mapping[str, float],
    inputs: str,
) -> Plan:
    """Which layers keep which sites wide, and the graphs that this takes."""
    names: dict[str, dict[str, str]] = {}
    keep: dict[str, str] = {}
    sites: list[SiteError] = []
    taken = set(program.graphs)
    for graph in dict.fromkeys(s.graph for s in linears):
        mine = [s.site for s in linears if s.graph == graph]
        wide = {p: frozenset(s for s in mine if not errors[s][p].rel_l1 <= budgets[s]) for p in program.prefixes(graph)}
        wide, everywhere = _few_kinds(wide)
        kinds = sorted(set(wide.values()), key=lambda kind: -sum(k == kind for k in wide.values()))
        called = {kind: graph if not i else _free_name(graph, taken) for i, kind in enumerate(kinds)}
        if len(kinds) > 1:
            names[graph] = {prefix: called[kind] for prefix, kind in wide.items()}
        for kind in kinds:
            for site in kind:
                layers = [p for p, k in wide.items() if k == kind]
                path = site.partition(":")[2]
                keep[f"{called[kind]}:{path}"] = _why(site, layers, errors[site], budgets[site], everywhere)
        rows = (_row(site, errors[site], budgets[site], wide, everywhere) for site in mine)
        sites += [row for row in rows if row is not None]
    sites.sort(key=lambda row: -row.error["rel_l1"] / row.budget)
    return Plan(inputs, names, keep, tuple(sites))


def _few_kinds(wide: Mapping[str, frozenset[str]]) -> tuple[dict[str, frozenset[str]], set[str]]:
    """At most MAX_KINDS sets of wide sites, by prefix, and the sites that are wide in all layers for that alone.

    One site after the other is kept everywhere: that which is wide in the most layers already, so costs the least.
    """
    wide, everywhere = dict(wide), set()
    while len(set(wide.values())) > MAX_KINDS:
        counts = {s: sum(s in kind for kind in wide.values()) for kind in wide.values() for s in kind}
        open_ = [s for s in counts if counts[s] < len(wide)]
        site = max(sorted(open_), key=lambda s: counts[s])
        everywhere.add(site)
        wide = {prefix: kind | {site} for prefix, kind in wide.items()}
    return wide, everywhere


def _free_name(graph: str, taken: set[str]) -> str:
    name = next(f"{graph}_{i}" for i in range(1, len(taken) + 2) if f"{graph}_{i}" not in taken)
    taken.add(name)
    return name


def _over(errors: Mapping[str, Error], budget: float) -> list[str]:
    return [prefix for prefix, error in errors.items() if not error.rel_l1 <= budget]


def _why(site: str, layers: Sequence[str], errors: Mapping[str, Error], budget: float, everywhere: set[str]) -> str:
    over = [p for p in layers if not errors[p].rel_l1 <= budget]
    top = max(errors[p].rel_l1 for p in (over or layers))
    if site in everywhere:
        return _everywhere(_over(errors, budget), budget)
    return f"relative L1 up to {top:.4f} in {_layers(over)} is over its budget of {budget:g}"


def _everywhere(over: Sequence[str], budget: float) -> str:
    return (
        f"over its budget of {budget:g} in {_layers(over)}, and wide in all layers, since more than {MAX_KINDS} kinds "
        "of the block would arise"
    )


def _layers(prefixes: Iterable[str]) -> str:
    return ranges([p.rstrip(".") for p in prefixes])


def _row(
    site: str,
    errors: Mapping[str, Error],
    budget: float,
    wide: Mapping[str, frozenset[str]],
    everywhere: set[str],
) -> SiteError | None:
    """The report's row of a site; None where a figure is no finite number."""
    rows = [(p.rstrip("."), finite(e), site not in wide[p]) for p, e in errors.items()]
    layers = tuple(LayerError(name, error, quantized) for name, error, quantized in rows if error is not None)
    top = finite(worst(list(errors.values())))
    if top is None:
        return None
    note = _everywhere(_over(errors, budget), budget) if site in everywhere else ""
    return SiteError(site, top, budget, layers, note)
