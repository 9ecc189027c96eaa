"""Leaves a model, and the process that it lives in, as they were.

Capture runs a user's code on tensors without memory, and a build calls the user's module to compare it with its engine.
That code may keep what it computes: in attributes, in helper objects, in the closure of a hook, in a dictionary of its
Python file, behind `functools.lru_cache`. `State` notes all of that before, by walking from the model to whatever its
functions can reach, and puts it back afterwards; `process_kept` does the same for what belongs to torch and to Python.
`compiling` is the lock that all of this runs under, because one thread would restore what another just set.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import enum
import functools
import logging
import random
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Packages whose functions and classes are not walked: their state is not a model's, or `process_kept` knows it.
FOREIGN = frozenset(
    {
        *sys.stdlib_module_names, "PIL", "_pytest", "accelerate", "av", "huggingface_hub", "hypothesis", "numpy",
        "onnx", "onnxruntime", "pytest", "regex", "safetensors", "sympy", "tokenizers", "torch", "torchvision", "tqdm",
        "triton", "turbocompile",
    }
)  # fmt: skip
# Of diffusers, transformers and peft the modules that load, save and convert models: no forward comes through them.
MACHINERY = (
    "diffusers.configuration_utils", "diffusers.loaders", "diffusers.models.modeling_utils", "diffusers.pipelines",
    "diffusers.quantizers", "diffusers.utils", "peft.helpers", "peft.mapping", "peft.peft_model", "peft.utils",
    "transformers.configuration_utils", "transformers.generation", "transformers.integrations",
    "transformers.modeling_utils", "transformers.quantizers", "transformers.trainer", "transformers.utils",
)  # fmt: skip
OPAQUE = (  # state that is not data, or that nobody may put back
    type(sys), types.CodeType, types.FrameType, types.GeneratorType, types.CoroutineType, weakref.ref, logging.Logger,
    torch.dtype, torch.device, type(threading.Lock()), type(threading.RLock()), threading.Thread, torch.Size,
)  # fmt: skip
ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
COPIED = 64 << 20  # bytes of a tensor or an array whose values are kept; a larger one that is written to stays so
_LOCK = threading.RLock()
_MISSING: Any = object()
_CACHE = type(functools.lru_cache(lambda: None))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """One thread of a process compiles at a time: export sets flags of the whole process while it traces."""
    with _LOCK:
        yield


# --------------------------------------------------------------------------------------------------------- what is kept


class _Kept:
    """Something that holds values: how to read it, and how to put back what it held. label: its place, for messages."""

    def __init__(self, label: str, read: Callable[[], Any], write: Callable[[Any], None], shared: bool = False) -> None:
        """shared: by more than the model, as the names of a Python file are."""
        self.label, self._read, self._write, self.shared = label, read, write, shared
        self.saved = read()

    def differs(self) -> bool:
        now, was = self._read(), self.saved
        if isinstance(now, dict):
            return list(now) != list(was) or not all(_same(a, was[k]) for k, a in now.items())
        if isinstance(now, (list, tuple)):
            return len(now) != len(was) or not all(map(_same, now, was))
        if isinstance(now, (set, frozenset)):
            return now != was
        return not _same(now, was)

    def changed(self) -> list[str]:
        """The places below it whose values are others now."""
        now = self._read()
        if not isinstance(now, dict):
            return [self.label] if self.differs() else []
        names = [k for k in {**self.saved, **now} if not _same(now.get(k, _MISSING), self.saved.get(k, _MISSING))]
        return [f"{self.label}.{k}" if str(k).isidentifier() else f"{self.label}[{k!r}]" for k in names]

    def put(self, value: Any) -> None:
        self._write(value)

    def restore(self) -> None:
        if self.differs():
            self._write(self.saved)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal plain values."""
    return a is b or (type(a) is type(b) and isinstance(a, ATOMS) and (a == b or a != a))


def _mapping(label: str, held: dict[Any, Any]) -> _Kept:
    kind: Any = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict

    def write(value: dict[Any, Any]) -> None:
        kind.clear(held)
        for k, v in value.items():
            kind.__setitem__(held, k, v)

    return _Kept(label, lambda: dict(held), write)


