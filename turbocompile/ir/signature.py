"""How a model is called, as data: parameters, shapes of the tensors, plain values, and the tree of the result.

A graph takes a flat list of tensors. `describe` records how the arguments of a call of `forward` map to that list.
`bind` maps the arguments of a later call, in any spelling (positional, keyword, omitted defaults), to the list in the
same way, or raises an error that says why the call does not fit. A `Spelling` repeats a call exactly as its user wrote
it, because a model may behave differently when an argument is passed by position, by name, or not at all.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import re
from collections import OrderedDict, namedtuple
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from turbocompile.errors import CaptureError
from turbocompile.ir.program import Input, Signature

PLAIN = (bool, int, float, str, type(None))
NUMBER = torch.float64  # the dtype of the tensor that stands for a Python float that is an input
TIMESTEP = re.compile(r"(^|\.)(timesteps?|t|time)$")
OUTPUT_CLASSES = {  # the classes that a loaded engine may construct; any other becomes an `Output`
    "diffusers.models.modeling_outputs.Transformer2DModelOutput",
    "diffusers.models.transformers.transformer_2d.Transformer2DModelOutput",
}
BY_DEFAULT = {
    "container": "default",
    "keys": [],
}  # marks an argument that the call left out and whose default is no plain value: calls leave it out, too
seen_classes: dict[
    str, type
] = {}  # classes of results that captures of this process met, by name: engines of this process return them


class Output(OrderedDict[str, Any]):
    """A result whose class an engine may not construct: a dictionary with attributes, indexable as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the result has {', '.join(self)}, not {name!r}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class _Default:
    """The value of an argument that the call left out and whose default is no plain value."""

    def __repr__(self) -> str:
        return "its default"


_DEFAULT = _Default()


