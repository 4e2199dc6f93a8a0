"""The stages of fitting a segmenter and of adding a class, in its folder: each is resumed where it was.

features/                          of every image
localization/<class>.safetensors   a network a class
parts/0/                           the images of the fit: names, tags and digests, score maps, points; the
                                   images of a class that was added are the next part
classifier.safetensors             replaced when an addition is complete
times.json                         seconds of each stage
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from moe_kernels.ops.hypercolumn import Pyramid

from .. import files, runs
from ..data.images import some
from . import classifier, localization, points, saved
from .backbones import Backbone, Features
from .cache import FeatureCache
from .classifier import PixelClassifier
from .configuration import SegmentConfig
from .data.tagged import TaggedImages
from .localization import Localizer, Task

FEATURES, LOCALIZATION, PARTS, CLASSIFIER, TIMES = (
    "features",
    "localization",
    "parts",
    "classifier.safetensors",
    "times.json",
)
_IMAGES, _POINTS, _HIGHEST = "images.json", "points", "highest.json"


def wide(features: Features) -> Features:
    """In float32, in which everything but the storage is computed."""
    maps = tuple(level.float() for level in features.pyramid.maps)
    return Features(Pyramid(maps, features.pyramid.grid), None if features.image is None else features.image.float())


def share(folder: Path, links: Mapping[str, Path]) -> None:
    """Let several segmenters have some of their folders in common: in ``folder``, names link to others' folders.

    Raises:
        ValueError: a name is there already and leads elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        target.mkdir(parents=True, exist_ok=True)
        link = folder / name
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(target, folder))
        elif not (link.exists() and link.samefile(target)):
            raise ValueError(
                f"{link} is there already, and is not {target}: name the folder that it is"
                + (f" ({os.readlink(link)})" if link.is_symlink() else ", or delete it")
            )


