"""A module that compiles itself when it is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from turbocompile.build.module_capture import ModuleCall
from turbocompile.build.module_facts import dtype_of
from turbocompile.capture.process import compiling
from turbocompile.errors import EngineError
from turbocompile.report.report import Report
from turbocompile.runtime.adapters import FixedWeights
from turbocompile.runtime.engine import Engine


class Builder(Protocol):
    """Builds an engine for calls of a module, or one that has them beside those of an engine that was built before."""

    def __call__(
        self,
        model: nn.Module,
        calls: Sequence[ModuleCall],
        known_calls: Sequence[ModuleCall] = (),
        grown: Engine | None = None,
    ) -> Engine: ...


class LazyEngine(FixedWeights, nn.Module):
    """A module that compiles itself at its first call, for that call's shapes and plain arguments; each other call adds
    its Program, and compiles nothing else. In a pipeline it stands for the module: it has the module's attributes, and
    moves with it.
    """

    model: nn.Module
    engine: Engine | None

    def __init__(self, model: nn.Module, builder: Builder) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.builder = builder
        self.calls: list[ModuleCall] = []
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
                self.engine = self.builder(self.model, [(args, kwargs)], self.calls, self.engine)
                self.calls = [*self.calls, (_to_meta(args), _to_meta(kwargs))]
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
        before = dtype_of(self.model)
        self.model._apply(fn)
        if self.engine is not None:
            self.engine = self.engine._apply(fn) if dtype_of(self.model) == before else None
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


def _to_meta(value: Any) -> Any:
    """The call with tensors that have no memory, so that a module that recompiles keeps no activations.

    Masks and indices are small, and keep their values.
    """
    if isinstance(value, torch.Tensor):
        floating = value.is_floating_point() or value.is_complex()
        return torch.empty_like(value, device="meta") if floating else value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: _to_meta(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(v) for v in value)
    return value
