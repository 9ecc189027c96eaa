"""Programs as data: JSON with operators from an allow-list of exact overloads, no Python source, no pickle.

`to_json` and `from_json` are inverse. Reading trusts nothing: operators, names, argument kinds and sizes are checked,
and the shapes are computed anew with fake tensors and must equal the recorded ones.
"""

from __future__ import annotations

import contextlib
import inspect
import keyword
import logging
import math
import operator
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile import kernels
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.ir import reading, weights
from turbocompile.ir import signature as sig
from turbocompile.ir.program import SHELL, Input, Program, Signature, Subgraph, call, infer, walk_tensors
from turbocompile.ir.reading import Unreadable, entry, items, one_of, plain, table, text, truth, whole
from turbocompile.kernels.quantize.quantize import FORMATS

VERSION = 1
MAX_NODES = 200_000
MAX_TENSOR_BYTES = 1 << 40  # an activation larger than this is a mistake or an attack
MAX_PARTS = 100_000  # tensors that one operator gives: each is made when the shapes are computed
MAX_RANK = 16
MAX_EXPR_DEPTH = 32  # of a weight: fused, quantized, with LoRAs it has some ten levels
MAX_SLA_BLOCK = 1024  # tokens: its memory grows by the square; recipes have up to 256
MAX_UPSAMPLE = 1e4
DEFAULT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a graph in a saved engine may call: pure tensor mathematics and the in-place writes that captured models do to
# tensors of their own. Nothing here reads files, runs code, or reinterprets memory.
_PACKETS = """
abs abs_ acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d
adaptive_avg_pool3d adaptive_max_pool2d add add_ addcdiv addcmul addmm addmv addr alias all amax amin __and__ any arange
argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors bucketize cat
cdist _cdist_forward ceil celu channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clone col2im
complex concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution copy copy_ copysign cos cos_ cosh cosine_similarity count_nonzero cummax cummin cumprod cumsum deg2rad
detach detach_ diag diag_embed diagonal diff digamma div div_ dot dropout einsum elu embedding empty empty_like eq erf
erfc erfinv exp exp_ exp2 expand expand_as expm1 eye fill fill_ flatten flip floor floor_divide fmax fmin fmod frac full
full_like gather ge gelu gelu_ glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt hardshrink hardsigmoid
hardswish hardtanh heaviside hypot i0 im2col imag index index_add index_add_ index_copy index_copy_ index_fill
index_fill_ index_put index_put_ index_select inner instance_norm isclose isfinite isinf isnan kron kthvalue layer_norm
ldexp le leaky_relu lerp lgamma lift_fresh_copy linalg_cross linalg_inv linalg_inv_ex linalg_matrix_exp linalg_qr
linalg_solve _linalg_solve_ex linalg_vector_norm linear linspace log log1p log2 log_sigmoid _log_softmax log_softmax
logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp __lshift__ lt masked_fill
masked_fill_ masked_scatter masked_scatter_ matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices maximum mean median meshgrid min minimum mish mm movedim msort mul mul_ mv nan_to_num nanmean
nansum narrow native_group_norm native_layer_norm ne neg neg_ new_empty new_full new_ones new_zeros norm numpy_T one_hot
ones ones_like __or__ outer pad pad_sequence permute pixel_shuffle pixel_unshuffle polar pow pow_ prod rad2deg real
reciprocal reciprocal_ relu relu_ relu6 remainder repeat repeat_interleave reshape reshape_as rms_norm roll rot90 round
__rshift__ rsqrt rsqrt_ rsub scalar_tensor scaled_dot_product_attention scatter scatter_ scatter_add scatter_add_
scatter_reduce searchsorted select select_scatter selu sgn sigmoid sigmoid_ sign silu silu_ sin sin_ sinc sinh slice
slice_scatter _softmax softmax softplus softshrink sort special_i0 split split_with_sizes sqrt sqrt_ square squeeze
stack std std_mean sub sub_ sum t take take_along_dim tan tanh tanh_ tensor_split tensordot threshold tile to topk trace
transpose tril tril_indices triu triu_indices trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split
_unsafe_view unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d var var_mean vector_norm view view_as
view_as_complex view_as_real _weight_norm where xlogy __xor__ zero_ zeros zeros_ zeros_like
"""


