"""What was measured, as JSON with all that is needed to judge it, and as tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_kernels.benchmarks.harness import ERROR_FACTOR, OURS, Result, Row
from moe_kernels.models import files

SCHEMA = 1
MISSING = "–"


def _number(value: float | None, pattern: str) -> str:
    return MISSING if value is None else format(value, pattern)


def _milliseconds(seconds: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if not seconds:
        return MISSING
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def heading(operator: str, results: Sequence[Result]) -> str:
    """The operator and the sizes that its cases share."""
    return f"{operator}, {'; '.join(sorted({result.workload.sizes for result in results}))}"


def title(result: Result) -> str:
    """The workload and the direction of a case."""
    return f"{result.workload}, {result.direction}"


def case_rows(result: Result) -> list[list[str]]:
    """One case as a table, a row for each candidate; the first row is the head."""

    def cells(row: Row) -> list[str]:
        quartiles = MISSING if row.quartiles is None else "–".join(map(_milliseconds, row.quartiles))
        ratios = [_number(ratio, ".2f") for ratio in (row.ratio_to_ours, row.ratio_to_limit)]
        errors = [_number(error, ".1e") for error in (row.forward_error, row.gradient_error)]
        return [row.candidate, _milliseconds(row.median), quartiles, *ratios, *errors, row.note]

    table = [["", "ms", "quartiles", "× ours", "× limit", "error", "gradient", "note"]]
    table += [cells(row) for row in result.rows]
    return table if any(row.note for row in result.rows) else [line[:-1] for line in table]


def summary_rows(results: Sequence[Result]) -> list[list[str]]:
    """All cases of an operator, one line each."""
    table = [["", "ours, ms", "× limit", "fastest peer", "its × ours"]]
    for result in results:
        ours, peer = result.row(OURS), result.fastest_peer()
        table.append(
            [
                title(result),
                _milliseconds(ours.median),
                _number(ours.ratio_to_limit, ".2f"),
                MISSING if peer is None else peer.candidate,
                MISSING if peer is None else _number(peer.ratio_to_ours, ".2f"),
            ]
        )
    return table


def conclusion(results: Sequence[Result]) -> str:
    """One sentence: in how many cases ours was ahead, and by how much."""
    peers = [result.fastest_peer() for result in results]
    ratios = [peer.ratio_to_ours for peer in peers if peer is not None and peer.ratio_to_ours is not None]
    if not ratios:
        return "No case could be compared."
    ahead = sum(ratio > 1 for ratio in ratios)
    return (
        f"Ours was ahead of the fastest peer in {ahead} of {len(ratios)} cases; that peer took {min(ratios):.2f} to "
        f"{max(ratios):.2f} times as long, median {statistics.median(ratios):.2f}."
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--", *["--:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (rows[0], rule, *rows[1:])]


def markdown(operator: str, results: Sequence[Result], environment: Mapping[str, Any]) -> str:
    """The page of one operator."""
    machine = environment["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"# {heading(operator, results)}, {machine['device']}",
        "",
        f"`{environment['command']}`, {environment['date']}, commit {environment['commit'] or 'unknown'}.",
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, ISA {machine['isa']}"
        + (f"; {machine['accelerator']}." if machine["accelerator"] else "."),
        f"{versions}; ours runs on the {environment['backend']} backend.",
        "",
        f"{environment['rounds']} interleaved rounds; times are medians with quartiles, ratios are medians of the "
        "ratios within a round, the limit is the row called bare. Errors are relative to float64 (Frobenius norm), of "
        f"the worst output and the worst gradient; a candidate beyond {ERROR_FACTOR:.0f} times plain PyTorch's error "
        "plus one eps gets no speed.",
        "",
        conclusion(results),
        "",
        *_markdown_table(summary_rows(results)),
    ]
    for result in results:
        lines += ["", f"## {title(result)}", "", *_markdown_table(case_rows(result))]
    return "\n".join(lines) + "\n"


def document(operator: str, results: Sequence[Result], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The same for machines, every single time in it."""
    return {
        "schema": SCHEMA,
        "operator": operator,
        **environment,
        "cases": [dataclasses.asdict(result) for result in results],
    }


def save(folder: Path, operator: str, results: Sequence[Result], environment: Mapping[str, Any]) -> list[Path]:
    """Write ``<operator>-<device>-<date>`` as .json and .md; returns the two paths."""
    device = environment["machine"]["device"]
    kind = f"{device}-quick" if environment["quick"] else device
    stem = f"{operator}-{kind}-{datetime.fromisoformat(environment['date']):%Y-%m-%d-%H%M%S}"
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    files.write_json(paths[0], document(operator, results, environment))
    files.write_text(paths[1], markdown(operator, results, environment))
    return paths
