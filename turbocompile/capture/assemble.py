"""Builds a Program of the pieces that were cut: one graph for each kind of block, and a shell that calls them."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from turbocompile.capture.pieces import Piece, constant_keys, constants_read, mutates
from turbocompile.ir.program import SHELL, Program, Subgraph, call, drop_unread
from turbocompile.ir.weights import RELATIVE, Dequantize, Expr, Load


def assemble(program: Program, pieces: list[list[Piece]]) -> Program:
    """The program with a graph for each group of pieces and a call in the shell for each piece."""
    names: dict[str, str] = {}  # of the graphs, by prefix
    graphs: dict[str, Subgraph] = {}
    values = dict(program.constants)
    for alike in pieces:
        base = _graph_name(alike[0])
        name = base if base not in graphs and base != SHELL else f"{base}_{len(graphs)}"
        names |= {piece.prefix: name for piece in alike}
        graphs[name] = _extract(alike[0], program.shell, _own_constants(alike, program, values))
    shell = _shell(program.shell, [piece for alike in pieces for piece in alike], names)
    made = Program({SHELL: shell, **graphs}, program.signature, values, program.fake_mode)
    read = made.constants_read()
    made.constants = {key: tensor for key, tensor in values.items() if key in read}
    return made


def _graph_name(piece: Piece) -> str:
    """The name of a piece's graph: `blocks` for the children of a list `blocks`, `block` for block_0 and block_1."""
    stem = piece.family.rpartition(".")[2].rstrip("*").rstrip("_")
    return re.sub(r"\W", "_", ".".join(filter(None, (piece.list_path, stem)))) or "blocks"


def _own_constants(alike: list[Piece], program: Program, values: dict[str, torch.Tensor]) -> dict[fx.Node, str]:
    """The constants of the first piece whose values differ between the pieces, with their names below the prefix.

    The value of each piece is entered in `values` under its full name, prefix + name, which that piece's call reads. A
    constant that is no buffer of the blocks (a literal tensor) gets a name made of its values, because a Program of
    another shape may have other values.
    """
    weights = program.shell.weights
    found: dict[fx.Node, str] = {}
    keys_of_pieces = zip(*(constant_keys(piece, weights) for piece in alike), strict=True)
    digests_of_pieces = zip(*(piece.constants for piece in alike), strict=True)
    nodes = constants_read(alike[0], weights)
    for node, keys, digests in zip(nodes, keys_of_pieces, digests_of_pieces, strict=True):
        if len(set(digests)) == 1:
            continue
        pairs = list(zip(keys, (piece.prefix for piece in alike), strict=True))
        below = {key.removeprefix(prefix) if key.startswith(prefix) else "" for key, prefix in pairs}
        local = below.pop() if len(below) == 1 else ""
        local = local or f"constant.{hashlib.sha256(b''.join(digests)).hexdigest()[:16]}"
        found[node] = local
        values |= {prefix + local: program.constants[key] for key, prefix in pairs}
    return found


def _local(name: str, expr: Expr, prefix: str) -> tuple[str, Expr]:
    """A weight's name below the prefix of a block, and its expression with the names of tensors relative to that."""
    if isinstance(expr, (Load, Dequantize)) and name.startswith(prefix):
        return name.removeprefix(prefix), _relative_to(prefix, expr)
    return name, expr


def _relative_to(prefix: str, expr: Expr) -> Expr:
    if isinstance(expr, Load):
        return replace(expr, name=RELATIVE + expr.name.removeprefix(prefix))
    assert isinstance(expr, Dequantize)
    return replace(expr, data=_relative_to(prefix, expr.data), scale=_relative_to(prefix, expr.scale))


