"""What was measured, as JSON with all that is needed to judge it, as tables, and as a picture that the JSON gives."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_kernels.benchmarks import picture
from moe_kernels.benchmarks.candidates import OURS
from moe_kernels.benchmarks.harness import ERROR_FACTOR, SLOW_FACTOR, SLOW_ROUNDS, UNSTEADY, Result, Row
from moe_kernels.models import files

SCHEMA = 2
MISSING = "–"


def _number(value: float | None, pattern: str) -> str:
    return MISSING if value is None else format(value, pattern)


def _milliseconds(seconds: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if not seconds:
        return MISSING
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _megabytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e6:.1f}"


def title(result: Result) -> str:
    """The workload and the direction of a case."""
    return f"{result.workload}, {result.direction}"


def limit(result: Result) -> str:
    """The physical limit of a case, and what it is made of."""
    work, rates = result.work, result.rates
    return (
        f"Limit {_milliseconds(result.limit_seconds)} ms: {work.flops / 1e9:.3g} GFLOP at {rates.flops / 1e9:.3g} "
        f"GFLOP/s, {work.bytes / 1e6:.3g} MB at {rates.bytes / 1e9:.3g} GB/s."
    )


def case_rows(result: Result) -> list[list[str]]:
    """One case as a table, a row for each candidate, the head first; columns without an entry are left out."""

    def cells(row: Row) -> list[str]:
        quartiles = MISSING if row.quartiles is None else "–".join(map(_milliseconds, row.quartiles))
        ratios = [_number(ratio, ".2f") for ratio in (row.ratio_to_ours, row.ratio_to_bare, row.ratio_to_limit)]
        errors = [_number(error, ".1e") for error in (row.forward_error, row.gradient_error)]
        note = "; ".join(filter(None, (row.note, *row.remarks)))
        return [
            row.candidate,
            _milliseconds(row.median),
            quartiles,
            *ratios,
            _megabytes(row.peak_bytes),
            *errors,
            note,
        ]

    head = ["", "ms", "quartiles", "× ours", "× bare", "× limit", "MB", "error", "gradient", "note"]
    columns = list(zip(head, *map(cells, result.rows), strict=True))
    kept = [column for column in columns if set(column[1:]) - {"", MISSING}]
    return [list(line) for line in zip(*kept, strict=True)]


def summary_rows(results: Sequence[Result]) -> list[list[str]]:
    """All cases of an operator, one line each."""
    table = [["", "ours, ms", "× bare", "× limit", "fastest peer", "its × ours", "unsteady"]]
    for result in results:
        ours, peer = result.row(OURS), result.fastest_peer()
        table.append(
            [
                title(result),
                _milliseconds(ours.median),
                _number(ours.ratio_to_bare, ".2f"),
                _number(ours.ratio_to_limit, ".2f"),
                MISSING if peer is None else peer.candidate,
                MISSING if peer is None else _number(peer.ratio_to_ours, ".2f"),
                str(sum(row.unsteady for row in result.rows)),
            ]
        )
    return table


def conclusion(results: Sequence[Result]) -> str:
    """In how many cases ours was ahead, and by how much; and how far the machine was quiet."""
    peers = [result.fastest_peer() for result in results]
    ratios = [peer.ratio_to_ours for peer in peers if peer is not None and peer.ratio_to_ours is not None]
    if not ratios:
        return "No case could be compared."
    ahead = sum(ratio > 1 for ratio in ratios)
    timed = [row for result in results for row in result.rows if row.median is not None]
    disturbed = sum(row.unsteady for row in timed)
    return (
        f"Ours was ahead of the fastest peer in {ahead} of {len(ratios)} cases; that peer took {min(ratios):.2f} to "
        f"{max(ratios):.2f} times as long, median {statistics.median(ratios):.2f}. "
        + (f"Unsteady: {disturbed} of {len(timed)} times." if disturbed else "All times were steady.")
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--", *["--:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (rows[0], rule, *rows[1:])]


def markdown(operator: str, results: Sequence[Result], environment: Mapping[str, Any], image: str | None) -> str:
    """The page of one operator, with ``image`` on it where there is one."""
    machine = environment["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"# {operator}, {machine['device']}",
        "",
        f"`{environment['command']}`, {environment['date']}, commit {environment['commit'] or 'unknown'}.",
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores, ISA {machine['isa']}"
        + (f"; {machine['accelerator']}." if machine["accelerator"] else "."),
        f"{versions}; ours runs on the {environment['backend']} backend.",
        "",
        f"{environment['rounds']} interleaved rounds by {environment['stopwatch']} time; times are medians with "
        "quartiles, ratios are medians of the ratios within a round. Bare: the row of that name, the operator's matrix "
        "products or copies alone, or the step without projection. Limit: the larger of FLOPs over the rate of a large "
        "product and compulsory bytes over the rate of a large copy, both measured in every round. MB: peak memory of "
        "a call beyond inputs, parameters and gradients. Errors are relative to float64 (Frobenius norm), of the worst "
        f"output and worst gradient; a candidate beyond {ERROR_FACTOR:.0f} times plain PyTorch's error plus one eps "
        f"gets no speed. One that takes more than {SLOW_FACTOR:.0f} times as long as ours has {SLOW_ROUNDS} rounds. "
        f"Unsteady: the medians of the first and the second half of the rounds differ by more than {UNSTEADY:.0%}.",
        "",
        conclusion(results),
        "",
        *([f"![Times by candidate]({image})", ""] if image else []),
        *_markdown_table(summary_rows(results)),
    ]
    for result in results:
        lines += ["", f"## {title(result)}", "", limit(result), "", *_markdown_table(case_rows(result))]
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
    """Write ``<operator>-<device>-<date>`` as .json, .md and, where matplotlib is, .png; returns the paths."""
    device = environment["machine"]["device"]
    kind = f"{device}-quick" if environment["quick"] else device
    stem = folder / f"{operator}-{kind}-{datetime.fromisoformat(environment['date']):%Y-%m-%d-%H%M%S}"
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    found = document(operator, results, environment)
    files.write_json(paths[0], found)
    drawn = picture.draw(json.loads(paths[0].read_text()), paths[2])
    files.write_text(paths[1], markdown(operator, results, environment, paths[2].name if drawn else None))
    return paths if drawn else paths[:2]
