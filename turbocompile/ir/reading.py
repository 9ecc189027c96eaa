"""Typed readers of parsed JSON from a file that anyone may have written.

Each reader takes a value and `what`, the words for it in an error message. It returns the value as its type, and raises
`Unreadable` with one clause ("the name of a node is 7, and should be a text") for a value of another type. No value of
a file is used before a reader has checked it.
"""

from __future__ import annotations

import math
from typing import Any

from turbocompile.files import is_plain_name

MAX_TEXT = 10_000  # characters of a name, an equation or a line of code
INT64 = 1 << 63  # whole numbers are below it, as torch takes them
PLAIN = (bool, int, float, str, type(None))


class Unreadable(ValueError):
    """A value of another type than its field; whoever opened the file adds the file's name."""


def shown(value: Any) -> str:
    """A value as a short text for a message: a field of a file may hold a megabyte, or control characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not -INT64 <= value < 2 * INT64:
        return "a number beyond 64 bits"
    return ascii(value)[:60]


def _refuse(value: Any, what: str, should: str) -> Unreadable:
    return Unreadable(f"{what} is {shown(value)}, and should be {should}")


def text(value: Any, what: str, most: int = MAX_TEXT) -> str:
    if not isinstance(value, str):
        raise _refuse(value, what, "a text")
    if len(value) > most:
        raise Unreadable(f"{what} is a text of {len(value)} characters, more than {most}")
    return value


def one_of(value: Any, what: str, names: Any) -> str:
    """A text that is one of the names: a sequence, or a table whose keys are the names."""
    if not isinstance(value, str) or value not in names:
        raise _refuse(value, what, f"one of {', '.join(names)}" if len(names) <= 12 else "one that there is")
    return value


def whole(value: Any, what: str, least: int = -INT64, most: int = INT64 - 1) -> int:
    """A whole number from `least` to `most`; a bool is refused."""
    if type(value) is not int or not least <= value <= most:
        kind = "a whole number" if (least, most) == (-INT64, INT64 - 1) else f"a whole number from {least} to {most}"
        raise _refuse(value, what, kind)
    return value


def number(value: Any, what: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not -1e308 <= value <= 1e308:
        raise _refuse(value, what, "a finite number")
    return float(value)


def truth(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(value, what, "true or false")
    return value


def items(value: Any, what: str, most: int = 1_000_000) -> list[Any]:
    if not isinstance(value, list):
        raise _refuse(value, what, "a list")
    if len(value) > most:
        raise Unreadable(f"{what} is a list of {len(value)}, more than {most}")
    return value


def texts(value: Any, what: str) -> list[str]:
    return [text(v, f"an entry of {what}") for v in items(value, what)]


def table(value: Any, what: str) -> dict[str, Any]:
    """An object of JSON, whose keys are texts."""
    if not isinstance(value, dict):
        raise _refuse(value, what, "an object")
    for key in value:
        text(key, f"a key of {what}")
    return value


def entry(data: dict[str, Any], key: str, what: str) -> Any:
    """The value under a key. Raises Unreadable where the object lacks the key."""
    if key not in data:
        raise Unreadable(f"{what} lacks {key!r}")
    return data[key]


def plain(value: Any, what: str) -> Any:
    """A plain value. {"float": "inf"} (or "-inf", "nan") stands for a number that JSON cannot write."""
    if isinstance(value, dict) and set(value) == {"float"}:
        return float(one_of(value["float"], what, ("inf", "-inf", "nan")))
    if type(value) is int:
        return whole(value, what)
    if isinstance(value, str):
        return text(value, what)
    if not isinstance(value, PLAIN):
        raise _refuse(value, what, "a plain value")
    return value


def file_name(value: Any, what: str = "a file that the engine names") -> str:
    """A plain relative name, as in "programs/a.json", which stays in its folder on every system."""
    if not is_plain_name(value):
        raise Unreadable(f"{what} is {shown(value)}, which is no plain relative name")
    return value


def is_finite(value: Any) -> bool:
    """Whether a plain value can stand in JSON as it is."""
    return not isinstance(value, float) or math.isfinite(value)
