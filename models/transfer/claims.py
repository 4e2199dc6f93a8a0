"""What DTNH's paper claims (section V), checked on results: each claim comes out as it does, with the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .configuration import PLAIN
from .protocol import Table, label

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Fields:
        text: what the paper says.
        holds: ``None`` where there was no case to see it in.
        numbers: what that was read from.
    """

    text: str
    holds: bool | None
    numbers: str


def rows(claims: Sequence[Claim]) -> list[list[str]]:
    """A table of the claims, its first row the head."""
    verdicts = {True: "holds", False: "does not hold here", None: "no such case here"}
    return [["claim", "here", "numbers"], *([claim.text, verdicts[claim.holds], claim.numbers] for claim in claims)]


def never_hurts(text: str, tables: Sequence[Table], method: str) -> Claim:
    """Where ``method`` shows negative transfer (:meth:`~.protocol.Table.negative`), the same with DTNH does not."""
    columns = [label(PLAIN), label(method), label(method, True)]
    hurt = [(table, target) for table in tables for target in table.targets if table.negative(target, columns[1])]
    if not hurt:
        return Claim(text, None, f"{columns[1]} is nowhere below {columns[0]}")
    cells = []
    for table, target in hurt:
        means = (f"{column} {100 * statistics.fmean(table.values(target, column)):.1f}" for column in columns)
        cells.append(f"{table.source} → {target}: {', '.join(means)}")
    saved = sum(not table.negative(target, columns[2]) for table, target in hurt)
    numbers = f"{columns[1]} hurts in {len(hurt)} pairs, {columns[2]} not in {saved} of them. {'; '.join(cells)}"
    return Claim(text, saved == len(hurt), numbers)


def not_below_base(text: str, tables: Sequence[Table], methods: Sequence[str]) -> Claim:
    """In every cell the mean accuracy with DTNH is at least that of the method alone."""
    gains = {
        f"{label(method, True)}, {table.source} → {target}": 100
        * (
            statistics.fmean(table.values(target, label(method, True)))
            - statistics.fmean(table.values(target, label(method)))
        )
        for method in methods
        for table in tables
        for target in table.targets
    }
    below = [f"{name}: {gain:+.2f}" for name, gain in gains.items() if gain < 0]
    numbers = (
        f"not below in {len(gains) - len(below)} of {len(gains)} cells; on average "
        f"{statistics.fmean(gains.values()):+.2f} points, {min(gains.values()):+.2f} to {max(gains.values()):+.2f}"
    )
    return Claim(text, not below, numbers + (f". Below: {'; '.join(below)}" if below else ""))


def throughout(
    text: str, results: Results, method: str, key: str, test: Callable[[float, float], bool], unit: str = ""
) -> Claim:
    """At every stage of training (entry of the histories) ``test(with DTNH, without)`` is true of the means over seeds.

    Args:
        results: runs of ``method`` with and without DTNH, with the same coefficient.
        key: of an entry of a history.
    """
    failed, sides, count = [], ([], []), 0  # type: tuple[list[str], tuple[list[float], list[float]], int]
    for pair, plain, dtnh in _stages(results, method, key):
        wrong = [str(step) for step in plain if not test(dtnh[step], plain[step])]
        count += len(plain)
        if wrong:
            failed.append(f"{pair}: {len(wrong)} of {len(plain)} (after {', '.join(wrong)} steps)")
        for side, values in zip(sides, (dtnh, plain), strict=True):
            side.extend(values.values())
    if not count:
        raise ValueError(f"results must have runs of {label(method)} with and without DTNH, with {key}")
    ours, theirs = (f"{statistics.fmean(side):.3g}{unit}" for side in sides)
    numbers = f"on average {label(method, True)} {ours}, {label(method)} {theirs}"
    return Claim(text, not failed, numbers + (f". Not so in {'; '.join(failed)}" if failed else ""))


def _stages(results: Results, method: str, key: str) -> Iterator[tuple[str, dict[int, float], dict[int, float]]]:
    """Of each source and target, the mean over seeds of ``key`` by step, without and with DTNH."""
    values: dict[str, dict[bool, dict[int, list[float]]]] = {}
    for result in results:
        run = result["run"]
        if run["method"] == method:
            sides = values.setdefault(f"{run['source']} → {run['data']}", {False: {}, True: {}})
            for entry in result["history"]:
                if entry[key] is not None:
                    sides[run["dtnh"]].setdefault(entry["step"], []).append(entry[key])
    for pair, sides in values.items():
        plain, dtnh = ({step: statistics.fmean(found) for step, found in sides[side].items()} for side in (False, True))
        if plain.keys() != dtnh.keys():
            raise ValueError(f"results of {pair} must be of the same steps with and without DTNH")
        yield pair, plain, dtnh
