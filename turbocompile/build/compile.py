"""From a recipe, or a module, to an engine: capture, normalize, rewrite, verify, emit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbocompile.runtime.adapters import FixedWeights
from turbocompile.report.attentions import chosen
from turbocompile.backends import get_backend
from turbocompile.tools.bench import time_attentions
from turbocompile.numerics.calibrate import Inputs, Plan, calibrate
from turbocompile.capture.export import capture
from turbocompile.runtime.engine import Engine, module_entry
from turbocompile.runtime.folder import new_folder, seal
from turbocompile.errors import CaptureError, EngineError, RecipeError, VerificationError
from turbocompile.hardware import AttentionChoice, target_of
from turbocompile.capture.isolation import compiling
from turbocompile.rewrite.lineage import GraphView, begin, graph_views
from turbocompile.rewrite.normalize import leave, normalize
from turbocompile.numerics.original import NOT_COMPARED, Comparison, Original
from turbocompile.passes.w8a8 import chosen_format
from turbocompile.rewrite.pipeline import PASSES, PassResult, load_pass, run_passes
from turbocompile.files import check_folder
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.printer import print_program
from turbocompile.ir.program import SHELL, Program, Signature, is_op
from turbocompile.recipe.schema import Recipe, Shape, load_recipe
from turbocompile.numerics.recording import MAX_TOKENS, Recorded, given_inputs, read_inputs
from turbocompile.report.report import Report
from turbocompile.ir.serialize import to_json
from turbocompile.ir.signature import (
    bound,
    describe,
    differs,
    fits,
    float_timesteps,
    given_numbers,
    tensors_of,
)
from turbocompile.runtime.tuning import FILE as TUNING
from turbocompile.runtime.tuning import Tuning, merge, tune
from turbocompile.numerics.verifier import Verifier, random_inputs, wrong_forms
from turbocompile.recipe.presets import Geometry
from turbocompile.wan.source import BOUNDARY, BlocksFrom, Source, TransformerSource, open_source
from turbocompile.ir.weights import (
    Emission,
    Evaluator,
    ModuleTensors,
    TensorSource,
    WithVectors,
    copied,
    nbytes,
    write_shards,
)

MODULES_OWN = "the module's"  # where the weights of a report come from
VERIFY_TOKENS = MAX_TOKENS  # a larger call is verified at a smaller shape, or not at all
TWIN = (3, 8, 8)  # patches of frames, height and width: 192 tokens are some blocks of every kernel, and ragged
COMPARED_SHARE = 0.08  # of a build's time that its blocks are compared in
OF_QUANTIZED_ATTENTIONS = ("norm_attention",)  # passes whose sites are the attentions that were quantized
Progress = Callable[[str, float], None]


@dataclass
class Compiled:
    """One module, compiled: Programs by shape name, what the passes did, and the printed graph after each pass.

    views: the graphs at the first shape before and after the passes.
    times: measured seconds of each attention at the first shape, by its site, on the card `measured_on`.
    tuning: which kernels its 8-bit linears run on that card. source: of the tensors that its weights are made of.
    """

    name: str
    programs: dict[str, Program]
    results: list[PassResult]
    printed: dict[str, str]
    views: dict[str, GraphView]
    plan: dict[str, Emission]
    constants: dict[str, torch.Tensor]
    source: TensorSource
    warnings: list[str] = field(default_factory=list)
    unmeasured: str = ""
    compared: str = ""
    times: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""
    tuning: Tuning = field(default_factory=dict)


class Stages:
    """Times the stages of a build and tells whoever watches: progress(stage, 0) at a start, (stage, 1) at an end."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress or (lambda stage, fraction: None)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.progress(name, 0.0)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.progress(name, 1.0)


class _Recorder:
    """Prints the graph after each pass."""

    def __init__(self, printed: dict[str, str]) -> None:
        self.printed = printed

    def before(self, program: Program, pass_: Any) -> None:
        """Nothing: only what comes out is printed."""

    def after(self, program: Program, before: Program, result: PassResult) -> dict[str, str]:
        self.printed[result.name] = print_program(program)
        return {}


Vetoes = dict[str, dict[str, str]]  # pass -> site -> why it stays as it was


@dataclass
class _Captured:
    """The Programs of one module before the passes.

    programs: by the name of their shape, in normal form. twin: the one that rewrites are measured on, or None. raw: as
    captured, by the same names, the twin under "". left: the graphs that have no normal form that is right -> why; they
    are as captured in all Programs.
    """

    programs: dict[str, Program]
    twin: Program | None
    raw: dict[str, Program]
    left: dict[str, str] = field(default_factory=dict)

    def leave(self, left: Mapping[str, str]) -> None:
        """Has graphs stay as captured, in every Program."""
        self.left |= {graph: reason for graph, reason in left.items() if graph not in self.left}
        for name, program in [*self.programs.items(), *([("", self.twin)] if self.twin else [])]:
            leave(program, self.raw[name], {g: why for g, why in self.left.items() if g in program.graphs})

    def warnings(self) -> list[str]:
        """What to say of the graphs that stay as captured."""
        return [
            f"the graph {graph!r} is built as it was captured, and no pass rewrites it: {reason}"
            for graph, reason in self.left.items()
        ]


