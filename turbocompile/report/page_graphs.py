"""The page's section of graphs: what merged into what, as a drawing and as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping

from turbocompile.ir.graph_view import GraphView, NodeView
from turbocompile.report import graph_svg as drawing
from turbocompile.report.data import ReportData
from turbocompile.report.markup import cell, counted, data_attributes, number_cell, table
from turbocompile.report.words import size

COLORS = 12  # of passes; page.css has as many classes, and further passes reuse them


def graph_section(graphs: Mapping[str, GraphView], report: ReportData, key: str) -> str:
    if not graphs:
        return '<p class="note">This engine does not say what merged into what; one that is built now does.</p>'
    names = [*report.passes, *(p for v in graphs.values() for n in v.after for p in n.passes)]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    parts = []
    for i, (name, view) in enumerate(graphs.items()):
        times = f", which runs {view.calls} times in a forward" if view.calls > 1 else ""
        heading = f"<h3>Graph {html.escape(name)}{times}</h3>\n"
        parts.append(heading + _figure(view, f"{key}-g{i}", order) + _merges(name, view, order))
    return "".join(parts)


def _made_by(node: NodeView, order: Mapping[str, int]) -> list[str]:
    return sorted(node.passes, key=order.__getitem__)


def _figure(view: GraphView, key: str, order: Mapping[str, int]) -> str:
    most = max(len(view.before), len(view.after))
    if most > drawing.MOST:
        said = f"The graph has {most:,} nodes, more than a picture shows. turbocompile explain --after prints it."
        return f'<p class="note">{said}</p>'

    def color(node: NodeView) -> int | None:
        return order[_made_by(node, order)[-1]] % COLORS if node.passes else None

    became: dict[int, list[str]] = {}
    for node in view.after:
        for origin in node.origins:
            became.setdefault(origin, []).append(node.name)

    def explain(side: str, i: int) -> str:
        node = (view.before if side == "b" else view.after)[i]
        lines = [node.code, " ".join(filter(None, (node.shape, f"[{node.module}]" if node.module else "")))]
        if node.flops or node.bytes:
            lines.append(f"{counted(node.flops, 'FLOP')}, {size(node.bytes)} a run")
        if side == "b":
            lines.append("became " + ", ".join(became[i]) if i in became else "no longer computed")
        elif node.passes:
            stands = ", ".join(view.before[o].name for o in node.origins) or "nothing that was there before"
            lines.append(f"made by {', '.join(_made_by(node, order))}; stands for {stands}")
        return "\n".join(line for line in lines if line)

    used = {p for n in view.after if n.passes for p in _made_by(n, order)[-1:]}
    shades = {name: i % COLORS for name, i in order.items() if name in used}
    svg = drawing.draw(view, key, color, explain)
    hint = "Point at a node, or click it, to see what it is and what it became."
    return (
        f'<figure class="graph">{drawing.legend(shades)}<div class="drawing">{svg}</div>'
        f'<figcaption class="panel" aria-live="polite">{hint}</figcaption></figure>\n'
    )


def _merges(graph: str, view: GraphView, order: Mapping[str, int]) -> str:
    """A row for each operation that a pass made."""
    rows = []
    for i, node in enumerate(view.after):
        if not node.passes or node.free:
            continue
        made = _made_by(node, order)
        data = data_attributes(
            {"merge": i, "graph": graph, "origins": " ".join(map(str, node.origins)), "passes": " ".join(made)}
        )
        names = ", ".join(view.before[o].name for o in node.origins) or "new"
        rows.append(
            f'<tr{data}><td class="strong"><i class="chip p{order[made[-1]] % COLORS}"></i>{html.escape(made[-1])}</td>'
            f"{cell(node.op.rpartition('.')[2])}{cell(node.module)}{number_cell(str(len(node.origins)))}"
            f"{cell(names, 'code')}{cell(', '.join(made[:-1]))}</tr>"
        )
    if not rows:
        return ""
    columns = ("pass", "made", "where", "nodes#", "out of", "with the help of")
    return table(f"What merged into what in {graph}", columns, rows)
