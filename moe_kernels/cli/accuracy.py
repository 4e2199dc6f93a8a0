"""Tables of accuracies on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first row is its head, the first column its names; what stands between ``**`` is bold."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*(Text(cell.strip("*"), "bold" if cell.startswith("**") else "") for cell in row))
    Console().print(table)
