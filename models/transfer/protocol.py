"""How methods are compared: coefficients by cross-validation, repeats with other seeds, a table for each source.

As in DTNH (section V): each regularized method, with and without DTNH, gets the coefficient that is best in
cross-validation on the training images of the target, and is then trained several times on all of them. The table is of
test images after the last step. For one target and seed all methods see the same new head and the same batches.

The runs of one table are alike in all but what makes a method, and those of one cell in all but the seed: others are
refused before anything is trained, and by :func:`collect`.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import files
from ..runs import RESULT, differences
from .configuration import PLAIN, FineTuneConfig
from .data import Target
from .trainer import Diverged, finetune, identity

RUNS, CROSS_VALIDATION = "runs", "cross-validation"
LABELS = {
    PLAIN: "Fine-tuning",
    "l2": "L2",
    "l2-sp": "L2-SP",
    "know-dist": "KnowDist",
    "delta": "DELTA",
    "attention-transfer": "AT",
}
# What a coefficient is multiplied with for the default grid of the cross-validation.
GRID = (0.01, 0.1, 1.0, 10.0)

# What makes a method, in which the columns of a table may differ.
_OF_METHODS = {
    *("method", "dtnh", "coefficient", "coefficient_decay", "regularizer", "parameters", "layers", "head"),
    *("head_decay", "scope", "anchored_only", "head_epochs", "estimate_batches"),
}
# What does not change a run's end.
_OF_LOOKS = {"eval_every", "eval_batch", "measure"}


def label(method: str, dtnh: bool = False) -> str:
    """The name of a column: ``"DTNH(L2-SP)"``."""
    name = LABELS.get(method, method)
    return f"DTNH({name})" if dtnh else name


# The columns of Tables II to IV: method and dtnh.
PAPER = ((PLAIN, False), ("l2-sp", False), ("l2-sp", True), ("know-dist", False), ("know-dist", True))
COLUMNS = tuple(label(method, dtnh) for method, dtnh in PAPER)


@dataclass(frozen=True)
class Pair:
    """A source and a target.

    Args:
        source: the name of the source, in tables and folder names.
        build: makes the model on the CPU with the source's weights and a new head from torch's generator; see
            :func:`~.trainer.finetune`.
        data: the target.
        description: what identifies model and weights, plain JSON.
    """

    source: str
    build: Callable[[], nn.Module]
    data: Target
    description: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One fine-tuning run and where its files lie."""

    pair: Pair
    config: FineTuneConfig
    folder: Path

    def __str__(self) -> str:
        what = label(self.config.name, self.config.dtnh)
        return f"{what}, {self.pair.source} → {self.pair.data.name}, seed {self.config.seed}"

    def description(self) -> dict[str, Any]:
        """What identifies the run beside target and configuration."""
        return {"source": self.pair.source, **self.pair.description}


def repeats(pair: Pair, config: FineTuneConfig, out: str | os.PathLike[str], count: int = 5) -> list[Run]:
    """The runs of ``config`` with ``count`` seeds, from ``config.seed`` on.

    Raises:
        ValueError: ``out`` has finished runs that these cannot stand in one table with.
    """
    if count < 1:
        raise ValueError(f"repeats must be at least 1, got {count}")
    place = _place(out, RUNS, pair, config)
    seeds = range(config.seed, config.seed + count)
    runs = [Run(pair, replace(config, seed=seed), place / f"seed{seed}") for seed in seeds]
    _check_alike([*(result["run"] for result in finished(out)), identity(pair.data, config, runs[0].description())])
    return runs