class Part:
    """Images that were used together, in their folder.

    Attributes:
        tags: name of an image → names of its classes.
        digests: name of an image → what tells it from another of the same name.
    """

    SCORES = "scores"

    def __init__(self, folder: Path, tags: Mapping[str, Sequence[str]], digests: Mapping[str, str]) -> None:
        self.folder, self.tags, self.digests = folder, dict(tags), dict(digests)

    @staticmethod
    def place(run: Path, number: int) -> Path:
        """The folder of part ``number`` of the segmenter in ``run``."""
        return run / PARTS / str(number)

    @classmethod
    def read(cls, run: Path, number: int) -> Part:
        """Part ``number`` of the segmenter in ``run``."""
        folder = cls.place(run, number)
        return cls(folder, **files.read_json(folder / _IMAGES))

    @classmethod
    def begin(cls, run: Path, number: int, dataset: TaggedImages, digests: Sequence[str]) -> Part:
        """Part ``number``, of the images of ``dataset``; what others left there is replaced, stage by stage."""
        folder = cls.place(run, number)
        tags = {
            name: [dataset.classes[place] for place in row.nonzero()[0]]
            for name, row in zip(dataset.names, dataset.tags, strict=True)
        }
        images = {"tags": tags, "digests": dict(zip(dataset.names, digests, strict=True))}
        files.write_json(folder / _IMAGES, images)
        return cls(folder, **images)

    @property
    def scores(self) -> Path:
        """The folder of its score maps."""
        return self.folder / self.SCORES

    @property
    def points(self) -> Path:
        """The folder of its points."""
        return self.folder / _POINTS

    def numbers(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """Name of an image → numbers of those of its classes that are in ``classes``."""
        place = {name: number for number, name in enumerate(classes)}
        return {image: sorted(place[name] for name in tags if name in place) for image, tags in self.tags.items()}

    def highest(self) -> dict[str, float]:
        """The highest score of each class in it, averaged over the images that have it."""
        found: dict[str, float] = files.read_json(self.folder / _HIGHEST)
        return found

    def digest(self) -> str:
        """Of names, tags and pictures."""
        return saved.digest(f"{name}: {tags} {self.digests[name]}" for name, tags in self.tags.items())


class Stages:
    """Does the stages in ``folder``, which is this process's.

    Args:
        digests: of all images that are used, by name.
        title: what ``times.json`` files them under.
        progress: with bars, on a terminal.
        checkpoint_share: largest share of the time that writing checkpoints may take.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        config: SegmentConfig,
        device: torch.device,
        digests: Mapping[str, str],
        title: str,
        progress: bool,
        checkpoint_share: float,
    ) -> None:
        self.folder, self.backbone, self.config, self.device = folder, backbone.to(device), config, device
        self.digests = digests
        self.title, self.progress, self.share = title, progress, checkpoint_share
        self.cache = FeatureCache(folder / FEATURES, backbone, getattr(torch, config.storage))

    def check_room(self, part: Part, classes: Sequence[str]) -> None:
        """Whether the disk has room for what :meth:`points` writes; the cache of features looks for its own.

        Raises:
            OSError: it has not.
        """
        locations, columns = self.backbone.grid[0] * self.backbone.grid[1], self.backbone.channels
        maps = sum(len(numbers) for numbers in part.numbers(classes).values())
        labelled = (maps + len(part.tags)) * self.config.samples
        values = labelled * columns + len(part.tags) * self.backbone.image_channels
        needed = 4 * maps * locations + np.dtype(self.config.storage).itemsize * values
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise OSError(
                f"{self.folder} has {free / 1e9:.1f} GB free, and {labelled} points take {needed / 1e9:.1f} GB: "
                "use another disk or fewer samples"
            )

    def check_kept(self, parts: Sequence[Part], images: Sequence[str]) -> None:
        """Whether there still is what an addition needs: the points of ``parts``, the features of ``images``.

        Raises:
            ValueError: it is not.
        """
        back = f"Delete {self.folder / CLASSIFIER}, and repeat the fit and the additions: they compute what is missing."
        for part in parts:
            try:
                points.about(part.points)
            except (OSError, ValueError) as error:
                raise ValueError(f"an addition needs {part.points}, which is not complete. {back}") from error
        if lacking := self.cache.lacking({name: self.digests[name] for name in images}):
            raise ValueError(
                f"an addition needs the features of {len(lacking)} images that {self.cache.folder} does not have, or "
                f"has of others of the same name: {some(lacking)}. {back}"
            )

    def features(self, dataset: TaggedImages) -> None:
        """Of every image of ``dataset``."""
        with self._timed("features"):
            self.cache.fill(dataset, [self.digests[name] for name in dataset.names], progress=self.progress)

    def localization(self, todo: Sequence[Task], *, replace: bool = False) -> dict[str, Localizer]:
        """The networks of ``todo``; ``replace`` is that of :func:`.localization.train`, but where others share them."""
        with self._timed("localization"), self._bar("localization", "step") as on_step:
            return localization.train(
                todo,
                lambda name: wide(self._stored(name)).pyramid,
                self.backbone.channels,
                self.folder / LOCALIZATION,
                self.config,
                description={"backbone": self.backbone.fingerprint},
                replace=replace and not (self.folder / LOCALIZATION).is_symlink(),
                device=self.device,
                checkpoint_share=self.share,
                on_step=on_step,
            )

    def points(self, part: Part, nets: Mapping[str, Localizer], classes: Sequence[str]) -> None:
        """The score maps and the points of ``part``, of those of its tags that are in ``classes``."""
        config, images = self.config, part.numbers(classes)
        kept = ("loss", "localization_hidden", "localization_rates", "seed")
        run = runs.identity(
            {name: getattr(config, name) for name in kept},
            {"backbone": self.backbone.fingerprint, "classes": list(classes), "images": part.digest()},
        )
        numbered = {number: nets[name] for number, name in enumerate(classes) if name in nets}
        with self._timed("scores"), self._bar("score maps", "image", len(images)) as on_image:
            points.score(
                part.scores,
                images,
                numbered,
                lambda name: wide(self._stored(name)),
                config,
                run,
                share=self.share,
                on_image=lambda done: on_image(done, len(images)),
            )
        scores = points.scores_of(part.scores, images)
        highest = points.highest(scores, images)
        files.write_json(part.folder / _HIGHEST, {classes[number]: value for number, value in highest.items()})
        kept = ("strategy", "samples", "penalty", "threshold", "spatial_sigma")
        run = runs.identity(run, {name: getattr(config, name) for name in kept})
        with self._timed("sampling"), self._bar(f"{config.strategy} sampling", "image", len(images)) as on_image:
            points.collect(
                part.points,
                images,
                scores,
                highest,
                self._stored,
                config,
                run,
                share=self.share,
                on_image=lambda done: on_image(done, len(images)),
            )

    def classifier(self, classes: Sequence[str], parts: Sequence[Part]) -> PixelClassifier:
        """Trained on the points of ``parts``."""
        with self._timed("classifier"), self._bar("pixel classifier", "step") as on_step:
            return classifier.train(
                points.Points([part.points for part in parts]),
                1 + len(classes),
                self.folder / CLASSIFIER,
                self.config,
                description={"classes": list(classes), "parts": [part.digest() for part in parts]},
                device=self.device,
                checkpoint_share=self.share,
                on_step=on_step,
            )

    def _stored(self, name: str) -> Features:
        found = self.cache.features(name, self.digests[name])
        maps = tuple(level.to(self.device) for level in found.pyramid.maps)
        image = None if found.image is None else found.image.to(self.device)
        return Features(Pyramid(maps, found.pyramid.grid), image)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """What a killed process spent does not count; what an interrupted one did does."""
        begun = time.monotonic()
        try:
            yield
        finally:
            path = self.folder / TIMES
            times = files.read_json(path) if path.exists() else {}
            mine = times.setdefault(self.title, {})
            mine[stage] = mine.get(stage, 0.0) + time.monotonic() - begun
            files.write_json(path, times)

    @contextmanager
    def _bar(self, what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
        with tqdm(total=total, desc=what, unit=unit, disable=None if self.progress else True) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
