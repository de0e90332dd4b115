"""What commands print for people: tables drawn by rich, which obeys NO_COLOR."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 200  # of a file or a pipe


def console() -> Console:
    ours = Console(highlight=False)
    return ours if ours.is_terminal else Console(highlight=False, width=WIDTH)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> list[RenderableType]:
    """A title and a table, or "none"; a column whose name begins with > is aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))  # Text: without markup
    return [Text(f"\n{title}", "bold"), made if made.rows else Text("none", "dim")]
