"""The report of a comparison: tables, coefficients and curves of all finished runs, as Markdown, HTML, PNG and JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, report
from . import pictures, tables
from .protocol import Table, collect, label

Results = Sequence[Mapping[str, Any]]


def write(
    out: str | os.PathLike[str], title: str, results: Results, more: Iterable[report.Section] = ()
) -> list[Table]:
    """Write ``report.md``, ``report.html``, ``results.json`` and the pictures of ``results`` into ``out``.

    Args:
        more: sections that stand between the tables and the curves.

    Returns:
        The tables, one a source.
    """
    found = collect(results)
    files.write_json(
        Path(out) / "results.json", {"tables": [tables.to_json(table) for table in found], "runs": results}
    )
    sections = [
        *(report.Section(f"Source {table.source}", [tables.CAPTION], tables.rows(table)) for table in found),
        report.Section("Coefficients", ["λ in the objective J + λΩ."], _coefficients(results)),
        *more,
        *_curves(Path(out), [result for result in results if result["final"] is not None]),
    ]
    report.write(out, title, sections)
    return found


def _coefficients(results: Results) -> list[list[str]]:
    chosen: dict[tuple[str, str, str], list[str]] = {}
    for run in (result["run"] for result in results):
        column = label(run["method"], run["dtnh"])
        values = chosen.setdefault((run["source"], run["data"], column), [])
        if (text := f"{run['coefficient']:g}") not in values:
            values.append(text)
    return [["source", "target", "method", "λ"], *([*names, ", ".join(values)] for names, values in chosen.items())]


def _curves(out: Path, results: Results) -> Iterable[report.Section]:
    """Figures 3 to 5 of each pair of a plain method and the same with DTNH."""
    groups: dict[tuple[str, str, str], dict[bool, list[Mapping[str, Any]]]] = {}
    for result in results:
        run = result["run"]
        sides = groups.setdefault((run["source"], run["data"], run["method"]), {False: [], True: []})
        sides[run["dtnh"]].append(result)
    for (source, target, method), sides in groups.items():
        plain, dtnh = (_comparable(sides[side]) for side in (False, True))
        if not plain or not dtnh:
            continue
        name = "".join(c if c.isalnum() else "-" for c in f"{source}-{target}-{method}")
        heading = f"{label(method)} and {label(method, True)}, {source} → {target}"
        coefficients = [side[0]["run"]["coefficient"] for side in (plain, dtnh)]
        of_each = f"λ is {coefficients[0]:g} of {label(method)} and {coefficients[1]:g} of {label(method, True)}"
        if coefficients[0] != coefficients[1]:
            of_each += ": what is seen is the effect of both, the projection and the other coefficient"
        pictures.plot_losses(plain, dtnh, out / f"{name}-losses.png")
        yield report.Section(
            f"Empirical loss and test loss: {heading}",
            ["The empirical loss is the data term of the training loss, as in Figure 3 of the paper.", f"{of_each}."],
            picture=f"{name}-losses.png",
        )
        for what, plot, assumption in (
            ("loss", pictures.plot_angles_to_loss, "Assumption 1, Figure 4: angle 1 below angle 3."),
            ("regularizer", pictures.plot_angles_to_regularizer, "Assumption 2, Figure 5: angle 2 near angle 4."),
        ):
            if not all(_measured(side, f"angle_to_{what}") for side in (plain, dtnh)):
                continue
            plot(plain, dtnh, out / f"{name}-angles-to-{what}.png")
            yield report.Section(
                f"Angle to the {what}'s gradient: {heading}",
                [assumption, f"{of_each}."],
                picture=f"{name}-angles-to-{what}.png",
            )


def _measured(results: Results, fact: str) -> bool:
    return any(entry[fact] is not None for result in results for entry in result["history"])


def _comparable(results: Results) -> Results:
    """Those that were looked at after the same steps as the first."""
    return [
        result
        for result in results
        if [entry["step"] for entry in result["history"]] == [entry["step"] for entry in results[0]["history"]]
    ]
