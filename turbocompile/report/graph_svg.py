"""A graph before and after the passes as one SVG: before on the left, after on the right, data flowing down.

Both halves share their rows: a node that a pass made stands at the height of the nodes that it replaced, so gaps on the
right show where nodes merged. Each node is in the row above its first reader. Within a row, positions come from a few
rounds in which every node moves to the middle of its neighbours. An edge over several rows has a lane of its own, which
all edges of one node share. The SVG has no style: classes name the nodes that a page colours. Every text is escaped.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from turbocompile.ir.graph_view import CALL, INPUT, OUTPUT, GraphView, NodeView

MOST = 1500  # nodes on a side; a larger graph is not drawn, because nobody could read it
BOX, DOT, LANE = 30.0, 8.0, 4.0  # heights of an operator and of a view; the width of a lane
GAP = 12.0  # between rows, and between neighbours in a row
BETWEEN = 70.0  # between the halves
NARROWEST = 150.0  # width of a half, because its title takes as much
HEAD = 26.0  # the titles of the halves
ROUNDS = 24
CHARACTER, SMALL = 6.6, 5.6  # widths in the two sizes of text
LONGEST = 24  # characters of a label


@dataclass
class _Item:
    """A node, or the lane of an edge, in a row. x: of its middle."""

    row: int
    width: float
    x: float = 0.0
    above: list[_Item] = field(default_factory=list)
    below: list[_Item] = field(default_factory=list)
    pull: float | None = None  # the x of the nodes before the passes that it stands for
    place: int | None = None  # of the node in its list
    lane: list[_Item] = field(default_factory=list)  # all items of the lane that this item is in


@dataclass
class _Half:
    nodes: Sequence[NodeView]
    rows: list[list[_Item]]
    items: list[_Item]  # of the nodes, in their order
    edges: list[list[tuple[_Item, _Item]]]  # by the node that they come from


def draw(view: GraphView, key: str, color: Callable[[NodeView], int | None], explain: Callable[[str, int], str]) -> str:
    """The SVG of a graph of at most MOST nodes a side.

    key: starts the ids `<key>-b<i>` and `<key>-a<i>` of the nodes before and after. color: of a node after the passes,
    by the pass that made it. explain(side, i): the text of a node's tooltip; side: "b" before, "a" after the passes.
    """
    before = _half(view.before, _rows(view.before))
    after = _half(view.after, _rows_beside(view.after, [item.row for item in before.items]))
    _settle(before)
    for node, item in zip(view.after, after.items, strict=True):
        xs = [before.items[o].x for o in node.origins]
        item.pull = sum(xs) / len(xs) if xs else None
    _settle(after)
    heights = _heights(before, after)
    tops = [HEAD + sum(heights[:i]) + GAP * i for i in range(len(heights) + 1)]
    left, right = _frame(before, 0.0), 0.0
    right = _frame(after, left + BETWEEN)
    became = _became(view)
    shades = [color(node) for node in view.after]
    parts = [
        f'<text class="head" x="{left / 2:.0f}" y="14">before: {_count(view.before)}</text>',
        f'<text class="head" x="{(left + BETWEEN + right) / 2:.0f}" y="14">after: {_count(view.after)}</text>',
    ]
    middle = [top + height / 2 for top, height in zip(tops, heights, strict=False)]
    for side, half in (("b", before), ("a", after)):
        parts += [_edges(half, tops, heights, middle, i) for i in range(len(half.nodes)) if half.edges[i]]
        for i, (node, item) in enumerate(zip(half.nodes, half.items, strict=True)):
            if side == "a":
                peers, shade, gone = [f"{key}-b{o}" for o in node.origins], shades[i], False
            else:
                peers = [f"{key}-a{a}" for a in became[i]]
                shade = next((s for a in became[i] if (s := shades[a]) is not None), None)
                gone = not became[i]
            merged = len(node.origins) if side == "a" and shade is not None else 0
            parts.append(
                _node(f"{key}-{side}{i}", node, item, middle[item.row], shade, gone, peers, merged, explain(side, i))
            )
    width, height = right, tops[-1]
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    label = 'role="group" aria-label="the graph before and after the passes"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>\n{body}\n</svg>'


def _became(view: GraphView) -> list[list[int]]:
    """For each node before the passes, the indices of the nodes after the passes that stand for it."""
    found: list[list[int]] = [[] for _ in view.before]
    for i, node in enumerate(view.after):
        for origin in node.origins:
            found[origin].append(i)
    return found


def _count(nodes: Sequence[NodeView]) -> str:
    operators = sum(not n.free and n.op not in (INPUT, OUTPUT) for n in nodes)
    return f"{operators} operation{'s' if operators != 1 else ''}"


# -------------------------------------------------------------------------------------------------------------- layout


def _rows(nodes: Sequence[NodeView]) -> list[int]:
    """The row of each node: the one above its first reader."""
    below = [-1] * len(nodes)  # how many rows must follow the node's row
    for i in reversed(range(len(nodes))):
        below[i] += 1
        for read in nodes[i].reads:
            below[read] = max(below[read], below[i])
    most = max(below, default=0)
    used = {r for n in nodes for r in n.reads}
    return [most - b if i in used or nodes[i].op != INPUT else 0 for i, b in enumerate(below)]


def _rows_beside(nodes: Sequence[NodeView], before: Sequence[int]) -> list[int]:
    """The row of each node: that of the last node that it stands for, and below all nodes that it reads."""
    found: list[int] = []
    for node in nodes:
        least = max((found[r] + 1 for r in node.reads), default=0)
        found.append(max([least, *(before[o] for o in node.origins)]))
    for i in reversed(range(len(nodes))):  # a node that stands for no other goes to the row above its first reader
        readers = [found[j] for j in range(i + 1, len(nodes)) if i in nodes[j].reads]
        if not nodes[i].origins and readers:
            found[i] = min(readers) - 1
    return found


def _half(nodes: Sequence[NodeView], rows: Sequence[int]) -> _Half:
    items = [_Item(row, _width(node), place=i) for i, (row, node) in enumerate(zip(rows, nodes, strict=True))]
    table: list[list[_Item]] = [[] for _ in range(max(rows, default=0) + 1)]
    edges: list[list[tuple[_Item, _Item]]] = []
    readers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for read in node.reads:
            readers[read].append(i)
    for i, item in enumerate(items):
        table[item.row].append(item)
        lane = {item.row: item}
        passing: list[_Item] = []
        for row in range(item.row + 1, max((items[r].row for r in readers[i]), default=0)):
            lane[row] = _Item(row, LANE, lane=passing)
            passing.append(lane[row])
            table[row].append(lane[row])
        own = [(lane[row - 1], one) for row, one in lane.items() if row > item.row]
        own += [(lane[items[r].row - 1], items[r]) for r in readers[i]]
        for upper, lower in own:
            upper.below.append(lower)
            lower.above.append(upper)
        edges.append(own)
    return _Half(nodes, table, items, edges)


def _settle(half: _Half) -> None:
    """Finds x of every item: goes through the rows down and up, and moves each item towards its neighbours.

    In the first half of the rounds the order within a row may change; in the second half lanes become straight.
    """
    for row in half.rows:
        for i, item in enumerate(row):
            item.x = item.pull if item.pull is not None else 60.0 * i
    for turn in range(ROUNDS):
        down, late = turn % 2 == 0, turn >= ROUNDS // 2
        lanes = _straight(half) if late else {}
        for row in half.rows if down else half.rows[::-1]:
            wanted = [
                lanes[id(item.lane)] if late and item.lane
                else _wanted(item, item.above + item.below if late else item.above if down else item.below)
                for item in row
            ]  # fmt: skip
            order = range(len(row)) if late else sorted(range(len(row)), key=wanted.__getitem__)
            row[:], wanted = [row[i] for i in order], [wanted[i] for i in order]
            _spread(row, wanted)


def _wanted(item: _Item, near: Sequence[_Item]) -> float:
    x = sum(n.x for n in near) / len(near) if near else item.x
    return x if item.pull is None else (x + item.pull) / 2


def _straight(half: _Half) -> dict[int, float]:
    """The x at which a whole lane can stand, by the lane's id: the x of its outermost item."""
    items = [item for row in half.rows for item in row]
    middle = sum(item.x for item in items) / max(len(items), 1)
    found = {}
    for lane in {id(item.lane): item.lane for item in items if item.lane}.values():
        places = [item.x for item in lane]
        found[id(lane)] = max(places) if sum(places) / len(places) > middle else min(places)
    return found


