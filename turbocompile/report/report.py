"""The report of a build, which shows itself in a terminal (rich), in a notebook and as a page (`to_html`).

Nothing in it is shown as markup, because it is read from engine folders that anyone may have made.
"""

from __future__ import annotations

import io

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from turbocompile.report.data import ReportData
from turbocompile.report.page import notebook, page
from turbocompile.report.tables import rich_table, tables

SHOWN_OPS = 15  # rows of the table of ops; the rest is summed up in one


class Report(ReportData):
    """What was built, and how it shows."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render()

    def render(self, gpu: str | None = None, ops: int = SHOWN_OPS) -> RenderableType:
        """For a terminal. gpu: the card of the estimates. ops: how many rows of them. Raises UnsupportedError."""
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
        """A page that needs nothing else, with every text escaped. gpu: the card of the estimates."""
        return page(self, None, gpu=gpu)
