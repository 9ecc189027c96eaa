"""From YAML to the dataclasses of a recipe: values that know where they stand, so that each error names its line."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from turbocompile.errors import RecipeError
from turbocompile.recipe.fields import FieldError, Section, kind_of, nearest, section_of
from turbocompile.recipe.presets import PRESETS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.pth)(?<!\.pt)(?<!\.safetensors)(?<!\.gguf)")  # owner/name
MAX_DEPTH = 16  # of nesting in a recipe; a legal one has 4 levels

_T = TypeVar("_T", bound=Section)


@dataclass
class Value:
    """A piece of YAML. data: dict of Value, list of Value, or a scalar; raw: the scalar as written."""

    data: Any
    raw: str
    where: str  # "recipe.yaml:12" or "--set a.b=c"
    base: Path | None  # what relative paths are relative to


def parse(text: str, where: str, base: Path | None, line_numbers: bool = True) -> Value:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if line_numbers and e.problem_mark else ""
        raise RecipeError(f"{where}{line}: this is not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"{where}: this is not YAML: {e}") from e
    if node is None:
        return Value(None, "", where, base)
    constructor = yaml.SafeLoader("")

    def convert(node: yaml.Node, depth: int) -> Value:
        at = f"{where}:{node.start_mark.line + 1}" if line_numbers else where
        if depth > MAX_DEPTH:
            raise RecipeError(f"{at}: nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.MappingNode):
            return Value(mapping(node, depth, at), "", at, base)
        if isinstance(node, yaml.SequenceNode):
            return Value([convert(n, depth + 1) for n in node.value], "", at, base)
        try:
            return Value(constructor.construct_object(node), node.value, at, base)
        except (yaml.YAMLError, ValueError) as e:
            raise RecipeError(f"{at}: {node.value!r} is not a plain value") from e

    def mapping(node: yaml.MappingNode, depth: int, at: str) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for key, value in node.value:
            line = f"{where}:{key.start_mark.line + 1}" if line_numbers else at
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{line}: a field's name must be a word")
            if key.value in found:
                raise RecipeError(f"{line}: {key.value} is given twice, first at {found[key.value].where}")
            made = convert(value, depth + 1)
            found[key.value] = dataclasses.replace(made, where=line)
        return found

    return convert(node, 0)


def from_plain(value: Any, where: str) -> Value:
    if isinstance(value, Mapping):
        return Value({str(k): from_plain(v, where) for k, v in value.items()}, "", where, None)
    if isinstance(value, (list, tuple)):
        return Value([from_plain(v, where) for v in value], "", where, None)
    return Value(value, str(value), where, None)


def append(tree: Value, name: str, given: str, where: str) -> None:
    """Adds the text `given` to the list of the field `name`, as the option `where` of a command line does."""
    made = Value(given, given, where, Path.cwd())
    known = tree.data.get(name)
    if known is None or known.data is None:
        tree.data[name] = Value([made], "", where, None)
    else:
        before = known.data if isinstance(known.data, list) else [known]
        tree.data[name] = dataclasses.replace(known, data=[*before, made])


def override(tree: Value, root: type, given: str) -> None:
    """Puts `a.b.c=value` into the tree; a scalar on the way becomes the section that it is short for."""
    where = f"--set {given}"
    name, equals, text = given.partition("=")
    keys = [k.strip() for k in name.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"{where}: write an override as name.of.field=value")
    new = dataclasses.replace(parse(text, where, Path.cwd(), line_numbers=False), where=where)
    at, kind = tree, typing.cast("type | None", root)
    for i, key in enumerate(keys):
        if isinstance(at.data, list):
            if not key.isdecimal() or int(key) >= len(at.data):
                raise RecipeError(f"{where}: {'.'.join(keys[:i])} has items 0 to {len(at.data) - 1}, not {key}")
            if i == len(keys) - 1:
                at.data[int(key)] = new
            at = at.data[int(key)]
            continue
        if kind is not None and not isinstance(at.data, dict):
            at.data = {} if at.data is None else {_first_key(kind, at): dataclasses.replace(at)}
        if not isinstance(at.data, dict):
            raise RecipeError(f"{where}: {'.'.join(keys[:i])} is a plain value and has no field {key!r}")
        hint = typing.get_type_hints(kind).get(key) if kind else None
        kind = section_of(hint)[0] if hint else None
        if i == len(keys) - 1:
            at.data[key] = new
        else:
            at = at.data.setdefault(key, Value({}, "", where, None))


# --- from values to dataclasses -------------------------------------------------------------------------------


def make(cls: type[_T], tree: Value) -> _T:
    """Builds a section from the tree, with every error carrying where its field stands."""
    return _build(cls, tree, "", tree)


def _build(cls: type[_T], value: Value, name: str, root: Value) -> _T:
    hints = typing.get_type_hints(cls)
    data = value.data
    if data is None:
        data = {}
    elif not isinstance(data, dict):
        if isinstance(data, list):
            raise RecipeError(f"{value.where}: {name} must be a mapping of fields, not a list")
        data = _short(cls, value)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, item in data.items():
        if key in cls.GONE:
            if item.data is not None:  # engines of earlier versions keep it, with nothing in it
                raise RecipeError(f"{item.where}: {_dotted(name, key)} {cls.GONE[key]}")
            continue
        if key not in known:
            raise RecipeError(f"{item.where}: unknown field {_dotted(name, key)}{nearest(key, known)}")
        arguments[key] = _convert(hints[key], _metadata(cls, key), item, _dotted(name, key), root)
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in arguments]  # type: ignore[arg-type]
    if missing:
        raise RecipeError(f"{value.where}: {_dotted(name, missing[0])} is missing")
    try:
        return cls(**arguments)
    except FieldError as e:
        full = _dotted(name, e.name)
        raise RecipeError(f"{_where(root, full)}: {full} {e.text}") from None


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _metadata(cls: type, name: str) -> Mapping[str, Any]:
    return next(f.metadata for f in dataclasses.fields(cls) if f.name == name)


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name and key else name or key


def _where(root: Value, name: str) -> str:
    """Where the field, or the closest thing that encloses it, stands."""
    at, where = root, root.where
    for key in name.split("."):
        if isinstance(at.data, dict) and key in at.data:
            at = at.data[key]
        elif isinstance(at.data, list) and key.isdecimal() and int(key) < len(at.data):
            at = at.data[int(key)]
        else:
            break
        where = at.where
    return where


def _first_key(cls: type, value: Value) -> str:
    """The field that a scalar in a section's place stands for: the first, or `enabled` for on and off."""
    first = dataclasses.fields(cls)[0]
    if isinstance(value.data, bool):
        choices = first.metadata.get("choices", ())
        names = [f.name for f in dataclasses.fields(cls)]
        if "enabled" in names and not (value.data is False and "off" in choices):
            return "enabled"
    return first.name


