"""Pieces of HTML: escaped cells with their numbers as data-* attributes, and tables of them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turbocompile.report.words import size


def data_attributes(values: Mapping[str, Any]) -> str:
    """HTML attributes data-<name>="<value>"; values that are None are left out."""
    return "".join(f' data-{k.replace("_", "-")}="{html.escape(str(v))}"' for k, v in values.items() if v is not None)


def cell(text: str, kind: str = "", **data: Any) -> str:
    """A cell of a table, with `text` escaped. kind: its CSS class. data: its data-* attributes."""
    return f"<td{f' class={kind}' if kind else ''}{data_attributes(data)}>{html.escape(text)}</td>"


def number_cell(text: str, **data: Any) -> str:
    return cell(text, "number", **data)


def table(caption: str, columns: Sequence[str], rows: Iterable[str], note: str = "") -> str:
    """A table. columns: names; a column of numbers has a name that ends in "#", and is aligned right. rows: HTML."""
    head = "".join(
        f'<th scope="col"{" class=number" if c.endswith("#") else ""}>{html.escape(c.rstrip("#"))}</th>'
        for c in columns
    )
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<h3>{html.escape(caption)}</h3>{said}\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{chr(10).join(rows)}\n</tbody></table></div>\n"
    )


def counted(n: float, unit: str) -> str:
    return size(n).removesuffix("B") + unit
