"""The paper's tables in small: digits found in scenes from their tags alone, in minutes on two cores.

A small VGG is trained to tell capital letters apart and frozen. On its hypercolumns a segmenter learns eight digits
from scenes (:mod:`.scenes`) that are tagged and nothing more, in every variant of the paper's Tables 1 to 3
(:mod:`.ablation`), and is then taught the two other digits. Masks only judge, on validation scenes whose digits are in
no training scene. Nothing was chosen with those: sizes and learning rates were found on scenes drawn with another seed.

Everything is kept in the output folder: killed at any instant and run again, the demo goes on where it was and ends
with the same numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

from .. import files, runs
from ..data import letters
from ..data.domains import Domains
from ..data.drawing import MEAN, STD
from ..gmoe.demo import LETTER_SHIFT, Shifted
from ..gmoe.trainer import SELECTED, train
from . import ablation, backbones, crf, demo_report, pictures, points, scenes
from .backbones import Backbone
from .data.tagged import TaggedImages
from .demo_plan import ADDED, CLASSES, GRID, LAYERS, Plan, network, plan
from .pictures import CRF, RESULT, TRUTH, Row
from .sampling import sample
from .segmenter import Segmenter, fit
from .stages import FEATURES, LOCALIZATION, Part, share, wide

__all__ = ["Plan", "plan", "run"]

PRETRAINING, VARIANTS, ADDITION = "pretraining", "variants", "addition"
PLAN, TIMES, RESULTS = "plan.json", "times.json", "results.json"


def run(
    out: str | os.PathLike[str],
    todo: Plan | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> dict[str, Any]:
    """Do, or finish, the demo; write ``results.json``, the report and its pictures into ``out``.

    Args:
        out: the folder, made if missing.
        todo: by default :func:`.demo_plan.plan` of ``quick`` and ``seed``.
        say: told in a line about each part that ends.
        progress: show bars on standard error, where that is a terminal.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: ``out`` holds a demo of another plan; the differences are listed.
        RuntimeError: another process works in ``out``.
    """
    demo = _Demo(Path(out), todo or plan(quick, seed), say, progress)
    with files.lock(demo.out):
        files.remove_leftovers(demo.out)
        return demo.run()


class _Demo:
    """The parts of a demo in the folder ``out``, each done once."""

    def __init__(self, out: Path, todo: Plan, say: Callable[[str], None], progress: bool) -> None:
        self.out, self.todo, self.say, self.progress = out, todo, say, progress
        self.config = todo.segmenter

    def run(self) -> dict[str, Any]:
        todo = self.todo
        self._claim()
        with self._timed("drawing the scenes"):
            train = self._scenes("train", todo.train, CLASSES)
            validation = self._scenes("validation", todo.validation, CLASSES)
            both = self._scenes("validation", todo.more_validation, (*CLASSES, *ADDED), ADDED)
        with self._timed("training the backbone"):
            backbone, right = self._backbone()
        self.say(f"backbone: {100 * right:.1f} % of unseen letters right")
        with self._timed("fitting and judging the variants"):
            found = ablation.run(
                train,
                validation,
                backbone,
                self.out / VARIANTS,
                self.config,
                samples=todo.samples,
                thresholds=todo.thresholds,
                progress=self.progress,
            )
        chosen = Segmenter.load(self.out / VARIANTS / ablation.name_of(self.config), backbone)
        found["letters"], found["points"] = right, self._once("points", lambda: _points(chosen, train))
        with self._timed("CRF"):
            found["crf"] = self._crf(chosen, validation)
        with self._timed("adding two classes"):
            extended = self._extended(train, backbone)
            found["added"] = self._once("added", lambda: self._added(extended, validation, both))
        for name, segmenter, dataset in (("scenes.png", chosen, validation), ("added.png", extended, both)):
            rows = [_row(segmenter, dataset, index) for index in range(min(todo.shown, len(dataset)))]
            pictures.plot_rows(rows, segmenter.classes, self.out / name)
        files.write_json(self.out / RESULTS, {"plan": asdict(todo), **found})
        times = files.read_json(self.out / TIMES)
        demo_report.write(self.out, todo, found, times, chosen.times()["fit"], extended.times())
        return found

    def _claim(self) -> None:
        """Make the folder one of this plan, or see that it is."""
        ours = runs.identity(asdict(self.todo))
        if (self.out / PLAN).exists():
            if (theirs := files.read_json(self.out / PLAN)) != ours:
                lines = "\n  ".join(runs.differences(theirs, ours))
                raise ValueError(
                    f"{self.out} holds a demo of another plan:\n  {lines}\n"
                    "Ask for the same, choose another folder, or delete this one."
                )
        else:
            files.write_json(self.out / PLAN, ours)

    def _scenes(self, part: str, count: int, classes: Sequence[str], always: Sequence[str] = ()) -> TaggedImages:
        return scenes.load(part, count, classes=classes, always=always, seed=self.config.seed)

    def _backbone(self) -> tuple[Backbone, float]:
        """Train, or read back, the backbone; and the accuracy on letters that it was not trained on."""
        folder, todo = self.out / PRETRAINING, self.todo
        if not (folder / runs.RESULT).exists():
            images, labels = scenes.pictures_of_letters(todo.letters, todo.size, self.config.seed)
            parts = (Shifted(images, labels, LETTER_SHIFT),), (TensorDataset(images, labels),)
            with tqdm(
                total=todo.pretraining.steps, desc="letters", unit="step", disable=None if self.progress else True
            ) as bar:
                train(
                    lambda: network(len(letters.CLASSES)).to(memory_format=torch.channels_last),
                    Domains("letters", letters.CLASSES, ("letters",), *parts),
                    todo.pretraining,
                    folder,
                    on_step=lambda step: bar.update(step - bar.n),
                )
        model = network(len(letters.CLASSES))
        model.load_state_dict(files.read_torch(folder / SELECTED)["model"])
        backbone = backbones.wrap(
            model, LAYERS, name="letters", mean=MEAN, std=STD, image_size=scenes.SIZE, grid=GRID, head=LAYERS[-1]
        )
        return backbone, files.read_json(folder / runs.RESULT)["selected"]["validation"]

    def _crf(self, chosen: Segmenter, validation: TaggedImages) -> dict[str, Any] | None:
        """What the CRF makes of the chosen segmenter; nothing where it cannot be used."""
        if why := crf.available():
            self.say(f"no CRF: {why}")
            return None
        return self._once("crf", lambda: chosen.evaluate(validation, crf=True, progress=self.progress)["crf"])

    def _extended(self, train: TaggedImages, backbone: Backbone) -> Segmenter:
        """The chosen segmenter once more, with the added classes."""
        variants, folder, loss = self.out / VARIANTS, self.out / ADDITION, self.config.loss
        share(folder, {FEATURES: variants / FEATURES, LOCALIZATION: variants / f"{LOCALIZATION}-{loss}"})
        share(Part.place(folder, 0), {Part.SCORES: variants / f"{Part.SCORES}-{loss}"})
        segmenter = fit(train, backbone, folder, self.config, progress=self.progress)
        for name in ADDED:
            if name not in segmenter.classes:
                more = self._scenes("train", self.todo.more, (*segmenter.classes, name), [name])
                segmenter.add_class(name, more, progress=self.progress)
                self.say(f"added {name}")
        return segmenter

    def _added(self, extended: Segmenter, validation: TaggedImages, both: TaggedImages) -> dict[str, Any]:
        """The extended segmenter on scenes of the old classes, and on those of all."""
        old, new = (extended.evaluate(data, progress=self.progress)["plain"] for data in (validation, both))
        return {"old": old["classes"], "new": new["classes"]}

    def _once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``compute`` gives, kept in a file."""
        path = self.out / f"{name}.json"
        if not path.exists():
            files.write_json(path, compute())
        found: dict[str, Any] = files.read_json(path)
        return found

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """What killed processes spent does not count, nor a look at finished work; what interrupted ones did does."""
        begun = time.monotonic()
        try:
            yield
        finally:
            path = self.out / TIMES
            times = files.read_json(path) if path.exists() else {}
            if not (self.out / RESULTS).exists():
                files.write_json(path, times | {what: times.get(what, 0.0) + time.monotonic() - begun})


