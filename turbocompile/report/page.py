"""The page of an engine: one file that shows what was done to it, to be opened in a browser, kept, or printed.

It needs nothing else: a Content-Security-Policy allows its own style and script, by their hashes, and no more. Without
the script it says the same; the script lights up what merged into what. Every text that comes from an engine is
escaped. Numbers stand as data-* attributes beside their text, exactly as in `turbocompile explain --json`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from turbocompile.errors import UnsupportedError
from turbocompile.hardware import GPUS, Gpu
from turbocompile.ir.cost import OpCost
from turbocompile.ir.graph_view import GraphView, NodeView
from turbocompile.report import graph_svg as drawing
from turbocompile.report.report import PassReport, Report, Skip, duration, sensitivity_title, size

if TYPE_CHECKING:
    from turbocompile.tools.bench import Bench, OpTime

COLORS = 12  # of passes; more take turns
BAR = 70  # pixels of a whole forward in the table of operations
ERRORS = ("rel_l1", "cosine", "max_abs")


def page(
    report: Report,
    graphs: Mapping[str, Mapping[str, GraphView]],
    records: Mapping[str, Bench] | None = None,
    gpu: str | None = None,
) -> str:
    """The page of a report.

    graphs: by module, the graphs before and after the passes; records: by module, what a `bench` of it measured. gpu:
    the card of the estimates. Raises UnsupportedError for an unknown card.
    """
    card = report.gpu(gpu)
    title = html.escape(f"turbocompile: {PurePath(report.model).name or report.module}")
    modules = {report.module: report, **report.others}
    body = [f"<h1>{title}</h1>", _facts(report), _warnings(report)]
    for number, (name, one) in enumerate(modules.items()):
        record = (records or {}).get(name)
        sections = [
            _figures(one, card, record),
            _graphs(graphs.get(name, {}), one, f"n{number}"),
            _passes(one),
            _attention(one, card),
            _ops(one, card, record),
        ]
        heading = f"<h2>{html.escape(name)}</h2>" if len(modules) > 1 else ""
        body.append(f'<section data-module="{html.escape(name)}">{heading}{"".join(sections)}</section>')
    body += [_cards(report), _stages(report)]
    policy = f"default-src 'none'; style-src '{_digest(_STYLE)}'; script-src '{_digest(_SCRIPT)}'; base-uri 'none'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{''.join(body)}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --------------------------------------------------------------------------------------------------------------- parts


def _data(values: Mapping[str, Any]) -> str:
    """Attributes with the values as JSON has them; what is None is left out."""
    return "".join(f' data-{k.replace("_", "-")}="{html.escape(str(v))}"' for k, v in values.items() if v is not None)


def _cell(text: str, kind: str = "", **data: Any) -> str:
    """A cell of a table. text: is escaped."""
    return f"<td{f' class={kind}' if kind else ''}{_data(data)}>{html.escape(text)}</td>"


def _number(text: str, **data: Any) -> str:
    return _cell(text, "number", **data)


def _table(caption: str, columns: Sequence[str], rows: Iterable[str], note: str = "") -> str:
    """columns: a name that ends in "#" is one of numbers, and stands right. rows: as HTML."""
    head = "".join(
        f'<th scope="col"{" class=number" if c.endswith("#") else ""}>{html.escape(c.rstrip("#"))}</th>'
        for c in columns
    )
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<h3>{html.escape(caption)}</h3>{said}\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{chr(10).join(rows)}\n</tbody></table></div>\n"
    )


def _counted(n: float, unit: str) -> str:
    return size(n).removesuffix("B") + unit


def _facts(report: Report) -> str:
    shapes = "; ".join(
        ", ".join(f"{path} {'x'.join(map(str, dims)) or 'scalar'}" for path, dims in s.inputs.items())
        for s in report.shapes
    )
    parts = [
        ("model", report.model),
        ("target", f"{report.target}, {report.dtype}, {report.backend} backend"),
        ("weights", report.weights),
        ("inputs", shapes),
        ("built with", ", ".join(f"{k} {v}" for k, v in report.versions.items())),
    ]
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in parts if v)
    return f'<dl class="facts">{"".join(rows)}</dl>\n'


def _warnings(report: Report) -> str:
    return "".join(f'<p class="warning">{html.escape(w)}</p>\n' for w in report.warnings)


def _figures(report: Report, card: Gpu, record: Bench | None) -> str:
    """The few numbers that one looks for first."""
    least = _total_seconds(report.ops, card)
    sites, done = (sum(getattr(p, k) for p in report.passes.values()) for k in ("sites", "rewritten"))
    moved = sum(op.bytes for op in report.ops)
    found = [
        ("sites rewritten", f"{done:,} of {sites:,}", {"rewritten": done, "sites": sites}),
        ("operations a forward", _counted(report.flops, "FLOP"), {"flops": report.flops}),
        ("bytes a forward", size(moved), {"bytes": moved}),
        ("parameters", size(report.parameter_bytes), {"parameter_bytes": report.parameter_bytes}),
        ("activations at most", size(report.activation_bytes), {"activation_bytes": report.activation_bytes}),
        (f"at least, on {card.name}", duration(least) if least is not None else "", {"seconds": least}),
    ]
    if record is not None:
        found.append((f"measured on {record.device}", duration(record.seconds), {"measured": record.seconds}))
    tiles = (
        f"<div{_data(data)}><b>{html.escape(text)}</b><span>{html.escape(name)}</span></div>"
        for name, text, data in found
        if text
    )
    return f'<div class="figures">{"".join(tiles)}</div>\n'


# -------------------------------------------------------------------------------------------------------------- graphs


def _graphs(graphs: Mapping[str, GraphView], report: Report, key: str) -> str:
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
            lines.append(f"{_counted(node.flops, 'FLOP')}, {size(node.bytes)} a run")
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
        data = _data(
            {"merge": i, "graph": graph, "origins": " ".join(map(str, node.origins)), "passes": " ".join(made)}
        )
        names = ", ".join(view.before[o].name for o in node.origins) or "new"
        rows.append(
            f'<tr{data}><td class="strong"><i class="chip p{order[made[-1]] % COLORS}"></i>{html.escape(made[-1])}</td>'
            f"{_cell(node.op.rpartition('.')[2])}{_cell(node.module)}{_number(str(len(node.origins)))}"
            f"{_cell(names, 'code')}{_cell(', '.join(made[:-1]))}</tr>"
        )
    if not rows:
        return ""
    columns = ("pass", "made", "where", "nodes#", "out of", "with the help of")
    return _table(f"What merged into what in {graph}", columns, rows)


# -------------------------------------------------------------------------------------------------------------- passes


def _passes(report: Report) -> str:
    rows = []
    for name, p in report.passes.items():
        errors = {k: p.error[k] for k in ERRORS} if p.error else {}
        output = {f"output_{k}": p.error_output[k] for k in ERRORS} if p.error_output else {}
        why = (p.error_reason or "") if p.error is None or p.error_output is None else ""
        rows.append(
            f"<tr{_data({'pass': name})}>{_cell(name, 'strong')}{_cell(p.kind, kind_of=p.kind)}"
            f"{_number(str(p.sites), sites=p.sites)}{_number(str(p.rewritten), rewritten=p.rewritten)}"
            f"{_number(str(p.sites - p.rewritten), skipped=p.sites - p.rewritten)}"
            f"{_number(_error(p.error), **errors)}{_number(_error(p.error_output), **output)}"
            f"{_number(duration(p.seconds), seconds=p.seconds)}{_cell(why, error_reason=p.error_reason)}</tr>"
        )
        rows += _skips(name, p)
    columns = ("pass", "kind", "sites#", "rewritten#", "left alone#", "error#", "at output#", "time#", "because")
    note = "Sites are counted over the whole model. Error: relative L1 at the worst site, against float64."
    if not rows:
        return '<p class="note">No pass ran.</p>'
    return _table("Passes", columns, rows, note) + _sensitivity(report)


def _sensitivity(report: Report) -> str:
    """What quantizing each site does to it."""
    rows = []
    for name, p in report.passes.items():
        for e in p.site_errors:
            figures = {k: e.error[k] for k in ERRORS}
            rows.append(
                f"<tr{_data({'sensitivity': e.site, 'of_pass': name})}>{_cell(name, 'strong')}{_cell(e.site, 'code')}"
                f"{_number(_error(e.error), **figures)}{_cell(e.worst)}{_median(e.median)}"
                f"{_number(f'{e.budget:g}', budget=e.budget)}{_cell(e.computed_in(report.dtype))}{_cell(e.why)}</tr>"
            )
    columns = ("pass", "site", "error#", "in", "median#", "at most#", "computed in", "because")
    note = "Relative L1 of each site on exact inputs, in its worst layer; a layer over the budget stays as it was."
    return _table(sensitivity_title(report.passes), columns, rows, note) if rows else ""


def _median(value: float | None) -> str:
    return _number("") if value is None else _number(f"{value:.2g}", median=value)


def _skips(name: str, p: PassReport) -> list[str]:
    """A row for each reason, with all its sites."""
    grouped: dict[str, list[Skip]] = {}
    for skip in p.skipped:
        grouped.setdefault(skip.reason, []).append(skip)
    rows = []
    for reason, skips in grouped.items():
        count = sum(s.count for s in skips)
        sites = ", ".join(s.site for s in skips)
        rows.append(
            f'<tr class="skip"{_data({"skip": name, "reason": reason, "count": count})}><td colspan="4"></td>'
            f'{_number(str(count))}<td colspan="4">{html.escape(reason)}: '
            f'<span class="code">{html.escape(sites)}</span></td></tr>'
        )
    return rows


def _error(error: Mapping[str, float] | None) -> str:
    return "" if error is None else f"{error['rel_l1']:.2g}"


# ---------------------------------------------------------------------------------------------------------- operations


def _seconds(op: OpCost, card: Gpu) -> float | None:
    """None where the card lacks the arithmetic."""
    try:
        return op.seconds(card)
    except UnsupportedError:
        return None


def _total_seconds(ops: Sequence[OpCost], card: Gpu) -> float | None:
    found = [s for op in ops if (s := _seconds(op, card)) is not None]
    return sum(found) if len(found) == len(ops) else None


def _attention(report: Report, card: Gpu) -> str:
    if not report.attention:
        return ""
    rows = []
    for a in report.attention:
        least = _seconds(a.cost, card)
        kind = a.kind if a.pv in (None, "none") else f"{a.kind} {a.pv}"
        of = f"{a.role}, {a.queries:,} x {a.keys:,} tokens, {a.heads} x {a.head_dim}"
        if (s := a.sparsity) is not None:
            of += f"; reads {s.kept} of {s.blocks} blocks of {s.block_k} keys"
        rows.append(
            f"<tr{_data({'attention': a.site, 'attention_kind': a.kind})}>{_cell(a.site, 'code')}"
            f"{_number(str(a.count), count=a.count)}{_cell(kind, 'strong')}"
            f"{_cell(of)}"
            f"{_number(_counted(a.cost.flops, 'FLOP'), flops=a.cost.flops)}"
            f"{_number(duration(least) if least is not None else '', seconds=least)}"
            f"{_number(duration(a.seconds) if a.seconds is not None else '', measured=a.seconds)}{_cell(a.why)}</tr>"
        )
    measured = f"measured on {report.measured_on}" if report.measured_on else "measured"
    columns = ("site", "runs#", "kind", "of", "operations#", f"at least, {card.name}#", f"{measured}#", "because")
    return _table("Attention", columns, rows)


def _ops(report: Report, card: Gpu, record: Bench | None) -> str:
    """One row for equal operations, the slowest first: what they cost on paper, and what was measured."""
    times = {(t.graph, t.name, t.where, t.shapes): t for t in record.ops} if record is not None else {}
    found = [(op, _seconds(op, card), times.get((op.graph, op.name, op.where, op.shapes))) for op in report.ops]
    spent = [(time.seconds if time else 0.0) if record is not None else least or 0.0 for _, least, time in found]
    whole = sum(spent)
    order = sorted(range(len(found)), key=lambda i: -spent[i])
    rows = [_op(*found[i], card, record, whole) for i in order]
    count, flops, moved = (sum(getattr(op, k) for op in report.ops) for k in ("count", "flops", "bytes"))
    least = _total_seconds(report.ops, card)
    total = [
        _number(str(count), count=count),
        _number(_counted(flops, "FLOP"), flops=flops),
        _number(size(moved), bytes=moved),
        _number(duration(least) if least is not None else "", seconds=least),
        _cell(""),
    ]
    columns = ["op", "where", "shapes", "runs#", "operations#", "bytes#", f"at least, {card.name}#", "bound by"]
    note = "For one forward. At least: the card's full rate for arithmetic and memory, whichever takes longer. "
    if record is not None:
        columns.append(f"measured, {record.device}#")
        total.append(_number(duration(whole), measured=whole))
        note += (
            f"Measured: each alone, on {record.device}, by turbocompile bench; the forward took "
            f"{duration(record.seconds)}."
        )
    else:
        note += "Nothing was measured on this machine: turbocompile bench does it."
    if _on_card(record):
        columns.append("of the rate#")
        total.append(_cell(""))
    rows.append(f'<tr class="total" data-total="ops"><td colspan="3">all</td>{"".join(total)}{_cell("")}</tr>')
    columns.append("of all measured" if record is not None else "of all")
    return _table("Operations", columns, rows, note)


def _on_card(record: Bench | None) -> bool:
    """Whether the machine that measured is a card whose rates are known."""
    return record is not None and any(t.floor is not None for t in record.ops)


def _op(op: OpCost, least: float | None, time: OpTime | None, card: Gpu, record: Bench | None, whole: float) -> str:
    where = f"{op.graph} {', '.join(path for path in op.where if path)}".strip()
    data = {"op": op.name, "graph": op.graph, "where": " ".join(op.where), "shapes": op.shapes}
    bound = op.bound(card) if least is not None else f"no such arithmetic on {card.name}"
    cells = [
        f'<td class="op">{html.escape(op.name.rpartition(".")[2]).replace("_", "_<wbr>")}</td>',
        _cell(where, "where"),
        _cell(op.shapes, "shapes"),
        _number(str(op.count), count=op.count),
        _number(_counted(op.flops, "FLOP"), flops=op.flops),
        _number(size(op.bytes), bytes=op.bytes),
        _number(duration(least) if least is not None else "", seconds=least),
        _cell(bound, bound=bound),
    ]
    part = least or 0.0
    if record is not None:  # what it did not time was folded into a constant when the engine was loaded
        part = time.seconds if time is not None else 0.0
        cells.append(_number(duration(part) if time else "at load", measured=part if time else None))
    if _on_card(record):
        floor = time.floor if time is not None else None
        cells.append(_number(f"{floor / part:.0%}" if floor is not None and part else "", floor=floor))
    cells.append(f'<td class="share">{_bar(part / whole if whole else 0.0)}</td>')
    return f"<tr{_data(data)}>{''.join(cells)}</tr>"


def _bar(share: float) -> str:
    width = BAR * min(share, 1.0)
    return (
        f'<svg class="bar" width="{BAR + 40}" height="14" role="img" aria-label="{share:.1%}">'
        f'<rect width="{width:.1f}" height="10" y="2" rx="2"/><text x="{width + 4:.1f}" y="11">{share:.1%}</text></svg>'
    )


# --------------------------------------------------------------------------------------------------- machines and time


def _cards(report: Report) -> str:
    modules = (report, *report.others.values())  # experts: all weights are there, and one of them runs
    memory = sum(m.parameter_bytes for m in modules) + max(m.activation_bytes for m in modules)
    rows = []
    for card in GPUS.values():
        least = _total_seconds(report.ops, card)
        rows.append(
            f"<tr{_data({'card': card.key})}>{_cell(card.name, 'strong')}"
            f"{_number(duration(least) if least is not None else 'lacks the arithmetic', seconds=least)}"
            f"{_number(size(card.memory))}{_cell('yes' if memory <= card.memory else 'no')}{_cell(card.source)}</tr>"
        )
    columns = ("card", "least time of a forward#", "memory#", "weights and activations fit", "figures from")
    return _table("Cards", columns, rows)


def _stages(report: Report) -> str:
    rows = [
        f"<tr{_data({'stage': name})}>{_cell(name)}{_number(duration(s), seconds=s)}</tr>"
        for name, s in report.stages.items()
    ]
    return _table("The build", ("stage", "time#"), rows) if rows else ""


# --------------------------------------------------------------------------------------------------- style and script

# Hues of the passes, as far apart from their neighbours in the list as twelve can be.
_HUES = (210, 28, 145, 275, 52, 340, 182, 100, 240, 5, 310, 70)
_PALETTE = "".join(f".p{i}{{--h:{hue}}}" for i, hue in enumerate(_HUES))

_STYLE = (
    """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#596175;--line:#d9dde5;--paper:#fff;--panel:#f5f6f9;--edge:#aab1bf;
