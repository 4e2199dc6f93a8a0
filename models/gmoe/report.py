"""What a study found, as Markdown, as one HTML page and as JSON."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from .protocol import Table, mean_and_error

MISSING = "–"


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then paragraphs, then a table (its first row the head), then a picture's file."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    picture: str | None = None


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


def write(folder: str | os.PathLike[str], title: str, sections: Iterable[Section]) -> None:
    """Write ``report.md`` and ``report.html`` into ``folder``; the HTML holds its pictures, the Markdown names them."""
    sections = list(sections)
    files.write_text(Path(folder) / "report.md", markdown(title, sections))
    files.write_text(Path(folder) / "report.html", page(title, sections, Path(folder)))


def markdown(title: str, sections: Iterable[Section]) -> str:
    """The report as Markdown."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.heading}")
        blocks += section.paragraphs
        if section.table:
            head, *body = (["" if cell is None else cell.replace("|", "\\|") for cell in row] for row in section.table)
            rule = ["---", *["---:"] * (len(head) - 1)]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body)))
        if section.picture:
            blocks.append(f"![{section.heading}]({section.picture})")
    return "\n\n".join(blocks) + "\n"


_STYLE = """ body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0
1rem; color: #222; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; } th:first-child,
td:first-child { text-align: left; } img { max-width: 100%; }
"""


def page(title: str, sections: Iterable[Section], folder: Path) -> str:
    """The report as one HTML page that needs no other file; pictures are read from ``folder``."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
        if section.table:
            rows = [
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in zip(["th", *["td"] * len(section.table)], section.table, strict=False)
            ]
            parts.append("<table>\n" + "\n".join(rows) + "\n</table>")
        if section.picture:
            data = base64.b64encode((folder / section.picture).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