def _points(segmenter: Segmenter, train: TaggedImages) -> dict[str, float]:
    """The shares of labelled points that lie on what they are labelled as."""
    found = []
    for index, name in enumerate(train.names):
        locations, labels = segmenter.samples(name)
        found.append(np.stack([labels, _mask(train, index)[_pixels(locations)]]))
    labels, truth = np.concatenate(found, 1)
    return {
        what: float((truth == labels)[chosen].mean())
        for what, chosen in (("classes", labels > 0), ("background", labels == 0))
    }


def _pixels(locations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the pixel in the middle of locations of the grid."""
    row, column = np.divmod(locations, GRID[1])
    (height, width), (rows, columns) = scenes.SIZE, GRID
    return (2 * row + 1) * height // (2 * rows), (2 * column + 1) * width // (2 * columns)


def _mask(data: TaggedImages, index: int) -> np.ndarray:
    mask = data.mask(index)
    assert mask is not None  # every scene has one
    return mask


@torch.no_grad()
def _row(segmenter: Segmenter, data: TaggedImages, index: int) -> Row:
    """A scene and what becomes of it; the samples are those that its tags would give in training."""
    image, config, known = data.image(index), segmenter.config, segmenter.highest()
    nets = {data.classes[place]: segmenter.localizer(data.classes[place]) for place in data.tags[index].nonzero()[0]}
    pyramid = wide(segmenter.backbone.features(image)).pyramid
    scores = points.score_maps(list(nets.values()), pyramid, config.loss)
    chosen = sample(scores, pyramid, config, highest=torch.tensor([known[name] for name in nets]), seed=index)
    labels = [segmenter.classes.index(name) + 1 for name in nets]
    places = np.array([0, *labels])[chosen.labels.numpy()]
    maps = {TRUTH: _mask(data, index), RESULT: segmenter.predict(image)}
    if not crf.available():
        maps[CRF] = segmenter.predict(image, crf=True)
    samples = np.stack([*_pixels(chosen.locations.numpy()), places], 1)
    return Row(np.asarray(image), segmenter.localize(image, nets).numpy(), labels, samples, maps)