def describe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrapper: bool = True,
    numbers: Container[str] = (),
) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a call and the call's tensors, in order. The output is filled in after the export.

    wrapper: whether a parameter `return_dict` that is true by default selects, as in diffusers, between the same
    results in an object and in a tuple; otherwise `return_dict` is an argument like any other. numbers: paths of the
    Python floats that become inputs (float64 tensors without dimensions); all other floats are fixed at capture.

    Raises CaptureError for a call without a tensor and for an argument that is neither a tensor, nor a plain value, nor
    a container of them.
    """
    declared = list(inspect.signature(model.forward).parameters.values())
    parameters = tuple((p.name, p.kind.name, p.default is not p.empty, _as_data(p.default)) for p in declared)
    has_return_dict = wrapper and any(p.name == "return_dict" and p.default in (True, None) for p in declared)
    bound = _bind(parameters, args, kwargs, type(model).__name__)
    inputs, guards, tensors = [], {}, []
    for path, value in _walk(bound):
        if isinstance(value, torch.Tensor):
            inputs.append(Input(path, tuple(value.shape), value.dtype, bool(TIMESTEP.search(path))))
            tensors.append(value)
        elif path in numbers and type(value) is float and math.isfinite(value):
            inputs.append(Input(path, (), NUMBER, number=True))
            tensors.append(torch.tensor(value, dtype=NUMBER))
        elif isinstance(value, PLAIN) or _is_marker(value):
            guards[path] = value
        else:
            raise CaptureError(
                f"the argument {path!r} of {type(model).__name__} is a {type(value).__name__}; "
                "a captured call takes tensors, plain values, and tuples, lists and dicts of them"
            )
    if not any(not i.number for i in inputs):
        raise CaptureError(f"the example call of {type(model).__name__} has no tensor; pass args= or kwargs=")
    if has_return_dict:
        guards["return_dict"] = True
    return Signature(parameters, tuple(inputs), guards, {}, has_return_dict), tensors


def given_numbers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """The finite Python floats that the call passes, by path; defaults are not among them."""
    parameters = [(p.name, p.kind.name) for p in inspect.signature(model.forward).parameters.values()]
    found = dict(pair for path, value in _paths(parameters, args, kwargs) for pair in _walk(value, path))
    return {path: v for path, v in found.items() if type(v) is float and math.isfinite(v)}


def _paths(
    parameters: Sequence[tuple[str, str]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The path and value of each argument that a call passes, positional arguments first."""
    positional = [n for n, kind in parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
    rest = next((n for n, kind in parameters if kind == "VAR_POSITIONAL"), "")
    more = next((n for n, kind in parameters if kind == "VAR_KEYWORD"), "")
    known = {n for n, kind in parameters if not kind.startswith("VAR_")}
    for i, value in enumerate(args):
        yield positional[i] if i < len(positional) else f"{rest}.{i - len(positional)}", value
    for name, value in kwargs.items():
        yield name if name in known else f"{more}.{name}", value


@dataclass(frozen=True)
class Spelling:
    """A call as its user wrote it: which arguments are positional, named or left out, and in which containers they are.

    `call` finds tensors, and numbers that are inputs, by their paths. return_dict: the value that the call passes where
    `return_dict` selects the wrapper alone; None where the user's value stays.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameters: tuple[tuple[str, str, bool, Any], ...]
    return_dict: bool | None = None

    @classmethod
    def of(cls, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Spelling:
        """The spelling of the call that `signature` describes."""
        return cls(tuple(args), dict(kwargs), signature.parameters, True if signature.return_dict else None)

    def call(self, leaves: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """args and kwargs in new containers of the same kinds; `leaves[path]` replaces the value at its path."""
        kinds = [(n, kind) for n, kind, _, _ in self.parameters]
        filled = [_filled(value, path, leaves) for path, value in _paths(kinds, self.args, self.kwargs)]
        args, kwargs = filled[: len(self.args)], dict(zip(self.kwargs, filled[len(self.args) :], strict=True))
        if self.return_dict is not None:
            names = [n for n, kind in kinds if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
            index = names.index("return_dict") if "return_dict" in names else len(args)
            default = next(d for n, _, _, d in self.parameters if n == "return_dict")
            if index < len(args):
                args[index] = self.return_dict
            elif "return_dict" in kwargs or default is not self.return_dict:
                kwargs["return_dict"] = self.return_dict
        return args, kwargs


def _filled(value: Any, path: str, leaves: Mapping[str, Any]) -> Any:
    if path in leaves:
        return leaves[path]
    if isinstance(value, Mapping):
        items = {k: _filled(v, f"{path}.{k}", leaves) for k, v in value.items()}
        if type(value) is dict:
            return items
        made: Any = copy.copy(value)
        for k, v in items.items():
            made[k] = v
        return made
    if isinstance(value, (tuple, list)):
        parts = [_filled(v, f"{path}.{k}", leaves) for k, v in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts) if type(value) in (tuple, list, torch.Size) else tuple(parts)
    return value


def float_timesteps(signature: Signature) -> Signature:
    """The signature with float32 timesteps instead of integer ones.

    Samplers pass integers or floats, and a sinusoidal embedding takes both.
    """
    inputs = tuple(
        replace(i, dtype=torch.float32) if i.cast and not i.dtype.is_floating_point else i for i in signature.inputs
    )
    return replace(signature, inputs=inputs)


def with_output(signature: Signature, output: dict[str, Any]) -> Signature:
    return replace(signature, output=output)


def _as_data(default: Any) -> Any:
    """A default as data: a plain value as it is, a container of them as a tree, any other default as a marker."""
    if default is inspect.Parameter.empty:
        return None
    if type(default) in PLAIN:
        return default
    if type(default) in (tuple, list) or (type(default) is dict and all(type(k) is str for k in default)):
        pairs = list(default.items() if isinstance(default, dict) else enumerate(default))
        keys, items = [k for k, _ in pairs], [_as_data(v) for _, v in pairs]
        if BY_DEFAULT not in items:
            return {"container": type(default).__name__, "keys": keys, "items": items}
    return dict(BY_DEFAULT)


def _from_data(stored: Any) -> Any:
    if not isinstance(stored, Mapping):
        return stored
    items = [_from_data(item) for item in stored.get("items", ())]
    kind = stored.get("container")
    if kind == "dict":
        return dict(zip(stored.get("keys", ()), items, strict=False))
    return {"tuple": tuple(items), "list": items}.get(str(kind), _DEFAULT)


def _bind(parameters: Sequence[tuple[str, str, bool, Any]], args: Any, kwargs: Any, name: str) -> dict[str, Any]:
    """The arguments by parameter name, defaults filled in."""
    missing = inspect.Parameter.empty
    made = inspect.Signature(
        [
            inspect.Parameter(n, inspect._ParameterKind[kind], default=_from_data(default) if has else missing)
            for n, kind, has, default in parameters
        ]
    )
    try:
        bound = made.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"the call does not fit {name}.forward{made}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _is_marker(value: Any) -> bool:
    """Whether a recorded value stands for a container: such markers let `differs` see another structure."""
    return isinstance(value, dict) and set(value) == {"container", "keys"}


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of each leaf; each container below the top gives a marker with its kind and keys."""
    if isinstance(value, Mapping):
        if path:
            yield path, {"container": "dict", "keys": [str(k) for k in value]}
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        yield path, {"container": "tuple" if isinstance(value, tuple) else "list", "keys": list(range(len(value)))}
        for key, item in enumerate(value):
            yield from _walk(item, f"{path}.{key}")
    elif value is _DEFAULT:
        yield path, dict(BY_DEFAULT)
    else:
        yield path, value


def _unwalk(path: str, leaves: Mapping[str, Any], guards: Mapping[str, Any]) -> Any:
    marker: Any = guards.get(path)
    if not _is_marker(marker):
        return leaves.get(path, marker)
    if marker == BY_DEFAULT:
        return _DEFAULT
    items = [_unwalk(f"{path}.{key}", leaves, guards) for key in marker["keys"]]
    if marker["container"] == "dict":
        return dict(zip(marker["keys"], items, strict=True))
    return tuple(items) if marker["container"] == "tuple" else items


def rebuild(signature: Signature, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """args and kwargs of `forward`, from tensors in the order of `signature.inputs` and the recorded plain values."""
    leaves = {i.path: t for i, t in zip(signature.inputs, tensors, strict=True)}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left_out = False
    for name, kind, _, _ in signature.parameters:
        value = _unwalk(name, leaves, signature.guards)
        if value is _DEFAULT:
            left_out = True  # the arguments after it have to be passed by name
        elif kind == "VAR_POSITIONAL":
            args.extend(value)
        elif kind == "VAR_KEYWORD":
            kwargs.update(value)
        elif kind == "KEYWORD_ONLY" or left_out:
            kwargs[name] = value
        else:
            args.append(value)
    return args, kwargs


def bind(signature: Signature, args: Any, kwargs: Any, name: str = "the engine") -> tuple[list[torch.Tensor], bool]:
    """The tensors of a call in the order of `signature.inputs`, and whether the caller wants the wrapped output.

    Raises CaptureError where an argument that was fixed at capture differs. `fits` checks the shapes, `cast` the
    dtypes.
    """
    given = bound(signature, args, kwargs, name)
    reason = differs(signature, given)
    if reason:
        raise CaptureError(f"{name} {reason}")
    return tensors_of(signature, given), given.wrapped


@dataclass(frozen=True)
class Bound:
    """A call's arguments: tensors and plain values by path, and whether the caller wants the wrapped output."""

    values: Mapping[str, Any]
    wrapped: bool


def bound(signature: Signature, args: Any, kwargs: Any, name: str = "the engine") -> Bound:
    """The arguments of a call by their paths. Raises CaptureError where the call does not fit `forward`."""
    arguments = _bind(signature.parameters, args, kwargs, name)
    return Bound(dict(_walk(arguments)), bool(arguments.get("return_dict", True)))


def tensors_of(signature: Signature, given: Bound) -> list[torch.Tensor]:
    """The call's tensors in the order of `signature.inputs`; numbers that are inputs become tensors."""
    found = []
    for i in signature.inputs:
        value = given.values[i.path]
        found.append(value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=NUMBER))
    return found


def differs(signature: Signature, given: Bound) -> str:
    """How a call differs from the captured one, apart from shapes and dtypes; "" where it does not differ.

    The text continues a sentence that begins with the engine's name.
    """
    wanted = {i.path: i for i in signature.inputs}
    for path, value in given.values.items():
        if isinstance(value, torch.Tensor):
            if path not in wanted:
                return f"was captured without the tensor {path!r}; compile it with one to pass one"
            if wanted[path].number:
                return f"was captured with a number for {path!r}, and got a tensor; compile it with one to pass one"
        elif path in wanted:
            if not (wanted[path].number and type(value) in (float, int)):
                return f"was captured with a tensor for {path!r}, and got {_shown(path, given.values)}"
        elif path == "return_dict" and signature.return_dict:
            continue
        elif path not in signature.guards or not _same(signature.guards[path], value):
            was = _shown(path, signature.guards, wanted) if path in signature.guards else "absent"
            got = _shown(path, given.values)
            return f"was captured with {path}={was}, and got {got}; compile it for that value"
    missing = [path for path in wanted if path not in given.values]
    if missing:
        return f"was captured with a tensor for {missing[0]!r}, which is missing from this call"
    gone = [path for path in signature.guards if path not in given.values and path != "return_dict"]
    if gone:
        return (
            f"was captured with {gone[0]}={_shown(gone[0], signature.guards, wanted)}, which is missing from this call"
        )
    return ""


def _same(was: Any, value: Any) -> bool:
    """Whether a plain value equals the captured one. An int equals a float of its value; a bool equals bools alone."""
    if type(was) is float and type(value) in (float, int):
        return was == value or (was != was and value != value)
    return type(was) is type(value) and was == value


def _shown(path: str, values: Mapping[str, Any], inputs: Mapping[str, Input] | None = None) -> str:
    """A value at a path as its user wrote it."""
    value = values.get(path)
    if inputs and path in inputs:
        return "a number" if inputs[path].number else f"a tensor {list(inputs[path].shape)}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if value == BY_DEFAULT:
        return repr(_DEFAULT)
    if not isinstance(value, dict) or not _is_marker(value):
        return repr(value)
    items = [_shown(f"{path}.{key}", values, inputs) for key in value["keys"]]
    if value["container"] == "dict":
        return "{" + ", ".join(f"{k!r}: {v}" for k, v in zip(value["keys"], items, strict=True)) + "}"
    if value["container"] == "tuple":
        return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"
    return "[" + ", ".join(items) + "]"


def fits(signature: Signature, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have the captured shapes."""
    return all(tuple(t.shape) == i.shape for t, i in zip(tensors, signature.inputs, strict=True))


def same_shapes(signature: Signature, given: Bound) -> bool:
    """Whether the call's tensors have the captured shapes wherever both have a tensor."""
    pairs = ((i.shape, given.values.get(i.path)) for i in signature.inputs)
    return all(tuple(t.shape) == shape for shape, t in pairs if isinstance(t, torch.Tensor))


def cast(signature: Signature, tensors: Sequence[torch.Tensor], name: str = "the engine") -> list[torch.Tensor]:
    """The tensors in the captured dtypes. Timesteps are cast.

    Raises CaptureError for another tensor of a wrong dtype, and for timesteps that a cast to an integer would round.
    """
    out = []
    for t, i in zip(tensors, signature.inputs, strict=True):
        if t.dtype != i.dtype and not i.cast:
            raise CaptureError(f"{name} takes {i.path!r} in {i.dtype}, and got {t.dtype}; cast it before the call")
        if t.is_floating_point() and not i.dtype.is_floating_point and bool((t != t.round()).any()):
            raise CaptureError(f"{name} takes {i.path!r} in {i.dtype}, and got numbers that are no integers")
        out.append(t.to(i.dtype))
    return out


def describe_output(value: Any, flat: list[torch.Tensor]) -> dict[str, Any]:
    """The tree of a result (see `Signature.output`). Appends the tensors of the result to `flat`.

    Raises CaptureError for a result that holds anything but tensors, plain values and containers of them.
    """
    if isinstance(value, torch.Tensor):
        flat.append(value)
        return {"kind": "tensor", "index": len(flat) - 1}
    if value is None:
        return {"kind": "none"}
    if isinstance(value, PLAIN):
        return {"kind": "value", "value": value}
    if type(value) in (tuple, list):
        return {"kind": type(value).__name__, "items": [describe_output(v, flat) for v in value]}
    if type(value) is dict:
        keys, items = list(value), list(value.values())
        return {"kind": "dict", "keys": keys, "items": [describe_output(v, flat) for v in items]}
    if isinstance(value, Mapping):
        keys, items = list(value), list(value.values())
    elif dataclasses.is_dataclass(value):
        keys = [f.name for f in dataclasses.fields(value)]
        items = [getattr(value, k) for k in keys]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        keys, items = list(value._fields), list(value)
    else:
        raise CaptureError(f"the model returned a {type(value).__name__}; return tensors, tuples, dicts or dataclasses")
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    seen_classes[name] = type(value)
    named = {"named_tuple": True} if isinstance(value, tuple) else {}
    return {"kind": "class", "name": name, "keys": keys, "items": [describe_output(v, flat) for v in items], **named}


def wrap_output(signature: Signature, flat: Sequence[torch.Tensor], wrapped: bool) -> Any:
    """The result as the model returns it. wrapped: False gives the items of the wrapper as a tuple."""
    tree = signature.output
    if not wrapped and signature.return_dict and tree["kind"] in ("class", "dict"):
        tree = {"kind": "tuple", "items": tree["items"]}
    return _wrap(tree, flat)


def _wrap(tree: dict[str, Any], flat: Sequence[torch.Tensor]) -> Any:
    kind = tree["kind"]
    if kind == "tensor":
        return flat[tree["index"]]
    if kind in ("none", "value"):
        return tree.get("value")
    items = [_wrap(item, flat) for item in tree["items"]]
    if kind in ("tuple", "list"):
        return tuple(items) if kind == "tuple" else items
    pairs = dict(zip(tree["keys"], items, strict=True))
    if kind == "dict":
        return pairs
    cls = _output_class(tree["name"])
    if cls is None and tree.get("named_tuple"):
        return namedtuple(tree["name"].rpartition(".")[2], tree["keys"], rename=True)(*items)
    return cls(**pairs) if cls is not None else Output(pairs)


def _output_class(name: str) -> type | None:
    if name not in seen_classes and name in OUTPUT_CLASSES:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        if isinstance(found, type):
            seen_classes[name] = found
    return seen_classes.get(name)
