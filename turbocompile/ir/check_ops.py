"""Checks a call of an operator that a file records, before and while its result is computed on shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from turbocompile.errors import EngineError
from turbocompile.ir import reading
from turbocompile.ir.program import Program, infer, walk_tensors
from turbocompile.ir.reading import Unreadable

MAX_PARTS = 100_000  # results of one operator, because computing the shapes makes a tensor for each
MAX_SLA_BLOCK = 1024  # tokens: memory grows with the square of a block; recipes have up to 256
MAX_UPSAMPLE = 1e4  # the factor by which an image may grow, or shrink

# Operators whose operands must have one dtype; their fake versions look at the shapes alone.
_ONE_DTYPE = (
    *("linear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "addmv", "addr", "baddbmm", "convolution", "conv1d"),
    *("conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention"),
    *("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
)

_CHECKS: dict[str, Any] = {
    "Tensor": lambda v: isinstance(v, fx.Node) or type(v) in (bool, int, float, complex),
    "number": lambda v: isinstance(v, fx.Node) or type(v) in (bool, int, float, complex),
    "int": lambda v: type(v) in (bool, int),
    "float": lambda v: type(v) in (bool, int, float),
    "bool": lambda v: type(v) in (bool, int),
    "str": lambda v: isinstance(v, str),
    "ScalarType": lambda v: isinstance(v, torch.dtype),
    "MemoryFormat": lambda v: isinstance(v, torch.memory_format),
    "Layout": lambda v: v is torch.strided,
    "Device": lambda v: v is None,
}


def check_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Raises Unreadable or EngineError for an argument of another type than the schema's, or of a cost without bound.

    The types are checked because torch accepts numbers as dtypes and strings as devices. The shapes are not checked
    here, because the operator refuses wrong ones when its result is computed.
    """
    known = {a.name: a for a in op._schema.arguments}
    positional = [a for a in op._schema.arguments if not a.kwarg_only]
    if len(args) > len(positional) or not set(kwargs) <= set(known):
        raise Unreadable(f"{where} has arguments that {op} does not take")
    given = [*zip(positional, args, strict=False), *((known[k], v) for k, v in kwargs.items())]
    for argument, value in given:
        if not _is_of(str(argument.real_type), value):
            reason = f"its argument {argument.name!r} is no {argument.real_type}"
            raise EngineError(f"{where} does not compute: {reason}; the engine is damaged, build it again")
    by_name = {a.name: v for a, v in given}
    operands = {v.meta["val"].dtype for k, v in by_name.items() if is_tensor(v) and k != "attn_mask"}
    if op._opname in _ONE_DTYPE and len(operands) > 1:
        raise EngineError(f"{where} does not compute: its operands are {', '.join(sorted(map(str, operands)))}")
    _check_cost(op, by_name, where)


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a schema's type, as "Optional[List[int]]"; one number may stand for a list of them."""
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "Optional":
        return value is None or _is_of(inner, value)
    if outer == "List":
        listed = isinstance(value, (list, tuple)) and all(_is_of(inner, v) for v in value)
        one = isinstance(value, fx.Node) if inner == "Tensor" else _is_of(inner, value)
        return listed or one
    return outer in _CHECKS and _CHECKS[outer](value)


def _check_cost(op: torch._ops.OpOverload, a: Mapping[str, Any], where: str) -> None:
    """Raises Unreadable for costs that the shapes of the results do not show: their number, and intermediate memory."""
    if any(type(a.get(k)) is int and a[k] > MAX_SLA_BLOCK for k in ("block_q", "block_k")):
        raise Unreadable(f"{where} has blocks of more than {MAX_SLA_BLOCK} tokens")
    scales = [v for k, v in a.items() if k.startswith("scale") and "upsample" in op._opname]
    for scale in (s for v in scales if v is not None for s in (v if isinstance(v, list) else [v])):
        if not 1 / MAX_UPSAMPLE <= scale <= MAX_UPSAMPLE:  # the kernels compute places in the image with it
            raise Unreadable(f"{where} scales an image by {reading.shown(scale)}")
    if _parts(op._opname, a) > MAX_PARTS:
        raise Unreadable(f"{where} gives more than {MAX_PARTS} tensors")


def _parts(name: str, a: Mapping[str, Any]) -> int:
    """An upper bound of the number of results, where an argument or a size determines it; else 0."""
    asked = [v for k in ("chunks", "sections") if type(v := a.get(k)) is int]
    one = next((n for n in a.values() if is_tensor(n)), None)
    if one is None or asked or ("split_size" not in a and name != "unbind"):
        return max(asked, default=0)
    size, dim, step = one.meta["val"].shape, a.get("dim", 0), a.get("split_size", 1)
    if type(dim) is not int or not -len(size) <= dim < len(size) or type(step) is not int or step < 1:
        return 0  # the operator refuses it, or takes a list of sizes
    return -(-size[dim] // step)


def fix_dtype(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], recorded: Any) -> None:
    """Gives an operator that makes a tensor (full, zeros, arange) the dtype that the tensor had at capture.

    Without the argument the dtype would be torch's default dtype at the time when the engine is loaded or called.
    """
    names = [a.name for a in op._schema.arguments]
    makes = not any(isinstance(v, fx.Node) for v in [*args, *kwargs.values()]) and "dtype" in names
    if makes and len(recorded) == 1 and kwargs.get("dtype") is None and len(args) <= names.index("dtype"):
        dtype = recorded[0][1]
        if dtype.is_floating_point or dtype.is_complex:
            kwargs["dtype"] = dtype


def infer_checked(node: fx.Node, program: Program, where: str, label: str) -> Any:
    try:
        value = infer(node.target, node.args, dict(node.kwargs), program.fake_mode)
        _try_one_element(node)
        return value
    except Exception as error:  # any operator may refuse any arguments; it is one sentence for the user
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise EngineError(f"the node {label!r} of {where} does not compute: {reason}") from error


def _try_one_element(node: fx.Node) -> None:
    """Runs an elementwise operator on one element of each operand's dtype, and raises any error of that run.

    Shapes do not tell that there is no minimum of complex numbers, or that 1e308 is no float32. NotImplementedError is
    no error here, because a card may have an operator that the CPU lacks.
    """
    op: Any = node.target
    if torch.Tag.pointwise not in op.tags and op._opname != "floor_divide":  # which torch does not mark as one
        return

    def one(value: fx.Node) -> Any:
        fake = value.meta["val"]
        return torch.ones((1,) * fake.dim(), dtype=fake.dtype, device="cpu")

    with contextlib.suppress(NotImplementedError), torch.no_grad():
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), one)
        op(*args, **kwargs)


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)


def specs(value: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in walk_tensors(value)]