def _spread(row: Sequence[_Item], wanted: Sequence[float]) -> None:
    """Sets x nearest to the wanted x, by least squares, so that neighbours do not touch. Lanes weigh more."""
    if not row:
        return
    offsets = [0.0]
    for one, other in itertools.pairwise(row):
        offsets.append(offsets[-1] + (one.width + other.width) / 2 + GAP)
    blocks: list[tuple[float, float, int]] = []  # items that touch each other: weighted sum of wanted x, weight, count
    for item, want, offset in zip(row, wanted, offsets, strict=True):
        weight, count = 8.0 if item.lane else 1.0, 1
        total = (want - offset) * weight
        while blocks and blocks[-1][0] / blocks[-1][1] > total / weight:
            more, heavier, others = blocks.pop()
            total, weight, count = total + more, weight + heavier, count + others
        blocks.append((total, weight, count))
    x = [total / weight for total, weight, count in blocks for _ in range(count)]
    for item, start, offset in zip(row, x, offsets, strict=True):
        item.x = start + offset


def _frame(half: _Half, start: float) -> float:
    """Moves a half to the x `start`; returns the x of its right end."""
    items = [item for row in half.rows for item in row]
    shift = start - min((i.x - i.width / 2 for i in items), default=start)
    for item in items:
        item.x += shift
    return max([start + NARROWEST, *(i.x + i.width / 2 for i in items)])


