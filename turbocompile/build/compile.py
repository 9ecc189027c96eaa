"""The story of a compilation: captured Programs, normal form, calibration, judged rewrites, planned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from turbocompile.backends import Tuning
from turbocompile.build.captured import Captured, Twin
from turbocompile.build.inputs import calibration_inputs, measuring
from turbocompile.build.rounds import Rewritten, rewrite_all
from turbocompile.build.stages import Stages, warnings_collected
from turbocompile.errors import EngineError, VerificationError
from turbocompile.ir.emit import Emission, factor_plan, weight_plan
from turbocompile.ir.evaluate import Evaluator, TensorSource, WithVectors
from turbocompile.ir.graph_view import GraphView
from turbocompile.ir.printer import print_program
from turbocompile.ir.program import Program
from turbocompile.numerics.calibrate import calibrate
from turbocompile.numerics.inputs import Inputs
from turbocompile.numerics.normal_forms import wrong_forms
from turbocompile.numerics.plan import Plan
from turbocompile.numerics.program_values import Weights
from turbocompile.numerics.recording import Recorded
from turbocompile.numerics.shapes import wrong_shapes
from turbocompile.recipe.options import CompileOptions
from turbocompile.rewrite.lineage import begin, graph_views
from turbocompile.rewrite.results import PassResult


@dataclass(frozen=True)
class Compiled:
    """One module, compiled.

    programs: by the name of their shape. results: what the passes did. printed: the first shape's graphs after each
    pass, as text; views: before and after all of them. plan: stored name of a weight -> how it is made. constants: the
    values of the Programs' constants. source: of the tensors that the weights are made of. warnings: in sentences.
    unmeasured: why no rewrite was measured, "" where they were. compared: what came of the comparison with the model
    itself, in words. times: measured seconds of each attention at the first shape, by its site, on the card
    `measured_on`. tuning: which kernels its 8-bit linears run on that card.
    """

    name: str
    programs: Mapping[str, Program]
    results: Sequence[PassResult]
    printed: Mapping[str, str]
    views: Mapping[str, GraphView]
    plan: Mapping[str, Emission]
    constants: Mapping[str, torch.Tensor]
    source: TensorSource
    warnings: tuple[str, ...] = ()
    unmeasured: str = ""
    compared: str = ""
    times: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    tuning: Tuning = field(default_factory=dict)

    def warned(self, *warnings: str) -> Compiled:
        """With further warnings, each said once."""
        return replace(self, warnings=tuple(dict.fromkeys((*self.warnings, *warnings))))


def compile_programs(
    name: str,
    programs: Mapping[str, Program],
    source: TensorSource,
    options: CompileOptions,
    *,
    twin: Twin | None = None,
    recorded: Recorded | None = None,
    example: Sequence[torch.Tensor] = (),
    stages: Stages | None = None,
) -> Compiled:
    """Rewrites the Programs of one module, which are left as they were captured.

    programs: by the name of their shape. twin: what rewrites are measured on; None measures nothing. recorded: calls
    that it is measured with, at the twin's shape; random tensors where there are none, with the masks and integers of
    `example`, a call of that shape.

    Nothing that cannot be trusted is used: a graph whose normal form differs is built as captured, and a site that is
    wrong, that fails, or that not every shape has rewritten is left alone at all shapes. Both are warned of.
    Raises VerificationError where nothing can be measured, RecipeError where the recorded tensors do not fit.
    """
    stages = stages or Stages()
    if not options.rewrite:
        return _as_captured(name, programs, source)
    captured = Captured(programs, twin, stages)
    inputs, calibrated, warned = None, Plan(""), []
    weights: Weights | None = None
    if captured.twin is not None:
        inputs = calibration_inputs(captured.measured[0], source, recorded, example)
        weights = _check_forms(name, captured, source, inputs, stages)
        if options.w8a8.is_calibrated:
            calibrated = _calibrated(name, captured, source, options, inputs, stages)
            options = options.with_calibration(calibrated.keep, calibrated.smoothed, calibrated.unsmoothed)
            source, weights = WithVectors(source, calibrated.vectors), None
            if options.w8a8.alpha_named and not inputs.recorded:
                alpha = options.w8a8.alphas[0]
                warned.append(f"smooth: {alpha:g} needs recorded inputs (calibration), so that nothing was smoothed")
    done = rewrite_all(name, captured, source, options, inputs, stages, weights)
    if options.verify == "shapes":
        _check_shapes(name, done.programs, captured, stages)
    plan = dict(sorted({**factor_plan(done.programs), **weight_plan(done.programs)}.items()))
    constants = merged_constants(done.programs)
    results = _with_verdicts(done, calibrated)
    made = Compiled(name, done.programs, results, done.printed, done.views, plan, constants, source)
    return made.warned(*warned, *captured.warnings(), *done.warned)


def _as_captured(name: str, programs: Mapping[str, Program], source: TensorSource) -> Compiled:
    """The Programs of one module without normal form or rewrites."""
    kept = {shape: program.copy() for shape, program in programs.items()}
    views: dict[str, GraphView] = {}
    for program in kept.values():
        start = program.copy()
        begin(program)
        views = views or graph_views(start, program)
    printed = {"capture": print_program(next(iter(kept.values())))}
    return Compiled(name, kept, [], printed, views, weight_plan(kept), merged_constants(kept), source)


def _check_forms(name: str, captured: Captured, source: TensorSource, inputs: Inputs, stages: Stages) -> Weights:
    """Has the graphs whose normal form gives other numbers stay as captured. Returns the weights' values."""
    raw, twin = captured.measured
    with stages("verify"), measuring(name, inputs):
        constants = {**raw.constants, **twin.constants}  # the normal form renames some
        weights = Weights(Evaluator(source, constants))
        captured.leave(wrong_forms(raw, twin, weights, inputs.calls[0]))
    return weights


