"""From a user's module to an Engine in memory: `turbocompile.optimize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbocompile.backends import get_backend
from turbocompile.build.compile import Compiled, compile_programs
from turbocompile.build.lazy import LazyEngine
from turbocompile.build.measure import measured
from turbocompile.build.module_capture import ModuleCall, Request, take
from turbocompile.build.module_facts import config_of, dtype_of
from turbocompile.build.stages import Progress, Stages, warnings_collected
from turbocompile.build.write import MODULES_OWN, ModuleWriter, Origin, make_report
from turbocompile.capture.module_weights import ModuleTensors
from turbocompile.capture.process import compiling
from turbocompile.errors import CaptureError, EngineError, RecipeError, VerificationError
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.shards import copied
from turbocompile.ir.weights import Constant, leaves
from turbocompile.numerics.recording import Recorded, given_inputs
from turbocompile.recipe.options import resolve
from turbocompile.recipe.schema import Recipe, Settings, load_recipe
from turbocompile.runtime.engine import Engine


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
    settings = settings_of(model, recipe, backend, target)
    get_backend(settings.backend).check(settings.target)
    if calibration is None:
        calibration = settings.calibration
    recorded = given_inputs(calibration, model) if calibration is not None else None
    builder = _Builder(settings, verify_args, recorded, progress)
    if args is None and kwargs is None:
        return LazyEngine(model, builder)
    return builder(model, _calls(args, kwargs))


class _Builder:
    """Builds the engine of a module for some calls of it."""

    def __init__(
        self, settings: Settings, verify_args: Any, recorded: Recorded | None, progress: Progress | None
    ) -> None:
        self.settings, self.verify_args, self.recorded, self.progress = settings, verify_args, recorded, progress

    def __call__(
        self,
        model: nn.Module,
        calls: Sequence[ModuleCall],
        known_calls: Sequence[ModuleCall] = (),
        grown: Engine | None = None,
    ) -> Engine:
        """The engine. grown: one that has known_calls already; the engine then has these, too, and shares its weights.

        What the build itself makes is on the CPU; the module's own calls have the default device that the user set.
        """
        default_device = torch.get_default_device()
        stages = Stages(self.progress)
        with compiling(), torch.device("cpu"):
            source = ModuleTensors(model)
            options = resolve(self.settings, source.keys())
            request = Request(model, calls, options, self.verify_args, self.recorded, default_device, known_calls)
            with stages("capture"):
                taken = take(request)
            item = compile_programs(
                "transformer", taken.programs, source, options,
                twin=taken.twin, recorded=self.recorded, example=taken.example, stages=stages,
            )  # fmt: skip
            item = replace(item, unmeasured=taken.unmeasured, compared=taken.comparison.words)
            item = item.warned(*taken.comparison.warnings)
            if taken.unmeasured and options.verify == "numeric" and options.rewrite:
                item = item.warned(f"the rewrites were {taken.unmeasured}")
            engine = self._engine(model, source, measured(item, self.settings, stages), stages, grown)
        if taken.original is not None and not taken.original.unchanged():
            raise VerificationError(
                f"{type(model).__name__} gives another result after the build than before it, so that something which "
                "it reads was changed; make it anew, and report it"
            )
        return engine

    def _engine(
        self, model: nn.Module, source: ModuleTensors, item: Compiled, stages: Stages, grown: Engine | None
    ) -> Engine:
        """The engine of a compiled module, on the module's device. It holds nothing of the module."""
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        with stages("weights"):
            weights = _weights(source, item, device, grown)
        runners: dict[str, Any] = {}
        if self.settings.backend != "triton":
            prove, target = get_backend(self.settings.backend).prove, self.settings.target
            with stages(self.settings.backend), warnings_collected() as said:
                runners = {name: prove(program, weights, device, target) for name, program in item.programs.items()}
            item = item.warned(*said)
        name = type(model).__name__
        report = make_report({"transformer": item}, self.settings, Origin(name, MODULES_OWN), stages)
        writer = ModuleWriter.of(item, self.settings, report)
        runners = {name: runner for name, runner in runners.items() if runner is not None}
        if grown is not None:
            names = {shape: f"call-{i}" for i, shape in enumerate(item.programs, len(grown.programs))}
            programs = {names[shape]: program for shape, program in item.programs.items()}
            engine = grown.extended(programs, weights, report, _writer_of(grown).joined(writer), item.tuning)
            engine.keep({names[shape]: runner for shape, runner in runners.items()})
            return engine
        engine = Engine(
            item.programs, weights, name=name, config=config_of(model), dtype=dtype_of(model), report=report,
            backend=self.settings.backend, tuning=item.tuning,
        )  # fmt: skip
        engine.write = writer
        engine.to(device)
        engine.keep(runners)
        return engine


def _weights(
    source: ModuleTensors, item: Compiled, device: torch.device, grown: Engine | None
) -> dict[str, torch.Tensor]:
    """The stored weights by name, without those that `grown` has. On a CPU a weight that is a parameter of the
    module is copied, because the user may write to the parameter later.
    """
    evaluate = Evaluator(item.source, item.constants)
    known = _writer_of(grown).plan if grown is not None else {}
    weights: dict[str, torch.Tensor] = {}
    for name, emission in item.plan.items():
        if known.get(name) == emission and not any(isinstance(leaf, Constant) for leaf in leaves(emission.expr)):
            continue  # `grown` has it; constants of the same name may differ from call to call
        value = evaluate(emission.expr, emission.prefix)
        weights[name] = copied(value) if device.type == "cpu" and source.shares(value) else value
    return weights


def _writer_of(engine: Engine) -> ModuleWriter:
    """How an engine that was built here is written."""
    if not isinstance(engine.write, ModuleWriter):
        raise EngineError(f"{engine.model_name} was not built from a module here, so that no call can be added to it")
    return engine.write


def settings_of(model: nn.Module, recipe: Any, backend: str, target: str | None) -> Settings:
    """How a module is compiled: the given passes, the module's dtype, the target that its device has."""
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    names = set(Settings.__dataclass_fields__)
    if isinstance(recipe, Recipe):
        fields: dict[str, Any] = {k: v for k, v in recipe.to_dict().items() if k in names}
    else:
        others = set(Recipe.__dataclass_fields__) - names  # a model and its sizes: here it is the module
        fields = {k: v for k, v in dict(recipe or {}).items() if k not in others}
    device = next((p.device.type for p in model.parameters()), "cpu")
    fields.setdefault("backend", backend)
    if target is not None:
        fields["target"] = target
    fields.setdefault("target", "host" if device == "cuda" else "cpu")
    dtype = str(dtype_of(model)).removeprefix("torch.")
    fields["dtype"] = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    return Settings.from_dict(fields, "optimize(recipe=...)")


def _check_arguments(model: Any, verify_args: Any) -> None:
    """Raises CaptureError for an object that is no module to capture, RecipeError for verify_args that are no pair."""
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


def _calls(args: Any, kwargs: Any) -> list[ModuleCall]:
    """The example calls of `optimize`: one, or a list of pairs."""
    several = isinstance(args, list) and args and all(isinstance(c, tuple) and len(c) == 2 for c in args)
    if several and kwargs is None and all(isinstance(c[1], Mapping) for c in args):
        return [(tuple(a), dict(k)) for a, k in args]
    given = args if isinstance(args, (tuple, list)) else (args,) if args is not None else ()
    return [(tuple(given), dict(kwargs or {}))]
