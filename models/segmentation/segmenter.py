"""A segmenter from images and their tags: fitted in a folder, extended by classes, applied to images.

``config.json`` says what it follows from, and a folder of another configuration is refused; :mod:`.stages` says what
else the folder holds. Every file is written atomically and every stage goes on where it was, after ``kill -9`` too, and
ends with the same bits (on the same device, for the same number of threads).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from .. import files, runs
from ..data.images import some
from ..data.rgb import in_rgb, read_rgb
from . import backbones, classifier, crf, localization, points, saved
from .backbones import Backbone
from .cache import FeatureCache
from .classifier import PixelClassifier
from .configuration import SegmentConfig
from .data.pixels import IGNORED
from .data.tagged import TaggedImages, check_class, checked
from .evaluation import BACKGROUND, MeanIoU
from .localization import Localizer, Task
from .sampling import normalized
from .stages import CLASSIFIER, FEATURES, LOCALIZATION, TIMES, Part, Stages, share, wide

CONFIG = "config.json"
_HASHES = ("tags", "pictures")
Picture = str | os.PathLike[str] | Image.Image | np.ndarray


def fit(
    dataset: TaggedImages,
    backbone: Backbone,
    folder: str | os.PathLike[str],
    config: SegmentConfig | None = None,
    *,
    features: str | os.PathLike[str] | None = None,
    created: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    checkpoint_share: float = 0.015,
) -> Segmenter:
    """Fit a segmenter to images and their tags, not their masks, in ``folder``; or resume, or read it back.

    Args:
        features: a folder for the features, to which ``folder`` then links: several segmenters may share it.
        created: the arguments of :func:`.backbones.create` that made ``backbone``, plain JSON, for
            :meth:`Segmenter.load`; without them that has to be given the backbone.
        device: where everything is computed.
        progress: with bars, on a terminal.
        checkpoint_share: largest share of the time that writing checkpoints may take.

    Raises:
        ValueError: no image, a class that no image or every image has, more samples than there are locations; or
            ``folder`` is of another configuration or of other images, and the differences are listed; or ``features``
            holds something else.
        OSError: an image cannot be read, or the disk has too little room.
        RuntimeError: another process works in ``folder``, or a loss is not finite.
    """
    config, folder, device = config or SegmentConfig(), Path(folder), torch.device(device)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder for the segmenter, and is a file")
    dataset.check_trainable()
    if BACKGROUND in dataset.classes:
        raise ValueError(
            f"classes must not have the name {BACKGROUND}, which is what is left; got {some(dataset.classes)}"
        )
    if config.samples > (locations := backbone.grid[0] * backbone.grid[1]):
        raise ValueError(f"samples must be at most {locations}, the locations of the grid, got {config.samples}")
    digests = dict(zip(dataset.names, dataset.digests(), strict=True))
    about = runs.identity(
        {"config": asdict(config), "backbone": backbone.description(), "classes": dataset.classes},
        {
            "images": len(dataset),
            "tags": saved.digest(map(str, zip(dataset.names, dataset.tags.tolist(), strict=True))),
            "pictures": saved.digest(map(str, digests.items())),
        },
    )
    with files.lock(folder):
        files.remove_leftovers(folder)
        if not _is_of(folder, about):
            # what refuses ``features`` comes before the folder is claimed
            FeatureCache(folder / FEATURES if features is None else features, backbone, getattr(torch, config.storage))
        if features is not None:
            share(folder, {FEATURES: Path(features)})
        if not (folder / CONFIG).exists():
            files.write_json(folder / CONFIG, {**about, "created": created})
        if not (folder / CLASSIFIER).exists():
            stages = Stages(folder, backbone, config, device, digests, "fit", progress, checkpoint_share)
            part = Part.begin(folder, 0, dataset, list(digests.values()))
            stages.check_room(part, dataset.classes)
            stages.features(dataset)
            nets = stages.localization(localization.tasks(dataset.names, dataset.classes, dataset.tags, digests))
            stages.points(part, nets, dataset.classes)
            stages.classifier(dataset.classes, [part])
    return Segmenter.load(folder, backbone, device=device)


def _is_of(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``folder`` is one of ``about`` already; ``ValueError`` when it is one of something else."""
    if not (folder / CONFIG).exists():
        return False
    theirs = files.read_json(folder / CONFIG)
    theirs.pop("created", None)
    if theirs != about:
        lines = "\n  ".join(saved.differences(_flat(theirs), _flat(about), _HASHES))
        raise ValueError(
            f"{folder} is of another configuration:\n  {lines}\n"
            "Ask for the same, choose another folder, or delete this one."
        )
    return True


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about.get("config", {}), **about.get("backbone", {})} | {
        key: value for key, value in about.items() if key not in ("config", "backbone")
    }


