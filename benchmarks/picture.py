"""The picture of a table: how long each candidate takes, as a multiple of the bare one.

Drawn from the JSON alone: ``python -m moe_kernels.benchmarks.picture results.json picture.png`` draws it again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_kernels.benchmarks.candidates import OURS
from moe_kernels.models import files

OURS_COLOR, PEER_COLOR, LIMIT_COLOR = "#1f5fa8", "#b9c0c7", "#b3261e"
LONGEST = 3.0
"""Bars end here; what is longer says how long."""


def _panel(axes: Any, case: Mapping[str, Any], names: list[str], unit: str) -> None:
    """One case: a bar for each candidate in ``names``, a line at the unit and one at the limit."""
    rows = {row["candidate"]: row for row in case["rows"]}
    for place, name in enumerate(names):
        row = rows.get(name)
        ratio = None if row is None else row[f"ratio_to_{unit}"]
        if row is None or ratio is None:
            axes.text(0.04, place, "–", va="center", fontsize=7, color="0.5")
            continue
        axes.barh(place, min(ratio, LONGEST), height=0.72, color=OURS_COLOR if name == OURS else PEER_COLOR)
        text = f"{ratio:.2f}" + (" ~" if row["unsteady"] else "")
        label = axes.text(min(ratio, LONGEST) + 0.06, place, text, va="center", fontsize=7, zorder=3)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(1, color="0.25", linewidth=0.8)
    if unit == "bare" and (limit := _limit(case, rows)) is not None:
        axes.axvline(limit, color=LIMIT_COLOR, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set(xlim=(0, LONGEST + 1), ylim=(len(names) - 0.4, -0.6), xticks=range(int(LONGEST) + 1))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="both", length=0, labelsize=7)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)


def _limit(case: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The limit in units of the bare candidate."""
    times = rows[case["bare"]]["ratio_to_limit"]
    return 1 / times if times else None


def _label(workload: Mapping[str, Any]) -> str:
    if "model" in workload:
        return f"{workload['model']}\n{workload['dtype']}"
    if "network" in workload:
        return f"{workload['network']}\n{workload['layout']}\n{workload['dtype']}"
    return (
        f"T={workload['tokens']} k={workload['top_k']}\n{workload['routing']}\n"
        f"d={workload['dim']} h={workload['hidden_dim']}\nE={workload['num_experts']} {workload['dtype']}"
    )


def draw(document: Mapping[str, Any], path: Path) -> bool:
    """Draw a document of ``report.document`` as PNG: a row for each workload, a column for each direction.

    Candidates without any time are left out, the table says why. Returns False, having drawn nothing, where matplotlib
    is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = {(str(case["workload"]), case["direction"]): case for case in document["cases"]}
    workloads = {str(case["workload"]): case["workload"] for case in document["cases"]}
    directions = list(dict.fromkeys(direction for _, direction in cases))
    bare = {case["bare"] for case in document["cases"]}
    timed = {row["candidate"] for case in document["cases"] for row in case["rows"] if row["median"] is not None}
    names = list(dict.fromkeys(row["candidate"] for case in document["cases"] for row in case["rows"]))
    names = [name for name in names if name in timed and name not in bare]
    machine = document["machine"]

    size = (2.9 * len(directions) + 2.6, (0.17 * len(names) + 0.35) * len(workloads) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(workloads), len(directions), squeeze=False, sharey=True)
    for (key, workload), row in zip(workloads.items(), grid, strict=True):
        for direction, axes in zip(directions, row, strict=True):
            if case := cases.get((key, direction)):
                _panel(axes, case, names, "bare" if case["bare"] else "ours")
            else:  # not measured yet
                axes.set_axis_off()
        row[0].set_ylabel(_label(workload), fontsize=8, rotation=0, ha="right", va="center")
    for direction, axes in zip(directions, grid[0], strict=True):
        unit = cases[next(iter(workloads)), direction]["bare"] or OURS
        axes.set_title(f"{direction}: time over {unit}", fontsize=8)
    figure.suptitle(
        f"{document['operator']} on {machine['accelerator'] or machine['processor']}\n"
        "dashed: physical limit; ~: unsteady",
        fontsize=9,
    )
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=160)
    return True


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    if not draw(json.loads(source.read_text()), target):
        raise SystemExit("a picture needs matplotlib: pip install matplotlib")
