"""An engine: compiled Programs and their weights, called like the model they came from.

`load` opens an engine's folder. It executes nothing from there: folder.py checks the files, and ir/deserialize.py
checks the Programs operator by operator and shape by shape.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbocompile.backends import BACKENDS, NO_TUNING, Tuning, get_backend
from turbocompile.errors import CaptureError, EngineError
from turbocompile.files import inside
from turbocompile.ir import signature as sig
from turbocompile.ir.allowed_ops import dtype_name, parse_dtype
from turbocompile.ir.deserialize import from_json
from turbocompile.ir.emit import weight_plan
from turbocompile.ir.program import Program
from turbocompile.report.report import Report
from turbocompile.runtime.adapters import FixedWeights
from turbocompile.runtime.cuda_graph import CudaGraph, Pool
from turbocompile.runtime.folder import check_files, new_folder, read_json, read_manifest
from turbocompile.runtime.lora import Adaptable, Adapted
from turbocompile.runtime.memory_plan import parse_size
from turbocompile.runtime.planned import PlannedMemory
from turbocompile.runtime.stored import plain_torch, read_weights, same_bits
from turbocompile.runtime.streaming import Gate, HostWeights, Placement
from turbocompile.runtime.tuning import FILE as TUNING
from turbocompile.runtime.tuning import merge, read_cache, read_tuning
from turbocompile.runtime.turns import Turns


class Config(dict[str, Any]):
    """The model's configuration: a dictionary whose keys are attributes too, as diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's configuration has no {name!r}") from None


