"""Programs as data: JSON with operators from an allow-list of exact overloads, no Python source, no pickle.

`to_json` and `from_json` are inverse. Reading trusts nothing: operators, names, argument kinds and sizes are checked,
and the shapes are computed anew with fake tensors and must equal the recorded ones.
"""

from __future__ import annotations

import math
import operator
from dataclasses import fields
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from turbocompile import kernels, weights
from turbocompile.errors import EngineError, UnsupportedError
from turbocompile.program import SHELL, Input, Program, Signature, Subgraph, call, infer, walk_tensors

VERSION = 1
MAX_NODES = 200_000
MAX_TENSOR_BYTES = 1 << 40  # an activation larger than this is a mistake or an attack

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
            if not any(a.is_out for a in op._schema.arguments):
                table[f"aten.{name}.{overload}"] = op
    for name in kernels.OPS:
        table[f"turbocompile.{name}.default"] = getattr(torch.ops.turbocompile, name).default
    return table


ALLOWED = _allowed()
_NAMES = {op: name for name, op in ALLOWED.items()}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
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
        if data["version"] != VERSION:
            raise EngineError(
                f"the program has format {data['version']!r}, and this version reads {VERSION}; rebuild it"
            )
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        program = Program({}, _signature(data["signature"]), fake_mode=mode)
        graphs = dict(data["graphs"])
        if SHELL not in graphs:
            raise EngineError("the program has no shell graph; the engine is damaged, build it again")
        for name in [*(g for g in graphs if g != SHELL), SHELL]:
            program.graphs[name] = _graph(graphs[name], name, program)
        program.graphs = {SHELL: program.graphs[SHELL], **{k: v for k, v in program.graphs.items() if k != SHELL}}
        return program
    except EngineError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, AssertionError) as error:
        raise EngineError(f"the program is not readable ({type(error).__name__}: {error}); build it again") from error


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


def _signature(d: dict[str, Any]) -> Signature:
    return Signature(
        tuple((str(n), str(k), bool(h), v) for n, k, h, v in d["parameters"]),
        tuple(
            Input(
                str(i["path"]),
                _shape(i["shape"]),
                parse_dtype(i["dtype"]),
                bool(i["cast"]),
                bool(i.get("number", False)),
            )
            for i in d["inputs"]
        ),
        {str(k): _plain(v) for k, v in d["guards"].items()},
        d["output"],
        bool(d["return_dict"]),
    )


def _number(value: Any) -> Any:
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) and set(value) == {"float"} else value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value) or len(value) > 16:
        raise EngineError(f"the engine has a shape {str(value)[:60]!r} that is none; build it again")
    return tuple(value)


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


