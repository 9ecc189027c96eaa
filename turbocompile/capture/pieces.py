"""The nodes of one block of a flat graph, and whether one call can stand for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from turbocompile.ir.weights import Constant, Dequantize, Expr

MAX_KINDS = 4  # of blocks that differ in the values of constants alone: each is rewritten, checked and tuned
ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax")


@dataclass
class Piece:
    """The nodes of one block of the flat graph.

    prefix: the path of the block's module and a dot. family: that path with a star for the part that differs between
    siblings. inside: the nodes that the module made; `nodes`: the same and copies of the operations that compute the
    block's constants. inputs, outputs: the nodes before and in the block whose values cross its border. structure: a
    text that is equal in pieces that may share a graph. constants: digests of the constants that the block reads.
    """

    prefix: str
    family: str
    inside: set[fx.Node]
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    structure: str = ""
    constants: tuple[bytes, ...] = ()

    @property
    def list_path(self) -> str:
        """The path of the module that holds the block."""
        return self.prefix.rstrip(".").rpartition(".")[0]

    @property
    def attention(self) -> int:
        """How many attentions it computes."""
        return sum(getattr(n.target, "_opname", "") in ATTENTION for n in self.nodes)


def kinds(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in groups, one for each graph that pieces share."""
    found: list[list[Piece]] = []
    for alike in _grouped(pieces, lambda p: (p.family, p.structure)):
        by_value = _grouped(alike, lambda p: p.constants)
        few = 1 < len(by_value) <= MAX_KINDS and min(map(len, by_value)) > 1
        found += by_value if few else [alike]
    return found


def _grouped(pieces: Iterable[Piece], key: Callable[[Piece], Any]) -> list[list[Piece]]:
    found: dict[Any, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(key(piece), []).append(piece)
    return list(found.values())


def schema_of(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def mutates(node: fx.Node) -> bool:
    schema = schema_of(node)
    return schema is not None and schema.is_mutable


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes into whose memory a later node writes, directly or through a view."""
    base: dict[fx.Node, fx.Node] = {}
    bases: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = schema_of(node)
        views = source is not None and (schema is None or schema.arguments[0].alias_info is not None)
        base[node] = base.get(source, source) if views and node.op == "call_function" else node  # type: ignore[arg-type]
        if mutates(node) and source is not None:
            bases.add(base.get(source, source))
    return {node for node, of in base.items() if of in bases}


def constant_operations(graph: fx.Graph) -> set[fx.Node]:
    """The operations that read weights and each other alone, and into whose tensors nothing writes.

    They draw no random numbers, so that each block may compute them anew.
    """
    found: set[fx.Node] = set()
    written = _written(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            random = (
                isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
            )
            pure = not mutates(node) and not random and node not in written
            if pure and all(n in found or n.op == "get_attr" for n in node.all_input_nodes):
                found.add(node)
    return found


def module_path_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def complete(piece: Piece, order: dict[fx.Node, int], constant: set[fx.Node]) -> bool:
    """Fills in the piece's nodes, inputs and outputs. Returns False if no call can stand for the piece.

    order: the position of each node in the graph. constant: the operations that compute constants.
    """
    inside = piece.inside
    taken: set[fx.Node] = set()
    todo = [n for node in inside for n in node.all_input_nodes if n in constant and n not in inside]
    while todo:  # the operations that compute its constants are copied into it
        node = todo.pop()
        if node not in taken:
            taken.add(node)
            todo += [n for n in node.all_input_nodes if n in constant and n not in inside]
    piece.nodes = sorted(inside | taken, key=order.__getitem__)
    members = set(piece.nodes)
    seen: dict[fx.Node, None] = {}
    for node in piece.nodes:
        for n in node.all_input_nodes:
            if n not in members and n.op != "get_attr":
                seen[n] = None
    piece.inputs = list(seen)
    piece.outputs = [n for n in piece.nodes if n in inside and any(u not in members for u in n.users)]
    if not piece.outputs or not piece.inputs:
        return False
    if any(not isinstance(n.meta.get("val"), torch.Tensor) for n in piece.inputs + piece.outputs):
        return False
    return _convex(piece, inside, order) and not _writes_outside(piece, members)


def _convex(piece: Piece, inside: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether no value leaves the piece and comes back through nodes outside it."""
    last = max(order[n] for n in inside)
    reached: set[fx.Node] = set()
    todo = [u for n in piece.outputs for u in n.users if u not in inside]
    while todo:
        node = todo.pop()
        if node in reached or order[node] > last:
            continue
        reached.add(node)
        for user in node.users:
            if user in inside:
                return False
            todo.append(user)
    return True


def _writes_outside(piece: Piece, members: set[fx.Node]) -> bool:
    """Whether an in-place operation may reach a tensor that the piece did not make."""
    owned: set[fx.Node] = set()
    for node in piece.nodes:
        schema = schema_of(node)
        aliases = schema is not None and any(a.alias_info is not None for a in schema.arguments)
        base = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if schema is None:  # getitem
            if base in owned:
                owned.add(node)
        elif not aliases or base in owned:
            owned.add(node)
        if mutates(node) and base not in owned:
            return True
    return False


def constants_read(piece: Piece, weights: Mapping[str, Expr]) -> list[fx.Node]:
    """The constants that a piece reads, in the order of the first reading."""
    read = (n for node in piece.nodes for n in node.all_input_nodes if n.op == "get_attr")
    return list(dict.fromkeys(n for n in read if isinstance(weights[str(n.target)], Constant)))


def constant_keys(piece: Piece, weights: Mapping[str, Expr]) -> list[str]:
    """The keys of the constants that a piece reads, in the order of the first reading."""
    return [weights[str(n.target)].key for n in constants_read(piece, weights)]  # type: ignore[attr-defined]


def digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def structure_of(piece: Piece, weights: Mapping[str, Expr]) -> str:
    """The piece as text, which is equal for pieces that may share a graph.

    The text names each operation with its arguments and shapes, each weight by its name after the prefix and by the
    format in which the model stores it, and each constant by its position among the constants that are read.
    """
    number = {n: f"in{i}" for i, n in enumerate(piece.inputs)}
    number |= {n: f"n{i}" for i, n in enumerate(piece.nodes)}
    constants = {n: f"c{i}" for i, n in enumerate(constants_read(piece, weights))}

    def name(node: fx.Node) -> str:
        if node in constants:
            return constants[node] + _spec(node)
        if node.op == "get_attr":
            expr = weights[str(node.target)]
            format = expr.format if isinstance(expr, Dequantize) else ""
            return "w:" + str(node.target).removeprefix(piece.prefix) + _spec(node) + format
        return number[node]

    lines = [f"{number[n]}{_spec(n)}" for n in piece.inputs]
    for node in piece.nodes:
        args = fx.map_arg(node.args, lambda n: _Name(name(n)))
        kwargs = fx.map_arg(node.kwargs, lambda n: _Name(name(n)))
        lines.append(f"{node.target}{args}{kwargs}{_spec(node)}")
    lines.append(",".join(number[n] for n in piece.outputs))
    return "\n".join(lines)


class _Name(str):
    """Prints as a bare name within an argument list."""

    __repr__ = str.__str__


def _spec(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f":{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