def compile_programs(
    name: str,
    captured: Mapping[str, Callable[[], Program]],
    source: TensorSource,
    options: Mapping[str, Mapping[str, Any]],
    target: str,
    *,
    rewrite: bool = True,
    twin: Callable[[], Program] | None = None,
    recorded: Recorded | None = None,
    example: Sequence[torch.Tensor] = (),
    stages: Stages | None = None,
) -> Compiled:
    """Captures and rewrites the Programs of one module.

    captured: shape name -> a function that captures it. rewrite: False leaves the graphs as captured. twin: captures
    the small shape at which rewrites are measured; None measures nothing. recorded: what they are measured on, at the
    twin's shape; random tensors where there is nothing, with the masks and integers of `example`, a call of that shape.

    What cannot be trusted is left as it was: a graph whose normal form differs is built as captured, a site that is
    wrong, that fails, or that not every shape has rewritten is left alone at all shapes; both are warned of.
    Raises VerificationError where nothing can be measured, RecipeError where the recorded tensors do not fit.
    """
    stages = stages or Stages()
    options = {k: {**v, "checkpoint_keys": frozenset(source.keys())} for k, v in options.items()}
    if not rewrite:
        return _as_captured(name, captured, source, stages)
    found = _capture_all(captured, twin, stages)
    warned: dict[str, None] = {}
    calibrated = Plan("")
    inputs = None
    if found.twin is not None:
        inputs = calibration_inputs(found.raw[""], source, recorded, example)
        with stages("verify"), _measuring(name, inputs):
            constants = {**found.raw[""].constants, **found.twin.constants}  # the normal form renames some
            found.leave(wrong_forms(found.raw[""], found.twin, Evaluator(source, constants), inputs.calls[0]))
        if in_all_layers(options, target):
            with stages("calibrate"), _collected(), _measuring(name, inputs):
                calibrated = calibrate(found.twin, source, options, target, inputs, _device(target))
            options = {**options, "w8a8": {**options["w8a8"], **calibrated.options}}
            source = WithVectors(source, calibrated.vectors)
            smooth = options["w8a8"].get("smooth", "off")
            if smooth not in ("auto", "off") and not inputs.recorded:
                warned[f"smooth: {smooth} needs recorded inputs (calibration), so that nothing was smoothed"] = None
            for program in (found.twin, *found.programs.values()):
                calibrated.split(program)
    warned |= dict.fromkeys(found.warnings())
    done = _rewrite_all(name, found, source, options, target, inputs, stages)
    warned |= dict.fromkeys(done.warned)
    for result in done.results:
        measured = next((r for r in done.judged if r.name == result.name), None)
        if measured is not None:
            result.error, result.error_output = measured.error, measured.error_output
            result.error_reason, result.site_errors = measured.error_reason, measured.site_errors
        if result.name == "w8a8" and calibrated.sites:
            result.layers, result.inputs = calibrated.sites, calibrated.inputs
            result.error = calibrated.worst_quantized() or result.error
    programs = done.programs
    plan, constants = weight_plan(programs), merged_constants(programs)
    return Compiled(name, programs, done.results, done.printed, done.views, plan, constants, source, list(warned))


def _as_captured(
    name: str, captured: Mapping[str, Callable[[], Program]], source: TensorSource, stages: Stages
) -> Compiled:
    """The Programs of one module without normal form or rewrites."""
    programs: dict[str, Program] = {}
    for shape, make in captured.items():
        with stages("capture"):
            programs[shape] = make()
    views: dict[str, GraphView] = {}
    for program in programs.values():
        start = program.copy()
        begin(program)
        views = views or graph_views(start, program)
    printed = {"capture": print_program(next(iter(programs.values())))}
    return Compiled(name, programs, [], printed, views, weight_plan(programs), merged_constants(programs), source)


@dataclass
class _Rewritten:
    """The Programs after the passes, what those did at the first shape and on the twin, and what they warned of."""

    programs: dict[str, Program] = field(default_factory=dict)
    results: list[PassResult] = field(default_factory=list)
    judged: list[PassResult] = field(default_factory=list)
    printed: dict[str, str] = field(default_factory=dict)
    views: dict[str, GraphView] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


def _rewrite_all(
    name: str,
    found: _Captured,
    source: TensorSource,
    options: Mapping[str, Mapping[str, Any]],
    target: str,
    inputs: Inputs | None,
    stages: Stages,
) -> _Rewritten:
    """Runs the passes on the twin and on the Programs of all shapes until all end with the same rewrites.

    What one of them left alone for a fault is left alone by all. Each round leaves at least one site more alone than
    the last, so that there is an end.
    """
    vetoes: Vetoes = {}
    small_options = options
    if found.twin is not None:
        with stages("rewrite"):
            choices = _attention_choices(found.programs, options, target)
            small_options = {**options, "attention": {**options.get("attention", {}), "choices": choices}}
    while True:
        done = _Rewritten()
        if found.twin is not None and inputs is not None:
            small = found.twin.copy()
            with stages("verify"):
                with _measuring(name, inputs):
                    verifier = Verifier(small, Evaluator(source, small.constants), options, list(inputs.calls[0]))
                with _collected():  # said again for the Programs that are built
                    done.judged = run_passes(small, small_options, target, verifier, vetoes=vetoes)
        given = _joined(vetoes, done.judged)
        everyone = _rewrite_programs(found, options, target, given, done, stages)
        vetoes = _joined(given, *everyone, _disagreements([*([done.judged] if done.judged else []), *everyone]))
        if {p: set(sites) for p, sites in vetoes.items()} == {p: set(sites) for p, sites in given.items()}:
            done.warned += _left_alone(done.judged or done.results)
            return done


def _rewrite_programs(
    found: _Captured,
    options: Mapping[str, Mapping[str, Any]],
    target: str,
    vetoes: Vetoes,
    done: _Rewritten,
    stages: Stages,
) -> list[list[PassResult]]:
    """Runs the passes on copies of the Programs of all shapes; gives what they did at each."""
    everyone: list[list[PassResult]] = []
    for shape, start in found.programs.items():
        first = not everyone
        program = done.programs[shape] = start.copy()
        if first:
            done.printed["normalize"] = print_program(program)
        with stages("rewrite"), _collected() as said:
            recorder = _Recorder(done.printed if first else {})
            results = run_passes(program, options, target, recorder, vetoes=vetoes)
        done.warned += said
        everyone.append(results)
        if first:  # a pass without a rewrite leaves the graph of the one before
            for before, result in zip(["normalize", *(r.name for r in results)], results, strict=False):
                done.printed.setdefault(result.name, done.printed[before])
            done.results, done.views = results, graph_views(start, program)
    return everyone


