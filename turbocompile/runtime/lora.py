"""Adapters (LoRA) that are put into a running engine, exchanged and taken out again, in place.

    stored weight  ->  the tensors of the checkpoint in it  ->  with adapters  ->  stored weight, quantized anew

An engine's graphs and compiled code hold its weights' memory, so new values are written there. What a weight is made
of stands in the Programs: rows of several linears, scales of smoothing, a quantization. The sums are computed on the
engine's device. A weight that is stored in 16 bits or more gets the value that a build with the adapters gives it; one
in 8 bits is dequantized, added to and quantized again, which rounds it twice. The bytes before are kept by the engine's
folder, or, of an engine without one, in memory on the host.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from turbocompile.errors import EngineError, RecipeError, UnsupportedError
from turbocompile.files import inside
from turbocompile.ir.evaluate import Evaluator
from turbocompile.ir.inverse import put_together, taken_apart, unit_name, units
from turbocompile.ir.program import Program, is_op
from turbocompile.ir.stored_names import stored_name, stored_weights
from turbocompile.ir.weights import Expr, Load, Quantize, absolute, leaves
from turbocompile.kernels import ops
from turbocompile.kernels.quantize.quantize import dequantize, quantize

if TYPE_CHECKING:
    from turbocompile.recipe.schema import LoraSpec
    from turbocompile.wan.lora import Changes

CHUNK = 128 << 20  # bytes of a pinned buffer; two of them let the host and the bus work at the same time


@dataclass(frozen=True)
class Slot:
    """A weight as an engine stores it: one tensor, or the data and the scale of one in 8 bits (`format`).

    names: stored names. expr: what its value was before it was quantized, with full names.
    """

    names: tuple[str, ...]
    expr: Expr
    format: str = ""


def slots_of(programs: Mapping[str, Program]) -> list[Slot]:
    """The weights of Programs that hold tensors of a checkpoint, each once."""
    found: dict[tuple[str, ...], Slot] = {}
    halves: set[str] = set()
    for program in programs.values():
        for graph, sub in program.graphs.items():
            for node in sub.graph.nodes:
                if not is_op(node, ops.w8a8_linear) or any(n.op != "get_attr" for n in node.args[2:4]):
                    continue
                locals_ = [str(n.target) for n in node.args[2:4]]
                for prefix in program.prefixes(graph):
                    exprs = [sub.weights[name] for name in locals_]
                    names = tuple(stored_name(graph, n, e, prefix) for n, e in zip(locals_, exprs, strict=True))
                    whole = exprs[0].of if isinstance(exprs[0], Quantize) else exprs[0]
                    found[names] = Slot(names, absolute(whole, prefix), str(node.args[5]))
                    halves.update(names)
    for program in programs.values():
        for weight in stored_weights(program):
            if weight.name not in halves and weight.expr.dtype.is_floating_point:
                found[weight.name,] = Slot((weight.name,), absolute(weight.expr, weight.prefix))
    return list(found.values())


def tensors_of(slots: Iterable[Slot]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The checkpoint's tensors that the slots hold: name -> shape, and the dtype that adapters are added in."""
    found = {}
    for slot in slots:
        for unit in units(slot.expr):
            name = unit_name(unit)
            if name is not None:
                found[name] = (unit.shape, torch.promote_types(torch.float32, _dtype(unit)))
    return found


def _dtype(unit: Expr) -> torch.dtype:
    return unit.dtype if unit.dtype.is_floating_point and unit.dtype.itemsize > 1 else torch.float32


@dataclass
class Adapted:
    """The adapters of an engine's weights. specs: as they were set; stamps: when their files were written; changed: the
    slots that hold other bytes than the engine was built with; kept: the bytes of these, of an engine without a folder.
    """

    specs: tuple[LoraSpec, ...] = ()
    stamps: tuple[object, ...] = ()
    changed: set[Slot] = field(default_factory=set)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def copied(self) -> Adapted:
        """Of weights that were copied to another place."""
        return Adapted(self.specs, self.stamps, set(self.changed), dict(self.kept))


_SETTING = threading.Lock()  # one thread at a time exchanges adapters, because experts are changed together


