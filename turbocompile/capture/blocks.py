"""Cuts the repeated blocks out of a flat graph.

A block is a module that has siblings like it: it stands in a list under an index, in a dictionary under a key, or in an
attribute whose name ends in a number. A block's nodes that can be taken out whole (nothing leaves them and comes back)
become a piece; pieces that are alike in every operation, shape and weight suffix share one graph. Of blocks in blocks
those are taken that cover most repeated work. What a piece reads that is computed from constants alone (RoPE tables)
moves into it, so that passes on the block see it.

Constants are compared by value. Where they take few values, each of which several layers share (a local and a global
rotary base), each value makes a kind of block; where they differ otherwise, each layer has its own.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from turbocompile.ir.program import SHELL, Program, Subgraph, call, drop_unread
from turbocompile.ir.weights import RELATIVE, Constant, Dequantize, Expr, Load

MAX_KINDS = 4  # of blocks that differ in the values of constants alone: each is rewritten, checked and tuned
MIN_NODES = 8  # a smaller repeated piece (a linear, an activation) is not worth a call
NUMBERED = re.compile(r"(.*\D)\d+")
ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax")


@dataclass
class Piece:
    """The nodes of one block of the flat graph.

    family: the block's path with a star for what tells it from its siblings. inside: the nodes that its module made;
    `nodes` includes the constant computations that it takes with it. structure: equal in pieces that may share a graph.
    constants: digests of the constants that it reads.
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
        """The path of what holds the block."""
        return self.prefix.rstrip(".").rpartition(".")[0]

    @property
    def attention(self) -> int:
        """How many attentions it computes."""
        return sum(getattr(n.target, "_opname", "") in ATTENTION for n in self.nodes)


def block_places(path: str, called: Mapping[str, str]) -> list[tuple[str, str]]:
    """(family, prefix) of each module on a module path that may be a block, from the outermost in.

    called: path -> class of the modules that made nodes. What was never called, and a Sequential, holds modules under
    keys; another module's attribute may be a block where its name ends in a number.
    """
    parts = path.split(".") if path else []
    found: list[tuple[str, str]] = []
    family: list[str] = []
    for i, part in enumerate(parts):
        holder, prefix = ".".join(parts[:i]), ".".join(parts[: i + 1])
        keyed = (holder or holder in called) and called.get(holder, "Sequential").endswith("Sequential")
        numbered = NUMBERED.fullmatch(part)
        told = "*" if part.isdigit() or keyed else f"{numbered[1]}*" if numbered and prefix in called else part
        family.append(told)
        if part.isdigit() or (told != part and prefix in called):
            found.append((".".join(family), prefix + "."))
    return found


def cut(program: Program, lists: set[str]) -> Program:
    """The same model as a shell, one graph per kind of block, and calls; unchanged where nothing repeats.

    lists: paths of the model's ModuleLists; an attention block that is alone in such a list is cut too.
    """
    places = _Places(program, lists)
    chosen = places.cover(places.outermost)
    if not chosen:
        return program
    chosen.sort(key=lambda piece: min(places.order[n] for n in piece.inside))
    return _assemble(program, kinds(chosen))