--box:#eef0f4;--box-line:#9aa2b1;--s:75%;--l:88%;--sl:38%;--accent:#2b62c4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#a2aabb;--line:#343b49;--paper:#14171d;--panel:#1d222b;
--edge:#566072;--box:#262c37;--box-line:#6b7587;--s:45%;--l:24%;--sl:62%;--accent:#8ab2ff}}
*{box-sizing:border-box}
body{margin:0;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);
background:var(--paper)}
main{max-width:1480px;margin:0 auto;padding:1.5rem 2rem 4rem}
h1{font-size:1.6rem;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:3rem 0 .5rem;padding-top:1rem;border-top:2px solid var(--line)}
h3{font-size:1.1rem;margin:2.2rem 0 .3rem}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.note{color:var(--soft);margin:.2rem 0 .6rem;font-size:.9rem;max-width:75em}
.warning{border-left:4px solid #c77700;background:var(--panel);padding:.4rem .8rem;margin:.8rem 0}
.figures{display:flex;flex-wrap:wrap;gap:.7rem;margin:1.2rem 0}
.figures div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.5rem .9rem;
min-width:8.5rem}
.figures b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.figures span{color:var(--soft);font-size:.82rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;vertical-align:top;padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);vertical-align:bottom}
td{font-variant-numeric:tabular-nums;overflow-wrap:break-word}
td.code,.skip td{overflow-wrap:anywhere}
td.shapes{min-width:12em;font-size:.92em}td.where{min-width:8em}td.op{font-weight:600;min-width:9em}td.share{padding-right:0}
.number{text-align:right}
td.number{white-space:nowrap}
.strong{font-weight:600;white-space:nowrap}
.code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85em}
.skip td{color:var(--soft);font-size:.95em;border-bottom-style:dotted}
.total td{font-weight:600;border-top:2px solid var(--line)}
.chip,.legend i{display:inline-block;width:.85em;height:.85em;border-radius:3px;margin-right:.45em;
background:var(--box);border:1px solid var(--box-line)}
.chip[class*=" p"],.legend [class^="p"] i{background:hsl(var(--h) var(--s) var(--l));
border-color:hsl(var(--h) 60% var(--sl))}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;margin:.4rem 0;padding:0;font-size:.86rem}
.legend .dot{width:.6em;height:.6em;border-radius:50%}
.legend .gone i{border-style:dashed;background:none}
.legend i.badge{width:1.35em;height:1.35em;border-radius:50%;font-style:normal;font-size:.85em;text-align:center;
line-height:1.3em;background:var(--paper);border-color:var(--soft)}
figure{margin:0}
.drawing{overflow:auto;border:1px solid var(--line);border-radius:8px;padding:14px;background:var(--paper)}
.drawing svg{display:block;overflow:visible;margin:0 auto}
.panel{position:sticky;bottom:0;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);
border:1px solid var(--line);border-radius:8px;padding:.5rem .8rem;margin:.4rem 0 0;font-size:.85rem;min-height:2.4rem}
html:not(.js) .panel{display:none}
svg text{font-size:12px;fill:var(--ink);text-anchor:middle}
svg .head{font-size:14px;font-weight:600}
svg .where{font-size:10px;fill:var(--soft)}
svg .badge{font-size:10px}
circle.badge{fill:var(--paper)!important;stroke:var(--soft)}
.edge{fill:none;stroke:var(--edge);stroke-width:1.1}
.node{outline:none;cursor:pointer}
.node rect,.node circle{fill:var(--box);stroke:var(--box-line)}
.node.input rect,.node.output rect{fill:var(--paper);stroke:var(--ink)}
.node.call rect{stroke-width:2.5}
.node[class*=" p"] rect,.node[class*=" p"] circle{
fill:hsl(var(--h) var(--s) var(--l));stroke:hsl(var(--h) 60% var(--sl))}
.node[class*=" p"] .where{fill:var(--ink)}
.node.gone rect,.node.gone circle{fill:var(--paper);stroke-dasharray:3 2}
.lighting .node{opacity:.3}.lighting .edge{opacity:.35}
.lighting .node.lit{opacity:1}.node.lit rect,.node.lit>circle:not(.badge){stroke:var(--ink);stroke-width:2.4}
.node:focus-visible rect{stroke:var(--accent);stroke-width:3}
.bar rect{fill:var(--accent)}.bar text{font-size:10.5px;text-anchor:start;fill:var(--soft)}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--panel:#fff;--edge:#999;
--box:#eee;--box-line:#777;--s:75%;--l:88%;--sl:38%;--accent:#2b62c4}
main{max-width:none;padding:0}body{font-size:9pt}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.panel{display:none}.drawing{max-height:none;overflow:visible;border:0;padding:0}
.drawing svg{width:100%;height:auto;max-height:23cm}.wide{overflow:visible}tr,.figures div{break-inside:avoid}
table{font-size:7pt}th,td{padding:.2rem .5rem .2rem 0}
td.shapes,td.where,td.op{min-width:0;font-size:1em}td.shapes{width:22%}.legend{break-after:avoid}
h2,h3{break-after:avoid}}
"""
    + _PALETTE
).strip()

# The text of a node is in its <title>; data-peers names what it became or stands for. A link to a node lights it.
_SCRIPT = """
(() => {
  const all = document;
  all.documentElement.classList.add("js");
  for (const figure of all.querySelectorAll("figure.graph")) {
    const svg = figure.querySelector("svg"), panel = figure.querySelector(".panel"), hint = panel.textContent;
    let pinned = null;
    const show = node => {
      for (const lit of svg.querySelectorAll(".lit")) lit.classList.remove("lit");
      svg.classList.toggle("lighting", Boolean(node));
      panel.textContent = node ? node.querySelector("title").textContent : hint;
      if (!node) return;
      const peers = node.dataset.peers.split(" ").filter(Boolean).map(id => all.getElementById(id));
      for (const lit of [node, ...peers]) lit.classList.add("lit");
    };
    const pin = node => { pinned = pinned === node ? null : node; show(pinned); };
    for (const node of svg.querySelectorAll(".node")) {
      node.addEventListener("mouseenter", () => show(node));
      node.addEventListener("mouseleave", () => show(pinned));
      node.addEventListener("focus", () => show(node));
      node.addEventListener("blur", () => show(pinned));
      node.addEventListener("click", () => pin(node));
      node.addEventListener("keydown", event => { if (event.key === "Enter") pin(node); });
    }
    all.addEventListener("keydown", event => { if (event.key === "Escape") { pinned = null; show(null); } });
    const linked = all.getElementById(location.hash.slice(1));
    if (linked && svg.contains(linked)) pin(linked);
  }
})();
""".strip()