class Engine(Adaptable, FixedWeights, PlannedMemory, nn.Module):
    """A compiled model, at one or several shapes, with its weights.

    An engine is called like the model it came from, by any number of threads. `.to(device)` moves the weights after the
    calls under way have returned; no `.to(dtype)` changes the weights. `experts` maps the names of all modules in the
    same folder ("transformer", "transformer_2") to their engines. `tuning` says which configuration each kernel of this
    engine is launched with, and no other engine's.

    On a GPU each shape becomes a CUDA graph at its second call (backend triton); with `engine.cuda_graph = False` its
    kernels are launched one by one. A move of the engine drops the graphs.

    `plan_memory("12GB")` has the engine and its experts run within that memory of a GPU; `memory` is the plan. The
    weights are then on the CPU where the plan moves them between calls; `changed(names)` brings weights that were
    written in place to the GPU.
    """

    experts: dict[str, Engine]
    cuda_graph: bool = True
    write: Callable[[Engine, Path], None] | None = None  # how `save` writes an engine that was built in this process
    _runners: dict[str, Any]
    _graphs: dict[str, CudaGraph]
    _pool: Pool | None
    _turns: Turns
    _making: threading.RLock  # held while code is compiled or a graph is made
    _host: HostWeights | None
    _placed: Placement | None
    _gate: Gate
    kept: dict[str, Any]

    def __init__(
        self,
        programs: Mapping[str, Program],
        weights: Mapping[str, torch.Tensor],
        *,
        name: str = "the engine",
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        report: Report | None = None,
        manifest: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        backend: str = "triton",
        files: Mapping[str, Sequence[str]] | None = None,
        tuning: Tuning = NO_TUNING,
    ) -> None:
        super().__init__()
        self.programs = {shape: _without_constants(program) for shape, program in programs.items()}
        self.weights = dict(weights)
        self.model_name = name
        self.config = Config(config or {})
        self._dtype = dtype
        self._device = torch.device("cpu")
        self._device = next((t.device for t in self.weights.values()), self._device)
        self.tuning = tuning
        self.report = report
        self.manifest = dict(manifest or {})
        self.folder = folder
        self.backend = backend
        self.files = {k: list(v) for k, v in (files or {}).items()}
        self.adapted = Adapted()
        self.__dict__.update(_of_one_engine())
        object.__setattr__(self, "experts", {"transformer": self})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """The input shapes that the engine has, in the order they were built."""
        return [{i.path: list(i.shape) for i in p.signature.inputs if not i.number} for p in self.programs.values()]

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Does nothing, because an engine keeps nothing between calls. diffusers' pipelines enter it for each call."""
        yield

    def __repr__(self) -> str:
        size = sum(t.nbytes for t in self.weights.values()) / 1e6
        return (
            f"Engine({self.model_name}, {self.backend}, {len(self.programs)} shapes, {size:.1f} MB; "
            "write it with engine.save(folder), open it with turbocompile.load(folder))"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Program for the call's shapes and plain arguments.

        The result is on the engine's device and has the form of the model's own result. Raises CaptureError where the
        engine has no such Program.
        """
        full = None
        try:
            with self._alone(), self._turns.call():
                name, given = self._program_of(args, kwargs)
                signature = self.programs[name].signature
                tensors = sig.cast(signature, sig.tensors_of(signature, given), self.model_name)
                flat = self.runner(name)(*(t.to(self._device) for t in tensors))
        except torch.OutOfMemoryError as error:
            full = next(iter(str(error).splitlines()), "")
        if full is not None:  # here, because an error's frames hold the tensors that filled the card
            raise self._out_of_memory(full)
        return sig.wrap_output(signature, flat, given.wrapped)

    def _program_of(self, args: Any, kwargs: Any) -> tuple[str, sig.Bound]:
        """The name of the Program that a call runs, and the call's arguments. Raises CaptureError in a sentence."""
        known: list[tuple[Any, sig.Bound]] = []  # Programs of one module declare the same parameters
        fitting = None  # a Program with the call's plain arguments, for the message
        reasons: list[tuple[bool, str]] = []
        for name, program in self.programs.items():
            signature = program.signature
            given = next((g for p, g in known if p == signature.parameters), None)
            if given is None:
                given = sig.bound(signature, args, kwargs, self.model_name)
                known.append((signature.parameters, given))
            reason = sig.differs(signature, given)
            if not reason:
                tensors = sig.tensors_of(signature, given)
                if sig.fits(signature, tensors):
                    return name, given
                fitting = fitting or (signature, tensors)
            else:
                reasons.append((sig.same_shapes(signature, given), reason))
        alike = [reason for same, reason in reasons if same]  # of Programs with the call's shapes
        if fitting is not None:
            signature, tensors = fitting
            shown = {i.path: list(t.shape) for i, t in zip(signature.inputs, tensors, strict=True) if not i.number}
            if alike:
                raise CaptureError(f"{self.model_name} with the shapes {shown} {alike[0]}")
            raise CaptureError(f"{self.model_name} has no program for the shapes {shown}; it has {self.shapes}")
        reason = next(iter([*alike, *(r for _, r in reasons)]), "holds no program; build it again")
        raise CaptureError(f"{self.model_name} {reason}")

    def accepts(self, args: Any, kwargs: Any) -> bool:
        """Whether the engine has a Program for the call's shapes and plain arguments."""
        for program in self.programs.values():
            given = sig.bound(program.signature, args, kwargs, self.model_name)
            if not sig.differs(program.signature, given) and sig.same_shapes(program.signature, given):
                return True
        return False

    def extended(
        self,
        programs: Mapping[str, Program],
        weights: Mapping[str, torch.Tensor],
        report: Report | None = None,
        write: Callable[[Engine, Path], None] | None = None,
        tuning: Tuning = NO_TUNING,
    ) -> Engine:
        """This engine with Programs of the same model at further shapes. Other threads may call this one meanwhile.

        programs: shape name -> Program, under names that the engine does not have. weights: stored name -> tensor; only
        the tensors that this engine lacks are needed, and its own tensor stays where it has one. report, write: of the
        engine with all shapes. tuning: more choices, which come before the engine's own.

        The returned engine shares weights, compiled code and graphs with this one, which stays as it is; a move of one
        of them leaves the other where it is. Raises EngineError where a name is taken, a weight is missing, two shapes
        need different values of a weight, or this engine was opened from a folder.
        """
        self.check_unadapted("an engine with more shapes")
        if self.folder is not None:
            raise EngineError(f"the engine of {self.folder} stays as it was built; build one with all shapes")
        taken = sorted(programs.keys() & self.programs.keys())
        if taken:
            raise EngineError(f"{self.model_name} has a program {taken[0]!r} already; add it under another name")
        made = copy.copy(self)
        with self._turns.call(), self._making:  # the engine stays where it is, and nothing is compiled
            device, own = self._device, self.weights
            made.__dict__.update(_device=device, weights=own, _pool=self._pool)
            made.keep(self._runners)
            made._graphs.update(self._graphs)
        made.programs = {**self.programs, **{shape: _without_constants(p) for shape, p in programs.items()}}
        for name in weight_plan(made.programs):
            if name not in own and name not in weights:
                raise EngineError(f"the programs read the weight {name!r}, which was not given; build them again")
            if name in weights and name in own and not same_bits(weights[name], own[name]):
                raise EngineError(
                    f"two shapes of the engine need different values of {name!r}; build an engine for each shape"
                )
        home = next((t.device for t in own.values()), device)  # under a plan it is not the engine's device
        made.weights = {**{name: t.to(home) for name, t in weights.items() if name not in own}, **own}
        made.report, made.write, made.tuning = report, write, merge(self.tuning, tuning)
        object.__setattr__(made, "experts", {"transformer": made})
        if self.memory is not None and device.type == "cuda":  # the new shapes may need more
            made.plan_memory(self.memory.budget)
        return made

    def keep(self, runners: Mapping[str, Any]) -> None:
        """Takes callables (shape name -> callable) that the backend made at the build for the engine's device."""
        with self._making:
            self._runners.update(runners)

    def compiled(self, name: str) -> Any:
        """The callable that the backend made of a shape, over flat tensors on the engine's device."""
        with self._making:
            if name not in self._runners and self.memory is not None:
                with plain_torch():  # a caller in inference mode would make weights that other callers cannot write to
                    self._runners[name] = self._placement().compiled(self.programs[name], self.weights, self.tuning)
            if name not in self._runners:
                backend = get_backend(self.backend)
                files = tuple(self.files.get(name, ()))
                self._runners[name] = backend.compile_program(
                    self.programs[name], self.weights, self._device, self.folder, files, self.tuning
                )
                if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.current_stream(self._device).synchronize()  # another stream may make the next call
            return self._runners[name]

    def runner(self, name: str) -> Any:
        """The callable that runs a shape: `compiled`, on a GPU as a CUDA graph."""
        compiled = self.compiled(name)
        if not self.cuda_graph or self._device.type != "cuda" or self.backend != "triton":
            return compiled
        if self._host is not None and not self._host.pinned:
            return compiled
        with self._making:
            if name not in self._graphs:
                tight = self.memory is not None
                self._graphs[name] = CudaGraph(compiled, self._graph_pool(), self.model_name, tight)
            return self._graphs[name]

    def _graph_pool(self) -> Pool:
        """One pool for the graphs of all shapes and experts on the device, because a step runs one of them."""
        if self._pool is None:
            known = (e._pool for e in self.experts.values() if e._pool is not None)
            self._pool = next((p for p in known if p.device == self._device), None) or Pool(self._device)
        return self._pool

    def __copy__(self) -> Engine:
        copied = type(self).__new__(type(self))
        copied.__dict__.update({**self.__dict__, **_of_one_engine()})
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copy with weights of its own, which compiles and records anew. Programs are data, which copies share."""
        memo[id(self)] = copied = type(self).__new__(type(self))
        with self._turns.call():
            shared = {"programs": dict(self.programs), "write": self.write}
            own = {k: v for k, v in self.__dict__.items() if k not in shared and k not in _OF_ONE_ENGINE}
            copied.__dict__.update(copy.deepcopy(own, memo) | shared | _of_one_engine())
        return copied

    def __reduce__(self) -> Any:
        """Raises EngineError, because no pickle holds what a graph holds."""
        raise EngineError("an engine is not pickled: save(folder) writes it, and turbocompile.load(folder) reads it")

    def _apply(self, fn: Any, recurse: bool = True) -> Engine:
        """Moves the weights to the device that `fn` moves tensors to; dtype changes do not reach them."""
        probe = fn(torch.empty(0, dtype=torch.int8, device=self._device if self._device.type != "meta" else "cpu"))
        self.move(probe.device)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Engine:
        """Moves the engine to a device; a dtype is ignored, because the weights' formats are the engine's own."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self.move(device)
        return self

    def move(self, device: torch.device) -> None:
        """Puts the weights on `device`, once the calls under way have returned; later calls wait until it is done.

        Compiled code and graphs are dropped, because they hold tensors on the old device.
        """
        with self._turns.change():
            if device == self._device:
                return
            for busy in (self._device, device):  # kernels of other streams may still read the old tensors
                if busy.type == "cuda":
                    torch.cuda.synchronize(busy)
            self._forget()
            home = device if self.memory is None else torch.device("cpu")  # a plan places them at the next call
            self.weights = {k: v.to(home) for k, v in self.weights.items()}
            self.adapted = self.adapted.copied()  # copies of this engine keep the tensors on the old device
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a call on another stream reads the new tensors
            self._device = device

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """The weights by stored name. They are the engine's, not the model's: fused, quantized."""
        return dict(self.weights)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The weights, for tools that look at devices and sizes; none is trainable."""
        for tensor in self.weights.values():
            yield nn.Parameter(tensor, requires_grad=False)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The same as `save`, under the name that diffusers uses. A pipeline's own `save_pretrained` leaves an engine
        out and says so, because `from_pretrained` could not open it; give it back by `from_pretrained(...,
        transformer=engine)`.
        """
        self.save(save_directory, force=True)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes the engine's folder, whole or not at all. force: an empty folder may stand there already.

        Raises EngineError where something is there, and for an engine that was neither opened from a folder nor built
        in this process.
        """
        self.check_unadapted("the engine's folder")
        target = Path(folder)
        if force and target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        with new_folder(target) as temporary:
            if self.folder is not None:
                shutil.copytree(self.folder, temporary, dirs_exist_ok=True)
            elif self.write is not None:
                self.write(self, temporary)
            else:
                raise EngineError(
                    "this engine was not built here, so there is nothing to write; copy its folder instead"
                )
        return target


_OF_ONE_ENGINE = ("_runners", "_graphs", "_pool", "_turns", "_making", "_host", "_placed", "_gate", "kept")


def _of_one_engine() -> dict[str, Any]:
    """The attributes that a copy does not share: compiled code, graphs and their memory, and who may use them."""
    return dict(zip(_OF_ONE_ENGINE, ({}, {}, None, Turns(), threading.RLock(), None, None, Gate(), {}), strict=True))


def _without_constants(program: Program) -> Program:
    """The same Program without its constants' values, because the engine's weights hold them."""
    return dataclasses.replace(program, constants={})


def load(
    folder: str | Path, *, device: torch.device | str | None = None, check: bool = True, vram: int | str | None = None
) -> Engine:
    """Opens an engine folder. Weights are mapped, not copied, until they are moved to a device.

    device: where the engine runs; the CPU by default. check: compare the hashes of all files that are read (turn it off
    only for a folder that was checked before). vram: the memory of the GPU that the engine may take, as in "12GB" or
    "auto"; see `Engine.plan_memory`. Returns the engine of the module "transformer", or of the first module.

    Raises EngineError in one sentence where the folder is damaged, altered, newer than this version, or hostile, and
    UnsupportedError where the memory does not suffice.
    """
    if isinstance(vram, str):
        parse_size(vram)  # a mistake is told before files are read
    with plain_torch():
        return _load(Path(folder), None if device is None else torch.device(device), check, vram)


def _load(root: Path, device: torch.device | None, check: bool, vram: int | str | None) -> Engine:
    manifest = read_manifest(root)
    report_name = "report.json"
    report = None
    if report_name in manifest["files"]:
        check_files(root, manifest, [report_name])
        report = Report.from_dict(read_json(inside(root, report_name)))
    tuning = NO_TUNING
    if TUNING in manifest["files"]:
        check_files(root, manifest, [TUNING])
        tuning = read_tuning(read_json(inside(root, TUNING)), f"{TUNING} of {root}")
    tuning = merge(tuning, read_cache(str(manifest["digest"])))  # the last comes first: it was measured on this machine
    engines: dict[str, Engine] = {}
    for module, row in manifest["modules"].items():
        engines[module] = _load_module(root, manifest, module, row, report, tuning, check)
    if not engines:
        raise EngineError(f"the engine {root} holds no module; build it again")
    for engine in engines.values():
        object.__setattr__(engine, "experts", engines)
    first = engines.get("transformer") or next(iter(engines.values()))
    if vram is not None:  # the weights stay in the files until the plan places them
        first.plan_memory(vram, device=device)
        return first
    for engine in engines.values():
        if device is not None:
            engine.move(device)
    return first


def _load_module(
    root: Path, manifest: Mapping[str, Any], module: str, row: Mapping[str, Any], report: Report | None, tuning: Tuning,
    check: bool,
) -> Engine:  # fmt: skip
    """The engine of one module. row: the module's entry of the manifest, which `read_manifest` checked."""
    if row["backend"] not in BACKENDS:
        raise EngineError(f"there is no backend {row['backend'][:40]!r}; choose one of {', '.join(BACKENDS)}")
    dtype = parse_dtype(row["dtype"])
    files = {shape: list(group) for shape, group in row["files"].items()}
    if check:
        read = [*row["programs"].values(), *row["weights"], *(f for group in files.values() for f in group)]
        check_files(root, manifest, read)
    programs = {shape: from_json(read_json(inside(root, name))) for shape, name in row["programs"].items()}
    tensors = read_weights(root, row["weights"])
    for name, emission in weight_plan(programs).items():
        found = tensors.get(name)
        if found is None:
            raise EngineError(f"the engine lacks the weight {name!r}; it is damaged, build it again")
        if tuple(found.shape) != tuple(emission.expr.shape) or found.dtype != emission.expr.dtype:
            raise EngineError(
                f"the engine's weight {name!r} is {list(found.shape)} {found.dtype}, and its program reads "
                f"{list(emission.expr.shape)} {emission.expr.dtype}; build it again"
            )
    return Engine(
        programs, tensors, name=row.get("name", module), config=row.get("config", {}), dtype=dtype, report=report,
        manifest=manifest, folder=root, backend=row["backend"], files=files, tuning=tuning,
    )  # fmt: skip


def module_entry(engine: Engine, programs: Mapping[str, str], shards: Sequence[str]) -> dict[str, Any]:
    """The manifest's entry of a module."""
    return {
        "name": engine.model_name,
        "backend": engine.backend,
        "dtype": dtype_name(engine.dtype),
        "programs": dict(programs),
        "weights": list(shards),
        "files": {name: list(files) for name, files in engine.files.items()},
        "config": dict(engine.config),
    }
