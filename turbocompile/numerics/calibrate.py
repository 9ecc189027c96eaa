"""Calibration: what 8 bits do to each linear in each layer, and which layers keep the model's dtype for it.

A block's graph stands for many layers, each with its own weights and its own, true, input. The truth is the graph
before w8a8 in float32 (errors of 1 to 4% are judged), run layer by layer with one layer's weights in memory; at each
site the 8-bit linear is computed from the true input, in the dtypes of the engine, and compared. A site over its budget
stays wide in that layer only: layers that keep the same sites share a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from turbocompile.ir.evaluate import Evaluator, TensorSource, WithVectors
from turbocompile.ir.program import SHELL, Program, Subgraph, is_op
from turbocompile.ir.site_errors import LayerError, SiteError, finite, ranges
from turbocompile.ir.weights import Quantize
from turbocompile.kernels import ops
from turbocompile.numerics.smoothing import NO_HELP, Scale, best_scale
from turbocompile.numerics.verifier import (
    CPU,
    Error,
    Evaluation,
    Values,
    as_engine,
    compare,
    is_float64,
    worst,
)
from turbocompile.recipe.options import CompileOptions, W8A8Options
from turbocompile.rewrite.pipeline import load_pass, run_passes, story
from turbocompile.rewrite.run_pass import run_pass
from turbocompile.rewrite.scale_folding import Fold, fold_of

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
    split. keep: site (of the split graphs) -> why it stays wide. smoothed: the sites whose input is scaled; unsmoothed:
    why others are not. vectors: the scales, by the names that the weights' expressions have for them. sites: every
    figure, for the report.
    """

    inputs: str
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    smoothed: frozenset[str] = frozenset()
    unsmoothed: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
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

    def weight(self, layer: Layer) -> torch.Tensor:
        """The weight in floating point, where the engine quantizes it."""
        expr = self.sub.weights[str(self.node.args[2].target)]  # type: ignore[union-attr]
        assert isinstance(expr, Quantize)  # others are in no group
        return layer.evaluate(expr.of, layer.prefix)

    def error(self, layer: Layer, weight: Sequence[torch.Tensor], s: torch.Tensor | None = None) -> Error:
        """How far the 8-bit product is from the true one, on the worst input.

        weight: its data and scale. s: what the input is divided by, a power of two for each channel.
        """
        node, bias, found = self.node, self.node.args[4], []
        for values in layer.values:
            x = as_engine(values[self.x], node.args[0].args[0].args[0])  # type: ignore[union-attr]
            x = x if s is None else (x.float() / s).to(x.dtype)
            plus = as_engine(values[bias.name], bias) if isinstance(bias, fx.Node) else None
            made = ops.w8a8_linear(*ops.quantize(x, self.format), *weight, plus, self.format, node.args[6])
            found.append(compare(made, values[self.name]))
        error = worst(found)
        assert error is not None  # there is an input
        return error


def calibrate(
    program: Program,
    source: TensorSource,
    options: CompileOptions,
    inputs: Inputs,
    device: torch.device = CPU,
) -> Plan:
    """Measures a normalized Program, which is left as it was.

    options: as they were resolved. inputs: tensors that the Program takes. device: where to compute.
    """
    prepared = before_smooth(program, options)
    w8a8 = options.w8a8
    linears = find_linears(prepared, w8a8)
    if not linears:
        return Plan(str(inputs))
    budgets = {s.site: w8a8.budget({s.format}) for s in linears}
    alphas = w8a8.alphas if inputs.recorded else ()
    groups, reasons = find_groups(prepared, linears) if alphas else ([], {})
    plain, scales = measure(prepared, source, linears, inputs, device, Smoothing(groups, alphas, budgets))
    smoothed = [g for g in groups if any(s.alpha is not None for s in scales[g.site].values())]
    reasons |= {s.site: NO_HELP for g in groups if g not in smoothed for s in g.linears}
    found = Measured(plain, budgets, reasons)
    vectors: dict[str, torch.Tensor] = {}
    if smoothed:
        for group in smoothed:
            for prefix, scale in scales[group.site].items():
                vectors |= group.vectors(prefix, scale.s)
                found.alphas |= {(s.site, prefix): scale.alpha for s in group.linears if scale.alpha is not None}
        sites = frozenset(g.site for g in smoothed)
        run_pass(prepared, load_pass("smooth"), replace(w8a8, smoothed=sites))
        after = find_linears(prepared, w8a8)
        found.errors, _ = measure(prepared, WithVectors(source, vectors), after, inputs, device)
    plan = decide(prepared, linears, found, str(inputs))
    return with_smoothing(plan, prepared, [g.site for g in smoothed], reasons, vectors)