def _joined(vetoes: Vetoes, *more: Sequence[PassResult] | Vetoes) -> Vetoes:
    """Vetoes and those of passes that ran, the earlier reason first."""
    made = {name: dict(sites) for name, sites in vetoes.items()}
    for one in more:
        for name, sites in one.items() if isinstance(one, dict) else [(r.name, r.vetoed) for r in one]:
            if sites:
                made[name] = {**sites, **made.get(name, {})}
    return made


def _disagreements(everyone: Sequence[Sequence[PassResult]]) -> Vetoes:
    """The sites that were rewritten at one shape and not at another: what was measured says nothing of those.

    An attention may be quantized at one shape and not at another, and then is a site of what follows from it at one.
    """
    found: Vetoes = {}
    for name in dict.fromkeys(r.name for results in everyone for r in results):
        ran = [next((r for r in results if r.name == name), None) for results in everyone]
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
    """What to say of sites that a pass was right to find and wrong to rewrite; a budget is no such reason."""
    return [
        f"the pass {r.name!r} left {site} as it was: {reason}"
        for r in results
        for site, reason in r.vetoed.items()
        if r.kind == "exact" or site not in r.site_errors
    ]


def calibration_inputs(
    program: Program, source: TensorSource, recorded: Recorded | None, example: Sequence[torch.Tensor] = ()
) -> Inputs:
    """What a Program's rewrites are measured on. Raises RecipeError where what was recorded does not fit."""
    if recorded is None:
        made = random_inputs(program, example=example)
        if all(t.is_floating_point() for t in made):
            return Inputs([made])
        # Next for an index of a table with one row, then for a mask that hides all keys of a token.
        others = [random_inputs(program, example=example, zeros=True), random_inputs(program)]
        return Inputs([next((t for t in (made, *others) if _computes(program, source, t)), made)])
    calls = recorded.tensors(program.signature)
    tokens = max_tokens(program)
    if tokens > VERIFY_TOKENS:
        raise RecipeError(
            f"{recorded.where}: the calls have {tokens} tokens, and a build measures on {VERIFY_TOKENS} at most; "
            "record them at a smaller size"
        )
    return Inputs(calls, recorded=True)


def _computes(program: Program, source: TensorSource, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the captured Program gives numbers for these tensors."""
    try:
        verifier = Verifier(program, Evaluator(source, program.constants), inputs=list(tensors))
    except (IndexError, RuntimeError):  # what torch raises for an index out of range, on a CPU and elsewhere
        return False
    return all(bool(t.isfinite().all()) for t in verifier.outputs[SHELL])


@contextlib.contextmanager
def _measuring(name: str, inputs: Inputs) -> Iterator[None]:
    """Says in a sentence that a model does not take what its rewrites were to be measured on."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise VerificationError(
            f"{name} cannot be computed on {inputs} to measure its rewrites ({reason}); give real ones "
            "(calibration), or build with verify: off"
        ) from error


def in_all_layers(options: Mapping[str, Mapping[str, Any]], target: str) -> bool:
    """Whether the options ask for 8-bit linears that are measured in every layer."""
    w8a8 = options.get("w8a8", {})
    wanted = w8a8.get("enabled", True) and w8a8.get("layers", "first") == "all"
    return wanted and chosen_format({**w8a8, "target": target}, None) != "off"


def _device(target: str) -> torch.device:
    """Where to measure what is built for the target."""
    return torch.device("cuda" if target != "cpu" and torch.cuda.is_available() else "cpu")


def _capture_all(
    captured: Mapping[str, Callable[[], Program]], twin: Callable[[], Program] | None, stages: Stages
) -> _Captured:
    """The Programs of all shapes and the twin, as captured and in normal form."""
    programs: dict[str, Program] = {}
    left: dict[str, str] = {}
    for shape, make in [*captured.items(), *([("", twin)] if twin is not None else [])]:
        with stages("capture"):
            programs[shape] = make()
    raw = {shape: program.copy() for shape, program in programs.items()}
    for program in programs.values():
        with stages("normalize"):
            left = {**normalize(program), **left}
    found = _Captured(programs, programs.pop("", None), raw)
    found.leave(left)
    return found


def _attention_choices(
    programs: Mapping[str, Program], options: Mapping[str, Mapping[str, Any]], target: str
) -> dict[str, AttentionChoice]:
    """What `auto` makes of each attention at the engine's shapes: what the small twin has to be, to be a measure."""
    copies = [program.copy() for program in programs.values()]
    passes = [load_pass(name) for name in PASSES[: PASSES.index("attention") + 1]]
    with _collected():
        for program in copies:
            run_passes(program, options, target, passes=passes)
    return chosen(copies)


