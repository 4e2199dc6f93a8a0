"""The tables of a comparison, as rows of text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .protocol import Table

MISSING = "–"
NEGATIVE = "▼"
CAPTION = (
    "Accuracy in percent, mean ± standard deviation over repeats with different seeds; the best of a row is bold. "
    f"{NEGATIVE}: negative transfer, below fine-tuning by more than the standard error of the difference."
)


def rows(table: Table) -> list[list[str]]:
    """In the form of Tables II to IV: a row for each target, a column for each method."""
    head = ["target", *table.columns]
    return [head, *([target, *(_cell(table, target, column) for column in table.columns)] for target in table.targets)]


def percent(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as "mean ± standard deviation" in percent; of one value the mean alone."""
    if not values:
        return MISSING
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _cell(table: Table, target: str, column: str) -> str:
    values, lost = table.values(target, column), table.diverged(target, column)
    if lost:
        return f"{percent(values)}, {lost} of {lost + len(values)} diverged" if values else "diverged"
    text = percent(values)
    if column in table.best(target):
        text = f"**{text}**"
    return f"{text} {NEGATIVE}" if table.negative(target, column) else text


def to_json(table: Table) -> dict[str, Any]:
    """The table for machines: by target and column the accuracy of each repeat, their mean and standard deviation, and
    how many repeats diverged."""

    def cell(target: str, column: str) -> dict[str, Any] | None:
        values, lost = table.values(target, column), table.diverged(target, column)
        if not values and not lost:
            return None
        return {
            "repeats": values,
            "diverged": lost,
            "mean": statistics.fmean(values) if values else None,
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "negative_transfer": table.negative(target, column),
            "best": column in table.best(target),
        }

    return {
        "source": table.source,
        "accuracy": {target: {column: cell(target, column) for column in table.columns} for target in table.targets},
    }
