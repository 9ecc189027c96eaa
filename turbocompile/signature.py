"""How a model is called, as data: names, kinds, defaults, the tensors' shapes, the plain values, the tree of the
result.

A graph takes flat tensors. `describe` records how a call of `forward` maps to them, and `bind` maps any later spelling
of the call (positional, keyword, omitted defaults) the same way, or says in one sentence why it does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from turbocompile.errors import CaptureError
from turbocompile.program import Input, Signature

PLAIN = (bool, int, float, str, type(None))
TIMESTEP = re.compile(r"(^|\.)(timesteps?|t|time)$")
OUTPUT_CLASSES = {  # what a loaded engine may construct; anything else becomes an `Output`
    "diffusers.models.modeling_outputs.Transformer2DModelOutput",
    "diffusers.models.transformers.transformer_2d.Transformer2DModelOutput",
}
BY_DEFAULT = {"container": "default", "keys": []}  # of an argument left out whose default is no data: it stays out
_seen_classes: dict[str, type] = {}  # classes met by captures of this process, which may be given back as they were


class Output(OrderedDict[str, Any]):
    """A result whose class is not at hand: a dictionary with attributes, indexable like diffusers' outputs."""

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
    """An argument left out whose default is no data."""

    def __repr__(self) -> str:
        return "its default"


_DEFAULT = _Default()


def describe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wrapper: bool = True
) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a call (its output is filled in after the export) and its tensors, in order.

    wrapper: whether a `return_dict` that is on by default means what diffusers means by it: the same results, in an
    object or in a tuple. Else it is an argument like any other.
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
        elif isinstance(value, PLAIN) or _is_marker(value):
            guards[path] = value
        else:
            raise CaptureError(
                f"the argument {path!r} of {type(model).__name__} is a {type(value).__name__}; "
                "a captured call takes tensors, plain values, and tuples, lists and dicts of them"
            )
    if not inputs:
        raise CaptureError(f"the example call of {type(model).__name__} has no tensor; pass args= or kwargs=")
    if has_return_dict:
        guards["return_dict"] = True
    return Signature(parameters, tuple(inputs), guards, {}, has_return_dict), tensors


def float_timesteps(signature: Signature) -> Signature:
    """Integer timesteps become float32: samplers give either, and a sinusoidal embedding takes both."""
    inputs = tuple(
        replace(i, dtype=torch.float32) if i.cast and not i.dtype.is_floating_point else i for i in signature.inputs
    )
    return replace(signature, inputs=inputs)


def with_output(signature: Signature, output: dict[str, Any]) -> Signature:
    return replace(signature, output=output)


def _as_data(default: Any) -> Any:
    """A default as it is stored: plain values as they are, containers of them as a tree, anything else a marker."""
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
    """An empty or opened container leaves a marker, so that a call with another structure is refused."""
    return isinstance(value, dict) and set(value) == {"container", "keys"}


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted path; every container below the top yields a marker with its kind and keys."""
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
    """args and kwargs of `forward` from flat tensors and the recorded plain values."""
    leaves = {i.path: t for i, t in zip(signature.inputs, tensors, strict=True)}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left_out = False
    for name, kind, _, _ in signature.parameters:
        value = _unwalk(name, leaves, signature.guards)
        if value is _DEFAULT:
            left_out = True  # what follows has to be named
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
    """The tensors of a call in the order of `signature.inputs`, and whether the wrapped output is wanted.

    Raises CaptureError where an argument that was fixed at capture differs. Shapes and dtypes are checked by `fits`.
    """
    bound = _bind(signature.parameters, args, kwargs, name)
    wrapped = bool(bound.get("return_dict", True))
    found = dict(_walk(bound))
    wanted = {i.path for i in signature.inputs}
    for path, value in found.items():
        if isinstance(value, torch.Tensor):
            if path not in wanted:
                raise CaptureError(f"{name} was captured without the tensor {path!r}; compile it with one to pass one")
        elif path in wanted:
            raise CaptureError(f"{name} was captured with a tensor for {path!r}, and got {value!r}")
        elif path == "return_dict" and signature.return_dict:
            continue
        elif path not in signature.guards or signature.guards[path] != value:
            was = signature.guards.get(path, "absent")
            was, value = (_DEFAULT if v == BY_DEFAULT else v for v in (was, value))
            raise CaptureError(f"{name} was captured with {path}={was!r}, and got {value!r}; compile it for that value")
    missing = [path for path in wanted if path not in found]
    if missing:
        raise CaptureError(f"{name} was captured with a tensor for {missing[0]!r}, which is missing from this call")
    return [found[i.path] for i in signature.inputs], wrapped


def fits(signature: Signature, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have the captured shapes."""
    return all(tuple(t.shape) == i.shape for t, i in zip(tensors, signature.inputs, strict=True))


def cast(signature: Signature, tensors: Sequence[torch.Tensor], name: str = "the engine") -> list[torch.Tensor]:
    """Tensors in the captured dtypes: timesteps are cast, any other mismatch is refused, and what a cast would cut."""
    out = []
    for t, i in zip(tensors, signature.inputs, strict=True):
        if t.dtype != i.dtype and not i.cast:
            raise CaptureError(f"{name} takes {i.path!r} in {i.dtype}, and got {t.dtype}; cast it before the call")
        if t.is_floating_point() and not i.dtype.is_floating_point and bool((t != t.round()).any()):
            raise CaptureError(f"{name} takes {i.path!r} in {i.dtype}, and got numbers that are no integers")
        out.append(t.to(i.dtype))
    return out


def describe_output(value: Any, flat: list[torch.Tensor]) -> dict[str, Any]:
    """The tree of a result (see `Signature.output`); its tensors are appended to `flat`."""
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
    _seen_classes[name] = type(value)
    named = {"named_tuple": True} if isinstance(value, tuple) else {}
    return {"kind": "class", "name": name, "keys": keys, "items": [describe_output(v, flat) for v in items], **named}


def wrap_output(signature: Signature, flat: Sequence[torch.Tensor], wrapped: bool) -> Any:
    """The result as the model returns it; with `return_dict=False` the wrapper's items as a tuple."""
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
    if name not in _seen_classes and name in OUTPUT_CLASSES:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        if isinstance(found, type):
            _seen_classes[name] = found
    return _seen_classes.get(name)
