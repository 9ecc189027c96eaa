"""The results of the passes: what each pass did, and, apart from it, what was measured of its rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from turbocompile.ir.program import Program, Subgraph
from turbocompile.ir.site_errors import SiteError


@dataclass(frozen=True)
class Rewrite:
    """A site that was rewritten: for each old node, the new node that gives the same value (both by name)."""

    graph: str
    site: str
    replaced: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Verdict:
    """What was measured of a pass's rewrites.

    error: cosine, relative L1 and largest absolute error of the worst site; error_output: the same figures at the
    output of the block. error_reason: why there are no figures. site_errors: of a quantizing pass, site -> (error,
    budget), also of the sites that were refused because they exceed the budget. layers: the errors of each site layer
    by layer, where calibration decided by them; inputs: the tensors that calibration measured on, in words.
    """

    error: Any = None
    error_output: Any = None
    error_reason: str | None = None
    site_errors: Mapping[str, tuple[Any, float]] = field(default_factory=dict)
    layers: tuple[SiteError, ...] = ()
    inputs: str = ""


UNMEASURED = Verdict()


@dataclass(frozen=True)
class PassResult:
    """What a pass did. Counts are over the whole model: a site in a block that is called n times counts n.

    sites: all candidates; rewritten: those of them that the pass replaced. skipped: (site, reason, count) of the
    others. rewrites: the rewritten sites, by the names of the nodes after clean-up. seconds: the time of the pass.
    raw: each rewritten graph before clean-up, with its rewrites by the names there; a judge measures on it, because
    clean-up may merge a site's last node into another node. vetoed: site -> reason, of the sites that a judge refused
    or where the pass raised an error. verdict: what was measured.
    """

    name: str
    kind: str
    sites: int = 0
    rewritten: int = 0
    skipped: tuple[tuple[str, str, int], ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    seconds: float = 0.0
    raw: Mapping[str, tuple[Subgraph, list[Rewrite]]] = field(default_factory=dict)
    vetoed: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict = UNMEASURED

    def with_verdict(self, verdict: Verdict) -> PassResult:
        """The same deeds with another verdict, as of the same pass measured on the twin."""
        return replace(self, verdict=verdict)

    @property
    def error(self) -> Any:
        return self.verdict.error

    @property
    def error_output(self) -> Any:
        return self.verdict.error_output

    @property
    def error_reason(self) -> str | None:
        return self.verdict.error_reason

    @property
    def site_errors(self) -> Mapping[str, tuple[Any, float]]:
        return self.verdict.site_errors

    @property
    def layers(self) -> tuple[SiteError, ...]:
        return self.verdict.layers

    @property
    def inputs(self) -> str:
        return self.verdict.inputs


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a pass: its verdict, and the sites that it refuses -> why."""

    verdict: Verdict = UNMEASURED
    refused: Mapping[str, str] = field(default_factory=dict)


class Judge(Protocol):
    """Measures the rewrites of each pass."""

    def after(self, program: Program, before: Program, result: PassResult) -> Judgement:
        """Called after a pass that rewrote something. before: the Program as the pass found it."""