@contextlib.contextmanager
def _collected() -> Iterator[list[str]]:
    """What passes warn of, as text for the report."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


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


# ---------------------------------------------------------------------------------------------------- from a recipe


def optimize_recipe(
    recipe: Recipe, out: Path | None, *, dry_run: bool = False, progress: Progress | None = None
) -> Report:
    """Builds the engine of a recipe in the new folder `out`. Nothing is left there when it fails.

    dry_run: captures, rewrites and plans, reads no weights and writes nothing (rewrites are measured with synthetic
    ones). progress(stage, fraction). Raises TurbocompileError.
    """
    stages = Stages(progress)
    get_backend(recipe.backend).check(recipe.target)
    if out is not None and not dry_run:
        if out.exists() or out.is_symlink():
            raise EngineError(
                f"{out} exists already, and an engine is never written over; name another folder or remove it"
            )
        check_folder(out)
    with stages("open"):
        source = open_source(recipe)
        components = sum(source.components.sizes().values())  # looks at their files, too
    compiled: dict[str, Compiled] = {}
    recorded = recorded_of(recipe, source)
    for name, transformer in source.transformers.items():
        # Where no weight may be read, rewrites are measured on synthetic ones of the same shapes.
        tensors = source.synthetic(name) if dry_run else transformer.tensors
        compiled[name] = _compile_transformer(
            name, transformer, tensors, recipe, stages, recorded=recorded.get(name), dry_run=dry_run
        )
    if dry_run or out is None:
        return make_report(compiled, recipe, stages, components=components)
    for item in compiled.values():
        measure(item, recipe, stages)
    with new_folder(out) as folder:
        modules: dict[str, Any] = {}
        for name, item in compiled.items():
            evaluate = Evaluator(item.source, item.constants)
            modules[name] = emit_module(item, evaluate, recipe, source.transformers[name].config, folder, stages)
        with stages("components"):
            (folder / "components").mkdir()
            table = source.components.save(folder / "components")
        more = {"task": source.task, "boundary_ratio": source.boundary_ratio}
        report = finish(folder, compiled, modules, table, recipe, stages, more)
    return report


def recorded_of(recipe: Recipe, source: Source) -> dict[str, Recorded]:
    """The recorded calls of each transformer; of two experts each has those of its timesteps. Raises RecipeError."""
    if recipe.calibration is None:
        return {}
    recorded = read_inputs(recipe.calibration)
    names = list(source.transformers)
    if len(names) == 1:
        return {names[0]: recorded}
    edge = 1000.0 * (BOUNDARY[source.task] if source.boundary_ratio is None else source.boundary_ratio)
    found = {names[0]: recorded.between(edge, math.inf), names[1]: recorded.between(-math.inf, edge)}
    for name, word in zip(names, ("of at least", "below"), strict=True):
        if not found[name].calls:
            raise RecipeError(f"{recorded.where}: no call has a timestep {word} {edge:g}, as those of {name} have")
    return found


def recorded_shape(recorded: Recorded, geometry: Geometry) -> Shape:
    """The size of the videos whose latents were recorded. Raises RecipeError where they are of none."""
    latent = recorded.calls[0].get("hidden_states")
    if latent is None or latent.dim() != 5:
        size = "missing" if latent is None else f"of the shape {list(latent.shape)}"
        raise RecipeError(
            f"{recorded.where}: '0.hidden_states' is {size}, and must be (batch, channels, frames, height, width)"
        )
    shape = Shape(**geometry.pixels(latent.shape[2:]), batch=latent.shape[0])
    if (wrong := geometry.wrong(shape)) is not None:
        raise RecipeError(f"{recorded.where}: '0.hidden_states' is the latent of no video: {' '.join(wrong)}")
    return shape


def _compile_transformer(
    name: str,
    transformer: TransformerSource,
    tensors: TensorSource,
    recipe: Recipe,
    stages: Stages,
    *,
    recorded: Recorded | None = None,
    dry_run: bool = False,
) -> Compiled:
    def capturing(source: TransformerSource, shape: Shape) -> Callable[[], Program]:
        def make() -> Program:
            args, kwargs = source.example_inputs(shape)
            return capture(source.build(), args, kwargs)

        return make

    captured = {shape.name: capturing(transformer, shape) for shape in recipe.shapes}
    options = recipe.pass_options()
    if dry_run:  # synthetic weights say nothing of a layer
        options["w8a8"]["layers"] = "first"
    geometry = transformer.geometry
    latent = [count * patch for count, patch in zip(TWIN, geometry.patch, strict=True)]
    tiny = Shape(**geometry.pixels(latent), batch=recipe.shapes[0].batch)
    smallest = min((*recipe.shapes, tiny), key=geometry.tokens)
    if recorded is not None:
        smallest = recorded_shape(recorded, geometry)
    layers = min(2, transformer.config["num_layers"])  # two show what repeats
    shallow = replace(transformer, config={**transformer.config, "num_layers": layers})
    small = functools.cache(capturing(shallow, smallest))
    compared = NOT_COMPARED
    if recipe.verify != "off" and not dry_run:
        with stages("capture"):
            program = small()
        with stages("compare"):
            compared = _compared(shallow, program, smallest, recipe)
    twin: Callable[[], Program] | None = None
    if recipe.verify == "numeric":
        everywhere = in_all_layers(options, recipe.target)
        twin = capturing(transformer, smallest) if everywhere else lambda: small().copy()
    item = compile_programs(
        name, captured, tensors, options, recipe.target,
        rewrite=recipe.passes.enabled, twin=twin, recorded=recorded, stages=stages,
    )  # fmt: skip
    item.warnings += [*compared.warnings, *transformer.notes]
    if compared.calls:
        allowed = COMPARED_SHARE * sum(stages.seconds.values()) - stages.seconds["compare"]
        with stages("compare"):
            blocks = _compared_further(transformer, shallow, small(), smallest, recipe, allowed)
        item.compared = f"{blocks} of {transformer.config['num_layers']} blocks: {compared.words}"
    else:
        item.compared = compared.words
    return item


def _compared(transformer: TransformerSource, program: Program, shape: Shape, recipe: Recipe) -> Comparison:
    """An eager transformer of two blocks beside its graph. Raises VerificationError where they differ."""
    device = _device(recipe.target)
    model = transformer.load().to(device)
    args, kwargs = transformer.example_inputs(shape)
    comparison = Original(model, args, kwargs).compare(program, ModuleTensors(model, device))
    if comparison.wrong:
        raise VerificationError(f"{transformer.where}: {comparison.wrong}")
    return comparison


def _compared_further(
    transformer: TransformerSource, shallow: TransformerSource, program: Program, shape: Shape, recipe: Recipe,
    seconds: float,
) -> int:  # fmt: skip
    """Compares the following blocks, two by two, each pair with its own weights, for so long; how many blocks it were.

    The whole transformer may be too large to run, and its blocks are one graph.
    """
    done, layers = 2, transformer.config["num_layers"]
    started = time.perf_counter()
    while done < layers and (time.perf_counter() - started) * (done / max(done - 2, 1)) < seconds:
        first = min(done, layers - 2)
        _compared(replace(shallow, tensors=BlocksFrom(transformer.tensors, first)), program, shape, recipe)
        done = first + 2
    return min(done, layers)


def measure(item: Compiled, recipe: Recipe, stages: Stages) -> None:
    """Times a module's attentions, and the kernels of its linears, where this machine has the card it is built for."""
    if recipe.backend != "triton" or recipe.target == "cpu" or not torch.cuda.is_available():
        return
    if target_of(torch.cuda.get_device_capability()) != recipe.target:
        return
    with stages("measure"):
        try:
            item.times = time_attentions(next(iter(item.programs.values())), torch.device("cuda"))
            item.measured_on = torch.cuda.get_device_name()
            item.tuning = tune(item.programs, torch.device("cuda"))
        except torch.OutOfMemoryError:  # the card is in use, and an engine can do without
            item.warnings.append("attentions and linears were not all timed: the GPU had too little free memory")