def _allowed() -> dict[str, Any]:
    table: dict[str, Any] = {"getitem": operator.getitem, "call": call}
    for name in _PACKETS.split():
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if _computes_tensors(op):
                table[f"aten.{name}.{overload}"] = op
    for name in kernels.OPS:
        table[f"turbocompile.{name}.default"] = getattr(torch.ops.turbocompile, name).default
    return table


def _computes_tensors(op: Any) -> bool:
    """Whether an overload gives tensors, in memory of its own; others are TorchScript's, on numbers, texts and lists.

    One of those multiplies a list by a number: that is memory without bound.
    """
    gives = [str(r.type) for r in op._schema.returns]
    return bool(gives) and set(gives) <= {"Tensor", "List[Tensor]"} and not any(a.is_out for a in op._schema.arguments)


ALLOWED = _allowed()
_NAMES = {op: name for name, op in ALLOWED.items()}
_NO_ARRAYS = re.compile(
    r"q|bits|u?int[1-7]$|float4"
)  # dtypes of tensors that have more than numbers, or halves of bytes
_DTYPES = {
    name: d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype) and not _NO_ARRAYS.match(name := str(d).removeprefix("torch."))
}
_FORMATS = {
    str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_EXPRS = {
    c.__name__: c
    for c in (
        weights.Load, weights.Constant, weights.Zeros, weights.Reshape, weights.Cast, weights.Permute, weights.Slice,
        weights.Cat, weights.Mul, weights.AddLora, weights.Dequantize, weights.Quantize,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise EngineError(f"the engine names a dtype {name!r} that this torch does not have; build it again")
    return _DTYPES[name]


def to_json(program: Program) -> dict[str, Any]:
    """The Program as JSON data (constants' values are not in it; they stand with the weights)."""
    return {
        "version": VERSION,
        "signature": _signature_json(program.signature),
        "graphs": {name: _graph_json(sub) for name, sub in program.graphs.items()},
    }


def from_json(data: Any) -> Program:
    """The Program that `to_json` wrote, checked. Raises EngineError in one sentence where it is not one."""
    try:
        with _quiet():
            return _program(table(data, "the program"))
    except (Unreadable, RecursionError, OverflowError) as error:
        raise EngineError(f"the program is not readable ({error}); build it again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of operators that refuse their arguments: the one sentence says it."""
    log = logging.getLogger(fake_tensor.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _program(data: dict[str, Any]) -> Program:
    version = entry(data, "version", "the program")
    if type(version) is not int or version != VERSION:
        raise EngineError(
            f"the program has format {reading.shown(version)}, and this version reads {VERSION}; rebuild it"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = Program({}, _signature(entry(data, "signature", "the program")), fake_mode=mode)
    graphs = table(entry(data, "graphs", "the program"), "the graphs")
    if SHELL not in graphs:
        raise EngineError("the program has no shell graph; the engine is damaged, build it again")
    for name in [*(g for g in graphs if g != SHELL), SHELL]:
        program.graphs[name] = _Reader(program, name).read(graphs[name])
    program.graphs = {SHELL: program.graphs[SHELL], **{k: v for k, v in program.graphs.items() if k != SHELL}}
    _check_output(program.signature.output, len(program.shell.outputs()))
    return program


def _signature_json(s: Signature) -> dict[str, Any]:
    return {
        "parameters": [list(p) for p in s.parameters],
        "inputs": [
            {"path": i.path, "shape": list(i.shape), "dtype": dtype_name(i.dtype), "cast": i.cast}
            | ({"number": True} if i.number else {})
            for i in s.inputs
        ],
        "guards": {k: _number(v) for k, v in s.guards.items()},
        "output": s.output,
        "return_dict": s.return_dict,
    }


# ------------------------------------------------------------------------------------------------------ the signature


def _signature(value: Any) -> Signature:
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
    """The parameters, such that Python takes them for those of a function."""
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
        made = Input(text(path, "the path of an input"), _shape(shape), parse_dtype(dtype), truth(cast, "cast"), number)
        if number and (made.shape, made.dtype, made.cast) != ((), sig.NUMBER, False):
            raise Unreadable(f"the input {made.path[:40]!r} is a number of another shape or dtype than one has")
        _check_size(made.shape, made.dtype, "the signature")
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


_ITEMS = ("tuple", "list", "dict", "class")


def _check_output(value: Any, outputs: int) -> None:
    """Raises Unreadable unless the tree of the result is one over this many tensors."""
    tree = table(value, "the result")
    kind = one_of(entry(tree, "kind", "the result"), "a kind in the result", ("tensor", "none", "value", *_ITEMS))
    if kind == "tensor":
        whole(entry(tree, "index", "a tensor of the result"), "the place of a tensor in the result", 0, outputs - 1)
    elif kind == "value":
        plain(entry(tree, "value", "a value of the result"), "a value of the result")
    elif kind in _ITEMS:
        inner = items(entry(tree, "items", "the result"), "the items of the result")
        for item in inner:
            _check_output(item, outputs)
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
    known = sig._seen_classes.get(name)
    try:
        if name in sig.OUTPUT_CLASSES and keys != ["sample"]:
            raise TypeError("it has one field, 'sample'")
        if known is not None:
            inspect.signature(known).bind(**dict.fromkeys(keys))
    except (TypeError, ValueError) as error:
        raise Unreadable(f"the result is no {last}: {str(error)[:80]}") from error


# --------------------------------------------------------------------------------------------------------- the graphs


def _number(value: Any) -> Any:
    return value if reading.is_finite(value) else {"float": repr(value)}


def _shape(value: Any) -> tuple[int, ...]:
    """Sizes whose product torch can count."""
    good = isinstance(value, list) and len(value) <= MAX_RANK and all(type(v) is int and v >= 0 for v in value)
    if not good or math.prod(max(v, 1) for v in value) >= reading.INT64:
        raise EngineError(f"the engine has a shape {str(value)[:60]!r} that is none; build it again")
    return tuple(value)


def _check_size(shape: Sequence[int], dtype: torch.dtype, where: str) -> None:
    if math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise EngineError(f"{where} declares a tensor of shape {list(shape)}, which is absurdly large; build it again")


def _graph_json(sub: Subgraph) -> dict[str, Any]:
    nodes = []
    for node in sub.graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "call_function":
            if node.target not in _NAMES:
                raise UnsupportedError(
                    f"the model uses {node.target}, which is not among the operators that an engine may hold; "
                    "write it with common tensor operators"
                )
            entry["target"] = _NAMES[node.target]
            if node.kwargs:
                entry["kwargs"] = {k: _arg_json(v) for k, v in node.kwargs.items()}
        elif node.op == "get_attr":
            entry["target"] = node.target
        if node.args:
            entry["args"] = _arg_json(list(node.args))
        if node.op != "output":
            entry["val"] = [[list(t.shape), dtype_name(t.dtype)] for t in walk_tensors(node.meta["val"])]
        stack = node.meta.get("nn_module_stack")
        if stack:
            entry["module"] = list(list(stack.values())[-1])
        nodes.append(entry)
    return {"nodes": nodes, "weights": {name: expr_json(expr) for name, expr in sub.weights.items()}}


def _arg_json(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_arg_json(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": str(value)}
    if isinstance(value, torch.device):
        return None  # the device is the engine's
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise UnsupportedError(f"an operator has an argument of type {type(value).__name__}, which an engine cannot hold")


def _arg(value: Any, env: Mapping[str, fx.Node]) -> Any:
    """An argument. Raises Unreadable for what `_arg_json` does not write."""
    if isinstance(value, list):
        return [_arg(v, env) for v in value]
    if not isinstance(value, dict) or set(value) == {"float"}:
        return plain(value, "an argument")
    if len(value) != 1:
        raise Unreadable(f"an argument is {reading.shown(value)}, which is none")
    ((kind, item),) = value.items()
    if kind == "node":
        if not isinstance(item, str) or item not in env:
            raise Unreadable(f"an argument is the node {reading.shown(item)}, which does not come before it")
        return env[item]
    if kind == "dtype":
        return parse_dtype(item)
    if kind == "memory_format":
        return _FORMATS[one_of(item, "a memory format", _FORMATS)]
    if kind == "layout" and item == "torch.strided":
        return torch.strided
    if kind == "complex" and len(items(item, "a complex number")) == 2:
        return complex(*(reading.number(v, "a part of a complex number") for v in item))
    raise EngineError(f"the engine has an argument of an unknown kind {str(kind)[:40]!r}; build it again")


def expr_json(expr: weights.Expr) -> dict[str, Any]:
    """A weight expression as JSON data."""
    out: dict[str, Any] = {"expr": type(expr).__name__}
    for f in fields(expr):  # type: ignore[arg-type]
        value = getattr(expr, f.name)
        if isinstance(value, weights.Expr):
            value = expr_json(value)
        elif isinstance(value, torch.dtype):
            value = dtype_name(value)
        elif isinstance(value, tuple):
            value = [expr_json(v) if isinstance(v, weights.Expr) else v for v in value]
        out[f.name] = value
    return out


def expr_from_json(data: Any, depth: int = 0) -> weights.Expr:
    """The expression that `expr_json` wrote. Raises EngineError or Unreadable where it has no shape."""
    if depth > MAX_EXPR_DEPTH:
        raise EngineError("a weight of the engine is nested absurdly deep; build it again")
    given = table(data, "a weight")
    cls = _EXPRS[one_of(entry(given, "expr", "a weight"), "the kind of a weight", _EXPRS)]
    values = {
        name: _field(entry(given, name, f"a weight ({cls.__name__})"), kind, f"{name} of a {cls.__name__}", depth)
        for name, kind in _FIELDS[cls].items()
    }
    made = cls(**values)
    _check_expr(made)
    return made


def _field(value: Any, kind: Any, what: str, depth: int) -> Any:
    """A field of a weight, of the type that the dataclass declares."""
    if isinstance(kind, types.UnionType):
        kind = weights.Expr if isinstance(value, dict) else float
    if kind is weights.Expr:
        return expr_from_json(value, depth + 1)
    if kind is torch.dtype:
        return parse_dtype(value)
    if kind is int:
        return whole(value, what)
    if kind is float:
        return reading.number(value, what)
    if kind is str:
        return text(value, what)
    if kind == tuple[int, ...]:
        return tuple(whole(v, what) for v in items(value, what, MAX_RANK))
    if kind == tuple[weights.Expr, ...]:
        return tuple(expr_from_json(v, depth + 1) for v in items(value, what))
    raise TypeError(f"{what} is declared as {kind}, which no reader knows")


_FIELDS: dict[type, dict[str, Any]] = {
    cls: {f.name: typing.get_type_hints(cls)[f.name] for f in fields(cls)}  # type: ignore[arg-type]
    for cls in _EXPRS.values()
}


def _check_expr(expr: weights.Expr) -> None:
    """Raises Unreadable unless the parts fit each other, so that the weight has a shape and a dtype."""
    kind = type(expr).__name__
    match expr:
        case weights.Reshape(of, shape):
            good = math.prod(of.shape) == math.prod(shape)
        case weights.Permute(of, dims):
            good = sorted(dims) == list(range(len(of.shape)))
        case weights.Slice(of, dim, start, stop):
            good = 0 <= dim < len(of.shape) and 0 <= start < stop <= of.shape[dim]
        case weights.Cat(of, dim):
            good = bool(of) and 0 <= dim < len(of[0].shape) and all(_alike(e, of[0], dim) for e in of)
        case weights.AddLora(of, a, b):
            good = all(len(e.shape) == 2 for e in (of, a, b))
        case weights.Dequantize(data, _, form):
            good = len(data.shape) == 2 and form in FORMATS
        case weights.Quantize(of, form, part):
            good = len(of.shape) == 2 and form in FORMATS and part in ("data", "scale")
        case _:
            good = True
    if not good:
        raise Unreadable(f"a weight is a {kind} of parts that do not fit")
    _check_size(_shape(list(expr.shape)), expr.dtype, f"a weight ({kind})")


def _alike(expr: weights.Expr, first: weights.Expr, dim: int) -> bool:
    """Whether two shapes differ along dim alone."""
    one, other = list(expr.shape), list(first.shape)
    return len(one) == len(other) and one[:dim] + one[dim + 1 :] == other[:dim] + other[dim + 1 :]


class _Reader:
    """Reads one graph of a program node by node; each is computed on shapes before the next is looked at."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.where = f"the graph {name[:60]!r}"
        self.env: dict[str, fx.Node] = {}
        self.inputs = iter(program.signature.inputs if name == SHELL else ())

    def read(self, value: Any) -> Subgraph:
        data = table(value, self.where)
        nodes = items(entry(data, "nodes", self.where), f"the nodes of {self.where}")
        if len(nodes) > MAX_NODES:
            raise EngineError(f"{self.where} has {len(nodes)} nodes, more than {MAX_NODES}; build it again")
        exprs = table(entry(data, "weights", self.where), f"the weights of {self.where}")
        self.sub = Subgraph(fx.Graph(), {name: expr_from_json(expr) for name, expr in exprs.items()})
        for one in nodes[:-1]:
            self._node(table(one, "a node"))
        self._output(nodes[-1] if nodes else None)
        if next(self.inputs, None) is not None:
            raise EngineError(f"{self.where} takes fewer tensors than the signature has; build the engine again")
        return self.sub

    def _output(self, value: Any) -> None:
        """The last node: what the graph returns, each one tensor."""
        if not isinstance(value, dict) or value.get("op") != "output":
            raise EngineError(f"{self.where} has no output; the engine is damaged, build it again")
        args = _arg(items(entry(value, "args", "the output"), "the output"), self.env)
        if len(args) != 1 or not isinstance(args[0], list) or not all(map(_is_tensor, args[0])):
            raise Unreadable(f"the output of {self.where} is no list of tensors")
        self.sub.graph.output(tuple(args[0]))

    def _node(self, data: dict[str, Any]) -> None:
        op, label = entry(data, "op", "a node"), entry(data, "name", "a node")
        if not _is_label(label) or label in self.env:
            raise EngineError(f"{self.where} has a node named {str(label)[:40]!r}; build the engine again")
        if op not in ("placeholder", "get_attr", "call_function"):
            raise EngineError(f"{self.where} has a node of kind {str(op)[:40]!r}; build the engine again")
        recorded = self._recorded(data, label)
        node = getattr(self, f"_{op}")(data, label, recorded)
        node.name = label
        if op == "placeholder" and self.name == SHELL:
            recorded = [(self.expected.shape, self.expected.dtype)]
        self._compare(node, recorded)
        if "module" in data:
            place = reading.texts(data["module"], "the module of a node")
            if len(place) != 2:
                raise Unreadable(f"the module of the node {label!r} is no path and kind")
            node.meta["nn_module_stack"] = {"module": (place[0], place[1])}
        self.env[label] = node

    def _recorded(self, data: dict[str, Any], label: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
        found = []
        for value in items(entry(data, "val", f"the node {label!r}"), "val"):
            if len(items(value, "val")) != 2:
                raise Unreadable(f"the node {label!r} has a value that is no shape and dtype")
            shape, dtype = _shape(value[0]), parse_dtype(value[1])
            _check_size(shape, dtype, self.where)
            found.append((shape, dtype))
        return found

    def _placeholder(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        if len(recorded) != 1:
            raise Unreadable(f"the input {label!r} is {len(recorded)} tensors, and should be one")
        if self.name == SHELL:
            expected = next(self.inputs, None)
            if expected is None:
                raise EngineError(f"{self.where} takes more tensors than the signature has; build the engine again")
            self.expected = expected
        node = self.sub.graph.create_node("placeholder", label, name=label)
        node.meta["val"] = _fake(self.program, *recorded[0])
        return node

    def _get_attr(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        target = one_of(entry(data, "target", f"the node {label!r}"), "a weight that a node reads", self.sub.weights)
        expr = self.sub.weights[target]
        node = self.sub.graph.create_node("get_attr", target, name=label)
        node.meta["val"] = _fake(self.program, expr.shape, expr.dtype)
        return node

    def _call_function(self, data: dict[str, Any], label: str, recorded: Any) -> fx.Node:
        target = entry(data, "target", f"the node {label!r}")
        if not isinstance(target, str) or target not in ALLOWED:
            raise EngineError(
                f"the engine calls {str(target)[:60]!r}, which is not an operator that an engine may hold"
            )
        args = tuple(_arg(items(data.get("args", []), "the arguments"), self.env))
        named = table(data.get("kwargs", {}), "the named arguments")
        kwargs = {k: _arg(v, self.env) for k, v in named.items()}
        op = ALLOWED[target]
        if isinstance(op, torch._ops.OpOverload):
            _check_arguments(op, args, kwargs, f"the node {label!r} of {self.where}")
            _fix_dtype(op, args, kwargs, recorded)
        elif kwargs:
            raise Unreadable(f"the node {label!r} names arguments that {target!r} does not have")
        node = self.sub.graph.create_node("call_function", op, args, kwargs, name=label)
        if op is call:
            if self.name != SHELL or hasattr(nn.Module, label):
                raise EngineError(f"{self.where} has a call {label!r} where none can be; build the engine again")
            node.meta["val"] = _call_value(node, self.program)
        elif op is operator.getitem:
            node.meta["val"] = _item(args, label)
        else:
            node.meta["val"] = _infer(node, self.program, self.where, label)
        return node

    def _compare(self, node: fx.Node, recorded: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        found = _specs(node.meta["val"])
        if found == recorded:
            return
        fitting = _fitting_default(node, self.program, recorded)
        if fitting is not None:
            raise EngineError(
                f"the engine was built while torch's default dtype was {fitting}, and it is "
                f"{torch.get_default_dtype()} now: the node {node.name!r} of {self.where} gives {found[0][1]}; call "
                f"torch.set_default_dtype({fitting}) before the engine is loaded, or build it again"
            )
        raise EngineError(
            f"the node {node.name!r} of {self.where} gives {str(found)[:200]}, and the engine records "
            f"{str(recorded)[:200]}; the engine is damaged, build it again"
        )


def _is_label(label: Any) -> bool:
    """Whether generated code can have a variable of that name."""
    return isinstance(label, str) and len(label) < 1000 and label.isascii() and label.isidentifier()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)


def _specs(value: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in walk_tensors(value)]


def _fake(program: Program, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    with program.fake_mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


# ------------------------------------------------------------------------------------------- the arguments of operators


def _check_arguments(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Raises Unreadable for an argument of another type than the schema's, or one that costs without bound.

    torch takes numbers for dtypes, and strings for devices. Whether shapes fit, the operator itself says.
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
    operands = {v.meta["val"].dtype for k, v in by_name.items() if _is_tensor(v) and k != "attn_mask"}
    if op._opname in _ONE_DTYPE and len(operands) > 1:  # their fake versions look at the shapes alone
        raise EngineError(f"{where} does not compute: its operands are {', '.join(sorted(map(str, operands)))}")
    _check_cost(op, by_name, where)


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
    """Raises Unreadable for what the shapes of the results do not show: how many there are, memory on the way."""
    if any(type(a.get(k)) is int and a[k] > MAX_SLA_BLOCK for k in ("block_q", "block_k")):
        raise Unreadable(f"{where} has blocks of more than {MAX_SLA_BLOCK} tokens")
    scales = [v for k, v in a.items() if k.startswith("scale") and "upsample" in op._opname]
    for scale in (s for v in scales if v is not None for s in (v if isinstance(v, list) else [v])):
        if not 1 / MAX_UPSAMPLE <= scale <= MAX_UPSAMPLE:  # the kernels compute places in the image with it
            raise Unreadable(f"{where} scales an image by {reading.shown(scale)}")
    if _parts(op._opname, a) > MAX_PARTS:
        raise Unreadable(f"{where} gives more than {MAX_PARTS} tensors")


def _parts(name: str, a: Mapping[str, Any]) -> int:
    """At most how many tensors an operator gives, where a number among its arguments or a size says it."""
    asked = [v for k in ("chunks", "sections") if type(v := a.get(k)) is int]
    one = next((n for n in a.values() if _is_tensor(n)), None)
    if one is None or asked or ("split_size" not in a and name != "unbind"):
        return max(asked, default=0)
    size, dim, step = one.meta["val"].shape, a.get("dim", 0), a.get("split_size", 1)
    if type(dim) is not int or not -len(size) <= dim < len(size) or type(step) is not int or step < 1:
        return 0  # the operator refuses it, or takes a list of sizes
    return -(-size[dim] // step)


def _fix_dtype(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], recorded: Any) -> None:
    """Gives a maker of tensors (full, zeros, arange) the dtype that it had at capture: left out, it is torch's default
    floating one, whatever that is when the engine is loaded or called.
    """
    names = [a.name for a in op._schema.arguments]
    makes = not any(isinstance(v, fx.Node) for v in [*args, *kwargs.values()]) and "dtype" in names
    if makes and len(recorded) == 1 and kwargs.get("dtype") is None and len(args) <= names.index("dtype"):
        dtype = recorded[0][1]
        if dtype.is_floating_point or dtype.is_complex:
            kwargs["dtype"] = dtype


def _item(args: tuple[Any, ...], label: str) -> Any:
    """One of the results of an operator that has several."""
    of = args[0].meta["val"] if args and isinstance(args[0], fx.Node) else None
    if len(args) != 2 or not isinstance(of, (tuple, list)):
        raise Unreadable(f"the node {label!r} takes an item of what has none")
    return of[whole(args[1], f"the item that the node {label!r} takes", 0, len(of) - 1)]


def _infer(node: fx.Node, program: Program, where: str, label: str) -> Any:
    try:
        value = infer(node.target, node.args, dict(node.kwargs), program.fake_mode)
        _try_one_element(node)
        return value
    except Exception as error:  # any operator may refuse any arguments; it is one sentence for the user
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise EngineError(f"the node {label!r} of {where} does not compute: {reason}") from error


def _try_one_element(node: fx.Node) -> None:
    """Runs an elementwise operator on one element of each operand's dtype; raises what every call of it would.

    Shapes do not tell that there is no minimum of complex numbers, or that 1e308 is no float32. What this torch lacks
    on a CPU alone (NotImplementedError), a card may have.
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


def _fitting_default(node: fx.Node, program: Program, recorded: Any) -> torch.dtype | None:
    """The default dtype under which a node gives what is recorded, where that is what differs."""
    before = torch.get_default_dtype()
    try:
        for dtype in DEFAULT_DTYPES if isinstance(node.target, torch._ops.OpOverload) else ():
            torch.set_default_dtype(dtype)
            if _specs(_infer(node, program, "", "")) == recorded:
                return dtype
    except EngineError:
        return None
    finally:
        torch.set_default_dtype(before)
    return None


def _call_value(node: fx.Node, program: Program) -> Any:
    """What a call gives: the outputs of the graph it names, whose inputs must be what it is given."""
    if len(node.args) < 3:
        raise Unreadable(f"the call {node.name!r} names no graph, prefix and phase")
    graph, prefix, phase, *args = node.args
    if not isinstance(graph, str) or graph not in program.graphs:
        raise EngineError(f"the call {node.name!r} names a graph {str(graph)[:40]!r} that is not there; build it again")
    text(prefix, f"the prefix of the call {node.name!r}")
    one_of(phase, f"the phase of the call {node.name!r}", ("prompt", "step"))
    if not all(map(_is_tensor, args)):
        raise Unreadable(f"the call {node.name!r} gives the graph {graph!r} something else than tensors")
    sub = program.graphs[graph]
    given = [spec for a in args for spec in _specs(a.meta["val"])]  # type: ignore[union-attr]
    wanted = [spec for n in sub.inputs() for spec in _specs(n.meta["val"])]
    if given != wanted:
        raise EngineError(
            f"the call {node.name!r} gives {str(given)[:200]} to the graph {graph!r}, which takes {str(wanted)[:200]}"
        )
    values = tuple(n.meta["val"] for n in sub.outputs())
    return values[0] if len(values) == 1 else values
