"""From a recipe to an engine's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbocompile.backends import get_backend
from turbocompile.build.captured import Twin
from turbocompile.build.compile import Compiled, compile_programs, device_of
from turbocompile.build.kept_shards import check_room, fingerprint, kept_shards
from turbocompile.build.measure import measured
from turbocompile.build.stages import Progress, Stages
from turbocompile.build.write import Origin, finish, make_report, write_recipes_module, write_recipes_weights
from turbocompile.capture.deepen import CAPTURED, deepened
from turbocompile.capture.export import capture
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.errors import EngineError, RecipeError, VerificationError
from turbocompile.files import check_folder
from turbocompile.ir.evaluate import Evaluator, TensorSource
from turbocompile.ir.program import Program
from turbocompile.numerics.original import NOT_COMPARED, Comparison, Original
from turbocompile.numerics.recording import Recorded, read_inputs
from turbocompile.recipe.configuration import is_vace
from turbocompile.recipe.options import CompileOptions, resolve
from turbocompile.recipe.presets import Geometry, boundary_of
from turbocompile.recipe.schema import Recipe, Shape
from turbocompile.report.report import Report
from turbocompile.runtime.folder import new_folder
from turbocompile.runtime.tuning import merge
from turbocompile.wan.as_stored import second_errors
from turbocompile.wan.source import Source, open_source
from turbocompile.wan.transformer import BlocksFrom, TransformerSource

TWIN = (3, 8, 8)  # patches of frames, height and width: 192 tokens are some blocks of every kernel, and ragged
COMPARED_SHARE = 0.08  # of a build's time that its blocks are compared in


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
    recorded = recorded_of(recipe, source)
    compiled: dict[str, Compiled] = {}
    for name, transformer in source.transformers.items():
        # Where no weight may be read, rewrites are measured on synthetic ones of the same shapes.
        tensors = source.synthetic(name) if dry_run else transformer.tensors
        build = _TransformerBuild(name, transformer, tensors, recipe, stages, recorded.get(name), dry_run)
        compiled[name] = build.compiled()
    if dry_run or out is None:
        return make_report(compiled, recipe, Origin.of_recipe(recipe), stages, components=components)
    places = {name: transformer.where for name, transformer in source.transformers.items()}
    compiled = {name: measured(item, recipe, stages) for name, item in compiled.items()}
    with kept_shards(out, fingerprint(recipe, compiled, places)) as shards:
        check_room(out, shards, compiled, components)
        device = device_of(recipe.target)
        evaluate = {name: Evaluator(item.source, item.constants, device) for name, item in compiled.items()}
        written = {name: write_recipes_weights(item, evaluate[name], shards, stages) for name, item in compiled.items()}
        with new_folder(out) as folder:
            for path in shards.glob("*.safetensors"):
                path.rename(folder / path.name)
            return _write(folder, compiled, evaluate, written, source, recipe, stages)


def _write(
    folder: Path,
    compiled: dict[str, Compiled],
    evaluate: Mapping[str, Evaluator],
    shards: Mapping[str, list[str]],
    source: Source,
    recipe: Recipe,
    stages: Stages,
) -> Report:
    """Writes all modules, whose weights are there, and the models around them."""
    modules: dict[str, Any] = {}
    for name, item in compiled.items():
        config = source.transformers[name].config
        compiled[name], modules[name] = write_recipes_module(
            item, evaluate[name], recipe, config, shards[name], folder, stages
        )
    with stages("components"):
        (folder / "components").mkdir()
        components = source.components.save(folder / "components")
    component_bytes = sum(p.stat().st_size for p in (folder / "components").rglob("*") if p.is_file())
    report = make_report(compiled, recipe, Origin.of_recipe(recipe), stages, components=component_bytes)
    manifest = {
        "modules": modules, "components": dict(components), "task": source.task,
        "boundary_ratio": source.boundary_ratio,
    }  # fmt: skip
    graphs = [(item.name, item.printed, item.views) for item in compiled.values()]
    return finish(folder, report, graphs, recipe, manifest, merge(*(item.tuning for item in compiled.values())))


def recorded_of(recipe: Recipe, source: Source) -> dict[str, Recorded]:
    """The recorded calls of each transformer; of two experts each has those of its timesteps. Raises RecipeError."""
    if recipe.calibration is None:
        return {}
    recorded = read_inputs(recipe.calibration)
    names = list(source.transformers)
    if len(names) == 1:
        return {names[0]: recorded}
    edge = 1000.0 * boundary_of(source.boundary_ratio, source.task)
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


@dataclass
class _TransformerBuild:
    """The compilation of one transformer of a recipe. tensors: what rewrites are measured with."""

    name: str
    transformer: TransformerSource
    tensors: TensorSource
    recipe: Recipe
    stages: Stages
    recorded: Recorded | None
    dry_run: bool

    @property
    def layers(self) -> int:
        """Blocks of the transformer."""
        return int(self.transformer.config["num_layers"])

    @property
    def shallow(self) -> TransformerSource:
        """The transformer with the blocks that show what repeats."""
        return self.transformer.shallow()

    def compiled(self) -> Compiled:
        """Captures each shape once, compares blocks with the model itself, rewrites."""
        recipe, stages = self.recipe, self.stages
        captured = {shape.name: self._captured(self.transformer, shape) for shape in recipe.shapes}
        programs = {shape: self.transformer.as_stored(program) for shape, program in captured.items()}
        options = self._options()
        compared, small = NOT_COMPARED, None
        if recipe.verify == "numeric":
            small = self._captured(self.shallow, self._smallest())
            if not self.dry_run:
                with stages("compare"):
                    compared = self._compared(self.shallow, small)
        item = compile_programs(
            self.name, programs, self.tensors, options,
            twin=self._twin(programs, small, options), recorded=self.recorded, stages=stages,
        )  # fmt: skip
        words = compared.words
        if compared.calls and small is not None:
            with stages("compare"):
                words = f"{self._compared_further(small)} of {self.layers} blocks: {words}"
        return replace(item, compared=words).warned(
            *compared.warnings, *self.transformer.notes, *self._rounded_twice(item)
        )

    def _rounded_twice(self, item: Compiled) -> list[str]:
        """What is said of weights that the checkpoint stores in another format than the engine."""
        stored = self.transformer.stored
        if self.dry_run or not stored:
            return []
        evaluate = Evaluator(item.source, item.constants)
        said = second_errors(next(iter(item.programs.values())), stored, evaluate)
        return [f"{self.transformer.where}: {said}"] if said is not None else []

    def _options(self) -> CompileOptions:
        options = resolve(self.recipe, self.tensors.keys())
        if self.dry_run:  # synthetic weights say nothing of a layer
            options = replace(options, w8a8=replace(options.w8a8, in_each_layer=False))
        return options

    def _smallest(self) -> Shape:
        """The size that rewrites are measured at: what was recorded, else the smallest of the recipe's and TWIN."""
        geometry = self.transformer.geometry
        if self.recorded is not None:
            return recorded_shape(self.recorded, geometry)
        latent = [count * patch for count, patch in zip(TWIN, geometry.patch, strict=True)]
        tiny = Shape(**geometry.pixels(latent), batch=self.recipe.shapes[0].batch)
        return min((*self.recipe.shapes, tiny), key=geometry.tokens)

    def _twin(self, programs: Mapping[str, Program], small: Program | None, options: CompileOptions) -> Twin | None:
        """What rewrites are measured on: all layers where each is calibrated, else two."""
        if small is None:
            return None
        shape = self._smallest()
        mixed = len(next(iter(programs.values())).graphs) > len(small.graphs)  # layers stored in different formats
        if (not options.w8a8.is_calibrated and not mixed) or self.layers <= 2:
            return Twin(self.transformer.as_stored(small))
        if shape.name in programs:
            return Twin(programs[shape.name], shape.name)
        return Twin(self.transformer.as_stored(self._captured(self.transformer, shape)))

    def _captured(self, transformer: TransformerSource, shape: Shape) -> Program:
        """The Program of a transformer. Of many layers three are captured, and the middle one is repeated, because all
        layers of a Wan transformer are one class that is given the same arguments.
        """
        layers = int(transformer.config["num_layers"])
        with self.stages("capture"):
            args, kwargs = transformer.example_inputs(shape)
            model = transformer.build()  # checks that there are weights for all layers
            if layers > CAPTURED and not is_vace(transformer.config):
                few = replace(transformer, config={**transformer.config, "num_layers": CAPTURED})
                made = deepened(capture(few.build(), args, kwargs), "blocks", layers)
                if made is not None:
                    return made
            return capture(model, args, kwargs)

    def _compared(self, transformer: TransformerSource, program: Program) -> Comparison:
        """An eager transformer of two blocks beside its graph. Raises VerificationError where they differ."""
        device = device_of(self.recipe.target)
        model = transformer.load().to(device)
        args, kwargs = transformer.example_inputs(self._smallest())
        comparison = Original(model, args, kwargs).compare(program, ModuleTensors(model, device))
        if comparison.wrong:
            raise VerificationError(f"{transformer.where}: {comparison.wrong}")
        return comparison

    def _compared_further(self, program: Program) -> int:
        """Compares the following blocks, as many at a time as the shallow transformer has, with their own weights, for
        COMPARED_SHARE of the build's time; how many blocks it were. The whole transformer may be too large to run, and
        its blocks are one graph.
        """
        seconds = COMPARED_SHARE * sum(self.stages.seconds.values()) - self.stages.seconds["compare"]
        few = self.shallow
        count = done = int(few.config["num_layers"])
        started = time.perf_counter()
        while done < self.layers and (time.perf_counter() - started) * (done / max(done - count, 1)) < seconds:
            first = min(done, self.layers - count)
            self._compared(replace(few, tensors=BlocksFrom(self.transformer.tensors, first, count)), program)
            done = first + count
        return min(done, self.layers)