def perform(
    run: Run,
    *,
    device: str = "cpu",
    workers: int = 0,
    checkpoint_share: float = 0.015,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Do one run, or resume it, or read back its result; see :func:`~.trainer.finetune`.

    Raises:
        Diverged: the loss is not finite; what it came to is among the results (:func:`finished`).
    """
    return finetune(
        run.pair.build,
        run.pair.data,
        run.config,
        run.folder,
        description=run.description(),
        device=device,
        workers=workers,
        checkpoint_share=checkpoint_share,
        on_step=on_step,
    )


def grid(coefficient: float) -> tuple[float, ...]:
    """What is tried by default: powers of ten around the method's own ``coefficient``."""
    return tuple(float(f"{factor * coefficient:.6g}") for factor in GRID)


def folds(
    pair: Pair,
    config: FineTuneConfig,
    out: str | os.PathLike[str],
    coefficients: Sequence[float] | None = None,
    count: int = 5,
) -> list[Run]:
    """The runs of a cross-validation: for each coefficient (:func:`grid` by default), one on each fold.

    Raises:
        ValueError: no coefficient, the same twice, a method without one, or ``out`` has finished runs that the chosen
            one could not stand in one table with.
    """
    if config.method == PLAIN:
        raise ValueError(f"method {PLAIN!r} has no coefficient to cross-validate")
    chosen = grid(config.initial_coefficient) if coefficients is None else tuple(map(float, coefficients))
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"coefficients must be different, at least one, got {list(chosen)}")
    ours = identity(pair.data, config, {"source": pair.source, **pair.description})
    there = [result["run"] for result in finished(out)]
    _check_alike([*there, {**ours, "coefficient": None}])
    column = (pair.source, pair.data.name, config.name, config.dtnh)
    alike = [run for run in there if (run["source"], run["data"], run["method"], run["dtnh"]) == column]
    if other := sorted({run["coefficient"] for run in alike} - set(chosen)):
        got = ", ".join(f"{value:g}" for value in chosen)
        raise ValueError(
            f"coefficients: expected {other[0]:g} among them, that of finished runs of "
            f"{label(config.name, config.dtnh)} in {out}, got {got}; choose another folder, or delete those runs"
        )
    place = _place(out, CROSS_VALIDATION, pair, config)
    return [
        Run(
            replace(pair, data=pair.data.fold(fold, count), description={**pair.description, "fold": [fold, count]}),
            replace(config, coefficient=coefficient),
            place / repr(coefficient).removesuffix(".0") / f"fold{fold}of{count}",
        )
        for coefficient in chosen
        for fold in range(count)
    ]


def cross_validate(runs: Sequence[Run], do: Callable[[Run], Mapping[str, Any]]) -> float:
    """Do the ``runs`` of :func:`folds` with ``do`` (:func:`perform`, say), one after the other.

    Returns:
        The coefficient with the best mean accuracy over its folds, the smallest of equals. One with which a run
        diverges cannot be it.

    Raises:
        Diverged: that is so of every coefficient.
    """
    accuracies: dict[float, list[float]] = {}
    for run in runs:
        try:
            accuracy = do(run)["final"]["test_accuracy"]
        except Diverged:
            accuracy = -math.inf
        accuracies.setdefault(run.config.coefficient, []).append(accuracy)
    means = {coefficient: statistics.fmean(values) for coefficient, values in sorted(accuracies.items())}
    best = max(means, key=means.__getitem__)
    if means[best] < 0:
        listed = ", ".join(f"{coefficient:g}" for coefficient in means)
        raise Diverged(f"the loss is not finite with any of the coefficients {listed}; smaller ones may help")
    return best


