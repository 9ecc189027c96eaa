"""What a model can reach, noted before its code runs, and put back afterwards.

Capture runs a user's code on tensors without memory, and a build calls the user's module to compare it with its engine.
That code may keep what it computes: in attributes, in helper objects, in the closure of a hook, in a dictionary of its
Python file, behind `functools.lru_cache`. A `State` walks from the model to every value that the model's functions can
reach, and notes it (kept_values.py). State of torch and of Python themselves is not a model's: process.py keeps that.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import enum
import functools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from turbocompile.capture.kept_values import (
    ATOMS,
    MISSING,
    Kept,
    array_values,
    attribute,
    cell_of,
    generator_state,
    global_name,
    mapping,
    sequence,
    set_of,
    tensor_values,
    weak_mapping,
)

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
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
COPIED = 64 << 20  # bytes of a tensor or an array whose values are kept; a larger one that is written to stays so
_CACHE = type(functools.lru_cache(lambda: None))


class State:
    """What a model and the functions that it calls can reach, as it was when the State was made.

    roots: name -> object, as {"model": model}. Names in messages start with them.
    """

    def __init__(self, **roots: Any) -> None:
        self._kept: list[Kept] = []
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
            self._kept.append(generator_state(label, value))
        elif isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and value.device.type == "cpu" and value.nbytes <= COPIED:
                self._kept.append(tensor_values(label, value))
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.nbytes <= COPIED and value.flags.writeable and not value.dtype.hasobject:
                self._kept.append(array_values(label, value))
        elif isinstance(value, (*OPAQUE, enum.Enum, enum.EnumMeta)):
            return
        elif isinstance(value, WEAK):
            self._kept.append(weak_mapping(label, value))
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
            self._kept.append(mapping(label, value))
            for k, v in list(dict.items(value)):
                self._later(v, f"{label}[{k!r}]" if isinstance(k, ATOMS) else label)
        elif isinstance(value, (list, collections.deque)):
            self._kept.append(sequence(label, value))
        elif isinstance(value, set):
            self._kept.append(set_of(label, value))
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
                self._kept.append(mapping(label, held))
                for name, v in list(held.items()):
                    self._later_attribute(value, v, label, name)
        for cls in kind.__mro__:
            slots = vars(cls).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else tuple(slots):
                if slot not in ("__dict__", "__weakref__") and not _foreign(cls.__module__):
                    mangled = f"_{cls.__name__.lstrip('_')}{slot}" if slot.startswith("__") else slot
                    self._kept.append(attribute(f"{label}.{slot}", value, mangled))
                    self._later(getattr(value, mangled, None), f"{label}.{slot}")
        self._later(kind, label)

    def _later_attribute(self, holder: Any, value: Any, label: str, name: str) -> None:
        if isinstance(holder, nn.Module) and name == "_modules" and isinstance(value, dict):
            self._seen[id(value)] = value
            self._kept.append(mapping(label, value))
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
                self._kept.append(attribute(label, base, name))
                self._later(value, label)

    def _visit_function(self, function: types.FunctionType, label: str) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._kept.append(cell_of(f"{name} (of {function.__qualname__})", cell))
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
        value = held.get(name, MISSING)
        if value is MISSING and not stored:
            return
        label = f"{held.get('__name__')}.{name}"
        if not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            self._kept.append(global_name(label, held, name))
        if isinstance(value, types.ModuleType):
            if not _foreign(value.__name__) and id(value) not in self._seen:
                for inner in names & set(vars(value)):
                    self._visit_name(vars(value), inner, frozenset(), stored=False)
        elif value is not MISSING:
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