def _sequence(label: str, held: Any) -> _Kept:
    def write(value: list[Any]) -> None:
        held.clear()
        held.extend(value)

    return _Kept(label, lambda: list(held), write)


def _weak(label: str, held: Any) -> _Kept:
    def write(value: dict[Any, Any]) -> None:
        held.clear()
        held.update(value)

    return _Kept(label, lambda: dict(held.items()), write)


class _Values(_Kept):
    """The values of a tensor or of a numpy array, which may be written to in place."""

    def __init__(self, label: str, held: Any, copied: Callable[[Any], Any], write: Callable[[Any], None]) -> None:
        super().__init__(label, lambda: held, write, shared=True)
        self.values = copied(held)

    def differs(self) -> bool:
        if isinstance(self.saved, torch.Tensor):
            return not torch.equal(self.saved.detach(), self.values)
        return self.saved.tobytes() != self.values.tobytes()

    def changed(self) -> list[str]:
        return [self.label] if self.differs() else []

    def restore(self) -> None:
        if self.differs():
            self._write(self.values)


def _tensor_values(label: str, held: torch.Tensor) -> _Values:
    def write(value: torch.Tensor) -> None:
        held.data.copy_(value)

    return _Values(label, held, lambda t: t.detach().clone(), write)


def _array_values(label: str, held: Any) -> _Values:
    def write(value: Any) -> None:
        held[...] = value

    return _Values(label, held, lambda a: a.copy(), write)


def _set(label: str, held: set[Any]) -> _Kept:
    def write(value: set[Any]) -> None:
        held.clear()
        held.update(value)

    return _Kept(label, lambda: set(held), write)


def _cell(label: str, cell: types.CellType) -> _Kept:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # an empty cell
            return _MISSING

    def write(value: Any) -> None:
        if value is _MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return _Kept(label, read, write)


def _name(label: str, names: dict[str, Any], name: str) -> _Kept:
    """One name of a Python file."""

    def write(value: Any) -> None:
        if value is _MISSING:
            names.pop(name, None)
        else:
            names[name] = value

    return _Kept(label, lambda: names.get(name, _MISSING), write, shared=True)


def _attribute(label: str, held: Any, name: str) -> _Kept:
    """A slot of an object, or an attribute of a class."""

    def read() -> Any:
        if isinstance(held, type):
            return vars(held).get(name, _MISSING)
        return getattr(held, name, _MISSING)

    def write(value: Any) -> None:
        if value is not _MISSING:
            setattr(held, name, value)
        elif read() is not _MISSING:
            delattr(held, name)

    return _Kept(label, read, write, shared=isinstance(held, type))


def _generator(label: str, held: torch.Generator) -> _Kept:
    def write(state: torch.Tensor) -> None:
        held.set_state(state)

    kept = _Kept(label, held.get_state, write)
    kept.differs = lambda: not torch.equal(held.get_state(), kept.saved)  # type: ignore[method-assign]
    return kept


