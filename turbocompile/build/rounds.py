"""The passes run on the Programs of all shapes, and on the twin, until all end with the same rewrites.

A site that one Program leaves alone for a fault is left alone in all of them. Each round leaves at least one site more
alone than the round before, so that there is an end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turbocompile.build.captured import Captured
from turbocompile.build.inputs import measuring
from turbocompile.build.stages import Stages, warnings_collected
from turbocompile.hardware import AttentionChoice
from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.graph_view import GraphView
from turbocompile.ir.printer import print_program
from turbocompile.ir.program import Program
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.verifier import Verifier
from turbocompile.recipe.options import CompileOptions
from turbocompile.report.attentions import chosen
from turbocompile.rewrite.lineage import graph_views
from turbocompile.rewrite.pipeline import run_passes, story
from turbocompile.rewrite.results import Judgement, PassResult

OF_QUANTIZED_ATTENTIONS = ("norm_attention",)  # passes whose sites are the attentions that were quantized
Vetoes = dict[str, dict[str, str]]  # pass -> site -> why it stays as it was


@dataclass
class Rewritten:
    """The Programs after the passes.

    results: what the passes did at the first shape; judged: what they did on the twin, with their errors. printed: the
    first shape's graphs after each pass, as text; views: before and after all of them. warned: in sentences.
    """

    programs: dict[str, Program] = field(default_factory=dict)
    results: list[PassResult] = field(default_factory=list)
    judged: list[PassResult] = field(default_factory=list)
    printed: dict[str, str] = field(default_factory=dict)
    views: dict[str, GraphView] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


class _Watch:
    """The hook of `run_passes`: has a verifier judge each pass, where there is one, and prints the graph after it."""

    def __init__(self, verifier: Verifier | None, printed: dict[str, str] | None) -> None:
        self.verifier, self.printed = verifier, printed

    def after(self, program: Program, before: Program, result: PassResult) -> Judgement:
        """What the verifier says of the pass."""
        judgement = self.verifier.after(program, before, result) if self.verifier is not None else Judgement()
        if self.printed is not None and not judgement.refused:
            self.printed[result.name] = print_program(program)
        return judgement


def rewrite_all(
    name: str,
    captured: Captured,
    source: TensorSource,
    options: CompileOptions,
    inputs: Inputs | None,
    stages: Stages,
    weights: Weights | None = None,
) -> Rewritten:
    """Runs the passes until all Programs agree.

    inputs: what the twin is measured on; None where there is no twin. weights: values of `source` that are known
    already.
    """
    vetoes: Vetoes = {}
    small_options = options
    if captured.twin is not None and not captured.twin_shape:
        with stages("rewrite"):
            small_options = options.with_choices(_choices(captured.programs, options))
    while True:
        done, everyone = Rewritten(), []
        if captured.twin is not None and inputs is not None:
            known = weights or Weights(Evaluator(source, captured.measured[1].constants))
            everyone.append(_judged(name, captured, known, small_options, inputs, vetoes, done, stages))
        given = _joined(vetoes, done.judged)
        for shape, start in captured.programs.items():
            if shape in done.programs:  # it is the twin's, which the passes have been through
                continue
            everyone.append(_rewritten(shape, start, options, given, done, stages))
        done.programs = {shape: done.programs[shape] for shape in captured.programs}
        vetoes = _joined(given, *everyone, _disagreements(everyone))
        if {p: set(sites) for p, sites in vetoes.items()} == {p: set(sites) for p, sites in given.items()}:
            done.warned += _left_alone(done.judged or done.results)
            return done


def _judged(
    name: str,
    captured: Captured,
    weights: Weights,
    options: CompileOptions,
    inputs: Inputs,
    vetoes: Vetoes,
    done: Rewritten,
    stages: Stages,
) -> list[PassResult]:
    """Runs the passes on the twin, each judged; where it is of an engine's shape, that shape is done with it."""
    small = captured.measured[1].copy()
    shape = captured.twin_shape
    first = bool(shape) and shape == next(iter(captured.programs))
    with stages("verify"):
        with measuring(name, inputs):
            verifier = Verifier(small, weights, options, list(inputs.calls[0]))
        if first:
            done.printed["normalize"] = print_program(small)
        with warnings_collected() as said:
            done.judged = run_passes(small, options, _Watch(verifier, done.printed if first else None), vetoes=vetoes)
    if shape:  # of a twin of another shape everything is said again for the Programs that are built
        done.programs[shape] = small
        done.warned += said
    if first:
        _show(done, captured.measured[1], small, done.judged)
    return done.judged