def _arg(value: Any, env: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_arg(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    if kind == "node":
        return env[item]
    if kind == "float":
        return float(item)
    if kind == "dtype":
        return parse_dtype(item)
    if kind == "memory_format":
        return _FORMATS[item]
    if kind == "layout" and item == "torch.strided":
        return torch.strided
    if kind == "complex":
        return complex(*item)
    raise EngineError(f"the engine has an argument of an unknown kind {kind!r}; build it again")


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


def expr_from_json(data: dict[str, Any], depth: int = 0) -> weights.Expr:
    """The expression that `expr_json` wrote."""
    if depth > 32:
        raise EngineError("a weight of the engine is nested absurdly deep; build it again")
    values: dict[str, Any] = {}
    cls = _EXPRS[data["expr"]]
    for f in fields(cls):
        value = data[f.name]
        if isinstance(value, dict):
            value = expr_from_json(value, depth + 1)
        elif f.name == "dtype":
            value = parse_dtype(value)
        elif isinstance(value, list):
            value = tuple(expr_from_json(v, depth + 1) if isinstance(v, dict) else v for v in value)
        values[f.name] = value
    made = cls(**values)
    _shape(list(made.shape))
    return made


def _graph(data: dict[str, Any], name: str, program: Program) -> Subgraph:
    if len(data["nodes"]) > MAX_NODES:
        raise EngineError(f"the graph {name!r} has {len(data['nodes'])} nodes, more than {MAX_NODES}; build it again")
    sub = Subgraph(fx.Graph(), {str(k): expr_from_json(v) for k, v in data["weights"].items()})
    env: dict[str, fx.Node] = {}
    inputs = iter(program.signature.inputs)
    for entry in data["nodes"]:
        op, label = entry["op"], entry["name"]
        if not isinstance(label, str) or not label.isidentifier() or label in env:
            raise EngineError(f"the graph {name!r} has a node named {str(label)[:40]!r}; build the engine again")
        args = tuple(_arg(entry.get("args", []), env))
        kwargs = {str(k): _arg(v, env) for k, v in entry.get("kwargs", {}).items()}
        if op == "output":
            sub.graph.output(tuple(args[0]))
            break
        recorded = [(_shape(s), parse_dtype(d)) for s, d in entry["val"]]
        for shape, dtype in recorded:
            if math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
                raise EngineError(
                    f"the graph {name!r} declares a tensor of shape {list(shape)}, which is absurdly large"
                )
        if op == "placeholder":
            node = sub.graph.create_node(op, label, name=label)
            value = _fake(program, *recorded[0])
            if name == SHELL and (expected := next(inputs, None)) is not None:
                recorded = [(expected.shape, expected.dtype)]
        elif op == "get_attr":
            expr = sub.weights[entry["target"]]
            node = sub.graph.create_node(op, entry["target"], name=label)
            value = _fake(program, expr.shape, expr.dtype)
        elif op == "call_function":
            target = entry["target"]
            if target not in ALLOWED:
                raise EngineError(
                    f"the engine calls {str(target)[:60]!r}, which is not an operator that an engine may hold"
                )
            node = sub.graph.create_node(op, ALLOWED[target], args, kwargs, name=label)
            value = _call_value(node, program) if target == "call" else _infer(node, program, name)
        else:
            raise EngineError(f"the graph {name!r} has a node of kind {str(op)[:40]!r}; build the engine again")
        node.name = label
        node.meta["val"] = value
        found = [(tuple(t.shape), t.dtype) for t in walk_tensors(value)]
        if found != recorded:
            raise EngineError(
                f"the node {label!r} of the graph {name!r} gives {found}, and the engine records {recorded}; "
                "the engine is damaged, build it again"
            )
        if "module" in entry:
            path, kind = entry["module"]
            node.meta["nn_module_stack"] = {"module": (str(path), str(kind))}
        env[label] = node
    if not sub.graph.nodes or next(iter(reversed(sub.graph.nodes))).op != "output":
        raise EngineError(f"the graph {name!r} has no output; the engine is damaged, build it again")
    return sub


def _fake(program: Program, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    with program.fake_mode:
        return torch.empty(shape, dtype=dtype)


def _infer(node: fx.Node, program: Program, name: str) -> Any:
    try:
        return infer(node.target, node.args, dict(node.kwargs), program.fake_mode)
    except Exception as error:  # any operator may refuse any arguments; it is one sentence for the user
        reason = str(error).strip().split("\n")[0][:200]
        raise EngineError(f"the node {node.name!r} of the graph {name!r} does not compute: {reason}") from error


def _call_value(node: fx.Node, program: Program) -> Any:
    """What a call gives: the outputs of the graph it names, whose inputs must be what it is given."""
    graph, prefix, phase, *args = node.args
    if graph not in program.graphs or not isinstance(prefix, str) or phase not in ("prompt", "step"):
        raise EngineError(f"the call {node.name!r} names a graph {str(graph)[:40]!r} that is not there; build it again")
    sub = program.graphs[graph]  # type: ignore[index]
    given = [(tuple(a.meta["val"].shape), a.meta["val"].dtype) for a in args]  # type: ignore[union-attr]
    wanted = [(tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in sub.inputs()]
    if given != wanted:
        raise EngineError(f"the call {node.name!r} gives {given} to the graph {graph!r}, which takes {wanted}")
    values = tuple(n.meta["val"] for n in sub.outputs())
    return values[0] if len(values) == 1 else values