class Adaptable:
    """The part of an engine that puts adapters into its weights."""

    experts: dict[str, Any]
    adapted: Adapted

    @property
    def lora(self) -> tuple[LoraSpec, ...]:
        """The adapters that `set_lora` put into the weights."""
        return self.adapted.specs

    def set_lora(self, lora: Any = None, weight: float = 1.0) -> None:
        """Puts adapters into the weights of this engine and its other expert, in the place of those set before.

        lora: a path (also as "path:0.8"), a mapping with the fields `path`, `weight` and `expert`, a list of these, or
        None, which gives every weight the bytes that the engine was built with. weight: multiplies that of each.

        Calls under way end before, later calls wait. Compiled code and CUDA graphs stay. Raises RecipeError,
        EngineError and UnsupportedError before anything is changed, for files that do not fit, and for engines of other
        backends than triton.
        """
        set_lora(self.experts, specs_of(lora, weight))

    @contextlib.contextmanager
    def with_lora(self, lora: Any, weight: float = 1.0) -> Iterator[None]:
        """The body runs with these adapters; then those that were set before are set again."""
        before = self.lora
        self.set_lora(lora, weight)
        try:
            yield
        finally:
            self.set_lora(before)

    def check_unadapted(self, what: str) -> None:
        """Raises EngineError where adapters are set. what: the thing that does not go with them."""
        if self.adapted.changed:
            raise EngineError(
                f"{what} would not say that the weights hold adapters (set_lora); take them out by "
                "engine.set_lora(None), or build the engine with them (lora in a recipe)"
            )


def specs_of(lora: Any, weight: float = 1.0) -> tuple[LoraSpec, ...]:
    """What a user gave as adapters, checked."""
    from turbocompile.recipe.fields import FieldError
    from turbocompile.recipe.schema import LoraSpec

    if lora is None:
        return ()
    given = lora if isinstance(lora, (list, tuple)) else [lora]
    found = []
    for item in given:
        try:
            values = dict(_fields(item))
            values["weight"] = float(values.get("weight", 1.0)) * float(weight)
            found.append(LoraSpec(**values))
            if found[-1].mode != "merge":
                raise FieldError("mode", "cannot be branch in an engine that is built; give it to the build")
        except FieldError as error:
            raise RecipeError(f"lora: {error}") from None
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"lora: {item!r} is no adapter ({error}); give a path, or {{'path': ..., 'weight': ..., 'expert': ...}}"
            ) from None
    return tuple(found)


def _fields(item: Any) -> Mapping[str, Any]:
    from turbocompile.recipe.schema import LoraSpec

    if isinstance(item, LoraSpec):
        return {"path": item.path, "weight": item.weight, "expert": item.expert, "mode": item.mode}
    if isinstance(item, str):
        return LoraSpec.of_text(item)
    return {"path": str(item)} if isinstance(item, Path) else item


def set_lora(engines: Mapping[str, Any], specs: Sequence[LoraSpec]) -> None:
    """Puts adapters into the weights of the engines of one folder, by the names of their modules."""
    for engine in engines.values():
        if engine.backend != "triton":
            raise UnsupportedError(
                f"the backend {engine.backend} holds the weights in its own files, so that no adapter can be put into "
                "them; build the engine with it (lora in the recipe)"
            )
    with _SETTING:
        wanted = tuple(specs), tuple(_stamp(spec.path) for spec in specs)
        if all((engine.adapted.specs, engine.adapted.stamps) == wanted for engine in engines.values()):
            return
        slots = {name: slots_of(engine.programs) for name, engine in engines.items()}
        changes: dict[str, Changes] = {}
        if specs:
            from turbocompile.wan.lora import changes_of

            changes = changes_of(specs, {name: tensors_of(s) for name, s in slots.items()})
        work = {name: _Exchange(name, engines[name], slots[name], changes.get(name)) for name in engines}
        with contextlib.ExitStack() as stack:
            for engine in engines.values():
                stack.enter_context(engine._turns.change())
            for name, exchange in work.items():
                exchange.run()
                engines[name].adapted.specs, engines[name].adapted.stamps = wanted


def _stamp(path: str) -> object:
    """What changes when a LoRA's files are written anew."""
    place = Path(path).expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())