def _rewritten(
    shape: str, start: Program, options: CompileOptions, vetoes: Vetoes, done: Rewritten, stages: Stages
) -> list[PassResult]:
    """Runs the passes on a copy of one shape's Program."""
    first = not done.printed
    program = done.programs[shape] = start.copy()
    if first:
        done.printed["normalize"] = print_program(program)
    with stages("rewrite"), warnings_collected() as said:
        results = run_passes(program, options, _Watch(None, done.printed if first else None), vetoes=vetoes)
    done.warned += said
    if first:
        _show(done, start, program, results)
    return results


def _show(done: Rewritten, start: Program, program: Program, results: list[PassResult]) -> None:
    """Keeps what the passes did at the first shape. A pass without a rewrite leaves the graph of the one before."""
    for before, result in zip(["normalize", *(r.name for r in results)], results, strict=False):
        done.printed.setdefault(result.name, done.printed[before])
    done.results, done.views = results, graph_views(start, program)


def _choices(programs: Mapping[str, Program], options: CompileOptions) -> dict[str, AttentionChoice]:
    """What each attention is at the engine's shapes: a small twin has to be the same, to be a measure of it."""
    if options.attention.others is not None:
        return {}
    copies = [program.copy() for program in programs.values()]
    with warnings_collected():
        for program in copies:
            run_passes(program, options, passes=story("attention"))
    return chosen(copies)


def _joined(vetoes: Vetoes, *more: Sequence[PassResult] | Vetoes) -> Vetoes:
    """Vetoes and those of passes that ran, the earlier reason first."""
    made = {name: dict(sites) for name, sites in vetoes.items()}
    for one in more:
        for name, sites in one.items() if isinstance(one, dict) else [(r.name, r.vetoed) for r in one]:
            if sites:
                made[name] = {**sites, **made.get(name, {})}
    return made


def _disagreements(everyone: Sequence[Sequence[PassResult]]) -> Vetoes:
    """The sites that were rewritten at one shape and not at another, because what was measured says nothing of these.

    An attention may be quantized at one shape and not at another, and then is a site of what follows from it at one.
    """
    found: Vetoes = {}
    for name in dict.fromkeys(r.name for results in everyone for r in results):
        ran: list[Any] = [next((r for r in results if r.name == name), None) for results in everyone]
        rewritten: list[set[str]] = [{x.site for x in r.rewrites} if r else set() for r in ran]
        differ = rewritten[0].union(*rewritten) - rewritten[0].intersection(*rewritten)
        if name in OF_QUANTIZED_ATTENTIONS:
            skipped: list[set[str]] = [{s for s, _, _ in r.skipped} if r else set() for r in ran]
            seen = [one | other for one, other in zip(rewritten, skipped, strict=True)]
            differ &= seen[0].intersection(*seen)
        if differ:
            reason = "rewritten at one shape and not at another, so that it was left alone at all"
            found[name] = dict.fromkeys(sorted(differ), reason)
    return found


def _left_alone(results: Sequence[PassResult]) -> list[str]:
    """A sentence for each site that a pass was right to find and wrong to rewrite; a budget is no such reason."""
    return [
        f"the pass {r.name!r} left {site} as it was: {reason}"
        for r in results
        for site, reason in r.vetoed.items()
        if r.kind == "exact" or site not in r.site_errors
    ]
