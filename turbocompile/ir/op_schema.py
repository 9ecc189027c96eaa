"""What the schema of a node's operator says: its name, its arguments by name, whether it only looks at memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# Ops that return a view of their input where strides and dtype allow it, and a copy otherwise.
MAY_COPY = ("aten::reshape", "aten::reshape_as", "aten::flatten", "aten::contiguous", "aten::to", "aten::type_as")


def op_name(node: fx.Node) -> str:
    """The op without its overload, as in "aten.linear"."""
    return schema_name(node).replace("::", ".")


def schema_name(node: fx.Node) -> str:
    """As in "aten::linear"; the plain name of a function that is no operator."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


def argument_values(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the op's schema, defaults filled in, nodes replaced by their values."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    return {name: fx.node.map_aggregate(value, _value_of) for name, value in given.items()}


def _value_of(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def is_view(node: fx.Node) -> bool:
    """Whether a node returns a view of its first argument. For an op of MAY_COPY the strides and dtypes decide."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    if schema.name == "aten::dropout":  # returns its input outside of training
        return not argument_values(node)["train"]
    if not is_alias(node) or schema.arguments[0].is_write:
        return False
    if schema.name not in MAY_COPY:
        return True
    source, made = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if source.dtype != made.dtype:
        return False
    if schema.name == "aten::contiguous":
        return bool(source.is_contiguous())
    return _can_view(source, made.shape)


def is_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _can_view(tensor: torch.Tensor, shape: torch.Size) -> bool:
    try:
        torch.empty_strided(tensor.shape, tensor.stride(), device="meta").view(shape)
    except RuntimeError:  # what view says of strides that do not allow it
        return False
    return True
