"""The tables of leave-one-domain-out: as rows of text, as one sentence and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .protocol import Table, mean_and_error

MISSING = "–"


def accuracy_rows(table: Table) -> list[list[str]]:
    """Percent by model and held-out domain, "mean ± standard error" over trials; "–" where no trial is finished."""
    rows = [["model", *table.domains, "average"]]
    for model in table.models:
        cells = [table.values(model, domain) for domain in table.domains] + [table.averages(model)]
        rows.append([model, *(percent(cell) for cell in cells)])
    return rows


def trial_rows(table: Table) -> list[list[str]]:
    """The same accuracies, every trial by itself."""
    trials = sorted({trial for _, _, trial in table.cells})
    rows = [["model", "trial", *table.domains]]
    for model in table.models:
        for trial in trials:
            values = [table.cells.get((model, domain, trial)) for domain in table.domains]
            cells = [MISSING if value is None else f"{100 * value:.1f}" for value in values]
            rows.append([model, str(trial), *cells])
    return rows


def comparison(table: Table, model: str, other: str) -> str:
    """One sentence about the paired difference between two models, whichever is ahead."""
    pairs = table.paired(model, other)
    if not pairs:
        return f"No run of {model} has a counterpart of {other} yet."
    mean, error = mean_and_error([100 * pair for pair in pairs])
    counts = [sum(test(pair) for pair in pairs) for test in (lambda d: d > 0, lambda d: d < 0, lambda d: d == 0)]
    return (
        f"{model} minus {other}, paired by held-out domain and trial: {mean:+.1f} ± {error:.1f} points over "
        f"{len(pairs)} pairs; {model} is ahead in {counts[0]}, {other} in {counts[1]}, equal in {counts[2]}. "
        + (
            "The difference is less than two standard errors from zero."
            if abs(mean) < 2 * error
            else "The difference is at least two standard errors from zero."
        )
    )


def percent(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as "mean ± standard error" in percent."""
    if not values:
        return MISSING
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.1f} ± {error:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table_json(table: Table) -> dict[str, Any]:
    """The table for machines: per model and domain the accuracy of each trial, their mean and standard error."""

    def cell(values: Sequence[float]) -> dict[str, Any] | None:
        if not values:
            return None
        mean, error = mean_and_error(values)
        return {"trials": list(values), "mean": mean, "standard_error": error}

    return {
        "dataset": table.dataset,
        "selection": "training-domain validation",
        "accuracy": {
            model: {
                **{domain: cell(table.values(model, domain)) for domain in table.domains},
                "average": cell(table.averages(model)),
            }
            for model in table.models
        },
    }