def emit_module(
    item: Compiled, evaluate: Evaluator, recipe: Recipe, config: Mapping[str, Any], folder: Path, stages: Stages
) -> dict[str, Any]:
    """Writes one module's programs, weights and backend files; its entry of the manifest."""
    programs = write_programs(item.name, item.programs, folder)
    with stages("weights"):
        shards = write_shards(item.plan, evaluate, folder, f"weights-{item.name}")
    engine = Engine(
        item.programs, {}, name=item.name, config=json_config(config), dtype=recipe.torch_dtype, backend=recipe.backend
    )
    if recipe.backend != "triton":
        with stages(recipe.backend), _collected() as said:
            weights = {k: evaluate(e.expr, e.prefix) for k, e in item.plan.items()}
            for shape, program in item.programs.items():
                engine.files[shape] = get_backend(recipe.backend).emit(
                    program, weights, folder, f"{item.name}-{shape}", recipe.target
                )
        item.warnings += said
    return module_entry(engine, programs, shards)


def write_programs(module: str, programs: Mapping[str, Program], folder: Path) -> dict[str, str]:
    """Writes `programs/<module>-<shape>.json`; shape name -> file name."""
    (folder / "programs").mkdir(exist_ok=True)
    names = {}
    for shape, program in programs.items():
        names[shape] = f"programs/{module}-{shape}.json"
        text = json.dumps(to_json(program), separators=(",", ":"), ensure_ascii=False)
        (folder / names[shape]).write_text(text, encoding="utf-8")
    return names