class _Places:
    """Where blocks may stand in a program, and which of them to cut out."""

    def __init__(self, program: Program, lists: set[str]) -> None:
        graph = program.shell.graph
        self.lists = lists
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.size = sum(n.op == "call_function" for n in graph.nodes)
        self.pieces: dict[str, list[Piece]] = defaultdict(list)  # by family; those that can be taken out whole
        self.prefixes: dict[str, list[str]] = defaultdict(list)  # by family, of all
        self.outermost: list[str] = []  # families
        self.within: dict[str, list[str]] = defaultdict(list)  # the families next inside a family
        inside: dict[tuple[str, str], set[fx.Node]] = defaultdict(set)
        called = {p: kind for n in graph.nodes for p, kind in (n.meta.get("nn_module_stack") or {}).values()}
        for node in graph.nodes:
            outer = self.outermost
            for place in block_places(_path(node), called) if node.op == "call_function" else ():
                inside[place].add(node)
                outer += [] if place[0] in outer else [place[0]]
                outer = self.within[place[0]]
        constant = _constants(graph)
        digests = {key: _digest(tensor) for key, tensor in program.constants.items()}
        for (family, prefix), nodes in inside.items():
            self.prefixes[family].append(prefix)
            piece = Piece(prefix, family, nodes)
            if _complete(piece, self.order, constant) and len(piece.nodes) >= MIN_NODES:
                piece.structure = _structure(piece, program.shell.weights)
                piece.constants = tuple(digests[key] for key in _keys(piece, program.shell.weights))
                self.pieces[family].append(piece)

    def cover(self, families: Iterable[str], under: tuple[str, ...] = ("",)) -> list[Piece]:
        """The blocks to cut out of the families' modules whose paths start with one of `under`."""
        return [piece for family in families for piece in self._cover(family, under)]

    def _cover(self, family: str, under: tuple[str, ...]) -> list[Piece]:
        """Those of a family, or those inside it, or some of both: what covers most repeated work."""
        alike, alone = self._worth(family, under)
        inner = self.within[family]
        if not alike and not alone:
            return self.cover(inner, under)
        everywhere = [p for p in self.prefixes[family] if p.startswith(under)]
        taken = {piece.prefix for piece in alike}
        left = tuple(p for p in everywhere if p not in taken)
        rest = tuple(p for p in left if p not in {piece.prefix for piece in alone})
        covers = [
            [*alike, *alone, *self.cover(inner, rest)],
            [*alike, *self.cover(inner, left)],
            self.cover(inner, under),
        ]
        return max(covers, key=_work)  # the first of equals: the outermost blocks

    def _worth(self, family: str, under: tuple[str, ...]) -> tuple[list[Piece], list[Piece]]:
        """The blocks of a family that are worth a call: alike at least twice; and lone attention blocks in lists."""
        groups = kinds([p for p in self.pieces[family] if p.prefix.startswith(under)])
        alike = [piece for group in groups if len(group) > 1 for piece in group]
        alone = [g[0] for g in groups if len(g) == 1 and g[0].attention and g[0].list_path in self.lists]
        if family.rpartition(".")[2] != "*":
            # Names that end in a number are common: they are blocks where they are most of the model.
            most = 2 * sum(len(piece.inside) for piece in alike) > self.size
            alike = [piece for piece in alike if piece.attention and most]
        return alike, alone


