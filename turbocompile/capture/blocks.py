"""Finds the repeated blocks of a flat graph, and cuts them out of it.

A block is a module that has siblings like it: it stands in a list under an index, in a dictionary under a key, or in an
attribute whose name ends in a number. The nodes of a block become a piece (pieces.py) if no value leaves them and comes
back, because then one call can stand for them. Pieces that are equal in every operation, shape and name of a weight
share one graph (assemble.py). Where blocks contain blocks, the level is cut that covers most repeated work. A piece
takes along the operations that compute its constants (RoPE tables), so that the passes on the block see them.

Constants are compared by value. If they take at most MAX_KINDS values and several layers share each value (a local and
a global rotary base), each value makes a kind of block of its own; if they differ in another way, each layer keeps its
own constants and all layers share one graph.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import fx

from turbocompile.capture.assemble import assemble
from turbocompile.capture.pieces import (
    Piece,
    complete,
    constant_keys,
    constant_operations,
    digest,
    kinds,
    module_path_of,
    structure_of,
)
from turbocompile.ir.program import Program

MIN_NODES = 8  # a smaller repeated piece (a linear, an activation) is not worth a call
NUMBERED = re.compile(r"(.*\D)\d+")


def block_candidates(path: str, called: Mapping[str, str]) -> list[tuple[str, str]]:
    """(family, prefix) of each module on a module path that may be a block, the outermost first.

    called: path -> class name, of the modules that made nodes. A module that was never called, and a Sequential, is
    taken for a container whose children may all be blocks. A child of any other module may be a block if its name ends
    in a number. family: the path with a star for the part that differs between siblings, as in "blocks.*".
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
    """The same model as a shell, one graph for each kind of block, and calls; `program` itself where nothing repeats.

    program: as captured, with all nodes in the shell. lists: the paths of the model's ModuleLists; an attention block
    that is alone in such a list is cut out, too.
    """
    candidates = _Candidates(program, lists)
    chosen = candidates.cover(candidates.outermost)
    if not chosen:
        return program
    chosen.sort(key=lambda piece: min(candidates.order[n] for n in piece.inside))
    return assemble(program, kinds(chosen))


class _Candidates:
    """The modules of a program that may be blocks, and the choice which of them to cut out."""

    def __init__(self, program: Program, lists: set[str]) -> None:
        graph = program.shell.graph
        self.lists = lists
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.size = sum(n.op == "call_function" for n in graph.nodes)
        self.pieces: dict[str, list[Piece]] = defaultdict(list)  # by family: the modules that one call can stand for
        self.prefixes: dict[str, list[str]] = defaultdict(list)  # by family: all modules
        self.outermost: list[str] = []  # families
        self.within: dict[str, list[str]] = defaultdict(list)  # the families next inside a family
        inside: dict[tuple[str, str], set[fx.Node]] = defaultdict(set)
        called = {p: kind for n in graph.nodes for p, kind in (n.meta.get("nn_module_stack") or {}).values()}
        for node in graph.nodes:
            outer = self.outermost
            for candidate in block_candidates(module_path_of(node), called) if node.op == "call_function" else ():
                inside[candidate].add(node)
                outer += [] if candidate[0] in outer else [candidate[0]]
                outer = self.within[candidate[0]]
        constant = constant_operations(graph)
        digests = {key: digest(tensor) for key, tensor in program.constants.items()}
        for (family, prefix), nodes in inside.items():
            self.prefixes[family].append(prefix)
            piece = Piece(prefix, family, nodes)
            if complete(piece, self.order, constant) and len(piece.nodes) >= MIN_NODES:
                piece.structure = structure_of(piece, program.shell.weights)
                piece.constants = tuple(digests[key] for key in constant_keys(piece, program.shell.weights))
                self.pieces[family].append(piece)

    def cover(self, families: Iterable[str], under: tuple[str, ...] = ("",)) -> list[Piece]:
        """The blocks to cut out of the modules of these families whose paths start with one of `under`."""
        return [piece for family in families for piece in self._cover(family, under)]

    def _cover(self, family: str, under: tuple[str, ...]) -> list[Piece]:
        """The blocks of a family, the blocks inside them, or some of both: whichever covers most repeated work."""
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
        """The blocks of a family that are worth a call: those that have an equal, and lone attentions of lists."""
        groups = kinds([p for p in self.pieces[family] if p.prefix.startswith(under)])
        alike = [piece for group in groups if len(group) > 1 for piece in group]
        alone = [g[0] for g in groups if len(g) == 1 and g[0].attention and g[0].list_path in self.lists]
        if family.rpartition(".")[2] != "*":
            # Many attributes end in a number (norm1, norm2): they are blocks only if they are most of the model.
            most = 2 * sum(len(piece.inside) for piece in alike) > self.size
            alike = [piece for piece in alike if piece.attention and most]
        return alike, alone


def _work(pieces: list[Piece]) -> tuple[int, float]:
    """How much work pieces cover: the number of attentions first, then of operations; a lone block's count half."""
    sizes = [(len(piece.inside), len(group)) for group in kinds(pieces) for piece in group]
    return sum(piece.attention for piece in pieces), sum(n if count > 1 else n / 2 for n, count in sizes)
