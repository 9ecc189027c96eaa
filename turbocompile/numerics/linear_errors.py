"""How far 8 bits move each linear in each layer, without and with scales of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from turbocompile.ir.evaluate import TensorSource
from turbocompile.ir.program import SHELL, Program, Subgraph, is_op
from turbocompile.ir.weights import Quantize
from turbocompile.kernels import ops
from turbocompile.numerics.errors import Error, compare, worst
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.interpreter import CPU
from turbocompile.numerics.layer_values import Layer, each_layer
from turbocompile.numerics.program_values import as_engine
from turbocompile.numerics.smoothing import Scale, best_scale
from turbocompile.recipe.options import W8A8Options
from turbocompile.rewrite.pipeline import load_pass
from turbocompile.rewrite.run_pass import run_pass
from turbocompile.rewrite.scale_folding import Fold, fold_of


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
