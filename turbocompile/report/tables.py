"""A report as tables of text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from turbocompile.errors import UnsupportedError
from turbocompile.hardware import GPUS, Gpu
from turbocompile.ir.cost import OpCost
from turbocompile.report.data import ReportData, least_seconds
from turbocompile.report.rows import PassReport, Skip
from turbocompile.report.words import (
    attention_kind,
    attention_size,
    duration,
    engine_line,
    error_text,
    keys_read,
    optional_duration,
    parameters_line,
    scaled,
    shape_line,
    size,
    some,
    why_no_error,
    with_article,
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of text. right: the indices of columns of numbers, which are aligned right. title may be empty."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[int, ...] = ()


def tables(report: ReportData, gpu: str | None, ops: int) -> list[Table]:
    """All tables of a report. gpu: the card of the estimates. ops: how many rows the table of ops has.

    Raises UnsupportedError for an unknown card.
    """
    card = report.gpu(gpu)
    tables = [_overview(report), _passes_table(report)]
    if any(p.site_errors for p in report.passes.values()):
        tables.append(_sensitivity_table(report))
    if any(p.skipped for p in report.passes.values()):
        tables.append(_skips_table(report))
    if report.attention:
        tables.append(_attention_table(report, card))
    tables.append(_ops_table(report, card, ops))
    tables.append(_cards_table(report))
    for name, other in report.others.items():
        for table in (_passes_table(other), *([_attention_table(other, card)] if other.attention else [])):
            tables.append(Table(f"{table.title} of {name}", table.columns, table.rows, table.right))
    return tables


def _overview(report: ReportData) -> Table:
    rows = [
        ("model", report.model or report.module),
        ("target", f"{report.target}, {report.dtype}, {report.backend} backend"),
        ("weights", report.weights),
        ("the model itself", report.compared),
        *((f"shape {s.name}", shape_line(s)) for s in report.shapes),
        ("parameters", parameters_line(report.parameters)),
        *((f"parameters of {name}", parameters_line(other.parameters)) for name, other in report.others.items()),
        ("activations", f"{size(report.activation_bytes)} at most"),
        ("engine", engine_line(report.engine_bytes, report.predicted_bytes)),
        ("stages", ", ".join(f"{name} {duration(s)}" for name, s in report.stages.items())),
        ("built with", ", ".join(f"{k} {v}" for k, v in report.versions.items())),
        *(("warning", warning) for warning in report.warnings),
    ]
    return Table("", ("", ""), [row for row in rows if row[1]])


def _passes_table(report: ReportData) -> Table:
    rows = [
        (
            name, p.kind, str(p.sites), str(p.rewritten), str(p.sites - p.rewritten), error_text(p.error),
            error_text(p.error_output), duration(p.seconds), why_no_error(p),
        )
        for name, p in report.passes.items()
    ]  # fmt: skip
    columns = ("pass", "kind", "sites", "rewritten", "skipped", "error", "at output", "time", "no error because")
    return Table("Passes (error: relative L1 at the worst site)", columns, rows, right=(2, 3, 4, 5, 6, 7))


def _sensitivity_table(report: ReportData) -> Table:
    rows = [
        (
            name, e.site, f"{e.error['rel_l1']:.4f}", e.worst or "the first layer",
            "" if e.median is None else f"{e.median:.4f}", f"{e.budget:g}", f"{e.error['cosine']:.6f}",
            "; ".join(filter(None, (e.computed_in(report.dtype), e.why))),
        )
        for name, p in report.passes.items()
        for e in p.site_errors
    ]  # fmt: skip
    columns = ("pass", "site", "relative L1", "in", "median", "at most", "cosine", "computed in")
    return Table(sensitivity_title(report.passes), columns, rows, right=(2, 4, 5, 6))


def _skips_table(report: ReportData) -> Table:
    rows = []
    for name, p in report.passes.items():
        grouped: dict[str, list[Skip]] = {}
        for skip in p.skipped:
            grouped.setdefault(skip.reason, []).append(skip)
        for reason, skips in grouped.items():
            rows.append((name, str(sum(s.count for s in skips)), reason, some([s.site for s in skips])))
    return Table("Left alone", ("pass", "sites", "because", "where"), rows, right=(1,))


def _attention_table(report: ReportData, card: Gpu) -> Table:
    title = attention_title(report, card)
    columns = ("site", "runs", "kind", "of", "keys read", "at least", "measured", "because")
    rows = [
        (
            a.site, str(a.count), attention_kind(a), attention_size(a), keys_read(a),
            optional_duration(least_seconds(a.cost, card)), optional_duration(a.seconds), a.why,
        )
        for a in report.attention
    ]  # fmt: skip
    return Table(title, columns, rows, right=(1, 5, 6))


def _ops_table(report: ReportData, card: Gpu, shown: int) -> Table:
    title = f"Operations of one forward, and the least time they take on {with_article(card.name)}"
    columns = ("op", "where", "shapes", "runs", "FLOPs", "bytes", "time", "bound by")
    try:
        timed = sorted(((op.seconds(card), op.bound(card), op) for op in report.ops), key=lambda t: -t[0])
    except UnsupportedError as error:
        return Table(title, columns, [(str(error), *[""] * 7)])
    rows = [_op_row(op, seconds, bound) for seconds, bound, op in timed[:shown]]
    rest = timed[shown:]
    if rest:
        rows.append(_total_row(f"{len(rest)} more", [op for *_, op in rest], sum(seconds for seconds, *_ in rest)))
    rows.append(_total_row("all", report.ops, sum(seconds for seconds, *_ in timed)))
    return Table(title, columns, rows, right=(3, 4, 5, 6))


def _cards_table(report: ReportData) -> Table:
    modules = (report, *report.others.values())  # of several experts all hold their weights, and one runs
    memory = sum(m.parameter_bytes for m in modules) + max(m.activation_bytes for m in modules)
    rows = []
    for card in GPUS.values():
        lacking = sorted({kind for op in report.ops for kind in op.work if not card.has(kind)})
        time = f"no {lacking[0]}" if lacking else duration(report.seconds(card.key))
        fits = "yes" if memory <= card.memory else f"no, it has {size(card.memory)}"
        rows.append((card.name, time, fits, card.source))
    columns = ("card", "least time of a forward", "weights and activations fit", "figures from")
    return Table("Cards", columns, rows, right=(1,))


def attention_title(report: ReportData, card: Gpu) -> str:
    """The title of the table of attentions, with the cards of its times."""
    measured = f", and as measured on {with_article(report.measured_on)}" if report.measured_on else ""
    return f"Attention: what each site became, its least time on {with_article(card.name)}{measured}"


def sensitivity_title(passes: Mapping[str, PassReport]) -> str:
    """The title of the table of sites' errors, with the inputs on which they were measured."""
    measured = [f"{name} in every layer on {p.inputs}" for name, p in passes.items() if p.inputs]
    rest = [name for name, p in passes.items() if p.site_errors and not p.inputs]
    measured += [f"{', '.join(rest)} in the first layer"] if rest else []
    return f"What 8 bits do to each site ({'; '.join(measured)})"


def _op_row(op: OpCost, seconds: float, bound: str) -> tuple[str, ...]:
    where = f"{op.graph} {some([path for path in op.where if path])}".strip()
    name = op.name.removeprefix("aten.")
    counts = (str(op.count), scaled(op.flops).strip(), size(op.bytes))
    return (name, where, op.shapes, *counts, duration(seconds), bound)


def _total_row(name: str, ops: Iterable[OpCost], seconds: float) -> tuple[str, ...]:
    ops = tuple(ops)
    flops, moved = sum(op.flops for op in ops), sum(op.bytes for op in ops)
    return (name, "", "", str(sum(op.count for op in ops)), scaled(flops).strip(), size(moved), duration(seconds), "")


def rich_table(table: Table) -> RichTable:
    """The table for rich. Cells are `Text`, because rich would read a site named "[red]" in a `str` as markup."""
    title = Text(table.title, style="bold") if table.title else None
    made = RichTable(title=title, title_justify="left", show_header=any(table.columns), box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        made.add_column(Text(_plain(column)), justify="right" if i in table.right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(_plain(cell)) for cell in row))
    return made


def _plain(text: str) -> str:
    """The text without control characters, because a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
