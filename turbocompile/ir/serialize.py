"""Writes a Program as JSON data: operators by their names in the allow-list, no Python source, no pickle.

`deserialize.from_json` reads the data back.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import fx

from turbocompile.errors import UnsupportedError
from turbocompile.ir import reading, weights
from turbocompile.ir.allowed_ops import OP_NAMES, dtype_name
from turbocompile.ir.program import Program, Signature, Subgraph, walk_tensors

VERSION = 1  # of the format of a program


def to_json(program: Program) -> dict[str, Any]:
    """The Program as JSON data (constants' values are not in it; they stand with the weights)."""
    return {
        "version": VERSION,
        "signature": signature_json(program.signature),
        "graphs": {name: _graph_json(sub) for name, sub in program.graphs.items()},
    }


def signature_json(s: Signature) -> dict[str, Any]:
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


def _graph_json(sub: Subgraph) -> dict[str, Any]:
    nodes = []
    for node in sub.graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "call_function":
            if node.target not in OP_NAMES:
                raise UnsupportedError(
                    f"the model uses {node.target}, which is not among the operators that an engine may hold; "
                    "write it with common tensor operators"
                )
            entry["target"] = OP_NAMES[node.target]
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


def _number(value: Any) -> Any:
    return value if reading.is_finite(value) else {"float": repr(value)}
