"""The main job: a dense ViT and a GMoE on handwritten digits across shifted domains, in minutes on two cores.

One small ViT is pretrained on drawn letters. From it start a dense ViT (ERM) and a GMoE, its sparse
upcycling; each is trained on three of the four domains of :mod:`..data.digits` and tested on the fourth, in
turn, over several trials (:mod:`.protocol`). Everything is kept in the output folder: killed at any instant
and run again, the demo goes on where it was and ends with the same numbers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm

from .. import files, report
from ..data import digits, letters
from ..data.domains import Domains
from ..weights import digest as state_digest
from . import pictures, tables
from .model import create
from .protocol import Entrant, Run, Table, collect, leave_one_out, perform
from .trainer import SELECTED, TrainConfig, train

MODEL = "gmoe_digits"
DENSE, SPARSE = "dense ViT", "GMoE"
PRETRAINING = "pretraining"
LETTER_SHIFT = 3


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        letters: how many are drawn to pretrain on.
        pretraining: without a held-out domain; a fifth of the letters is validated on.
        training: of each run; held-out domain and trial are set by the protocol.
        trials: for each model and held-out domain.
    """

    letters: int
    pretraining: TrainConfig
    training: TrainConfig
    trials: int = 3

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")


def plan(trials: int = 3, quick: bool = False) -> Plan:
    """The demo's plan; ``quick`` trains so little that its accuracies only show that everything runs.

    AdamW with warm-up and a cosine to zero, because a network this small with as few steps as this needs a
    rate at which the last steps would not settle. The batch is DomainBed's, 32 images a domain.
    """
    pretraining = TrainConfig(
        steps=200 if quick else 2400,
        eval_every=100 if quick else 400,
        batch_per_domain=64,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=20 if quick else 240,
        eval_batch=256,
    )
    training = TrainConfig(
        steps=20 if quick else 150,
        eval_every=10 if quick else 25,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=4 if quick else 16,
        eval_batch=128,
    )
    return Plan(2600 if quick else 15600, pretraining, training, trials)