def kinds(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces by the graph that they share."""
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


def _work(pieces: list[Piece]) -> tuple[int, float]:
    """What blocks are worth: the attentions that they compute, then their operations; half of those of a lone block."""
    sizes = [(len(piece.inside), len(group)) for group in kinds(pieces) for piece in group]
    return sum(piece.attention for piece in pieces), sum(n if count > 1 else n / 2 for n, count in sizes)


def _schema(node: fx.Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _mutates(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory is written to, be it through a view of it."""
    base: dict[fx.Node, fx.Node] = {}
    bases: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        schema = _schema(node)
        views = source is not None and (schema is None or schema.arguments[0].alias_info is not None)
        base[node] = base.get(source, source) if views and node.op == "call_function" else node  # type: ignore[arg-type]
        if _mutates(node) and source is not None:
            bases.add(base.get(source, source))
    return {node for node, of in base.items() if of in bases}


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on weights that are no parameter of a block and on nothing else, and that nobody writes to."""
    found: set[fx.Node] = set()
    written = _written(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            random = (
                isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
            )
            pure = not _mutates(node) and not random and node not in written
            if pure and all(n in found or n.op == "get_attr" for n in node.all_input_nodes):
                found.add(node)
    return found


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _complete(piece: Piece, order: dict[fx.Node, int], constant: set[fx.Node]) -> bool:
    """Fills in the piece's nodes, inputs and outputs; False where it cannot be taken out whole."""
    inside = piece.inside
    taken: set[fx.Node] = set()
    todo = [n for node in inside for n in node.all_input_nodes if n in constant and n not in inside]
    while todo:  # the constants it reads come along, copied
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
    """Whether no value leaves the piece and comes back into it."""
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
        schema = _schema(node)
        aliases = schema is not None and any(a.alias_info is not None for a in schema.arguments)
        base = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if schema is None:  # getitem
            if base in owned:
                owned.add(node)
        elif not aliases or base in owned:
            owned.add(node)
        if _mutates(node) and base not in owned:
            return True
    return False


def _constants_read(piece: Piece, weights: Mapping[str, Expr]) -> list[fx.Node]:
    """The constants that a piece reads, in the order of the first reading."""
    read = (n for node in piece.nodes for n in node.all_input_nodes if n.op == "get_attr")
    return list(dict.fromkeys(n for n in read if isinstance(weights[str(n.target)], Constant)))


def _keys(piece: Piece, weights: Mapping[str, Expr]) -> list[str]:
    """The keys of the constants that a piece reads, in the order of the first reading."""
    return [weights[str(n.target)].key for n in _constants_read(piece, weights)]  # type: ignore[attr-defined]


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _structure(piece: Piece, weights: Mapping[str, Expr]) -> str:
    """What two pieces must share to be one graph: operations, arguments, shapes, weights by names after the prefix, and
    the format in which the model has them; constants by the order in which they are read.
    """
    number = {n: f"in{i}" for i, n in enumerate(piece.inputs)}
    number |= {n: f"n{i}" for i, n in enumerate(piece.nodes)}
    constants = {n: f"c{i}" for i, n in enumerate(_constants_read(piece, weights))}

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


def _assemble(program: Program, pieces: list[list[Piece]]) -> Program:
    """The program with each kind of piece as a graph and each piece as a call."""
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
    """As in `blocks` for the blocks of a list (of the model itself, too), and of attributes block_0, block_1."""
    stem = piece.family.rpartition(".")[2].rstrip("*").rstrip("_")
    return re.sub(r"\W", "_", ".".join(filter(None, (piece.list_path, stem)))) or "blocks"


def _own_constants(alike: list[Piece], program: Program, values: dict[str, torch.Tensor]) -> dict[fx.Node, str]:
    """The constants of the first piece that are not equal in all pieces of its kind, by their names below the prefix.

    Their values are entered in `values` under the full name that each call reads. One that is no buffer of the blocks
    (a literal tensor) is named by its values: those of another shape may be others.
    """
    weights = program.shell.weights
    found: dict[fx.Node, str] = {}
    keys_of_pieces = zip(*(_keys(piece, weights) for piece in alike), strict=True)
    digests_of_pieces = zip(*(piece.constants for piece in alike), strict=True)
    nodes = _constants_read(alike[0], weights)
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
    """The block's own name of a weight, and its expression relative to the call."""
    if isinstance(expr, (Load, Dequantize)) and name.startswith(prefix):
        return name.removeprefix(prefix), _relative_to(prefix, expr)
    return name, expr


def _relative_to(prefix: str, expr: Expr) -> Expr:
    if isinstance(expr, Load):
        return replace(expr, name=RELATIVE + expr.name.removeprefix(prefix))
    assert isinstance(expr, Dequantize)
    return replace(expr, data=_relative_to(prefix, expr.data), scale=_relative_to(prefix, expr.scale))


def _extract(piece: Piece, shell: Subgraph, own: Mapping[fx.Node, str]) -> Subgraph:
    """The graph of a kind of block, from its first piece. own: the constants that each layer has its own of."""
    block = Subgraph(fx.Graph())
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(piece.inputs):
        made = block.graph.create_node("placeholder", f"input_{i}", name=f"input_{i}")
        made.meta = {"val": node.meta["val"]}
        env[node] = made

    def value(node: fx.Node) -> fx.Node:
        if node not in env:  # a weight, read where it is first used
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
    """Module paths below the block; what was made outside it (constants) keeps its own."""
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
    """The flat graph with a call in place of each piece, emitted as soon as its inputs are there."""
    owner = {}
    for piece in pieces:
        for node in piece.nodes:
            if node in piece.inside:
                owner[node] = piece
    last = {id(piece): next(n for n in reversed(piece.nodes) if owner.get(n) is piece) for piece in pieces}
    shell = Subgraph(fx.Graph())
    env: dict[fx.Node, fx.Node] = {}

    def emit(node: fx.Node) -> None:
        """Emits a node after what it reads (a stray between a block's nodes may read that block)."""
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
            continue  # emitted on demand, after the block that it reads
        if own is None or node is last[id(own)]:
            emit(node)
    for node in flat.graph.nodes:
        if node not in env and node not in owner and (node.op == "output" or _mutates(node)):
            emit(node)
    for node in reversed(list(shell.graph.nodes)):
        unused = not node.users and node.op in ("get_attr", "call_function") and not _mutates(node)
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