class Segmenter:
    """Says of every pixel of an image which class it is of. :func:`fit` makes one, :meth:`load` reads one.

    Attributes:
        folder: its run.
        backbone, config: what it was fitted with.
        classes: their names; label c + 1 is class c, 0 the background.
        classifier: on ``device``, as the backbone is.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        config: SegmentConfig,
        classes: Sequence[str],
        parts: int,
        net: PixelClassifier,
        device: torch.device,
    ) -> None:
        self.folder, self.backbone, self.config = folder, backbone, config
        self.classes, self.classifier, self.device = tuple(classes), net, device
        self._parts = parts

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], backbone: Backbone | None = None, *, device: str | torch.device = "cpu"
    ) -> Segmenter:
        """Read the segmenter in ``folder``.

        Args:
            backbone: by default it is created as it was for the fit.

        Raises:
            FileNotFoundError: there is none, or its fitting was not finished.
            ValueError: the backbone is another; the differences are listed. Or it cannot be created.
        """
        folder, device = Path(folder), torch.device(device)
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"{folder} holds no segmenter: {CONFIG} is missing")
        about = files.read_json(folder / CONFIG)
        net, run = classifier.load(folder / CLASSIFIER, device)
        if backbone is None:
            if about["created"] is None:
                raise ValueError(f"backbone: {folder} was fitted with a module of its own, which has to be given")
            backbone = backbones.create(**about["created"])
        if about["backbone"] != (ours := runs.identity(backbone.description())):
            lines = "\n  ".join(runs.differences(about["backbone"], ours))
            raise ValueError(f"{folder} was fitted with another backbone:\n  {lines}")
        facts = about["config"]
        config = SegmentConfig(**{**facts, "localization_rates": tuple(facts["localization_rates"])})
        return cls(folder, backbone.to(device), config, run["classes"], len(run["parts"]), net, device)

    def times(self) -> dict[str, dict[str, float]]:
        """Seconds of each stage of the fit and of each addition, without what killed processes spent.

        Empty where ``times.json`` is missing, which nothing depends on.
        """
        path = self.folder / TIMES
        found: dict[str, dict[str, float]] = files.read_json(path) if path.exists() else {}
        return found

    def probabilities(self, image: Picture) -> Tensor:
        """Of an image at its own size, float32 (1 + C, h, w): the background, then each class; they sum to 1."""
        image = _rgb(image)
        return self.classifier.probabilities(wide(self.backbone.features(image)), (image.height, image.width))

    def predict(self, image: Picture, *, crf: bool = False) -> np.ndarray:
        """The label of every pixel of an image, uint8 (h, w).

        Args:
            image: of any size and mode, its file, or an array uint8 (h, w, 3).
            crf: the probabilities are refined by a dense CRF, which needs the extra ``crf``.
        """
        image = _rgb(image)
        return _refined(image, self.probabilities(image)) if crf else self._labels(image)

    def _labels(self, image: Image.Image) -> np.ndarray:
        found = self.classifier.labels(wide(self.backbone.features(image)), (image.height, image.width))
        labels: np.ndarray = found.cpu().numpy()
        return labels

    def evaluate(self, dataset: TaggedImages, *, crf: bool = False, progress: bool = True) -> dict[str, Any]:
        """Mean IoU on the images of ``dataset`` that have a mask, at their own size.

        Args:
            crf: with the dense CRF too.

        Returns:
            ``images`` (how many), and under ``plain``, and ``crf``: ``mean`` and ``classes``, IoU by name, the
            background's among them, ``None`` for one that neither masks nor predictions have.

        Raises:
            ValueError: there is no mask, or a class in it that the segmenter does not know.
        """
        table = self._numbers(dataset.classes)
        metrics = {kind: MeanIoU(self.classes) for kind in (["plain", "crf"] if crf else ["plain"])}
        images = 0
        for image, mask in _masked(dataset, "evaluation", progress):
            if crf:
                probabilities = self.probabilities(image)
                metrics["plain"].update(_array(probabilities.argmax(0)), table[mask])
                metrics["crf"].update(_refined(image, probabilities), table[mask])
            else:
                metrics["plain"].update(self._labels(image), table[mask])
            images += 1
        return {"images": images} | {kind: _found(metric) for kind, metric in metrics.items()}

    def evaluate_localization(
        self, dataset: TaggedImages, thresholds: Sequence[float], *, progress: bool = True
    ) -> dict[float, dict[str, Any]]:
        """Mean IoU of the localization's maps taken as the result, as in :meth:`evaluate`, at each threshold.

        A pixel gets the class with the highest normalized score, or the background where that is below the threshold
        (section 4.2 of the paper, whose best is 0.2).
        """
        table = self._numbers(dataset.classes)
        metrics = {threshold: MeanIoU(self.classes) for threshold in thresholds}
        nets = {name: self.localizer(name) for name in self.classes}
        for image, mask in _masked(dataset, "localization's maps", progress):
            best, row = self.localize(image, nets).max(0)
            for threshold, metric in metrics.items():
                metric.update(_array(torch.where(best >= threshold, row + 1, 0)), table[mask])
        return {threshold: _found(metric) for threshold, metric in metrics.items()}

    @torch.no_grad()
    def localize(self, image: Picture, nets: Mapping[str, Localizer] | None = None) -> Tensor:
        """The localization's score maps at the image's size, float32 (C, h, w).

        They are normalized: on average, training images with the class have highest score 1.

        Args:
            nets: the networks of the classes that are wanted, by default of all.
        """
        nets = {name: self.localizer(name) for name in self.classes} if nets is None else nets
        if not nets:
            raise ValueError("nets must be of at least one class, got none")
        image = _rgb(image)
        found, known = wide(self.backbone.features(image)), self.highest()
        maps = points.score_maps(list(nets.values()), found.pyramid, self.config.loss)
        maps = normalized(maps, torch.tensor([known[name] for name in nets], device=self.device))
        maps = maps.unflatten(1, found.pyramid.grid)[None]
        return interpolate(maps, (image.height, image.width), mode="bilinear", align_corners=False)[0]

    def localizer(self, name: str) -> Localizer:
        """The localization network of class ``name``."""
        return localization.load(self.folder / LOCALIZATION, name, self.device)

    def losses(self) -> dict[str, list[float]]:
        """The localization's mean log-loss of each class in each epoch; that of a guess is 0.69."""
        return {name: localization.losses(self.folder / LOCALIZATION, name) for name in self.classes}

    def highest(self) -> dict[str, float]:
        """The highest score of each class, averaged over the training images that have it."""
        found: dict[str, float] = {}
        for part in self.parts():
            found = part.highest() | found
        return found

    def parts(self) -> list[Part]:
        """The images of the fit, and those of each addition."""
        return [Part.read(self.folder, number) for number in range(self._parts)]

    def samples(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The points of training image ``name``: locations on the grid and labels, both int (P,).

        Raises:
            ValueError: it was not trained on that image.
        """
        for part in self.parts():
            if name in part.tags:
                about = points.about(part.points)
                mine = about[about[:, 1] == list(part.tags).index(name)]
                return mine[:, 2], mine[:, 0]
        raise ValueError(f"name must be of an image that the segmenter was trained on, got {name!r}")

    def add_class(
        self,
        name: str,
        images: TaggedImages | Sequence[Picture],
        *,
        skip_bad: bool = False,
        progress: bool = True,
        checkpoint_share: float = 0.015,
    ) -> None:
        """Learn one more class from images of it; what is known of the others stays as it is.

        One localization network is trained, on the new images and as many of the old ones; points are sampled in the
        new images; and the pixel classifier is trained anew on the old points and the new ones. Until that is done the
        segmenter in the folder is the old one. An interrupted call, made again, goes on where it was; with other
        images it begins anew. The folder must still have the points and the features of the images learned from.

        Args:
            images: images or their files, all of the new class; or tagged images, of which those with the tag ``name``
                are used. Their other tags count too: old classes are sampled in the new images. Their names get the
                class as a folder: ``name/``, as in a URL. Images learned from already may be among them: they are no
                negatives, and points are drawn in them once more.
            skip_bad: leave out files that cannot be read, with a warning.

        Raises:
            ValueError: the class is there already, there is no image of it, a name of an image is taken, files
                cannot be read, or points or features are missing.
            TypeError: ``images`` is no sequence of images.
            RuntimeError: another process works in the folder, or the segmenter there has other classes by now.
        """
        check_class(name)
        if name in (BACKGROUND, *self.classes):
            raise ValueError(f"class {name} is there already: {some(self.classes)}")
        if len(self.classes) == IGNORED - 1:
            raise ValueError(f"there can be {IGNORED - 1} classes at most, and there are")
        dataset = _images_of(name, images, skip_bad)
        new = dict(zip(dataset.names, dataset.digests(), strict=True))
        with files.lock(self.folder):
            _, run = classifier.load(self.folder / CLASSIFIER)
            if (run["classes"], len(run["parts"])) != (list(self.classes), self._parts):
                raise RuntimeError(
                    f"{self.folder} was changed since this segmenter was loaded, and now knows {some(run['classes'])}: "
                    "load it again"
                )
            old = self.parts()
            digests = {image: digest for part in old for image, digest in part.digests.items()}
            if taken := [image for image in dataset.names for part in old if image in part.tags]:
                raise ValueError(f"images must have new names; those of the segmenter have {some(taken)} too")
            positive = set(new.values())
            negatives = [
                image
                for part in old
                for image, tags in part.tags.items()
                if name not in tags and part.digests[image] not in positive
            ]
            digests |= new
            task = Task(name, dataset.names, tuple(negatives), digests)
            stages = Stages(
                self.folder, self.backbone, self.config, self.device, digests, f"add {name}", progress, checkpoint_share
            )
            drawn = task.images(self.config.seed).items()
            stages.check_kept(old, [image for (image, _), present in drawn if not present])
            part, classes = Part.begin(self.folder, len(old), dataset, list(new.values())), (*self.classes, name)
            stages.check_room(part, classes)
            stages.features(dataset)
            nets = stages.localization([task], replace=True) | {known: self.localizer(known) for known in self.classes}
            stages.points(part, nets, classes)
            self.classifier = stages.classifier(classes, [*old, part])
            self.classes, self._parts = classes, len(old) + 1

    def _numbers(self, classes: Sequence[str]) -> np.ndarray:
        """What the labels of masks of ``classes`` are here, uint8 (256,)."""
        if unknown := [name for name in classes if name not in self.classes]:
            raise ValueError(f"the segmenter knows {some(self.classes)}; the data has {some(unknown)} too")
        table = np.arange(256, dtype=np.uint8)
        table[1 : len(classes) + 1] = [self.classes.index(name) + 1 for name in classes]
        return table


def _found(metric: MeanIoU) -> dict[str, Any]:
    mean, classes = metric.compute()
    return {"mean": mean, "classes": classes}


def _images_of(name: str, images: Any, skip_bad: bool) -> TaggedImages:
    """The images of class ``name``."""
    folder = quote(name, safe="")
    if isinstance(images, TaggedImages):
        if name not in images.classes:
            raise ValueError(f"images must have the tag {name}; their tags are {some(images.classes)}")
        dataset = images.subset(np.flatnonzero(images.tags[:, images.classes.index(name)]))
        dataset = dataset.renamed([f"{folder}/{image}" for image in dataset.names])
    else:
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(
                f"images must be a sequence of images or files, got one {type(images).__name__}: put it in []"
            )
        on_disk = [isinstance(image, (str, os.PathLike)) for image in images]
        names = [
            f"{folder}/{Path(image).stem if stored else number}"
            for number, (image, stored) in enumerate(zip(images, on_disk, strict=True))
        ]
        sources = [
            Path(image) if stored else np.asarray(_rgb(image)) for image, stored in zip(images, on_disk, strict=True)
        ]
        dataset = TaggedImages(names, (name,), np.ones((len(names), 1), bool), sources)
        if all(on_disk) and on_disk:
            dataset = checked(dataset, sources[0].parent, skip_bad=skip_bad)
    if not len(dataset):
        raise ValueError(f"images must have at least one of class {name}, got none")
    return dataset


def _rgb(image: Picture) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(f"an array must be an image uint8 (h, w, 3), got {image.dtype} {image.shape}")
        return Image.fromarray(image)
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise TypeError(f"image must be an image, its file or an array uint8 (h, w, 3), got {type(image).__name__}")
    return in_rgb(image) if isinstance(image, Image.Image) else read_rgb(image)


def _masked(dataset: TaggedImages, what: str, progress: bool) -> Any:
    """Image and mask of those of ``dataset`` that have one, under a bar."""
    if not dataset.has_masks:
        raise ValueError("evaluation needs masks; none of the images has one")
    for index in tqdm(range(len(dataset)), desc=what, unit="image", disable=None if progress else True):
        mask = dataset.mask(index)
        if mask is not None:
            yield dataset.image(index), mask


def _refined(image: Image.Image, probabilities: Tensor) -> np.ndarray:
    """The labels after the CRF."""
    return crf.refine(np.array(image), probabilities.cpu().numpy()).argmax(0).astype(np.uint8)


def _array(labels: Tensor) -> np.ndarray:
    array: np.ndarray = labels.to(torch.uint8).cpu().numpy()
    return array
