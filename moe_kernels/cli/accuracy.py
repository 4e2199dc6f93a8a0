"""Tables of accuracies on the terminal, shared by ``demo`` and ``gmoe``."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first row is its head, the first column its names."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