def _extract(piece: Piece, shell: Subgraph, own: Mapping[fx.Node, str]) -> Subgraph:
    """The graph of a kind of block, made of its first piece. own: the constants whose values each layer has its own of,
    with their names below the prefix.
    """
    block = Subgraph(fx.Graph())
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(piece.inputs):
        made = block.graph.create_node("placeholder", f"input_{i}", name=f"input_{i}")
        made.meta = {"val": node.meta["val"]}
        env[node] = made

    def value(node: fx.Node) -> fx.Node:
        if node not in env:  # a weight, which is read before its first user
            expr = shell.weights[str(node.target)]
            if node in own:
                local, expr = own[node], replace(expr, key=RELATIVE + own[node])  # type: ignore[type-var]
            else:
                local, expr = _local(str(node.target), expr, piece.prefix)
            block.weights[local] = expr
            env[node] = block.graph.create_node("get_attr", local)
            env[node].meta = dict(node.meta)
        return env[node]

    for node in piece.nodes:
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        made = block.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        made.meta["nn_module_stack"] = _relative(node.meta.get("nn_module_stack"), piece.prefix)
        env[node] = made
    block.graph.output(tuple(env[n] for n in piece.outputs))
    return block


def _relative(stack: Any, prefix: str) -> dict[str, tuple[str, str]]:
    """The modules of a node, with paths relative to the block; a constant made outside the block keeps its paths."""
    found = {}
    for key, (path, kind) in (stack or {}).items():
        if path + "." == prefix:
            found[key] = ("", kind)
        elif path.startswith(prefix):
            found[key] = (path.removeprefix(prefix), kind)
        elif not prefix.startswith(path + ".") and path:
            found[key] = (path, kind)
    return found


def _shell(flat: Subgraph, pieces: list[Piece], names: Mapping[str, str]) -> Subgraph:
    """The flat graph with a call for each piece. names: prefix -> the graph that the piece's call runs."""
    owner = {}
    for piece in pieces:
        for node in piece.nodes:
            if node in piece.inside:
                owner[node] = piece
    last = {id(piece): next(n for n in reversed(piece.nodes) if owner.get(n) is piece) for piece in pieces}
    shell = Subgraph(fx.Graph())
    env: dict[fx.Node, fx.Node] = {}

    def emit(node: fx.Node) -> None:
        """Emits a node, or the call that stands for it, after all nodes that it reads."""
        stack = [node]
        while stack:
            top = stack[-1]
            piece = owner.get(top)
            needs = piece.inputs if piece else top.all_input_nodes
            waiting = [n for n in needs if n not in env]
            if top in env:
                stack.pop()
            elif waiting:
                stack += waiting
            else:
                stack.pop()
                if piece:
                    _call(shell.graph, piece, names[piece.prefix], env)
                else:
                    env[top] = _copy(shell, flat, top, env)

    for node in flat.graph.nodes:
        own = owner.get(node)
        if own is None and any(owner.get(n) and n not in env for n in node.all_input_nodes):
            continue  # it stands between the nodes of a block that it reads: emitted when a later node reads it
        if own is None or node is last[id(own)]:
            emit(node)
    for node in flat.graph.nodes:
        if node not in env and node not in owner and (node.op == "output" or mutates(node)):
            emit(node)
    for node in reversed(list(shell.graph.nodes)):
        unused = not node.users and node.op in ("get_attr", "call_function") and not mutates(node)
        if unused and node.target is not call:
            shell.graph.erase_node(node)
    drop_unread(shell)
    return shell


def _copy(shell: Subgraph, flat: Subgraph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "get_attr":
        shell.weights[str(node.target)] = flat.weights[str(node.target)]
    if node.op == "output":
        made = shell.graph.output(fx.map_arg(node.args[0], env.__getitem__))
    else:
        args, kwargs = fx.map_arg(node.args, env.__getitem__), fx.map_arg(node.kwargs, env.__getitem__)
        made = shell.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    made.meta = dict(node.meta)
    return made


def _call(graph: fx.Graph, piece: Piece, name: str, env: dict[fx.Node, fx.Node]) -> None:
    label = "call_" + piece.prefix.rstrip(".").replace(".", "_")
    made = graph.create_node(
        "call_function", call, (name, piece.prefix, "step", *(env[n] for n in piece.inputs)), name=label
    )
    values = tuple(n.meta["val"] for n in piece.outputs)
    made.meta["val"] = values[0] if len(values) == 1 else values
    if len(values) == 1:
        env[piece.outputs[0]] = made
    else:
        for i, node in enumerate(piece.outputs):
            item = graph.create_node("call_function", operator.getitem, (made, i), name=f"{label}_{i}")
            item.meta["val"] = node.meta["val"]
            env[node] = item
    for node in piece.nodes:
        env.setdefault(node, made)
