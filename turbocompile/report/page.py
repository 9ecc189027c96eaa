"""The page of an engine: one HTML file that shows what the passes did, for a browser or a printer.

The page loads no other file: a Content-Security-Policy allows the page's own style and script, by their hashes, and
nothing else. The page shows all data without the script, too; the script highlights the nodes that merged into a node.
Every text that comes from an engine is escaped. Numbers are also data-* attributes, exactly as in `explain --json`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib import resources
from pathlib import PurePath

from turbocompile.hardware import Gpu
from turbocompile.ir.graph_view import GraphView
from turbocompile.report.data import ReportData
from turbocompile.report.markup import counted, data_attributes
from turbocompile.report.page_graphs import graph_section
from turbocompile.report.page_tables import (
    attention_section,
    card_section,
    operation_section,
    pass_section,
    stage_section,
    total_seconds,
)  # fmt: skip
from turbocompile.report.timings import Bench
from turbocompile.report.words import duration, engine_line, parameters_line, shape_line, size

Graphs = Mapping[str, Mapping[str, GraphView]]


def page(
    report: ReportData,
    graphs: Graphs | None,
    records: Mapping[str, Bench] | None = None,
    gpu: str | None = None,
) -> str:
    """The page of a report.

    graphs: by module, the graphs before and after the passes; with None the page has no section of graphs. records: by
    module, the times that a `bench` measured. gpu: the card of the estimates.

    Raises UnsupportedError for an unknown card.
    """
    title = html.escape(f"turbocompile: {PurePath(report.model).name or report.module}")
    style, script = _file("page.css"), _file("page.js")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>{_body(report, graphs, records, gpu)}\n"
        f"</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def notebook(report: ReportData) -> str:
    """The page's body as HTML for a notebook: without style and script, because the notebook has its own style."""
    return _body(report, None, None, None)


def _body(report: ReportData, graphs: Graphs | None, records: Mapping[str, Bench] | None, gpu: str | None) -> str:
    card = report.gpu(gpu)
    modules = {report.module: report, **report.others}
    body = [_facts(report), _warnings(report)]
    for number, (name, one) in enumerate(modules.items()):
        record = (records or {}).get(name)
        sections = [
            _figures(one, card, record),
            "" if graphs is None else graph_section(graphs.get(name, {}), one, f"n{number}"),
            pass_section(one),
            attention_section(one, card),
            operation_section(one, card, record),
        ]
        heading = f"<h2>{html.escape(name)}</h2>" if len(modules) > 1 else ""
        body.append(f'<section data-module="{html.escape(name)}">{heading}{"".join(sections)}</section>')
    return "".join([*body, card_section(report), stage_section(report)])


def _file(name: str) -> str:
    """The text of a file of this package."""
    return (resources.files("turbocompile.report") / name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(report: ReportData) -> str:
    """The engine's model, target, shapes and versions, one line for each."""
    parts = [
        ("model", report.model),
        ("target", f"{report.target}, {report.dtype}, {report.backend} backend"),
        ("weights", report.weights),
        ("the model itself", report.compared),
        *((f"shape {s.name}", shape_line(s)) for s in report.shapes),
        ("parameters", parameters_line(report.parameters)),
        *((f"parameters of {name}", parameters_line(other.parameters)) for name, other in report.others.items()),
        ("engine", engine_line(report.engine_bytes, report.predicted_bytes)),
        ("built with", ", ".join(f"{k} {v}" for k, v in report.versions.items())),
    ]
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in parts if v)
    return f'<dl class="facts">{"".join(rows)}</dl>\n'


def _warnings(report: ReportData) -> str:
    return "".join(f'<p class="warning">{html.escape(w)}</p>\n' for w in report.warnings)


def _figures(report: ReportData, card: Gpu, record: Bench | None) -> str:
    """The few numbers that a reader looks for first."""
    least = total_seconds(report.ops, card)
    sites, done = (sum(getattr(p, k) for p in report.passes.values()) for k in ("sites", "rewritten"))
    moved = sum(op.bytes for op in report.ops)
    found = [
        ("sites rewritten", f"{done:,} of {sites:,}", {"rewritten": done, "sites": sites}),
        ("operations a forward", counted(report.flops, "FLOP"), {"flops": report.flops}),
        ("bytes a forward", size(moved), {"bytes": moved}),
        ("parameters", size(report.parameter_bytes), {"parameter_bytes": report.parameter_bytes}),
        ("activations at most", size(report.activation_bytes), {"activation_bytes": report.activation_bytes}),
        (f"at least, on {card.name}", duration(least) if least is not None else "", {"seconds": least}),
    ]
    if record is not None:
        found.append((f"measured on {record.device}", duration(record.seconds), {"measured": record.seconds}))
    tiles = (
        f"<div{data_attributes(data)}><b>{html.escape(text)}</b><span>{html.escape(name)}</span></div>"
        for name, text, data in found
        if text
    )
    return f'<div class="figures">{"".join(tiles)}</div>\n'
