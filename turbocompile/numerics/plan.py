"""Which layers keep which sites wide, decided from the errors that 8 bits cause there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from turbocompile.ir.program import Program
from turbocompile.ir.site_errors import LayerError, SiteError, finite, ranges
from turbocompile.numerics.errors import Error, worst
from turbocompile.numerics.linear_errors import Linear

MAX_KINDS = 4  # graphs that one kind of block may become: each is compiled, tuned and read by a person


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
        wide, everywhere = few_kinds(wide)
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


def few_kinds(wide: Mapping[str, frozenset[str]]) -> tuple[dict[str, frozenset[str]], set[str]]:
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