def _calibrated(
    name: str, captured: Captured, source: TensorSource, options: CompileOptions, inputs: Inputs, stages: Stages
) -> Plan:
    """Measures 8-bit linears in each layer, and gives the layers of all Programs the graphs that this takes."""
    with stages("calibrate"), warnings_collected(), measuring(name, inputs):
        plan = calibrate(captured.measured[1], source, options, inputs, device_of(options.target))
    for program, _ in captured.everything():
        plan.split(program)
    return plan


def _with_verdicts(done: Rewritten, calibrated: Plan) -> list[PassResult]:
    """What the passes did at the first shape, with what was measured on the twin, joined by the pass's name."""
    verdicts = {result.name: result.verdict for result in done.judged}
    if "w8a8" in verdicts and calibrated.sites:
        measured = verdicts["w8a8"]
        error = calibrated.worst_quantized() or measured.error
        verdicts["w8a8"] = replace(measured, error=error, layers=calibrated.sites, inputs=calibrated.inputs)
    return [result.with_verdict(verdicts.get(result.name, result.verdict)) for result in done.results]


def _check_shapes(name: str, programs: Mapping[str, Program], captured: Captured, stages: Stages) -> None:
    """Raises VerificationError where a rewritten Program has other shapes or dtypes than the captured one."""
    with stages("verify"):
        for shape, program in programs.items():
            reason = wrong_shapes(program, captured.raw[shape])
            if reason:
                raise VerificationError(f"{name} at {shape}: {reason}; verify: numeric finds the site and leaves it")


def device_of(target: str) -> torch.device:
    """Where to measure what is built for the target."""
    return torch.device("cuda" if target != "cpu" and torch.cuda.is_available() else "cpu")


def merged_constants(programs: Mapping[str, Program]) -> dict[str, torch.Tensor]:
    """The constants of all shapes. Raises EngineError where one name holds different values."""
    found: dict[str, torch.Tensor] = {}
    for program in programs.values():
        for key, tensor in program.constants.items():
            known = found.setdefault(key, tensor)
            if known is not tensor and not torch.equal(known, tensor):
                raise EngineError(
                    f"the constant {key!r} differs between the shapes of the engine; build one engine a shape"
                )
    return found
