"""The page's tables: passes with what they left alone, attentions, operations, cards, stages."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from turbocompile.hardware import GPUS, Gpu
from turbocompile.ir.cost import OpCost
from turbocompile.report.data import ReportData, least_seconds
from turbocompile.report.markup import cell, counted, data_attributes, number_cell, table
from turbocompile.report.rows import PassReport, Skip
from turbocompile.report.tables import attention_title, sensitivity_title
from turbocompile.report.timings import Bench, OpTime
from turbocompile.report.words import attention_kind, attention_size, duration, keys_read, optional_duration, size

BAR = 70  # pixels of a whole forward in the table of operations
ERRORS = ("rel_l1", "cosine", "max_abs")


def pass_section(report: ReportData) -> str:
    rows = []
    for name, p in report.passes.items():
        errors = {k: p.error[k] for k in ERRORS} if p.error else {}
        output = {f"output_{k}": p.error_output[k] for k in ERRORS} if p.error_output else {}
        why = (p.error_reason or "") if p.error is None or p.error_output is None else ""
        rows.append(
            f"<tr{data_attributes({'pass': name})}>{cell(name, 'strong')}{cell(p.kind, kind_of=p.kind)}"
            f"{number_cell(str(p.sites), sites=p.sites)}{number_cell(str(p.rewritten), rewritten=p.rewritten)}"
            f"{number_cell(str(p.sites - p.rewritten), skipped=p.sites - p.rewritten)}"
            f"{number_cell(_error(p.error), **errors)}{number_cell(_error(p.error_output), **output)}"
            f"{number_cell(duration(p.seconds), seconds=p.seconds)}{cell(why, error_reason=p.error_reason)}</tr>"
        )
        rows += _skips(name, p)
    columns = ("pass", "kind", "sites#", "rewritten#", "left alone#", "error#", "at output#", "time#", "because")
    note = "Sites are counted over the whole model. Error: relative L1 at the worst site, against float64."
    if not rows:
        return '<p class="note">No pass ran.</p>'
    return table("Passes", columns, rows, note) + _sensitivity(report)


def _sensitivity(report: ReportData) -> str:
    """A table of the error that 8 bits cause at each site."""
    rows = []
    for name, p in report.passes.items():
        for e in p.site_errors:
            figures = {k: e.error[k] for k in ERRORS}
            rows.append(
                f"<tr{data_attributes({'sensitivity': e.site, 'of_pass': name})}>"
                f"{cell(name, 'strong')}{cell(e.site, 'code')}"
                f"{number_cell(_error(e.error), **figures)}{cell(e.worst)}{_median(e.median)}"
                f"{number_cell(f'{e.budget:g}', budget=e.budget)}{cell(e.computed_in(report.dtype))}{cell(e.why)}</tr>"
            )
    columns = ("pass", "site", "error#", "in", "median#", "at most#", "computed in", "because")
    note = "Relative L1 of each site on exact inputs, in its worst layer; a layer over the budget stays as it was."
    return table(sensitivity_title(report.passes), columns, rows, note) if rows else ""


def _median(value: float | None) -> str:
    return number_cell("") if value is None else number_cell(f"{value:.2g}", median=value)


def _skips(name: str, p: PassReport) -> list[str]:
    """A row for each reason why the pass left sites alone, with the names of all these sites."""
    grouped: dict[str, list[Skip]] = {}
    for skip in p.skipped:
        grouped.setdefault(skip.reason, []).append(skip)
    rows = []
    for reason, skips in grouped.items():
        count = sum(s.count for s in skips)
        sites = ", ".join(s.site for s in skips)
        rows.append(
            f'<tr class="skip"{data_attributes({"skip": name, "reason": reason, "count": count})}><td colspan="4"></td>'
            f'{number_cell(str(count))}<td colspan="4">{html.escape(reason)}: '
            f'<span class="code">{html.escape(sites)}</span></td></tr>'
        )
    return rows


def _error(error: Mapping[str, float] | None) -> str:
    return "" if error is None else f"{error['rel_l1']:.2g}"


def total_seconds(ops: Sequence[OpCost], card: Gpu) -> float | None:
    found = [s for op in ops if (s := least_seconds(op, card)) is not None]
    return sum(found) if len(found) == len(ops) else None


def attention_section(report: ReportData, card: Gpu) -> str:
    """A table with a row for each attention: its kind, the reason, how long it takes."""
    if not report.attention:
        return ""
    rows = []
    for a in report.attention:
        least = least_seconds(a.cost, card)
        rows.append(
            f"<tr{data_attributes({'attention': a.site, 'attention_kind': a.kind})}>{cell(a.site, 'code')}"
            f"{number_cell(str(a.count), count=a.count)}{cell(attention_kind(a), 'strong')}"
            f"{cell(attention_size(a))}{cell(keys_read(a))}"
            f"{number_cell(counted(a.cost.flops, 'FLOP'), flops=a.cost.flops)}"
            f"{number_cell(optional_duration(least), seconds=least)}"
            f"{number_cell(optional_duration(a.seconds), measured=a.seconds)}{cell(a.why)}</tr>"
        )
    columns = ("site", "runs#", "kind", "of", "keys read", "operations#", "at least#", "measured#", "because")
    return table(attention_title(report, card), columns, rows)


def operation_section(report: ReportData, card: Gpu, record: Bench | None) -> str:
    """A table with one row for equal operations, the slowest first: their cost on paper and their measured time."""
    times = {(t.graph, t.name, t.where, t.shapes): t for t in record.ops} if record is not None else {}
    found = [(op, least_seconds(op, card), times.get((op.graph, op.name, op.where, op.shapes))) for op in report.ops]
    spent = [(time.seconds if time else 0.0) if record is not None else least or 0.0 for _, least, time in found]
    whole = sum(spent)
    order = sorted(range(len(found)), key=lambda i: -spent[i])
    rows = [_op(*found[i], card, record, whole) for i in order]
    count, flops, moved = (sum(getattr(op, k) for op in report.ops) for k in ("count", "flops", "bytes"))
    least = total_seconds(report.ops, card)
    total = [
        number_cell(str(count), count=count),
        number_cell(counted(flops, "FLOP"), flops=flops),
        number_cell(size(moved), bytes=moved),
        number_cell(duration(least) if least is not None else "", seconds=least),
        cell(""),
    ]
    columns = ["op", "where", "shapes", "runs#", "operations#", "bytes#", f"at least, {card.name}#", "bound by"]
    note = "For one forward. At least: the card's full rate for arithmetic and memory, whichever takes longer. "
    if record is not None:
        columns.append(f"measured, {record.device}#")
        total.append(number_cell(duration(whole), measured=whole))
        note += (
            f"Measured: each alone, on {record.device}, by turbocompile bench; the forward took "
            f"{duration(record.seconds)}."
        )
    else:
        note += "Nothing was measured on this machine: turbocompile bench does it."
    if _on_card(record):
        columns.append("of the rate#")
        total.append(cell(""))
    rows.append(f'<tr class="total" data-total="ops"><td colspan="3">all</td>{"".join(total)}{cell("")}</tr>')
    columns.append("of all measured" if record is not None else "of all")
    return table("Operations", columns, rows, note)


def _on_card(record: Bench | None) -> bool:
    """Whether the record was measured on a card whose rates are known."""
    return record is not None and any(t.floor is not None for t in record.ops)


def _op(op: OpCost, least: float | None, time: OpTime | None, card: Gpu, record: Bench | None, whole: float) -> str:
    where = f"{op.graph} {', '.join(path for path in op.where if path)}".strip()
    data = {"op": op.name, "graph": op.graph, "where": " ".join(op.where), "shapes": op.shapes}
    bound = op.bound(card) if least is not None else f"no such arithmetic on {card.name}"
    cells = [
        f'<td class="op">{html.escape(op.name.rpartition(".")[2]).replace("_", "_<wbr>")}</td>',
        cell(where, "where"),
        cell(op.shapes, "shapes"),
        number_cell(str(op.count), count=op.count),
        number_cell(counted(op.flops, "FLOP"), flops=op.flops),
        number_cell(size(op.bytes), bytes=op.bytes),
        number_cell(duration(least) if least is not None else "", seconds=least),
        cell(bound, bound=bound),
    ]
    part = least or 0.0
    if record is not None:  # an op without a time was folded into a constant when the engine was loaded
        part = time.seconds if time is not None else 0.0
        cells.append(number_cell(duration(part) if time else "at load", measured=part if time else None))
    if _on_card(record):
        floor = time.floor if time is not None else None
        cells.append(number_cell(f"{floor / part:.0%}" if floor is not None and part else "", floor=floor))
    cells.append(f'<td class="share">{_bar(part / whole if whole else 0.0)}</td>')
    return f"<tr{data_attributes(data)}>{''.join(cells)}</tr>"


def _bar(share: float) -> str:
    width = BAR * min(share, 1.0)
    return (
        f'<svg class="bar" width="{BAR + 40}" height="14" role="img" aria-label="{share:.1%}">'
        f'<rect width="{width:.1f}" height="10" y="2" rx="2"/><text x="{width + 4:.1f}" y="11">{share:.1%}</text></svg>'
    )


def card_section(report: ReportData) -> str:
    modules = (report, *report.others.values())  # of several experts all hold their weights, and one runs
    memory = sum(m.parameter_bytes for m in modules) + max(m.activation_bytes for m in modules)
    rows = []
    for card in GPUS.values():
        least = total_seconds(report.ops, card)
        rows.append(
            f"<tr{data_attributes({'card': card.key})}>{cell(card.name, 'strong')}"
            f"{number_cell(duration(least) if least is not None else 'lacks the arithmetic', seconds=least)}"
            f"{number_cell(size(card.memory))}{cell('yes' if memory <= card.memory else 'no')}{cell(card.source)}</tr>"
        )
    columns = ("card", "least time of a forward#", "memory#", "weights and activations fit", "figures from")
    return table("Cards", columns, rows)


def stage_section(report: ReportData) -> str:
    rows = [
        f"<tr{data_attributes({'stage': name})}>{cell(name)}{number_cell(duration(s), seconds=s)}</tr>"
        for name, s in report.stages.items()
    ]
    return table("The build", ("stage", "time#"), rows) if rows else ""
