"""Reads the signature of a Program, and the tree of its result, from JSON data that anyone may have written."""

from __future__ import annotations

import inspect
import keyword
from dataclasses import fields
from typing import Any

from turbocompile.ir import reading
from turbocompile.ir import signature as sig
from turbocompile.ir.allowed_ops import parse_dtype
from turbocompile.ir.program import Input, Signature
from turbocompile.ir.reading import Unreadable, entry, items, one_of, plain, table, text, truth, whole
from turbocompile.ir.sizes import check_size, read_shape

_ITEMS = ("tuple", "list", "dict", "class")


def read_signature(value: Any) -> Signature:
    d = table(value, "the signature")
    given = {f.name: entry(d, f.name, "the signature") for f in fields(Signature)}
    guards = table(given["guards"], "the guards")
    return Signature(
        _parameters(given["parameters"]),
        _inputs(given["inputs"]),
        {path: _guard(v, f"the guard {reading.shown(path)}") for path, v in guards.items()},
        table(given["output"], "the result"),
        truth(given["return_dict"], "return_dict"),
    )


def _parameters(value: Any) -> tuple[tuple[str, str, bool, Any], ...]:
    """The parameters. Raises Unreadable unless `inspect.Signature` accepts them."""
    made = []
    for one in items(value, "the parameters"):
        if len(items(one, "a parameter")) != 4:
            raise Unreadable(f"a parameter is {reading.shown(one)}, and should be a name, a kind and a default")
        name = text(one[0], "the name of a parameter")
        if not name.isidentifier():
            raise Unreadable(f"a parameter is named {reading.shown(name)}, which is the name of none")
        kind = one_of(one[1], f"the kind of the parameter {name[:40]!r}", inspect._ParameterKind.__members__)
        has = truth(one[2], f"whether the parameter {name[:40]!r} has a default")
        made.append((name, kind, has, _default(one[3], f"the default of the parameter {name[:40]!r}")))
    try:
        inspect.Signature(
            [
                inspect.Parameter(name, inspect._ParameterKind[kind], default=None if has else inspect.Parameter.empty)
                for name, kind, has, _ in made
            ]
        )
    except ValueError as error:
        raise Unreadable(f"the parameters are those of no function: {str(error)[:80]}") from error
    return tuple(made)


def _inputs(value: Any) -> tuple[Input, ...]:
    found: dict[str, Input] = {}
    for one in items(value, "the inputs"):
        d = table(one, "an input")
        path, shape, dtype, cast = (entry(d, k, "an input") for k in ("path", "shape", "dtype", "cast"))
        number = truth(d.get("number", False), "number")
        made = Input(
            text(path, "the path of an input"), read_shape(shape), parse_dtype(dtype), truth(cast, "cast"), number
        )
        if number and (made.shape, made.dtype, made.cast) != ((), sig.NUMBER, False):
            raise Unreadable(f"the input {made.path[:40]!r} is a number of another shape or dtype than one has")
        check_size(made.shape, made.dtype, "the signature")
        if found.setdefault(made.path, made) is not made:
            raise Unreadable(f"two inputs are both {made.path[:40]!r}")
    return tuple(found.values())


def _guard(value: Any, what: str) -> Any:
    """A plain value, or the marker of a container."""
    return _container(value, what, ()) if isinstance(value, dict) and "container" in value else plain(value, what)


def _default(value: Any, what: str) -> Any:
    """A plain value, or a tree of containers of them."""
    if not isinstance(value, dict) or "container" not in value:
        return plain(value, what)
    made = _container(value, what, ("items",))
    if "items" in value:
        made["items"] = [_default(v, what) for v in items(value["items"], what)]
        if len(made["items"]) != len(made["keys"]):
            raise Unreadable(f"{what} has {len(made['keys'])} keys of {len(made['items'])} items")
    elif made["container"] != "default":
        raise Unreadable(f"{what} lacks 'items'")
    return made


def _container(value: dict[str, Any], what: str, more: tuple[str, ...]) -> dict[str, Any]:
    kind = one_of(value["container"], f"the container of {what}", ("tuple", "list", "dict", "default"))
    keys = items(entry(value, "keys", what), f"the keys of {what}")
    wanted: Any = range(len(keys)) if kind in ("tuple", "list") else keys
    if kind == "dict":
        reading.texts(keys, f"the keys of {what}")
    if any(type(k) is not type(w) or k != w for k, w in zip(keys, wanted, strict=True)) or (keys and kind == "default"):
        raise Unreadable(f"{what} has keys that no {kind} has")
    if set(value) - {"container", "keys", *more}:
        raise Unreadable(f"{what} is {reading.shown(value)}, and should be a plain value or a container")
    return {"container": kind, "keys": list(keys)}


def check_output(value: Any, outputs: int) -> None:
    """Raises Unreadable unless the tree of the result is well-formed and its tensors are among this many outputs."""
    tree = table(value, "the result")
    kind = one_of(entry(tree, "kind", "the result"), "a kind in the result", ("tensor", "none", "value", *_ITEMS))
    if kind == "tensor":
        whole(entry(tree, "index", "a tensor of the result"), "the place of a tensor in the result", 0, outputs - 1)
    elif kind == "value":
        plain(entry(tree, "value", "a value of the result"), "a value of the result")
    elif kind in _ITEMS:
        inner = items(entry(tree, "items", "the result"), "the items of the result")
        for item in inner:
            check_output(item, outputs)
        if kind in ("dict", "class"):
            keys = items(entry(tree, "keys", "the result"), "the keys of the result")
            if len(keys) != len(inner):
                raise Unreadable(f"the result has {len(keys)} keys of {len(inner)} items")
            made = [plain(k, "a key of the result") for k in keys]
            if len(set(made)) != len(made):
                raise Unreadable("the result has a key twice")
            if kind == "class":
                _check_class(tree, reading.texts(keys, "the keys of the result"))


def _check_class(tree: dict[str, Any], keys: list[str]) -> None:
    name = text(entry(tree, "name", "the class of the result"), "the class of the result")
    truth(tree.get("named_tuple", False), "named_tuple")
    last = name.rpartition(".")[2]
    if not last.isidentifier() or keyword.iskeyword(last):
        raise Unreadable(f"the class of the result is {reading.shown(name)}, and should be the name of one")
    known = sig.seen_classes.get(name)
    try:
        if name in sig.OUTPUT_CLASSES and keys != ["sample"]:
            raise TypeError("it has one field, 'sample'")
        if known is not None:
            inspect.signature(known).bind(**dict.fromkeys(keys))
    except (TypeError, ValueError) as error:
        raise Unreadable(f"the result is no {last}: {str(error)[:80]}") from error