def _short(cls: type, value: Value) -> dict[str, Value]:
    """The fields that a scalar in a section's place stands for."""
    if not isinstance(value.data, str):
        return {_first_key(cls, value): value}
    given = typing.cast("type[Section]", cls).of_text(value.data)
    if list(given.values()) == [value.data]:
        return dict.fromkeys(given, value)
    return {name: dataclasses.replace(value, data=text, raw=text) for name, text in given.items()}


def _convert(hint: Any, metadata: Mapping[str, Any], value: Value, name: str, root: Value) -> Any:
    """The value as the field's type. Raises RecipeError."""
    if isinstance(hint, types.UnionType):
        if value.data is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    section, many = section_of(hint)
    if section is not None and not many:
        return _build(section, value, name, root)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if section is not None and metadata.get("one") and value.data is not None and not isinstance(value.data, list):
            value = dataclasses.replace(value, data=[value])
        if not isinstance(value.data, list):
            raise RecipeError(f"{value.where}: {name} must be a list, not {kind_of(value.data)}")
        return tuple(_convert(item, metadata, v, f"{name}.{i}", root) for i, v in enumerate(value.data))
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value.data, dict):
            raise RecipeError(f"{value.where}: {name} must be a mapping, not {kind_of(value.data)}")
        return _plain_value(value)
    return _scalar(hint, metadata, value, name)


def _scalar(hint: type, metadata: Mapping[str, Any], value: Value, name: str) -> Any:
    data = value.data
    if hint is str:
        text = data
        if isinstance(data, bool):  # YAML 1.1 reads off as False; what was written counts
            text = {"False": "off", "True": "on"}.get(value.raw, value.raw.lower())
        elif isinstance(data, (int, float)):  # a revision may look like a number
            text = value.raw
        if isinstance(text, str):
            return _located(text, metadata, value)
    elif hint is bool and data in ("on", "off"):  # from Python or JSON, where YAML's words are text
        return data == "on"
    elif hint in (bool, int) and type(data) is hint:
        return data
    elif hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    elif hint is float and isinstance(data, str):
        try:
            return float(data)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
    kinds = {str: "text", bool: "on or off", int: "a whole number", float: "a number"}
    raise RecipeError(f"{value.where}: {name} must be {kinds[hint]}, not {kind_of(data)}")


def _located(text: str, metadata: Mapping[str, Any], value: Value) -> str:
    """A path made absolute, relative to where it was written; hub ids (owner/name) and words stay as they are."""
    if not metadata.get("path") or not text or text in metadata.get("words", ()):
        return text
    path = Path(text).expanduser()
    if path.is_absolute() or value.base is None:
        return str(path)
    beside = value.base / path
    if beside.exists() or not (HUB_ID.fullmatch(text) or text in PRESETS):
        return os.path.abspath(beside)  # not resolved: a link in a hub cache has the file's name, its target a hash
    return text


def _plain_value(value: Value) -> Any:
    if isinstance(value.data, dict):
        return {k: _plain_value(v) for k, v in value.data.items()}
    if isinstance(value.data, list):
        return [_plain_value(v) for v in value.data]
    return value.data
