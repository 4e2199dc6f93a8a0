"""Leave-one-domain-out: train on all domains but one, test on that one, in turn, over several trials, and the
table.

Two things go by similar names and are not the same. *Leave-one-domain-out* is how a network is tested here.
*Training-domain validation* is how its weights are selected: at the step where the mean accuracy on the
held-out fifths of the training domains is best, and never by looking at the test domain (Gulrajani and
Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021).

Models are compared in pairs: for one held-out domain and one trial, all of them get the same splits and
    batches.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..data.domains import Domains, normalized_name
from ..runs import RESULT
from .trainer import TrainConfig, train

RUNS = "runs"

# What GMoE was trained with, by data set: where it differs from TrainConfig's defaults.
PAPER: dict[str, dict[str, Any]] = {
    "PACS": {},
    "VLCS": {},
    "OfficeHome": {"learning_rate": 1e-5},
    "TerraIncognita": {"learning_rate": 5e-5, "weight_decay": 1e-4},
    "DomainNet": {"learning_rate": 5e-5, "weight_decay": 0.0, "steps": 15001, "eval_every": 500},
    "CUB-DG": {"learning_rate": 5e-5, "weight_decay": 0.0},
}


def paper_config(dataset: str, **changes: Any) -> TrainConfig:
    """GMoE's configuration for a data set, with ``changes`` on top (``None`` is no change).

    ``dataset`` is compared without case, spaces and underscores (``office_home``); another than GMoE's gets
    that of PACS, the defaults of :class:`TrainConfig`.
    """
    known = {normalized_name(name): values for name, values in PAPER.items()}
    asked = {name: value for name, value in changes.items() if value is not None}
    return TrainConfig(**{**known.get(normalized_name(dataset), {}), **asked})


@dataclass(frozen=True)
class Entrant:
    """A model that takes part.

    Args:
        name: in tables and folder names.
        build: makes it on the CPU, one logit a class, its random parts from torch's generator. It is called
            once a run.
        description: what identifies it besides its name, plain JSON.
    """

    name: str
    build: Callable[[], nn.Module]
    description: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run of the protocol and where its files lie."""

    entrant: Entrant
    config: TrainConfig
    folder: Path

    def __str__(self) -> str:
        return f"{self.entrant.name}, {' and '.join(self.config.held_out)} held out, trial {self.config.trial}"


def leave_one_out(
    entrants: Sequence[Entrant],
    data: Domains,
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    held_out: Sequence[str] | None = None,
    trials: Sequence[int] = (0, 1, 2),
) -> Iterator[Run]:
    """The runs of the protocol, one trial after the other: ``held_out`` (all domains by default) ×
    ``entrants``.

    Raises:
        ValueError: an unknown domain; the valid ones are listed.
    """
    domains = data.domains if held_out is None else tuple(data.domains[data.index(name)] for name in held_out)
    for trial in trials:
        for domain in domains:
            for entrant in entrants:
                yield Run(
                    entrant,
                    replace(config, held_out=(domain,), trial=trial),
                    Path(out) / RUNS / _file_name(entrant.name) / _file_name(domain) / f"trial{trial}",
                )


def perform(
    run: Run,
    data: Domains,
    *,
    device: str | torch.device = "cpu",
    workers: int = 0,
    checkpoint_share: float = 0.015,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train one run, or resume it, or read back its result; see :func:`~.trainer.train`."""
    return train(
        run.entrant.build,
        data,
        run.config,
        run.folder,
        description={"model": run.entrant.name, **run.entrant.description},
        device=device,
        workers=workers,
        checkpoint_share=checkpoint_share,
        on_step=on_step,
    )


@dataclass(frozen=True)
class Table:
    """Out-of-domain accuracies.

    Args:
        dataset: the name of the data.
        models, domains: the rows and the columns, in order.
        cells: accuracy in [0, 1] by model, held-out domain and trial; a run that is not finished is missing.
    """

    dataset: str
    models: tuple[str, ...]
    domains: tuple[str, ...]
    cells: Mapping[tuple[str, str, int], float]

    def values(self, model: str, domain: str) -> list[float]:
        """The accuracy of each finished trial."""
        return [value for key, value in sorted(self.cells.items()) if key[:2] == (model, domain)]

    def averages(self, model: str) -> list[float]:
        """The mean over domains, for each trial that has them all."""
        trials = sorted({trial for _, _, trial in self.cells})
        rows = [[self.cells.get((model, domain, trial)) for domain in self.domains] for trial in trials]
        return [statistics.fmean(row) for row in rows if None not in row]  # type: ignore[type-var]

    def paired(self, model: str, other: str) -> list[float]:
        """The accuracy of ``model`` minus that of ``other``, for each domain and trial that both have finished."""
        return [
            value - self.cells[other, domain, trial]
            for (name, domain, trial), value in sorted(self.cells.items())
            if name == model and (other, domain, trial) in self.cells
        ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, as DomainBed reports them: the population's deviation over √n, so 0 for one value."""
    return statistics.fmean(values), statistics.pstdev(values) / len(values) ** 0.5


def collect(results: Sequence[Mapping[str, Any]]) -> Table:
    """The table of finished runs; rows and columns in order of their first appearance and of the data set.

    Raises:
        ValueError: there is none, or they are of different data.
    """
    runs = [result["run"] for result in results]
    if not runs:
        raise ValueError("results must have at least one finished run, got none")
    if len({run["data"] for run in runs}) > 1:
        raise ValueError(f"results must be of one data set, got {', '.join(sorted({run['data'] for run in runs}))}")
    held_out = {"+".join(run["held_out"]) for run in runs}
    domains = [name for name in runs[0]["images"] if name in held_out]
    cells = {}
    for result, run in zip(results, runs, strict=True):
        cells[run["model"], "+".join(run["held_out"]), run["trial"]] = result["selected"]["test"]
    return Table(
        dataset=runs[0]["data"],
        models=tuple(dict.fromkeys(run["model"] for run in runs)),
        domains=(*domains, *sorted(held_out - set(domains))),
        cells=cells,
    )


def finished(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results of every finished run under ``out``, also those of other processes and of earlier."""
    return [files.read_json(path) for path in sorted((Path(out) / RUNS).glob(f"*/*/*/{RESULT}"))]


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
