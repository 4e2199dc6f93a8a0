"""How methods are compared: coefficients by cross-validation, repeats with other seeds, a table for each source.

As in DTNH (section V): each regularized method, with and without DTNH, gets the coefficient that is best in
cross-validation on the training images of the target, and is then trained several times on all of them. The table is of
test images after the last step. For one target and seed all methods see the same new head and the same batches.
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
from ..runs import RESULT
from .configuration import COEFFICIENTS, PLAIN, FineTuneConfig
from .data import Target
from .trainer import Diverged, finetune

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


def label(method: str, dtnh: bool = False) -> str:
    """The name of a column: ``"DTNH(L2-SP)"``."""
    return f"DTNH({LABELS[method]})" if dtnh else LABELS[method]


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
        what = label(self.config.method, self.config.dtnh)
        return f"{what}, {self.pair.source} → {self.pair.data.name}, seed {self.config.seed}"


def repeats(pair: Pair, config: FineTuneConfig, out: str | os.PathLike[str], count: int = 5) -> list[Run]:
    """The runs of ``config`` with ``count`` seeds, from ``config.seed`` on."""
    if count < 1:
        raise ValueError(f"repeats must be at least 1, got {count}")
    place = _place(out, RUNS, pair, config)
    seeds = range(config.seed, config.seed + count)
    return [Run(pair, replace(config, seed=seed), place / f"seed{seed}") for seed in seeds]


def perform(
    run: Run,
    *,
    device: str = "cpu",
    workers: int = 0,
    checkpoint_share: float = 0.015,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Do one run, or resume it, or read back its result; see :func:`~.trainer.finetune`."""
    return finetune(
        run.pair.build,
        run.pair.data,
        run.config,
        run.folder,
        description={"source": run.pair.source, **run.pair.description},
        device=device,
        workers=workers,
        checkpoint_share=checkpoint_share,
        on_step=on_step,
    )


def grid(method: str) -> tuple[float, ...]:
    """The coefficients that are tried by default: powers of ten around COEFFICIENTS[method]."""
    return tuple(float(f"{factor * COEFFICIENTS[method]:.6g}") for factor in GRID)


def folds(
    pair: Pair,
    config: FineTuneConfig,
    out: str | os.PathLike[str],
    coefficients: Sequence[float] | None = None,
    count: int = 5,
) -> list[Run]:
    """The runs of a cross-validation: for each coefficient (:func:`grid` by default), one on each fold.

    Raises:
        ValueError: no coefficient, the same twice, or a method without one.
    """
    chosen = grid(config.method) if coefficients is None else tuple(coefficients)
    if config.method == PLAIN:
        raise ValueError(f"method {PLAIN!r} has no coefficient to cross-validate")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"coefficients must be different, at least one, got {list(chosen)}")
    place = _place(out, CROSS_VALIDATION, pair, config)
    return [
        Run(
            replace(pair, data=pair.data.fold(fold, count), description={**pair.description, "fold": [fold, count]}),
            replace(config, coefficient=coefficient),
            place / f"{coefficient:g}" / f"fold{fold}of{count}",
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
        cells: accuracy in [0, 1] by target, column and seed; a run that is not finished is missing.
    """

    source: str
    targets: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str, int], float]

    def values(self, target: str, column: str) -> list[float]:
        """The accuracy of each finished repeat."""
        return [value for key, value in sorted(self.cells.items()) if key[:2] == (target, column)]

    def best(self, target: str) -> tuple[str, ...]:
        """The columns with the best mean."""
        means = {column: statistics.fmean(values) for column in self.columns if (values := self.values(target, column))}
        return tuple(column for column in means if means[column] == max(means.values()))

    def negative(self, target: str, column: str) -> bool:
        """Whether ``column`` shows negative transfer: its mean is below fine-tuning's by more than the standard error
        of the difference, √(s₁²/n₁ + s₂²/n₂). With a single repeat of either nothing can be said: no."""
        ours, theirs = self.values(target, column), self.values(target, LABELS[PLAIN])
        if min(len(ours), len(theirs)) < 2:
            return False
        error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
        return statistics.fmean(ours) < statistics.fmean(theirs) - error


def collect(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of finished runs, one a source; rows in order of first appearance, columns in the paper's order."""
    order = [label(method, dtnh) for method in LABELS for dtnh in (False, True)]
    tables = []
    for source in dict.fromkeys(result["run"]["source"] for result in results):
        cells = {
            (run["data"], label(run["method"], run["dtnh"]), run["seed"]): result["final"]["test_accuracy"]
            for result in results
            if (run := result["run"])["source"] == source
        }
        present = {column for _, column, _ in cells}
        targets = tuple(dict.fromkeys(target for target, _, _ in cells))
        tables.append(Table(source, targets, tuple(column for column in order if column in present), cells))
    return tables


def finished(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results of every finished repeat under ``out``, also those of other processes and of earlier."""
    return [files.read_json(path) for path in sorted((Path(out) / RUNS).glob(f"*/*/*/*/{RESULT}"))]


def _place(out: str | os.PathLike[str], kind: str, pair: Pair, config: FineTuneConfig) -> Path:
    names = (pair.source, pair.data.name, label(config.method, config.dtnh))
    return Path(out, kind, *("".join(c if c.isalnum() or c in "-_.()" else "_" for c in name) for name in names))
