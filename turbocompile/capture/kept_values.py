"""Values that a trace or a call may change: each is read once, and put back where it differs later."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import torch

ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis))
MISSING: Any = object()  # stands for a name that is not there


class Kept:
    """Something that holds values: how to read it, and how to put back what it held. label: its place, for messages."""

    def __init__(self, label: str, read: Callable[[], Any], write: Callable[[Any], None], shared: bool = False) -> None:
        """shared: by more than the model, as the names of a Python file are."""
        self.label, self._read, self._write, self.shared = label, read, write, shared
        self.saved = read()

    def differs(self) -> bool:
        now, was = self._read(), self.saved
        if isinstance(now, dict):
            return list(now) != list(was) or not all(same(a, was[k]) for k, a in now.items())
        if isinstance(now, (list, tuple)):
            return len(now) != len(was) or not all(map(same, now, was))
        if isinstance(now, (set, frozenset)):
            return now != was
        return not same(now, was)

    def changed(self) -> list[str]:
        """The places below it whose values are others now."""
        now = self._read()
        if not isinstance(now, dict):
            return [self.label] if self.differs() else []
        names = [k for k in {**self.saved, **now} if not same(now.get(k, MISSING), self.saved.get(k, MISSING))]
        return [f"{self.label}.{k}" if str(k).isidentifier() else f"{self.label}[{k!r}]" for k in names]

    def put(self, value: Any) -> None:
        self._write(value)

    def restore(self) -> None:
        if self.differs():
            self._write(self.saved)


def same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal plain values."""
    return a is b or (type(a) is type(b) and isinstance(a, ATOMS) and (a == b or a != a))


def mapping(label: str, held: dict[Any, Any]) -> Kept:
    kind: Any = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict

    def write(value: dict[Any, Any]) -> None:
        kind.clear(held)
        for k, v in value.items():
            kind.__setitem__(held, k, v)

    return Kept(label, lambda: dict(held), write)


def sequence(label: str, held: Any) -> Kept:
    def write(value: list[Any]) -> None:
        held.clear()
        held.extend(value)

    return Kept(label, lambda: list(held), write)


def weak_mapping(label: str, held: Any) -> Kept:
    def write(value: dict[Any, Any]) -> None:
        held.clear()
        held.update(value)

    return Kept(label, lambda: dict(held.items()), write)


class _Values(Kept):
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


def tensor_values(label: str, held: torch.Tensor) -> _Values:
    def write(value: torch.Tensor) -> None:
        held.data.copy_(value)

    return _Values(label, held, lambda t: t.detach().clone(), write)


def array_values(label: str, held: Any) -> _Values:
    def write(value: Any) -> None:
        held[...] = value

    return _Values(label, held, lambda a: a.copy(), write)


def set_of(label: str, held: set[Any]) -> Kept:
    def write(value: set[Any]) -> None:
        held.clear()
        held.update(value)

    return Kept(label, lambda: set(held), write)


def cell_of(label: str, cell: types.CellType) -> Kept:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # an empty cell
            return MISSING

    def write(value: Any) -> None:
        if value is MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return Kept(label, read, write)


def global_name(label: str, names: dict[str, Any], name: str) -> Kept:
    """One name of a Python file."""

    def write(value: Any) -> None:
        if value is MISSING:
            names.pop(name, None)
        else:
            names[name] = value

    return Kept(label, lambda: names.get(name, MISSING), write, shared=True)


def attribute(label: str, held: Any, name: str) -> Kept:
    """A slot of an object, or an attribute of a class."""

    def read() -> Any:
        if isinstance(held, type):
            return vars(held).get(name, MISSING)
        return getattr(held, name, MISSING)

    def write(value: Any) -> None:
        if value is not MISSING:
            setattr(held, name, value)
        elif read() is not MISSING:
            delattr(held, name)

    return Kept(label, read, write, shared=isinstance(held, type))


def generator_state(label: str, held: torch.Generator) -> Kept:
    def write(state: torch.Tensor) -> None:
        held.set_state(state)

    kept = Kept(label, held.get_state, write)
    kept.differs = lambda: not torch.equal(held.get_state(), kept.saved)  # type: ignore[method-assign]
    return kept