@dataclass(frozen=True)
class Table:
    """Accuracies of the targets of one source, as in Tables II to IV.

    Args:
        source: its name.
        targets, columns: the rows and the columns, in order.
        cells: accuracy in [0, 1] by target, column and seed, ``None`` where the run diverged; a run that is not
            finished is missing.
    """

    source: str
    targets: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str, int], float | None]

    def values(self, target: str, column: str) -> list[float]:
        """The accuracy of each repeat that is finished and did not diverge."""
        return [value for value in self._cell(target, column) if value is not None]

    def diverged(self, target: str, column: str) -> int:
        """How many repeats diverged."""
        return self._cell(target, column).count(None)

    def best(self, target: str) -> tuple[str, ...]:
        """The columns with the best mean, of those in which no repeat diverged."""
        means = {
            column: statistics.fmean(values)
            for column in self.columns
            if (values := self.values(target, column)) and not self.diverged(target, column)
        }
        return tuple(column for column in means if means[column] == max(means.values()))

    def negative(self, target: str, column: str) -> bool:
        """Whether ``column`` shows negative transfer: its mean is below fine-tuning's by more than the standard error
        of the difference, √(s₁²/n₁ + s₂²/n₂). With a single repeat of either nothing can be said: no."""
        ours, theirs = self.values(target, column), self.values(target, LABELS[PLAIN])
        if min(len(ours), len(theirs)) < 2:
            return False
        error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
        return statistics.fmean(ours) < statistics.fmean(theirs) - error

    def _cell(self, target: str, column: str) -> list[float | None]:
        return [value for _, value in sorted(item for item in self.cells.items() if item[0][:2] == (target, column))]


def collect(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of finished runs, one a source; rows in order of first appearance, columns in the paper's order.

    Raises:
        ValueError: runs of one table, or of one cell, that are not alike; it is said in what.
    """
    _check_alike([result["run"] for result in results])
    columns = {result["run"]["method"]: None for result in results}
    order = [label(method, dtnh) for method in {**dict.fromkeys(LABELS), **columns} for dtnh in (False, True)]
    tables = []
    for source in dict.fromkeys(result["run"]["source"] for result in results):
        cells = {
            (run["data"], label(run["method"], run["dtnh"]), run["seed"]): final and final["test_accuracy"]
            for result in results
            if (run := result["run"])["source"] == source
            for final in [result["final"]]
        }
        present = {column for _, column, _ in cells}
        targets = tuple(dict.fromkeys(target for target, _, _ in cells))
        tables.append(Table(source, targets, tuple(column for column in order if column in present), cells))
    return tables


def _check_alike(runs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ``runs`` (:func:`~.trainer.identity`) that cannot stand in one table."""
    rows: dict[Any, Mapping[str, Any]] = {}
    cells: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        row = (run["source"], run["data"])
        column = label(run["method"], run["dtnh"])
        # a coefficient that is not known yet is like any
        free = {"coefficient"} if run["coefficient"] is None else set()
        for kept, key, ignored in ((rows, row, _OF_METHODS), (cells, (*row, column), free)):
            first = kept.setdefault(key, run)
            theirs, ours = (
                {name: value for name, value in side.items() if name not in {"seed", *_OF_LOOKS, *ignored}}
                for side in (first, run)
            )
            if theirs != ours:
                what = " and ".join(dict.fromkeys([label(first["method"], first["dtnh"]), column]))
                lines = "\n  ".join(differences(theirs, ours))
                raise ValueError(
                    f"runs of one table must be alike, those of {what}, {row[0]} → {row[1]}, are not:\n  {lines}\n"
                    "Ask for the same, choose another folder, or delete those that are there."
                )


def finished(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results of every finished repeat under ``out``, also those of other processes and of earlier.

    Raises:
        ValueError: a file that holds no result.
    """
    results = []
    for path in sorted((Path(out) / RUNS).glob(f"*/*/*/*/{RESULT}")):
        result = files.read_json(path)
        whole = isinstance(result, dict) and {"run", "history", "final"} <= result.keys()
        if not whole or not {"source", "data", "method", "dtnh", "coefficient", "seed"} <= result["run"].keys():
            raise ValueError(f"{path} holds no result of a run; delete it to train that again")
        results.append(result)
    return results


def _place(out: str | os.PathLike[str], kind: str, pair: Pair, config: FineTuneConfig) -> Path:
    names = (pair.source, pair.data.name, label(config.name, config.dtnh))
    return Path(out, kind, *("".join(c if c.isalnum() or c in "-_.()" else "_" for c in name) for name in names))
