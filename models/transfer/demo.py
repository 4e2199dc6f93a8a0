"""The tables and figures of DTNH's paper in small, from sources that suit a target and sources that do not.

A small ResNet is pretrained on each of two sources, and fine-tuned on each of three targets with few images
(:mod:`.sources`), by the five methods of the paper's Tables II to IV. Each regularized method has its coefficient from
a cross-validation on the target's training images, with the same grid and folds with and without DTNH; L2-SP is also
run with the largest of its coefficients, where a regularizer can hurt. What the paper claims is checked on that
(:mod:`.claims`).

Nothing was chosen with the test images: sizes, learning rate and grids were found on images drawn with another seed.
Everything is kept in the output folder: killed at any instant and run again, the demo goes on where it was and ends
with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .. import files
from ..weights import digest
from . import backbones, demo_report, protocol, sources, tables
from .configuration import PLAIN, FineTuneConfig
from .data import Target
from .demo_plan import BASE, REGULARIZED, Plan, network, plan
from .protocol import Pair, Run, Table, label
from .trainer import FINAL, finetune

__all__ = ["Plan", "plan", "run"]

PRETRAINING, STRONG = "pretraining", "strong"
SCRATCH = "random weights"

Results = list[dict[str, Any]]


def run(
    out: str | os.PathLike[str],
    todo: Plan,
    *,
    say: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> list[Table]:
    """Do, or finish, the plan; write ``results.json``, the report and its pictures into ``out``.

    Args:
        out: the folder, made if missing.
        say: told in a line about each part that ends.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The tables, one a source, of the coefficients that cross-validation chose.

    Raises:
        ValueError: ``out`` holds a demo of another plan; the differences are listed.
        RuntimeError: another process works in ``out``.
    """
    out = Path(out)
    with files.lock(out):
        files.remove_leftovers(out)
        origins = [sources.source(name, todo.images) for name in todo.sources]
        targets = [sources.target(name, todo.per_class, todo.tested) for name in todo.targets]
        with tqdm(total=todo.steps(), unit="step", disable=None if progress else True, smoothing=0.05) as bar:
            study = _Study(out, todo, bar, say)
            pretrained: dict[str, Any] = {}
            scratch, chosen, strong = Results(), Results(), Results()
            for target in targets:
                scratch += study.repeat(Pair(SCRATCH, _builder(target), target, {}), study.config())
            for origin in origins:
                pretrained[origin.name] = study.pretrain(origin)
                for target in targets:
                    pair = study.pair(origin, target)
                    plain = study.repeat(pair, study.config())
                    chosen += plain
                    strong += plain
                    for method, dtnh in REGULARIZED:
                        chosen += study.repeat(pair, study.cross_validated(pair, method, dtnh))
                    for dtnh in (False, True):
                        strong += study.repeat(pair, study.config(BASE, dtnh, todo.strong()), STRONG)
        return demo_report.write(out, todo, origins + targets, pretrained, scratch, chosen, strong)


def _builder(target: Target, weights: Mapping[str, Any] | None = None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = network(len(target.classes))
        if weights is not None:
            backbones.load_backbone(model, weights, PRETRAINING)
        return model

    return build


class _Study:
    """Does the runs of a plan, one after the other, in the folder ``out``."""

    def __init__(self, out: Path, todo: Plan, bar: Any, say: Callable[[str], None]) -> None:
        self.out, self.todo, self.bar, self.say, self.finished = out, todo, bar, say, 0

    def pretrain(self, origin: Target) -> dict[str, Any]:
        """Train the network on a source, from random weights."""
        self.bar.set_description(origin.name)
        config = self.todo.pretraining
        result = finetune(
            _builder(origin), origin, config, self._weights(origin).parent, on_step=self._count(config.steps)
        )
        self.say(f"pretrained on {origin.name}: {100 * result['final']['test_accuracy']:.1f} % of unseen ones right")
        return result

    def pair(self, origin: Target, target: Target) -> Pair:
        weights = files.read_torch(self._weights(origin))["model"]
        return Pair(origin.name, _builder(target, weights), target, {"weights": digest(weights)})

    def config(self, method: str = PLAIN, dtnh: bool = False, coefficient: float | None = None) -> FineTuneConfig:
        return replace(self.todo.training, method=method, dtnh=dtnh, coefficient=coefficient)

    def cross_validated(self, pair: Pair, method: str, dtnh: bool) -> FineTuneConfig:
        """A method with the best of its coefficients."""
        # of a fold only the end counts
        config = replace(self.config(method, dtnh), eval_every=self.todo.training.steps)
        runs = protocol.folds(pair, config, self.out, self.todo.coefficients[method], self.todo.folds)
        return self.config(method, dtnh, protocol.cross_validate(runs, self._do))

    def repeat(self, pair: Pair, config: FineTuneConfig, folder: str = "") -> Results:
        """The runs of a method with every seed."""
        results = [self._do(each) for each in protocol.repeats(pair, config, self.out / folder, self.todo.repeats)]
        what = label(config.name, config.dtnh) + (f", λ = {config.coefficient:g}" if config.coefficient else "")
        right = tables.percent([result["final"]["test_accuracy"] for result in results])
        self.say(f"{pair.source} → {pair.data.name}, {what}: {right} %")
        return results

    def _weights(self, origin: Target) -> Path:
        return self.out / PRETRAINING / origin.name / FINAL

    def _do(self, each: Run) -> dict[str, Any]:
        self.bar.set_description(str(each))
        return protocol.perform(each, on_step=self._count(each.config.steps))

    def _count(self, steps: int) -> Callable[[int], None]:
        before = self.finished
        self.finished += steps
        return lambda step: self.bar.update(before + step - self.bar.n)