def finish(
    folder: Path,
    compiled: Mapping[str, Compiled],
    modules: Mapping[str, Any],
    components: Mapping[str, Any],
    recipe: Recipe,
    stages: Stages,
    more: Mapping[str, Any] | None = None,
    model: str | None = None,
    weights: str | None = None,
) -> Report:
    """Writes the printed graphs, the report and the manifest, and returns the report.

    more: for the manifest. model, weights: for the report, where they are not the recipe's.
    """
    (folder / "graphs").mkdir()
    for item in compiled.values():
        for stage, text in item.printed.items():
            (folder / "graphs" / f"{item.name}-{stage}.txt").write_text(text, encoding="utf-8")
        (folder / "graphs" / f"{item.name}.json").write_text(views_json(item), encoding="utf-8")
    component_bytes = sum(p.stat().st_size for p in (folder / "components").rglob("*") if p.is_file())
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    report = make_report(
        compiled, recipe, stages, components=component_bytes, written=written, model=model, weights=weights
    )
    report.save(folder / "report.json")
    if tuning := merge(*(item.tuning for item in compiled.values())):
        (folder / TUNING).write_text(json.dumps(tuning, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(report.to_html(), encoding="utf-8")
    seal(folder, {
        "recipe": recipe.to_dict(), "target": recipe.target, "versions": versions(), "modules": dict(modules),
        "components": dict(components), **(more or {}),
    })  # fmt: skip
    return report


def make_report(
    compiled: Mapping[str, Compiled],
    recipe: Recipe,
    stages: Stages,
    *,
    components: int = 0,
    written: int | None = None,
    model: str | None = None,
    weights: str | None = None,
) -> Report:
    """The report of all modules. components: bytes of the models around them; written: of the engine, if built."""
    reports = {}
    for name, item in compiled.items():
        reports[name] = Report.from_results(
            item.results, item.programs, unmeasured=item.unmeasured or _unmeasured(recipe), times=item.times,
            measured_on=item.measured_on, compared=item.compared,
            module=name, model=model or recipe.model.path or recipe.model.preset or "", target=recipe.target,
            dtype=recipe.dtype, backend=recipe.backend, weights=weights or recipe.model.weights,
            stages=dict(stages.seconds), warnings=tuple(item.warnings), versions=versions(),
            predicted_bytes=sum(predicted_bytes(i) for i in compiled.values()) + components, engine_bytes=written,
        )  # fmt: skip
    first, *rest = reports.values()
    return replace(first, others={r.module: r for r in rest})


def _unmeasured(recipe: Recipe) -> str:
    if not recipe.passes.enabled:
        return "not measured: nothing was rewritten (passes: off)"
    return f"not measured: the recipe says verify: {recipe.verify}"


def predicted_bytes(item: Compiled) -> int:
    """Bytes that a module takes in an engine: its weights with their headers, its programs and printed graphs."""
    header = sum(len(name) + 80 for name in item.plan)  # name, dtype, shape and offsets in JSON
    programs = sum(len(json.dumps(to_json(p), separators=(",", ":"))) for p in item.programs.values())
    printed = sum(len(text) for text in (*item.printed.values(), views_json(item)))
    return sum(nbytes(e.expr) for e in item.plan.values()) + header + programs + printed


def views_json(item: Compiled) -> str:
    """What `graphs/<module>.json` holds."""
    return json.dumps({k: v.to_dict() for k, v in item.views.items()}, separators=(",", ":"), ensure_ascii=False)


def versions() -> dict[str, str]:
    """What was installed when the engine was built."""
    found = {}
    names = ("turbocompile", "torch", "triton", "diffusers", "transformers", "safetensors", "onnx", "tensorrt-rtx")
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's entries that JSON can hold (diffusers adds private ones)."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if not str(key).startswith("_"):
            with contextlib.suppress(Exception):  # an object's own __str__ may raise anything, a dictionary hold itself
                text = json.dumps(value, default=str, ensure_ascii=False)
                text.encode("utf-8")
                kept[str(key)] = json.loads(text)
    return kept


# ---------------------------------------------------------------------------------------------------- from a module


def optimize(
    model: nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    backend: str = "triton",
    target: str | None = None,
    verify_args: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    calibration: Any = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Compiles a module into an Engine that is called the same way.

    model: any module; it is left as it was, and what is done to it later does not reach the engine. args, kwargs: an
    example call, or several (a list of (args, kwargs) pairs given as `args`), one Program each. Without an example the
    returned module captures at its first call, and again at calls of other shapes or plain arguments. recipe: what the
    passes do: a Recipe, its fields as a mapping (`{"passes": {"w8a8": "int8"}}`), or a file; its model, shapes and
    dtype are not looked at. target: "cpu", "sm90", ...; by default what the model's device is.
    verify_args: a smaller example call to measure rewrites on, for calls of over 4,096 tokens.
    calibration: calls that are like the real ones, of at most 4,096 tokens, to measure 8-bit linears on: a list (each a
    tuple of arguments, a dict of keyword arguments, or a pair of both), a function that returns one, or a file that
    `turbocompile.record` wrote. Without it they are measured on random tensors.

    Raises CaptureError, VerificationError, UnsupportedError, RecipeError.
    """
    _check_arguments(model, verify_args)
    model = getattr(model, "_orig_mod", model)  # of torch.compile: what it wraps is captured
    options = module_recipe(model, recipe, backend, target)
    get_backend(options.backend).check(options.target)
    if calibration is None:
        calibration = options.calibration
    recorded = given_inputs(calibration, model) if calibration is not None else None
    if args is None and kwargs is None:
        return LazyEngine(model, options, verify_args, progress, recorded)
    return _engine_of(model, _calls(args, kwargs), options, verify_args, recorded, Stages(progress))


def _engine_of(
    model: nn.Module,
    calls: Sequence[tuple[Any, Any]],
    options: Recipe,
    verify_args: Any,
    recorded: Recorded | None,
    stages: Stages,
) -> Engine:
    """The engine of a module for some calls of it.

    What the build itself makes is on the CPU; the module's own calls have the default device that the user set.
    """
    default_device = torch.get_default_device()
    with compiling(), torch.device("cpu"):
        return _built(model, calls, options, verify_args, recorded, stages, default_device)


def _built(
    model: nn.Module,
    calls: Sequence[tuple[Any, Any]],
    options: Recipe,
    verify_args: Any,
    recorded: Recorded | None,
    stages: Stages,
    default_device: torch.device,
) -> Engine:
    source = ModuleTensors(model)
    with stages("capture"):
        taken = take(model, calls, verify_args, options, recorded, default_device)
    item = compile_programs(
        "transformer", {k: p.copy for k, p in taken.programs.items()}, source, options.pass_options(), options.target,
        rewrite=options.passes.enabled, twin=taken.twin.copy if taken.twin else None, recorded=recorded,
        example=taken.example, stages=stages,
    )  # fmt: skip
    item.unmeasured = taken.unmeasured
    item.compared = taken.comparison.words
    item.warnings += taken.comparison.warnings
    if taken.unmeasured and options.verify == "numeric" and options.passes.enabled:
        item.warnings.append(f"the rewrites were {taken.unmeasured}")
    measure(item, options, stages)
    evaluate = Evaluator(item.source, item.constants)
    with stages("weights"):
        weights = {name: evaluate(e.expr, e.prefix) for name, e in item.plan.items()}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if device.type == "cpu":  # what is written to the model later does not reach the engine
        weights = {k: copied(t) if source.shares(t) else t for k, t in weights.items()}
    runners: dict[str, Any] = {}
    if options.backend != "triton":
        prove = get_backend(options.backend).prove
        with stages(options.backend), _collected() as said:
            runners = {name: prove(program, weights, device, options.target) for name, program in item.programs.items()}
        item.warnings += said
    report = make_report({"transformer": item}, options, stages, model=type(model).__name__, weights=MODULES_OWN)
    engine = Engine(
        item.programs, weights, name=type(model).__name__, config=config_of(model),
        dtype=_module_dtype(model), report=report, backend=options.backend, tuning=item.tuning,
    )  # fmt: skip
    # the build's own item holds the module's tensors; those that the engine runs are its weights
    written = replace(item, programs=engine.programs, constants={}, source=ModuleTensors(nn.Module()))
    build = EngineBuild(options, written, stages)
    engine.write = lambda built, folder: write_engine(built, folder, build)
    engine.to(device)
    engine.keep({name: runner for name, runner in runners.items() if runner is not None})
    if taken.original is not None and not taken.original.unchanged():
        raise VerificationError(
            f"{type(model).__name__} gives another result after the build than before it, so that something which it "
            "reads was changed; make it anew, and report it"
        )
    return engine


def config_of(model: nn.Module) -> dict[str, Any]:
    """A module's configuration as a dictionary: of diffusers, transformers, dataclasses, namespaces, and other objects
    that have attributes. Empty where there is none.
    """
    config: Any = None
    with contextlib.suppress(Exception):  # a property of the user's may raise anything; without it the engine has none
        config = getattr(model, "config", None)
    found: Any = {}
    if isinstance(config, Mapping):
        found = config
    elif isinstance(config, type):
        found = {}
    elif callable(getattr(config, "to_dict", None)):  # transformers' PretrainedConfig
        found = config.to_dict()
    elif dataclasses.is_dataclass(config):
        found = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(config)}
    elif isinstance(config, tuple) and hasattr(config, "_asdict"):
        found = config._asdict()
    else:
        found = getattr(config, "__dict__", {})
    return {str(k): v for k, v in found.items() if not str(k).startswith("_")} if isinstance(found, Mapping) else {}


def _check_arguments(model: Any, verify_args: Any) -> None:
    """Raises CaptureError for what is no module that can be captured, RecipeError for verify_args that are no pair."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise CaptureError(f"optimize() takes a module, and {model.__name__} is a class: give it {model.__name__}(...)")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("optimize() takes the module itself, and this is what TorchScript made of it")
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"optimize() takes a torch.nn.Module, not {type(model).__name__}; for a folder there is turbocompile.load, "
            "for a recipe `turbocompile optimize`"
        )
    waiting = next((n for n, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)), None)
    if waiting is not None:
        raise CaptureError(f"{type(model).__name__} has parameters without a shape yet ({waiting}); call it once first")
    pair = isinstance(verify_args, (tuple, list)) and len(verify_args) == 2
    fits = pair and isinstance(verify_args[0], (tuple, list)) and isinstance(verify_args[1], Mapping)
    if verify_args is not None and not fits:
        raise RecipeError("optimize(verify_args=...) is a pair (args, kwargs): a tuple and a dict")


@dataclass(frozen=True)
class EngineBuild:
    """What `Engine.save` needs beside the engine: how it was built."""

    recipe: Recipe
    compiled: Compiled
    stages: Stages


class LazyEngine(FixedWeights, nn.Module):
    """A module that compiles itself at its first call, for that call's shapes and plain arguments; other calls add
    theirs. In a pipeline it stands for the module: it has the module's attributes, and moves with it.
    """

    model: nn.Module
    engine: Engine | None

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        verify_args: Any,
        progress: Progress | None,
        recorded: Recorded | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.recipe, self.verify_args, self.progress, self.recorded = recipe, verify_args, progress, recorded
        self.calls: list[tuple[Any, Any]] = []
        self.engine = None
        self.model_name = type(model).__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine = self.engine
        if engine is None or not engine.accepts(args, kwargs):
            engine = self._grown(args, kwargs)
        return engine(*args, **kwargs)

    def _grown(self, args: Any, kwargs: Any) -> Engine:
        """The engine with a Program for this call, too; another thread may have added it meanwhile."""
        with compiling():
            if self.engine is None or not self.engine.accepts(args, kwargs):
                calls = [*self.calls, (args, kwargs)]
                self.engine = _engine_of(
                    self.model, calls, self.recipe, self.verify_args, self.recorded, Stages(self.progress)
                )
                self.calls = [(_to_meta(a), _to_meta(k)) for a, k in calls]
            return self.engine

    def __getattr__(self, name: str) -> Any:
        """The module's own attributes: config, dtype, device, cache_context, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__:
                raise
            return getattr(self.model, name)

    def _apply(self, fn: Any, recurse: bool = True) -> LazyEngine:
        """Moves the module, and the engine with it. Where that changes the module's dtype, it is compiled anew."""
        before = _module_dtype(self.model)
        self.model._apply(fn)
        if self.engine is not None:
            self.engine = self.engine._apply(fn) if _module_dtype(self.model) == before else None
            self.calls = self.calls if self.engine is not None else []
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The module's."""
        return self.model.parameters(recurse)

    @property
    def report(self) -> Report | None:
        """The report of the last compilation; None before the first call."""
        return self.engine.report if self.engine is not None else None

    def save(self, folder: str | Path) -> Path:
        """Writes the engine folder. Raises EngineError before the first call."""
        if self.engine is None:
            raise EngineError("nothing was captured yet; call the module once, or give optimize() an example call")
        return self.engine.save(folder)


def module_recipe(model: nn.Module, recipe: Any, backend: str, target: str | None) -> Recipe:
    """The recipe that a module is compiled by: the given passes, the module's dtype, the target its device has."""
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    if isinstance(recipe, Recipe):
        fields: dict[str, Any] = recipe.to_dict()
    else:
        fields = dict(recipe or {})
    device = next((p.device.type for p in model.parameters()), "cpu")
    fields.setdefault("backend", backend)
    if target is not None:
        fields["target"] = target
    fields.setdefault("target", "host" if device == "cuda" else "cpu")
    fields["model"] = {"preset": "wan-tiny"}  # a recipe has a model; here it is the module, and this one is not read
    dtype = str(_module_dtype(model)).removeprefix("torch.")
    fields["dtype"] = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    return Recipe.from_dict(fields, "optimize(recipe=...)")


def _module_dtype(model: nn.Module) -> torch.dtype:
    """The module's own word for its dtype, else that of most of its floating parameters."""
    own = getattr(model, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    sizes: dict[torch.dtype, int] = {}
    for p in model.parameters():
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def _calls(args: Any, kwargs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    several = isinstance(args, list) and args and all(isinstance(c, tuple) and len(c) == 2 for c in args)
    if several and kwargs is None and all(isinstance(c[1], Mapping) for c in args):
        return [(tuple(a), dict(k)) for a, k in args]
    given = args if isinstance(args, (tuple, list)) else (args,) if args is not None else ()
    return [(tuple(given), dict(kwargs or {}))]


@dataclass(frozen=True)
class Taken:
    """What was captured of a module. twin: the Program that rewrites are measured on, None and `unmeasured` why.

    example: the tensors of the twin's call. comparison: of the module with the graph; original: what it was made by.
    """

    programs: dict[str, Program]
    twin: Program | None
    unmeasured: str
    example: list[torch.Tensor]
    comparison: Comparison = NOT_COMPARED
    original: Original | None = None


@dataclass(frozen=True)
class _Way:
    """How calls are captured. numbers: paths of the Python floats that are inputs. float_timesteps: integers are taken
    as floats first.
    """

    numbers: frozenset[str] = frozenset()
    float_timesteps: bool = True


def take(
    model: nn.Module,
    calls: Sequence[tuple[Any, Any]],
    verify_args: Any,
    recipe: Recipe,
    recorded: Recorded | None,
    default_device: torch.device | None = None,
) -> Taken:
    """Captures a module for some calls, in the way that serves most calls of those whose graph is the module.

    Raises CaptureError where it cannot be captured, or where no graph gives the module's own results.
    """
    ways = _ways(model, calls, recipe, recorded)
    for way in ways:
        try:
            taken = _taken(model, calls, verify_args, recipe, recorded, way, default_device)
        except CaptureError:
            if way == ways[-1]:
                raise
            continue
        if not taken.comparison.wrong:
            return taken
    raise CaptureError(taken.comparison.wrong)


def _ways(model: nn.Module, calls: Sequence[tuple[Any, Any]], recipe: Recipe, recorded: Recorded | None) -> list[_Way]:
    """The ways to try, the last of which is the example call alone. Where nothing is compared, only what is sure."""
    if recipe.verify == "off":
        return [_Way()]
    ways = [_Way()]
    numbers = _changing_numbers(model, calls)
    if recorded is None and numbers:
        ways.insert(0, _Way(numbers=numbers))
    signature, _ = describe(model, *calls[0])
    if float_timesteps(signature) != signature:
        ways.append(_Way(float_timesteps=False))
    return ways


def _changing_numbers(model: nn.Module, calls: Sequence[tuple[Any, Any]]) -> frozenset[str]:
    """Floats that are arguments by themselves; of those in containers (options of a LoRA, which fold into weights) the
    ones that differ between the calls.
    """
    given = [given_numbers(model, *call) for call in calls]
    paths = {path for one in given for path in one}
    differing = {path for path in paths if len({one[path] for one in given if path in one}) > 1}
    return frozenset(path for path in paths if "." not in path) | differing


def _taken(
    model: nn.Module,
    calls: Sequence[tuple[Any, Any]],
    verify_args: Any,
    recipe: Recipe,
    recorded: Recorded | None,
    way: _Way,
    default_device: torch.device | None,
) -> Taken:
    """Captures in one way, and compares."""

    def captured(args: Any, kwargs: Any) -> Program:
        return capture(model, args, kwargs, numbers=way.numbers, float_timesteps=way.float_timesteps)

    programs: dict[str, Program] = {}
    made: list[tuple[tuple[Any, Any], Program]] = []
    for args, kwargs in calls:
        if not any(_is_of(program.signature, args, kwargs) for program in programs.values()):
            program = captured(args, kwargs)
            programs[f"call-{len(programs)}" if programs else "call"] = program
            made.append(((args, kwargs), program))
    if recipe.verify == "off":
        return Taken(programs, None, f"not measured: the recipe says verify: {recipe.verify}", [])
    if any(p.device.type == "meta" for p in model.parameters()):
        reason = "not measured: the parameters are on the meta device, so there are no numbers"
        return Taken(programs, None, reason, [])
    call, twin = min(made, key=lambda one: sum(t.numel() for t in _tensors(one[0])))
    if recorded is not None:
        call = recorded.example(model, *calls[0])
        try:
            twin = captured(*call)
        except CaptureError as error:
            raise RecipeError(f"{recorded.where}: the model does not take these inputs ({error})") from error
    elif verify_args is not None:
        call = tuple(verify_args[0]), dict(verify_args[1])
        twin = captured(*call)
    original = Original(model, *call, default_device)
    tokens = max_tokens(twin)
    if tokens > VERIFY_TOKENS:
        reason = (
            f"not measured: the call has {tokens} tokens, more than {VERIFY_TOKENS}; "
            "give optimize() a smaller call as verify_args=(args, kwargs)"
        )
        if original.device.type == "cpu":
            return Taken(programs, None, reason, [])
        return Taken(
            programs, None, reason, [], original.compare(twin, ModuleTensors(model, original.device)), original
        )
    compared = original.compare(twin, ModuleTensors(model, original.device))
    if recipe.verify != "numeric":
        reason = f"not measured: the recipe says verify: {recipe.verify}"
        return Taken(programs, None, reason, [], compared, original)
    example = [] if recorded is not None else describe(model, *call, numbers=way.numbers)[1]
    return Taken(programs, twin, "", example, compared, original)


def _is_of(signature: Signature, args: Any, kwargs: Any) -> bool:
    """Whether a call is one that the signature stands for already."""
    given = bound(signature, args, kwargs)
    return not differs(signature, given) and fits(signature, tensors_of(signature, given))


def max_tokens(program: Program) -> int:
    """The largest number of rows that a linear of the Program sees in one sample."""
    sizes = [1]
    for sub in program.graphs.values():
        for node in sub.graph.nodes:
            if is_op(node, torch.ops.aten.linear) and node.meta["val"].dim() > 2:
                sizes.append(node.meta["val"].shape[-2])
    return max(sizes)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in _tensors(item)]


def _to_meta(value: Any) -> Any:
    """The call with tensors that have no memory, so that a module that recompiles keeps no activations.

    Masks and indices are small, and rewrites are measured on them.
    """
    if isinstance(value, torch.Tensor):
        floating = value.is_floating_point() or value.is_complex()
        return torch.empty_like(value, device="meta") if floating else value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _to_meta(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(v) for v in value)
    return value


def write_engine(engine: Engine, folder: Path, build: EngineBuild) -> None:
    """Writes a compiled module's engine into the empty `folder`."""
    item, recipe = build.compiled, build.recipe
    programs = write_programs(item.name, engine.programs, folder)
    names = list(item.plan)
    shards = write_shards(item.plan, _Stored(engine.weights, names), folder, f"weights-{item.name}")
    for shape, program in engine.programs.items():
        weights = {k: v.cpu() for k, v in engine.weights.items()}
        files = get_backend(engine.backend).emit(program, weights, folder, f"{item.name}-{shape}", recipe.target)
        if files:
            engine.files[shape] = files
    entry = module_entry(engine, programs, shards)
    entry["config"] = json_config(engine.config)
    finish(
        folder, {item.name: item}, {item.name: entry}, {}, recipe, build.stages, model=engine.model_name,
        weights=MODULES_OWN,
    )  # fmt: skip


class _Stored(Evaluator):
    """Hands the evaluated weights of an engine to `write_shards`, in the order of the plan."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self.weights, self.names = weights, iter(names)

    def __call__(self, expr: Any, prefix: str = "") -> torch.Tensor:
        return self.weights[next(self.names)].cpu().contiguous()