def _heights(*halves: _Half) -> list[float]:
    """The height of each row: that of an operator if the row holds one in either half."""
    heights = [DOT] * max(len(half.rows) for half in halves)
    for half in halves:
        for node, item in zip(half.nodes, half.items, strict=True):
            heights[item.row] = max(heights[item.row], DOT if node.free else BOX)
    return heights


# --------------------------------------------------------------------------------------------------------------- shapes


def _labels(node: NodeView) -> tuple[str, str]:
    """A node's two lines of text: the operator, and as much of the end of the module's path as fits."""
    if node.op == INPUT:
        return _short(node.module or node.name), ""
    name = {OUTPUT: "output", CALL: node.code.split(":")[0]}.get(node.op, node.op.rpartition(".")[2])
    where = "" if node.op in (OUTPUT, CALL) else node.module
    name = {"scaled_dot_product_attention": "attention"}.get(name, name)
    return _short(name), where if len(where) <= LONGEST else "…" + where[1 - LONGEST :]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _width(node: NodeView) -> float:
    if node.free:
        return DOT
    name, where = _labels(node)
    return max(len(name) * CHARACTER, len(where) * SMALL, 20.0) + 18.0


def _edges(half: _Half, tops: Sequence[float], heights: Sequence[float], middle: Sequence[float], i: int) -> str:
    """All edges of a node as one path: a curve between two rows, a straight line where a lane crosses a row."""

    def ends(item: _Item) -> float:
        if item.place is None:
            return heights[item.row] / 2
        return (DOT if half.nodes[item.place].free else BOX) / 2

    parts = []
    for upper, lower in half.edges[i]:
        top, bottom = middle[upper.row] + ends(upper), middle[lower.row] - ends(lower)
        bend = (top + bottom) / 2
        curve = f"M{upper.x:.1f} {top:.1f}C{upper.x:.1f} {bend:.1f} {lower.x:.1f} {bend:.1f} {lower.x:.1f} {bottom:.1f}"
        parts.append(curve + (f"V{bottom + heights[lower.row]:.1f}" if lower.place is None else ""))
    return f'<path class="edge" d="{"".join(parts)}"/>'


def _node(
    name: str,
    node: NodeView,
    item: _Item,
    y: float,
    shade: int | None,
    gone: bool,
    peers: Sequence[str],
    merged: int,
    said: str,
) -> str:
    classes = "node" + (f" p{shade}" if shade is not None else "") + (" gone" if gone else "")
    classes += f" {node.op}" if node.op in (INPUT, OUTPUT, CALL) else ""
    data = {"name": node.name, "op": node.op, "peers": " ".join(peers)}
    attributes = "".join(f' data-{k}="{html.escape(v)}"' for k, v in data.items())
    focus = "" if node.free else ' tabindex="0" role="img"'
    head = f'<g id="{name}" class="{classes}"{attributes}{focus}><title>{html.escape(said)}</title>'
    if node.free:
        return f'{head}<circle cx="{item.x:.1f}" cy="{y:.1f}" r="{DOT / 2}"/></g>'
    first, second = _labels(node)
    left, top = item.x - item.width / 2, y - BOX / 2
    body = f'<rect x="{left:.1f}" y="{top:.1f}" width="{item.width:.1f}" height="{BOX}" rx="5"/>'
    lines = f'<text x="{item.x:.1f}" y="{y + (-2 if second else 4):.1f}">{html.escape(first)}</text>'
    if second:
        lines += f'<text class="where" x="{item.x:.1f}" y="{y + 10:.1f}">{html.escape(second)}</text>'
    if merged > 1:
        x = left + item.width + 1
        lines += f'<circle class="badge" cx="{x:.1f}" cy="{top - 1:.1f}" r="8"/>'
        lines += f'<text class="badge" x="{x:.1f}" y="{top + 2.5:.1f}">{merged}</text>'
    return f"{head}{body}{lines}</g>"


def legend(shades: Mapping[str, int]) -> str:
    """The legend: the colours of the passes, and the meaning of the signs."""
    keys = [f'<li class="p{shade}"><i></i>{html.escape(name)}</li>' for name, shade in shades.items()]
    keys.append('<li><i class="dot"></i>a view: moves nothing, costs nothing</li>')
    keys.append('<li class="gone"><i></i>no longer computed</li>')
    keys.append('<li><i class="badge">4</i>stands for four nodes of before</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'
