"""The dataclasses of a recipe: fields that carry their meaning and their bounds, checked when one is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

from turbocompile.errors import RecipeError


class FieldError(RecipeError):
    """A check of a dataclass failed; the builder adds where the field stands."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name} {text}".strip())
        self.name, self.text = name, text


def described(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its meaning; `choices`, `minimum`, `above`, `maximum`, `path` are checked."""
    return field(default=default, metadata={"help": help, **metadata})


class Section:
    """Base of the recipe's dataclasses: checks each field against its metadata. Raises RecipeError.

    GONE: fields of earlier versions -> why there is none. ORDER: the fields in the order that they are written in,
    where another than that of the class.
    """

    GONE: ClassVar[Mapping[str, str]] = {}
    ORDER: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value is None:
                continue
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise FieldError(f.name, not_one_of(value, choices))
            for item in value if isinstance(value, tuple) else (value,):
                _check_bounds(f, item)
        self.check()

    def check(self) -> None:
        """Checks that concern several fields."""

    @classmethod
    def of_text(cls, text: str) -> Mapping[str, str]:
        """The fields that a scalar in the section's place stands for: the first one."""
        return {dataclasses.fields(cls)[0].name: text}  # type: ignore[arg-type]

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _check_bounds(f: dataclasses.Field[Any], value: Any) -> None:
    low, above, high = (f.metadata.get(k) for k in ("minimum", "above", "maximum"))
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(f.name, f"must be a finite number, not {value}")
    if low is not None and value < low:
        raise FieldError(f.name, f"must be at least {low}, not {value}")
    if above is not None and value <= above:
        raise FieldError(f.name, f"must be greater than {above}, not {value}")
    if high is not None and value > high:
        raise FieldError(f.name, f"must be at most {high}, not {value}")


def section_of(hint: Any) -> tuple[type | None, bool]:
    """The Section class in a field's type, and whether the field is a tuple of them."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and dataclasses.is_dataclass(args[0]):
        return typing.cast(type, args[0]), True
    return None, False


def fields_of(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a section, in the order that they are written in."""
    found = {f.name: f for f in dataclasses.fields(cls)}
    return [found[name] for name in cls.ORDER or found]


def plain(value: Any) -> Any:
    """A section, or a value of a field, as JSON holds it."""
    if isinstance(value, Section):
        return {f.name: plain(getattr(value, f.name)) for f in fields_of(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def kind_of(data: Any) -> str:
    if isinstance(data, (dict, Mapping)):
        return "a mapping"
    if isinstance(data, list):
        return "a list"
    return "nothing" if data is None else repr(data)


def nearest(name: str, known: Sequence[str]) -> str:
    """The nearest valid name, or all of them where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(known)}"


def not_one_of(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
    more = f"; did you mean {near[0]}?" if near else ""
    return f"must be one of {', '.join(map(str, choices))}, not {value!r}{more}"