class State:
    """What a model and the functions that it calls can reach, as it was when the State was made.

    roots: name -> object, as {"model": model}. Names in messages start with them.
    """

    def __init__(self, **roots: Any) -> None:
        self._kept: list[_Kept] = []
        self._caches: list[tuple[Any, int]] = []
        self._seen: dict[int, Any] = {}  # by identity; holds the objects, so that no identity is used again
        self._todo: list[tuple[Any, str]] = [(value, name) for name, value in roots.items()]
        while self._todo:
            value, label = self._todo.pop()
            if id(value) not in self._seen and not isinstance(value, ATOMS):
                self._seen[id(value)] = value
                self._visit(value, label)

    def changed(self) -> list[str]:
        """The places whose values are others now, as in `model.blocks.0.step`."""
        return [label for kept in self._kept for label in kept.changed()]

    def restore(self) -> None:
        """Puts back all that changed, and empties caches that took something in."""
        for kept in self._kept:
            kept.restore()
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()

    def empty_caches(self) -> None:
        """Empties what `functools.lru_cache` holds: tensors in it cannot be replaced, and are computed again."""
        for cache, _ in self._caches:
            cache.cache_clear()

    def replace(self, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts `made(t)` in the place of each tensor t that is held; names of Python files and classes stay."""
        for kept in self._kept:
            new = kept.saved if kept.shared else _replaced(kept.saved, made)
            if new is not kept.saved:
                kept.put(new)

    # -------------------------------------------------------------------------------------------------------- the walk

    def _later(self, value: Any, label: str) -> None:
        self._todo.append((value, label))

    def _visit(self, value: Any, label: str) -> None:
        if isinstance(value, torch.Generator):
            self._kept.append(_generator(label, value))
        elif isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and value.device.type == "cpu" and value.nbytes <= COPIED:
                self._kept.append(_tensor_values(label, value))
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.nbytes <= COPIED and value.flags.writeable and not value.dtype.hasobject:
                self._kept.append(_array_values(label, value))
        elif isinstance(value, (*OPAQUE, enum.Enum, enum.EnumMeta)):
            return
        elif isinstance(value, WEAK):
            self._kept.append(_weak(label, value))
            for v in list(value.values()):
                self._later(v, label)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, types.FunctionType):
            self._visit_function(value, label)
        elif isinstance(value, types.MethodType):
            self._later(value.__self__, label)
            self._later(value.__func__, label)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._later(part, label)
        elif isinstance(value, _CACHE):
            self._caches.append((value, value.cache_info().misses))
            self._later(getattr(value, "__wrapped__", None), label)
        elif isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            for name in ("fget", "__func__", "func"):
                self._later(getattr(value, name, None), label)
        elif not self._visit_container(value, label):
            self._visit_object(value, label)

    def _visit_container(self, value: Any, label: str) -> bool:
        if isinstance(value, dict):
            self._kept.append(_mapping(label, value))
            for k, v in list(dict.items(value)):
                self._later(v, f"{label}[{k!r}]" if isinstance(k, ATOMS) else label)
        elif isinstance(value, (list, collections.deque)):
            self._kept.append(_sequence(label, value))
        elif isinstance(value, set):
            self._kept.append(_set(label, value))
        elif not isinstance(value, (tuple, frozenset)):
            return False
        if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            for i, v in enumerate(list(value)):
                self._later(v, f"{label}[{i}]")
        self._visit_object(value, label)  # subclasses may have attributes
        return True

    def _visit_object(self, value: Any, label: str) -> None:
        kind = type(value)
        foreign = _root(kind.__module__) in ("torch", "numpy", "_thread", "threading", "weakref")
        if foreign and not isinstance(value, (nn.Module, threading.local)):
            return
        with contextlib.suppress(AttributeError):
            local = isinstance(value, threading.local)  # has one dictionary a thread, which it alone finds
            held = value.__dict__ if local else object.__getattribute__(value, "__dict__")
            if isinstance(held, dict):
                self._kept.append(_mapping(label, held))
                for name, v in list(held.items()):
                    self._later_attribute(value, v, label, name)
        for cls in kind.__mro__:
            slots = vars(cls).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else tuple(slots):
                if slot not in ("__dict__", "__weakref__") and not _foreign(cls.__module__):
                    mangled = f"_{cls.__name__.lstrip('_')}{slot}" if slot.startswith("__") else slot
                    self._kept.append(_attribute(f"{label}.{slot}", value, mangled))
                    self._later(getattr(value, mangled, None), f"{label}.{slot}")
        self._later(kind, label)

    def _later_attribute(self, holder: Any, value: Any, label: str, name: str) -> None:
        if isinstance(holder, nn.Module) and name == "_modules" and isinstance(value, dict):
            self._seen[id(value)] = value
            self._kept.append(_mapping(label, value))
            for child, module in value.items():
                self._later(module, f"{label}.{child}")
        else:
            self._later(value, f"{label}.{name}")

    def _visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if _foreign(base.__module__) or (base is not cls and id(base) in self._seen):
                continue
            self._seen[id(base)] = base
            for name, value in list(vars(base).items()):
                if name.startswith("__") and name not in ("__init_subclass__", "__call__", "__getattr__"):
                    continue
                label = f"{base.__qualname__}.{name}"
                self._kept.append(_attribute(label, base, name))
                self._later(value, label)

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._kept.append(_cell(f"{name} (of {function.__qualname__})", cell))
            with contextlib.suppress(ValueError):
                self._later(cell.cell_contents, name)
        for part in (function.__defaults__, function.__kwdefaults__, function.__dict__):
            if part:
                self._later(part, function.__qualname__)
        if _foreign(function.__globals__.get("__name__")):
            return
        names, stored = _names(function.__code__)
        for name in names:
            self._visit_name(function.__globals__, name, names, name in stored)

    def _visit_name(self, held: dict[str, Any], name: str, names: frozenset[str], stored: bool) -> None:
        """A name that a function reads or writes in its Python file, and what it reads there of other files."""
        value = held.get(name, _MISSING)
        if value is _MISSING and not stored:
            return
        label = f"{held.get('__name__')}.{name}"
        if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            self._kept.append(_name(label, held, name))
        if isinstance(value, types.ModuleType):
            if not _foreign(value.__name__) and id(value) not in self._seen:
                for inner in names & set(vars(value)):
                    self._visit_name(vars(value), inner, frozenset(), stored=False)
        elif value is not _MISSING:
            self._later(value, label)


def _root(module: Any) -> str:
    return str(module).partition(".")[0]


def _foreign(module: Any) -> bool:
    """Whether a Python file is not a model's own."""
    return _root(module) in FOREIGN or str(module).startswith(MACHINERY)


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names and attributes that a function's code reads, those of functions inside it too; and the global
    names that it writes.
    """
    names, stored = set(code.co_names), set()
    if dis.opmap["STORE_GLOBAL"] in code.co_code[::2]:
        stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, written = _names(constant)
            names |= inner
            stored |= written
    return frozenset(names), frozenset(stored)


def _replaced(value: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with other tensors at its top, and in tuples below; the same object where nothing is replaced."""
    if isinstance(value, torch.Tensor):
        return made(value)
    if isinstance(value, dict):
        new = {k: _inner(v, made) for k, v in value.items()}
        return new if any(new[k] is not value[k] for k in value) else value
    if isinstance(value, list):
        items = [_inner(v, made) for v in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _inner(value: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a container holds: tensors and tuples of them; other containers are kept by themselves."""
    if isinstance(value, torch.Tensor):
        return made(value)
    if type(value) is tuple:
        items = tuple(_inner(v, made) for v in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


# ---------------------------------------------------------------------------------------------------------- the process


def _torch_settings() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """(read, write) of what a model's code, or what traces it, may set for the whole process or thread."""
    cudnn, matmul, compiler = torch.backends.cudnn, torch.backends.cuda.matmul, torch.compiler
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.is_grad_enabled, torch._C._set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
        (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
        (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
        (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    ]
    for kind in ("cpu", "cuda"):
        pairs.append(
            (
                functools.partial(torch.is_autocast_enabled, kind),
                functools.partial(torch.set_autocast_enabled, kind),
            )
        )
    flags = [(cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn, "enabled"), (compiler, "_is_compiling_flag"),
             (compiler, "_is_exporting_flag"), (matmul, "allow_bf16_reduced_precision_reduction")]  # fmt: skip
    for holder, name in flags:
        if hasattr(holder, name):
            pairs.append((functools.partial(getattr, holder, name), functools.partial(setattr, holder, name)))
    return pairs


def _random_states() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        pairs.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        pairs.append((numpy.random.get_state, numpy.random.set_state))
    return pairs


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Puts back torch's settings, random states and the levels of torch's transforms, however the body ends."""
    from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack_and_undo_to_depth

    settings = [(read(), read, write) for read, write in _torch_settings()]
    states = [(read(), write) for read, write in _random_states()]
    depth = get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if get_dynamic_layer_stack_depth() > depth:  # what an error inside torch.vmap or torch.func leaves behind
            pop_dynamic_layer_stack_and_undo_to_depth(depth)
        for was, read, write in settings:
            if read() != was:
                write(was)
        for was, write in states:
            write(was)


class _Silent:
    """What export prints of a graph that it could not finish goes nowhere: the error's sentence is enough."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export logs the partial graph of a failure, prints it, and warns of what it does on its own."""
    from torch.export import _trace

    loggers = [logging.getLogger(n) for n in ("torch", "torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            vars(_trace)["print"] = _Silent()
            yield
        finally:
            vars(_trace).pop("print", None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