def run(
    out: str | os.PathLike[str],
    todo: Plan,
    *,
    say: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> Table:
    """Do, or finish, the plan; write ``results.json``, the report and its pictures into ``out``.

    Args:
        out: the folder, made if missing.
        say: told in a line about each part that ends.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The out-of-domain accuracies.

    Raises:
        ValueError: ``out`` holds a demo of another plan; the differences are listed.
        RuntimeError: another process works in ``out``.
    """
    out = Path(out)
    with files.lock(out):
        files.remove_leftovers(out)
        data = digits.load()
        work = todo.pretraining.steps + 2 * len(data.domains) * todo.trials * todo.training.steps
        with tqdm(total=work, unit="step", disable=None if progress else True, smoothing=0.05) as bar:
            bar.set_description("letters")
            pretrained = _pretrain(out, todo, lambda step: _show(bar, step))
            say(f"pretrained on letters: {100 * pretrained['selected']['validation']:.1f} % of unseen ones right")
            entrants = _entrants(out / PRETRAINING / SELECTED)
            runs = list(leave_one_out(entrants, data, todo.training, out, trials=range(todo.trials)))
            results, finished = [], todo.pretraining.steps
            for each in runs:
                bar.set_description(str(each))
                results.append(perform(each, data, on_step=lambda step, done=finished: _show(bar, done + step)))
                finished += todo.training.steps
                selected = results[-1]["selected"]
                say(
                    f"{each}: {100 * selected['test']:.1f} % there, "
                    f"{100 * selected['validation']:.1f} % in the domains it was trained on"
                )
        table = collect(results)
        shown = [each for each in runs if each.entrant.name == SPARSE and each.config.trial == 0][-1]
        _write(out, todo, data, pretrained, results, table, shown)
    return table


def _show(bar: Any, step: int) -> None:
    bar.update(step - bar.n)


class Shifted(Dataset[tuple[Tensor, int]]):
    """Images (N, 3, H, W), each moved by up to ``margin`` pixels each way, its border repeated; and labels (N,).

    Letters that stay where they were drawn are soon learnt by heart, and then little of it is of use for digits.
    """

    def __init__(self, images: Tensor, labels: Tensor, margin: int) -> None:
        self.images, self.labels, self.margin = pad(images, 4 * (margin,), mode="replicate"), labels, margin

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = torch.randint(2 * self.margin + 1, (2,)).tolist()
        height, width = (size - 2 * self.margin for size in self.images.shape[-2:])
        return self.images[index, :, top : top + height, left : left + width], int(self.labels[index])


def _pretrain(out: Path, todo: Plan, on_step: Callable[[int], None]) -> dict[str, Any]:
    """The dense ViT on letters, as a run with one domain and none held out."""
    images, labels = letters.load(todo.letters)
    trained, shown = Shifted(images, labels, LETTER_SHIFT), TensorDataset(images, labels)
    data = Domains("letters", letters.CLASSES, ("letters",), (trained,), (shown,))

    def build() -> nn.Module:
        model = create(MODEL, len(letters.CLASSES), layers=[])
        # timm's standard deviation of 0.02 is made for width 768; at width 64 it leaves the blocks almost silent
        # and learning slow. Xavier's depends on the width.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        return model

    return train(build, data, todo.pretraining, out / PRETRAINING, description={"model": DENSE}, on_step=on_step)


def _entrants(weights: Path) -> list[Entrant]:
    """The two models from the same start; the digest ties what was trained to what it was trained from."""
    digest = state_digest(files.read_torch(weights)["model"])

    def entrant(name: str, **options: Any) -> Entrant:
        def build() -> nn.Module:
            with warnings.catch_warnings():
                # that there is a new head for the digits is no news
                warnings.filterwarnings("ignore", message=".*its head is for another number of classes")
                return create(MODEL, len(digits.CLASSES), pretrained=weights, **options)

        return Entrant(name, build, {"create": {"name": MODEL, **options}, "weights": digest})

    return [entrant(DENSE, layers=[]), entrant(SPARSE)]


def _write(
    out: Path,
    todo: Plan,
    data: Domains,
    pretrained: dict[str, Any],
    results: list[dict[str, Any]],
    table: Table,
    shown: Run,
) -> None:
    """The results and the report; ``shown`` is the run whose routing is pictured."""
    files.write_json(
        out / "results.json",
        {"plan": asdict(todo), "table": tables.table_json(table), "pretraining": pretrained, "runs": results},
    )
    pictures.plot_curves(results, out / "curves.png")
    pictures.plot_domains(data, out / "domains.png")
    model = create(MODEL, len(data.classes))
    model.load_state_dict(files.read_torch(shown.folder / SELECTED)["model"])
    pictures.plot_routing(model, data, out / "routing.png", title=str(shown))
    report.write(out, "Handwritten digits across shifted domains", _sections(todo, data, pretrained, table, shown))


def _sections(todo: Plan, data: Domains, pretrained: dict[str, Any], table: Table, shown: Run) -> list[report.Section]:
    sizes = {
        name: sum(parameter.numel() for parameter in create(MODEL, len(data.classes), **options).parameters())
        for name, options in ((DENSE, {"layers": []}), (SPARSE, {}))
    }
    training, first = todo.training, pretrained["selected"]
    return [
        report.Section(
            "Out-of-domain accuracy",
            [
                "Percent of images right in the domain that was held out: mean ± standard error over trials "
                f"({todo.trials}). Each run trains on the other three domains; its weights are selected by accuracy on "
                "the fifth of those that it does not train on (training-domain validation), never by the held-out one.",
                tables.comparison(table, SPARSE, DENSE),
            ],
            tables.accuracy_rows(table),
        ),
        report.Section(
            "What was trained",
            [
                f"{DENSE}: {sizes[DENSE]:,} parameters, plain empirical risk minimization. {SPARSE}: the same network "
                f"with six experts in the place of the last two even blocks' feed-forward network, each a copy of it, "
                f"and a cosine router that sends each patch to one: {sizes[SPARSE]:,} parameters. Both start from one "
                f"ViT pretrained on {todo.letters:,} drawn letters for {todo.pretraining.steps:,} steps "
                f"({100 * first['validation']:.1f} % of unseen letters right).",
                f"Each run: {training.steps} steps of {training.batch_per_domain} images a training domain, "
                f"{training.optimizer}, learning rate {training.learning_rate:g} with a {training.schedule} schedule. "
                "For one held-out domain and trial both models see the same batches.",
            ],
        ),
        report.Section("Every trial", (), tables.trial_rows(table)),
        report.Section(
            "Accuracy over training",
            ["Solid: the held-out domain, with the range over trials. Dotted: validation on the training domains."],
            picture="curves.png",
        ),
        report.Section(
            "Which patches go to which expert",
            [f"The last mixture-of-experts layer of one network ({shown}), on images of every domain."],
            picture="routing.png",
        ),
        report.Section("The domains", (), picture="domains.png"),
    ]
