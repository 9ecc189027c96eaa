"""What a build writes into an engine's folder: programs, weights, printed graphs, the report, the manifest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from turbocompile.backends import get_backend
from turbocompile.build.compile import Compiled
from turbocompile.build.stages import Stages, warnings_collected
from turbocompile.errors import EngineError
from turbocompile.ir.emit import Emission
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.graph_view import GraphView
from turbocompile.ir.program import Program
from turbocompile.ir.serialize import to_json
from turbocompile.ir.shards import write_shards
from turbocompile.ir.stored_names import shard_stem
from turbocompile.ir.weights import nbytes
from turbocompile.recipe.schema import Recipe, Settings
from turbocompile.report.collect import collect
from turbocompile.report.page import page
from turbocompile.report.report import Report
from turbocompile.rewrite.pipeline import foreign_operators
from turbocompile.runtime.engine import Engine, module_entry
from turbocompile.runtime.folder import seal
from turbocompile.runtime.tuning import FILE as TUNING
from turbocompile.runtime.tuning import merge

MODULES_OWN = "the module's"  # where the weights of a module's report come from


@dataclass(frozen=True)
class Origin:
    """Which model was compiled, for the report: its name or path, and where its weights come from."""

    model: str
    weights: str

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Origin:
        """Of the model that a recipe names."""
        return cls(recipe.model.path or recipe.model.preset or "", recipe.model.weights)


def write_recipes_weights(item: Compiled, evaluate: Evaluator, folder: Path, stages: Stages) -> list[str]:
    """Writes one module's weights; the names of their files."""
    with stages("weights"):
        return write_shards(
            item.plan, evaluate, folder, shard_stem(item.name), lambda done, all_: stages.tell("weights", done / all_)
        )


def write_recipes_module(
    item: Compiled,
    evaluate: Evaluator,
    recipe: Recipe,
    config: Mapping[str, Any],
    shards: Sequence[str],
    folder: Path,
    stages: Stages,
) -> tuple[Compiled, dict[str, Any]]:
    """Writes one module's programs and backend files. Returns the module with what was warned of, and its entry of the
    manifest.

    shards: the names of the files with the module's weights.
    """
    programs = write_programs(item.name, item.programs, folder)
    engine = Engine(
        item.programs, {}, name=item.name, config=json_config(config), dtype=recipe.torch_dtype, backend=recipe.backend
    )
    if recipe.backend != "triton":
        with stages(recipe.backend), warnings_collected() as said:
            weights = {k: evaluate(e.expr, e.prefix) for k, e in item.plan.items()}
            for shape, program in item.programs.items():
                engine.files[shape] = get_backend(recipe.backend).emit(
                    program, weights, folder, f"{item.name}-{shape}", recipe.target
                )
        item = item.warned(*said)
    return item, module_entry(engine, programs, shards)


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
    report: Report,
    graphs: Sequence[tuple[str, Mapping[str, str], Mapping[str, GraphView]]],
    settings: Settings,
    manifest: Mapping[str, Any],
    tuning: Mapping[str, Any],
) -> Report:
    """Writes the printed graphs, the report and the manifest of an engine; the report with the sizes of what stands in
    the folder.

    graphs: of each module its name, its graphs after each pass as text, and their views. manifest: `modules`,
    `components` and further entries.
    """
    (folder / "graphs").mkdir()
    for name, printed, views in graphs:
        for stage, text in printed.items():
            (folder / "graphs" / f"{name}-{stage}.txt").write_text(text, encoding="utf-8")
        (folder / "graphs" / f"{name}.json").write_text(views_json(views), encoding="utf-8")
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    sized = [replace(r, engine_bytes=written) for r in (report, *report.others.values())]
    report = replace(sized[0], others={r.module: r for r in sized[1:]})
    report.save(folder / "report.json")
    if tuning:
        (folder / TUNING).write_text(json.dumps(tuning, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report, None), encoding="utf-8")
    seal(folder, {
        "recipe": settings.to_dict(), "target": settings.target, "versions": versions(), **manifest,
    })  # fmt: skip
    return report