class _Exchange:
    """The change of one engine's weights from the adapters that it has to others. Nobody calls the engine meanwhile."""

    def __init__(self, module: str, engine: Any, slots: Sequence[Slot], changes: Changes | None) -> None:
        """Reads what is needed to go back, so that what is missing is found before anything changes."""
        self.module, self.engine, self.changes = module, engine, changes
        self.device: torch.device = engine.device
        touched = {} if changes is None else changes.of
        self.wanted = [s for s in slots if any(unit_name(u) in touched for u in units(s.expr))]
        self.back = [s for s in engine.adapted.changed if s not in set(self.wanted)]
        for slot in self.wanted:
            self._check(slot)
        known = engine.adapted.changed
        self.before = _Before(module, engine, [n for s in known for n in s.names])

    def _check(self, slot: Slot) -> None:
        """Raises UnsupportedError where the slot's value does not say what its units are."""
        meta = torch.empty(slot.expr.shape, dtype=torch.float32, device="meta")
        taken_apart(slot.expr, meta, lambda e: self._factor(e).to("meta"))

    def _factor(self, expr: Expr) -> torch.Tensor:
        lost = [leaf for leaf in leaves(expr) if isinstance(leaf, Load) and leaf.name not in self.engine.weights]
        if lost:
            raise UnsupportedError(
                f"{self.engine.model_name} was built without the scale {lost[0].name} that a weight was multiplied by, "  # type: ignore[attr-defined]
                "so that no adapter can be added to it; build the engine again"
            )
        return Evaluator(_Weights(self.engine.weights, self.device), {})(expr)

    @torch.no_grad()
    def run(self) -> None:
        """Writes the new values; where that fails, those that the engine was built with, and raises."""
        _synchronize(self.device)  # kernels that read the old values
        adapted: Adapted = self.engine.adapted
        try:
            with _Copier(self.device) as copier:
                leaves = None if self.changes is None else _Leaves(self.changes, self._leaf_names(), copier)
                seen: set[int] = set()
                for slot in self.wanted:
                    place = self.engine.weights[slot.names[0]].data_ptr()
                    if place not in seen:  # tied weights may have one memory
                        self._adapt(slot, leaves, copier)
                    seen.add(place)
                self._restore(self.back, copier)
        except BaseException:
            with _Copier(self.device) as copier:
                self.before = _Before(self.module, self.engine, [n for s in adapted.changed for n in s.names])
                self._restore(list(adapted.changed), copier)
            adapted.specs = adapted.stamps = ()
            self._refresh()
            raise
        self._refresh()

    def _leaf_names(self) -> list[str]:
        assert self.changes is not None
        used = {unit_name(u) for s in self.wanted for u in units(s.expr)}
        exprs = [c.leaves for name, changes in self.changes.of.items() if name in used for c in changes]
        return list(dict.fromkeys(leaf.name for group in exprs for e in group for leaf in leaves(e)))  # type: ignore[attr-defined]

    def _adapt(self, slot: Slot, leaves: _Leaves | None, copier: _Copier) -> None:
        """Writes a slot with adapters."""
        assert self.changes is not None
        assert leaves is not None
        adapted: Adapted = self.engine.adapted
        storages = [self.engine.weights[name] for name in slot.names]
        if slot in adapted.changed:
            stored = [copier.to_device(self.before.get(name)) for name in slot.names]
        else:
            stored = [t.to(self.device) for t in storages]
            if self.engine.folder is None:
                adapted.kept |= {n: copier.to_host(t) for n, t in zip(slot.names, storages, strict=True)}
        value = dequantize(stored[0], stored[1], slot.format, torch.float32) if slot.format else stored[0]
        parts = taken_apart(slot.expr, value, self._factor)
        for unit in list(parts):
            name = unit_name(unit)
            if name is not None and name in self.changes.of:
                wide = torch.promote_types(torch.float32, _dtype(unit))
                base = Load(_BASE, unit.shape, wide)
                source = _With(parts[unit].to(wide), leaves)
                parts[unit] = Evaluator(source, {})(self.changes.expression(name, base))
        made = put_together(slot.expr, parts, self._factor, wide=bool(slot.format))
        new = quantize(made, slot.format) if slot.format else (made,)
        adapted.changed.add(slot)  # before the first byte is written
        for storage, tensor in zip(storages, new, strict=True):
            storage.copy_(tensor)

    def _restore(self, slots: Sequence[Slot], copier: _Copier) -> None:
        """Writes the bytes that the engine was built with."""
        adapted: Adapted = self.engine.adapted
        for slot in slots:
            for name in slot.names:
                copier.into(self.before.get(name), self.engine.weights[name])
        for slot in slots:
            adapted.changed.discard(slot)
            for name in slot.names:
                adapted.kept.pop(name, None)

    def _refresh(self) -> None:
        """Has what was computed of the weights follow them."""
        names = {name for slot in (*self.wanted, *self.back) for name in slot.names}
        self.engine.changed(names)
        _synchronize(self.device)  # other streams read the new values


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_BASE = "base:"


