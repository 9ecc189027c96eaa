"""The report of a build, which shows itself in a terminal (rich), in a notebook and as a page (`to_html`).

No text of a report is shown as markup, because reports are read from engine folders that anyone may have made.
"""

from __future__ import annotations

import io

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from turbocompile.report.data import ReportData
from turbocompile.report.page import notebook, page
from turbocompile.report.tables import rich_table, tables

SHOWN_OPS = 15  # rows of the table of ops; one more row sums up the rest


class Report(ReportData):
    """The data of a report, and the ways to show it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()

    def render(self, gpu: str | None = None, ops: int = SHOWN_OPS) -> RenderableType:
        """The report for a terminal. gpu: the card of the estimates. ops: how many rows the table of ops has.

        Raises UnsupportedError for an unknown card.
        """
        parts: list[RenderableType] = []
        for table in tables(self, gpu, ops):
            parts += [rich_table(table), Text()]
        return Group(*parts[:-1])

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self.render())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        return notebook(self)

    def to_html(self, gpu: str | None = None) -> str:
        """One self-contained page of HTML, with every text escaped. gpu: the card of the estimates."""
        return page(self, None, gpu=gpu)