def make_report(
    compiled: Mapping[str, Compiled],
    settings: Settings,
    origin: Origin,
    stages: Stages,
    *,
    components: int = 0,
) -> Report:
    """The report of all modules. components: bytes of the models around them."""
    sizes = [predicted_bytes(item) for item in compiled.values()]
    predicted = None if None in sizes else sum(size or 0 for size in sizes) + components
    reports = {}
    for name, item in compiled.items():
        reports[name] = collect(
            item.results, item.programs, unmeasured=item.unmeasured or _unmeasured(settings), times=item.times,
            measured_on=item.measured_on, compared=item.compared, module=name, model=origin.model,
            target=settings.target, dtype=settings.dtype, backend=settings.backend, weights=origin.weights,
            stages=dict(stages.seconds), warnings=tuple(item.warnings), versions=versions(), predicted_bytes=predicted,
            engine_bytes=None,
        )  # fmt: skip
    first, *rest = reports.values()
    return replace(first, others={r.module: r for r in rest})


def _unmeasured(settings: Settings) -> str:
    if not settings.passes.enabled:
        return "not measured: nothing was rewritten (passes: off)"
    return f"not measured: the recipe says verify: {settings.verify}"


def predicted_bytes(item: Compiled) -> int | None:
    """Bytes that a module takes in an engine: its weights with their headers, its programs and printed graphs.

    None where a pass of another package made an operator that no engine folder may hold.
    """
    if any(foreign_operators(program) for program in item.programs.values()):
        return None
    header = sum(len(name) + 80 for name in item.plan)  # name, dtype, shape and offsets in JSON
    programs = sum(len(json.dumps(to_json(p), separators=(",", ":"))) for p in item.programs.values())
    printed = sum(len(text) for text in (*item.printed.values(), views_json(item.views)))
    return sum(nbytes(e.expr) for e in item.plan.values()) + header + programs + printed


def views_json(views: Mapping[str, GraphView]) -> str:
    """What `graphs/<module>.json` holds."""
    return json.dumps({k: v.to_dict() for k, v in views.items()}, separators=(",", ":"), ensure_ascii=False)


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


@dataclass(frozen=True)
class ModuleWriter:
    """Writes a compiled module's engine: `engine.write`. It holds words, names and expressions, and no tensor."""

    name: str
    settings: Settings
    report: Report
    printed: Mapping[str, str]
    views: Mapping[str, GraphView]
    tuning: Mapping[str, Any]
    plan: Mapping[str, Emission]

    @classmethod
    def of(cls, item: Compiled, settings: Settings, report: Report) -> ModuleWriter:
        """Of a module as it was compiled."""
        return cls(item.name, settings, report, item.printed, item.views, item.tuning, dict(item.plan))

    def __call__(self, engine: Engine, folder: Path) -> None:
        """Writes the engine into the empty `folder`."""
        programs = write_programs(self.name, engine.programs, folder)
        shards = write_shards(self.plan, _Stored(engine.weights, list(self.plan)), folder, shard_stem(self.name))
        entry = {**module_entry(engine, programs, shards), "config": json_config(engine.config)}
        if engine.backend != "triton":
            weights = {k: v.cpu() for k, v in engine.weights.items()}
            emit, target = get_backend(engine.backend).emit, self.settings.target
            entry["files"] = {
                shape: emit(program, weights, folder, f"{self.name}-{shape}", target)
                for shape, program in engine.programs.items()
            }
        finish(
            folder, self.report, [(self.name, self.printed, self.views)], self.settings,
            {"modules": {self.name: entry}, "components": {}}, self.tuning,
        )  # fmt: skip

    def joined(self, other: ModuleWriter) -> ModuleWriter:
        """Of the engine that has the calls of both: this one's graphs are printed, and the report is the later one."""
        plan = dict(sorted({**self.plan, **other.plan}.items()))
        return replace(self, report=other.report, plan=plan, tuning=merge(self.tuning, other.tuning))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleWriter:
        """Itself: nothing in it changes."""
        return self


class _Stored(Evaluator):
    """Hands the evaluated weights of an engine to `write_shards`, in the order of the plan."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self.weights, self.names = weights, iter(names)

    def __call__(self, expr: Any, prefix: str = "") -> torch.Tensor:
        name = next(self.names)
        if name not in self.weights:
            raise EngineError(f"the engine lacks the weight {name!r} that it was built with; build it again")
        return self.weights[name].cpu().contiguous()