@dataclass(frozen=True)
class _With:
    """A source of adapters' tensors, and of the weight that they are added to."""

    base: torch.Tensor
    leaves: _Leaves

    def keys(self) -> Iterable[str]:
        return [_BASE, *self.leaves.keys()]

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        found = self.get(name)
        return tuple(found.shape), found.dtype

    def get(self, name: str) -> torch.Tensor:
        return self.base if name == _BASE else self.leaves.get(name)


@dataclass(frozen=True)
class _Weights:
    """An engine's weights as a source."""

    weights: Mapping[str, torch.Tensor]
    device: torch.device

    def keys(self) -> Iterable[str]:
        return self.weights.keys()

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.weights[name].shape), self.weights[name].dtype

    def get(self, name: str) -> torch.Tensor:
        return self.weights[name].to(self.device)


class _Leaves:
    """The tensors of adapters on the device, all at once, so that no copy waits for a sum."""

    def __init__(self, changes: Changes, names: Iterable[str], copier: _Copier) -> None:
        self._tensors = {name: copier.to_device(changes.leaves.get(name)) for name in names}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _Before:
    """The bytes that an engine was built with, by stored name: of its folder, or those that were kept."""

    def __init__(self, module: str, engine: Any, names: Iterable[str]) -> None:
        """module: the engine's name in its folder. Raises EngineError where the folder no longer has them."""
        self._kept: Mapping[str, torch.Tensor] = engine.adapted.kept
        self._files: dict[str, Any] = {}
        wanted = set(names)
        if engine.folder is None or not wanted:
            return
        for shard in engine.manifest["modules"][module]["weights"]:
            try:
                opened = safe_open(inside(engine.folder, shard), framework="pt", device="cpu")
                self._files |= {name: opened for name in opened.keys() if name in wanted}  # noqa: SIM118
            except (OSError, SafetensorError, EngineError) as error:
                raise EngineError(
                    f"the weights without adapters are in {engine.folder}, which cannot be read any more ({error}); "
                    "put the folder back, or load the engine again"
                ) from error

    def get(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name) if name in self._files else self._kept[name]


class _Copier:
    """Copies tensors between the host and a GPU through two pinned buffers: the host fills one while the other is under
    way. On a CPU it copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = 0
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> _Copier:
        if self.device.type == "cuda":
            self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        for event in self._events:
            event.synchronize()
        self._buffers, self._events = [], []

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host's tensor on the device."""
        if self.device.type != "cuda":
            return tensor
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        self.into(tensor, made)
        return made

    def into(self, tensor: torch.Tensor, place: torch.Tensor) -> None:
        """Writes a host's tensor into another one of its shape and dtype, bytes unchanged."""
        if place.device.type != "cuda" or not place.is_contiguous():
            place.copy_(tensor)
            return
        source, target = _bytes(tensor.contiguous()), _bytes(place)
        for start in range(0, source.numel(), CHUNK):
            part = source[start : start + CHUNK]
            buffer, event = self._buffers[self._turn], self._events[self._turn]
            event.synchronize()  # until the copy that last used the buffer is done
            buffer[: part.numel()].copy_(part)
            target[start : start + CHUNK].copy_(buffer[: part.numel()], non_blocking=True)
            event.record(torch.cuda.current_stream(self.device))
            self._turn = 1 - self._turn

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host."""
        if tensor.device.type != "cuda" or not tensor.is_contiguous():
            return tensor.detach().to("cpu", copy=True)
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        source, target = _bytes(tensor), _bytes(made)
        waiting: list[tuple[int, torch.Tensor, torch.cuda.Event]] = []
        for start in [*range(0, source.numel(), CHUNK), source.numel()]:
            if start < source.numel():
                part = source[start : start + CHUNK]
                buffer, event = self._buffers[self._turn], self._events[self._turn]
                event.synchronize()
                buffer[: part.numel()].copy_(part, non_blocking=True)
                event.record(torch.cuda.current_stream(self.device))
                waiting.append((start, buffer[: part.numel()], event))
                self._turn = 1 - self._turn
            if len(waiting) > 1 or start == source.numel():  # the other buffer fills meanwhile
                for at, filled, copied in waiting[: 1 if start < source.numel() else None]:
                    copied.synchronize()
                    target[at : at + filled.numel()].copy_(filled)
                del waiting[: 1 if start < source.numel() else None]
        return made


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