def with_smoothing(
    plan: Plan,
    program: Program,
    smoothed: Sequence[str],
    reasons: Mapping[str, str],
    vectors: Mapping[str, torch.Tensor],
) -> Plan:
    """The plan with what is smoothed, by the names that the sites have in the split graphs."""

    def named(site: str) -> list[str]:
        graph, _, path = site.partition(":")
        return [f"{made}:{path}" for made in dict.fromkeys([*plan.names.get(graph, {}).values(), graph])]

    return replace(
        plan,
        smoothed=frozenset(name for site in smoothed for name in named(site)),
        unsmoothed={name: reason for site, reason in reasons.items() for name in named(site)},
        vectors=vectors,
    )


def before_smooth(program: Program, options: CompileOptions) -> Program:
    """The Program as smooth finds it, but with attention in floating point: its quantization is judged by itself."""
    made = program.copy()
    run_passes(made, options.in_floating_point(), passes=story("smooth")[:-1])
    return made


def find_linears(program: Program, w8a8: W8A8Options) -> list[Linear]:
    """The linears that w8a8 would rewrite under its options."""
    result = run_pass(program.copy(), load_pass("w8a8"), w8a8)
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


@dataclass(frozen=True)
class Group:
    """Linears that share an input which can be scaled."""

    linears: tuple[Linear, ...]
    fold: Fold

    @property
    def site(self) -> str:
        """The site that the pass smooth knows the group by."""
        return self.linears[0].site

    def vectors(self, prefix: str, s: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scale of a layer and its inverse, by their full names."""
        start = prefix + self.fold.base
        return {start + "smooth": s.cpu(), start + "unsmooth": (1 / s).cpu()}


def find_groups(program: Program, linears: Sequence[Linear]) -> tuple[list[Group], dict[str, str]]:
    """The groups of linears whose input can be scaled, and why that of the other sites cannot."""
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    known = {(s.graph, s.name): s for s in linears}
    for linear in linears:
        if any(linear in group.linears for group in groups):
            continue
        sub = program.graphs[linear.graph]
        fold = fold_of(next(n for n in sub.graph.nodes if n.name == linear.name), sub)
        if isinstance(fold, str):
            reasons[linear.site] = fold
            continue
        members = [known.get((linear.graph, n.name)) for n in fold.linears]
        if None in members:
            reasons[linear.site] = "it shares its input with a linear that has no 8 bits"
        else:
            groups.append(Group(tuple(m for m in members if m is not None), fold))
    return groups, reasons


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


@dataclass(frozen=True)
class Smoothing:
    """The groups to try scales for, the alphas to try, and the sites' budgets."""

    groups: Sequence[Group] = ()
    alphas: Sequence[float] = ()
    budgets: Mapping[str, float] = field(default_factory=dict)


Scales = dict[str, dict[str, Scale]]


def measure(
    program: Program,
    source: TensorSource,
    linears: Sequence[Linear],
    inputs: Inputs,
    device: torch.device = CPU,
    smoothing: Smoothing = Smoothing(),
) -> tuple[dict[str, dict[str, Error]], Scales]:
    """Site -> prefix of a call -> the error of the 8-bit linear there, on the input where it is largest.

    Also group -> prefix -> the scale that helps it most.
    """
    wanted = _wanted(linears)
    errors: dict[str, dict[str, Error]] = {s.site: {} for s in linears}
    scales: Scales = {g.site: {} for g in smoothing.groups}
    for layer in each_layer(program, source, inputs, wanted, device):
        for linear in linears:
            if linear.graph == layer.graph:
                errors[linear.site][layer.prefix] = _error(linear, layer, device)
        for group in smoothing.groups:
            if group.linears[0].graph == layer.graph:
                plain = {s.site: errors[s.site][layer.prefix].rel_l1 for s in group.linears}
                scales[group.site][layer.prefix] = _scale(group, layer, smoothing, plain, device)
    return errors, scales


@torch.no_grad()
def _scale(group: Group, layer: Layer, smoothing: Smoothing, plain: Mapping[str, float], device: torch.device) -> Scale:
    """The scale that helps a group most in a layer."""
    weights = {s.site: s.weight(layer).to(device) for s in group.linears}
    x = torch.stack([_amax(values[group.linears[0].x]) for values in layer.values]).amax(dim=0)
    w = torch.stack([_amax(weight) for weight in weights.values()]).amax(dim=0)

    def errors(s: torch.Tensor) -> dict[str, float]:
        found = {}
        for linear in group.linears:
            weight = weights[linear.site]
            quantized = ops.quantize((weight.float() * s).to(weight.dtype), linear.format)
            found[linear.site] = linear.error(layer, quantized, s).rel_l1
        return found

    budget = min(smoothing.budgets[s.site] for s in group.linears)
    return best_scale(x, w, smoothing.alphas, plain, budget, errors)


def _amax(value: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel, in float32."""
    return value.float().abs().flatten(0, -2).amax(dim=0)


def _wanted(linears: Sequence[Linear]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for linear in linears:
        found.setdefault(linear.graph, set()).update(linear.wanted)
    return found


@torch.no_grad()
def _error(linear: Linear, layer: Layer, device: torch.device) -> Error:
    """The error of a site in a layer, on the worst input."""
    names = [str(n.target) for n in linear.node.args[2:4]]  # type: ignore[union-attr]
    weights = [layer.evaluate(linear.sub.weights[name], layer.prefix).to(device) for name in names]
    return linear.error(layer, weights)


# ----------------------------------------------------------------------------------------------------------- deciding


@dataclass
class Measured:
    """What was measured of each site, by prefix of the call.

    plain: errors without smoothing. budgets: of the sites. reasons: why a site is not smoothed. errors: as the engine
    is built. alphas: (site, prefix) -> alpha, where it is smoothed.
    """

    plain: Mapping[str, Mapping[str, Error]]
    budgets: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, Error]] = field(default_factory=dict)
    alphas: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.errors = self.errors or self.plain

    def over(self, site: str) -> list[str]:
        """The layers where a site is over its budget."""
        return [prefix for prefix, error in self.errors[site].items() if not error.rel_l1 <= self.budgets[site]]

    def row(self, site: str, wide: Mapping[str, frozenset[str]], everywhere: set[str]) -> SiteError | None:
        """The report's row of a site; None where a figure is no finite number."""
        top = finite(worst(list(self.errors[site].values())))
        if top is None:
            return None
        layers = tuple(
            LayerError(
                prefix.rstrip("."), finite(error) or {}, site not in wide[prefix], self.alphas.get((site, prefix)),
                self.plain[site][prefix].rel_l1 if (site, prefix) in self.alphas else None,
            )
            for prefix, error in self.errors[site].items()
        )  # fmt: skip
        over = self.over(site)
        note = _everywhere(over, self.budgets[site]) if site in everywhere else ""
        if over and site in self.reasons:
            note = "; ".join(filter(None, (note, f"not smoothed: {self.reasons[site]}")))
        return SiteError(site, top, self.budgets[site], layers, note)


def decide(program: Program, linears: Sequence[Linear], found: Measured, inputs: str) -> Plan:
    """Which layers keep which sites wide, and the graphs that this takes."""
    names: dict[str, dict[str, str]] = {}
    keep: dict[str, str] = {}
    sites: list[SiteError] = []
    taken = set(program.graphs)
    for graph in dict.fromkeys(s.graph for s in linears):
        mine = [s.site for s in linears if s.graph == graph]
        over = {site: found.over(site) for site in mine}
        wide = {p: frozenset(s for s in mine if p in over[s]) for p in program.prefixes(graph)}
        wide, everywhere = _few_kinds(wide)
        kinds = sorted(set(wide.values()), key=lambda kind: -sum(k == kind for k in wide.values()))
        called = {kind: graph if not i else _free_name(graph, taken) for i, kind in enumerate(kinds)}
        if len(kinds) > 1:
            names[graph] = {prefix: called[kind] for prefix, kind in wide.items()}
        for kind in kinds:
            layers = [p for p, k in wide.items() if k == kind]
            for site in kind:
                path = site.partition(":")[2]
                keep[f"{called[kind]}:{path}"] = _why(found, site, layers, everywhere)
        rows = (found.row(site, wide, everywhere) for site in mine)
        sites += [row for row in rows if row is not None]
    sites.sort(key=lambda row: -row.error["rel_l1"] / row.budget)
    return Plan(inputs, names, keep, sites=tuple(sites))


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


def _why(found: Measured, site: str, layers: Sequence[str], everywhere: set[str]) -> str:
    """Why a site stays wide in some layers of one kind."""
    over, budget = found.over(site), found.budgets[site]
    if site in everywhere:
        return _everywhere(over, budget)
    here = [p for p in layers if p in over]
    top = max(found.errors[site][p].rel_l1 for p in here)
    return f"relative L1 up to {top:.4f} in {_layers(here)} is over its budget of {budget:g}"


def _everywhere(over: Sequence[str], budget: float) -> str:
    return (
        f"over its budget of {budget:g} in {_layers(over)}, and wide in all layers, since more than {MAX_KINDS} kinds "
        "of the block would arise"
    )


def _layers(prefixes: Iterable[str]) -> str:
    return ranges([p.rstrip(".") for p in prefixes])
