"""The data of a target task: images to train on and to test on, from folders or from tensors.

The transforms are DTNH's (section V-A): resize to 256×256, a random crop of 224×224 and a random mirror in training,
the middle in testing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..data.checking import digests, unreadable
from ..data.domains import ImageDataset
from ..data.images import (
    EXTENSIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Folder,
    images_in,
    refuse_or_leave_out,
    some,
    subfolders,
    to_tensor,
)
from ..weights import digest

_TRAIN, _TEST = "train", "test"


@dataclass(frozen=True)
class Target:
    """A target task.

    Fields:
        name: as tables show it.
        classes: names of the classes; a label is an index into them.
        train: to train on, augmented with randomness from torch's default generator only.
        plain: the same items in the same order, without chance.
        test: other items, without chance.
        mean, std: what the images were normalized with, a value a channel.
        origin: what else the images are determined by, plain JSON: a digest of the content, sizes, the split.

    Raises:
        ValueError: fewer than two classes, a part without images, ``train`` and ``plain`` of different length, or a
            label that is not of a class.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageDataset
    plain: ImageDataset
    test: ImageDataset
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # numbers of any library, as Python's own
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if len(self.classes) < 2:
            raise ValueError(f"classes must be at least two, got {len(self.classes)}: {some(self.classes)}")
        if len(self.train) != len(self.plain):
            raise ValueError(f"train and plain must have the same items, got {len(self.train)} and {len(self.plain)}")
        for name in (_TRAIN, _TEST):
            labels = getattr(self, name).labels
            if not len(labels):
                raise ValueError(f"{name} must have at least one image, got none")
            if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
                raise ValueError(
                    f"labels of {name} must be in 0 … {len(self.classes) - 1}, got {int(labels.min())} … "
                    f"{int(labels.max())}"
                )

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the tensors of its items, plain JSON: equal in every process, and of no other task.

        ``name``, ``classes``, ``train`` and ``test`` (how many images), ``mean``, ``std`` and what ``origin`` has:
        ``content``, a digest of names and bytes of the files, or of the tensors; ``crop``, and ``resize`` and
        ``split`` (``null``, or its seed and numbers a class) of files, or ``shape`` and ``mirror`` of tensors; and
        ``fold`` of a fold.
        """
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train": len(self.train),
            "test": len(self.test),
            "mean": list(self.mean),
            "std": list(self.std),
            **self.origin,
        }

    def fold(self, index: int, folds: int, seed: int = 0) -> Target:
        """The task of one fold of ``folds``: to train on all of ``train`` but that fold, and to be tested on it.

        Every class is dealt out evenly. ``test`` is not touched.

        Raises:
            ValueError: fewer than two folds, more than there are images, or no such ``index``.
        """
        if not 2 <= folds <= len(self.train):
            raise ValueError(f"folds must be in 2 … {len(self.train)}, the number of images, got {folds}")
        if not 0 <= index < folds:
            raise ValueError(f"index must be in 0 … {folds - 1}, got {index}")
        draw, labels = np.random.default_rng(seed), self.train.labels.numpy()
        dealt = np.concatenate([draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
        tested = np.zeros(len(labels), bool)
        tested[dealt[index::folds]] = True
        kept, out = np.flatnonzero(~tested), np.flatnonzero(tested)
        return replace(
            self,
            train=Part(self.train, kept),
            plain=Part(self.plain, kept),
            test=Part(self.plain, out),
            origin={**self.origin, "fold": {"index": index, "folds": folds, "seed": seed}},
        )


class Part(ImageDataset):
    """The items ``indices`` of ``whole``."""

    def __init__(self, whole: ImageDataset, indices: np.ndarray) -> None:
        self.whole, self.indices, self.labels = whole, indices, whole.labels[torch.from_numpy(indices)]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.whole[int(self.indices[index])]


class Tensors(ImageDataset):
    """Images in memory, float32 (N, C, H, W), and labels int64 (N,).

    Args:
        crop: height and width of an item, cut out of the middle; by default the whole image.
        chance: cut at random instead.
        mirror: and half of them from right to left.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, crop: int | None = None, chance: bool = False, mirror: bool = False
    ) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be floats (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one an image, got {tuple(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        if crop is not None and not 1 <= crop <= min(images.shape[-2:]):
            raise ValueError(f"crop must be in 1 … {min(images.shape[-2:])}, the size of the images, got {crop}")
        self.images, self.labels, self.chance, self.mirror = images, labels.long(), chance, mirror
        self.size = tuple(images.shape[-2:]) if crop is None else (crop, crop)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        free = [whole - cut + 1 for whole, cut in zip(image.shape[-2:], self.size, strict=True)]
        top, left = (int(torch.randint(some, ())) if self.chance else (some - 1) // 2 for some in free)
        image = image[:, top : top + self.size[0], left : left + self.size[1]]
        if self.mirror and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image.clone(), int(self.labels[index])


def from_tensors(
    name: str,
    classes: Sequence[str],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    crop: int | None = None,
    mirror: bool = False,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> Target:
    """A task from images float32 (N, C, H, W), already normalized, and labels (N,).

    Args:
        crop: size of the random crop in training and of the middle in testing; by default images stay whole.
        mirror: in training, turn half of the images from right to left.
    """
    plain, tested = (Tensors(*part, crop=crop) for part in (train, test))
    content = {"train": plain.images, "train labels": plain.labels, "test": tested.images, "test labels": tested.labels}
    return Target(
        name,
        tuple(classes),
        Tensors(*train, crop=crop, chance=True, mirror=mirror),
        plain,
        tested,
        mean,
        std,
        {"crop": crop, "mirror": mirror, "shape": list(plain.images.shape[1:]), "content": digest(content)},
    )


def transform(
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    augment: bool,
) -> v2.Compose:
    """The paper's: an RGB image to float32 (3, crop, crop), cut out and mirrored at random or the middle as it is."""
    cut = [v2.RandomCrop(crop), v2.RandomHorizontalFlip()] if augment else [v2.CenterCrop(crop)]
    return v2.Compose([v2.Resize((resize, resize)), *cut, *to_tensor(mean, std)])


def load(
    root: str | os.PathLike[str],
    *,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
    resize: int = 256,
    crop: int = 224,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    skip_bad: bool = False,
) -> Target:
    """The task under ``root``, every image of which can be decoded.

    Either root/train/<class>/<image> and root/test/<class>/<image>; or root/<class>/<image>, of which
    ``train_per_class`` images of each class, drawn with ``seed``, are to train on and ``test_per_class`` of the others
    (by default all) to test on, as the paper has Caltech 256 with 30 or 60 and 20. The number is then part of the name.

    All images are decoded once before this returns; later calls decode only files that are new or changed. They are
    :func:`~moe_kernels.models.data.rgb.in_rgb`, transparent ones as ``ImageFolder`` shows them.

    Args:
        resize, crop: size of the whole image, and of what is cut out of it.
        skip_bad: leave out files that cannot be decoded, with a warning, instead of raising.

    Raises:
        ValueError: ``root`` is missing or of another form, its parts differ in their classes, a class has no or too
            few images in a part, or files cannot be decoded (all are named).
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise ValueError(f"root must be a folder with images, {root} is {'a file' if root.exists() else 'missing'}")
    if not 1 <= crop <= resize:
        raise ValueError(f"crop must be in 1 … {resize}, the size after resize, got {crop}")
    folders = [folder.name for folder in subfolders(root)]
    divided = _TRAIN in folders and _TEST in folders
    if divided and not (train_per_class is None and test_per_class is None):
        raise ValueError(f"train_per_class and test_per_class are for a folder without {_TRAIN} and {_TEST}: {root}")
    if not divided and train_per_class is None:
        raise ValueError(
            f"root must have the folders {_TRAIN} and {_TEST}, or one folder a class and train_per_class "
            f"(--train-per-class); {root} has {some(folders)}"
        )
    places = [root / _TRAIN, root / _TEST] if divided else [root]
    classes = _classes(places)
    listed = [list(images_in(place, classes)) for place in places]
    _check_classes(places, listed, classes)
    bad = unreadable([file for items in listed for file, _ in items], root)
    refuse_or_leave_out(bad, sum(map(len, listed)), root, skip_bad=skip_bad)
    listed = [[item for item in items if item[0] not in bad] for items in listed]
    _check_classes(places, listed, classes)
    split = None
    if train_per_class is not None:
        listed = _split(listed[0], classes, train_per_class, test_per_class, seed)
        split = {"seed": seed, "train_per_class": train_per_class, "test_per_class": test_per_class}
    trained, tested = listed
    augmented, plain = (transform(resize, crop, mean, std, augment=augment) for augment in (True, False))
    return Target(
        root.name if divided else f"{root.name}-{train_per_class}",
        classes,
        _folder(trained, augmented),
        _folder(trained, plain),
        _folder(tested, plain),
        mean,
        std,
        {"resize": resize, "crop": crop, "split": split, "content": _content(listed, root)},
    )


def _classes(places: Sequence[Path]) -> tuple[str, ...]:
    named = [tuple(folder.name for folder in subfolders(place)) for place in places]
    for place, names in zip(places, named, strict=True):
        if names != named[0]:
            differ = sorted(set(names) ^ set(named[0]))
            raise ValueError(f"{place} and {places[0]} must have the same classes; they differ in {some(differ)}")
        if len(names) < 2:
            raise ValueError(
                f"{place} must have one folder of images ({', '.join(EXTENSIONS)}) a class, at least two; "
                f"it has {some(names)}"
            )
    return named[0]


_Items = list[tuple[str, int]]


def _check_classes(places: Sequence[Path], listed: Sequence[_Items], classes: Sequence[str]) -> None:
    for place, items in zip(places, listed, strict=True):
        if empty := sorted(set(range(len(classes))) - {label for _, label in items}):
            lacking = some([classes[label] for label in empty])
            raise ValueError(f"{place} must have images that can be read of every class; it has none of {lacking}")


def _split(items: _Items, classes: Sequence[str], train: int, test: int | None, seed: int) -> list[_Items]:
    """``train`` items of each class, and ``test`` (or all) of the others, in the order of ``items``."""
    for name, value in (("train_per_class", train), ("test_per_class", test)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    needed = train + (1 if test is None else test)
    draw, labels = np.random.default_rng(seed), np.array([label for _, label in items], np.int64)
    parts: list[list[int]] = [[], []]
    for label, name in enumerate(classes):
        shuffled = draw.permutation(np.flatnonzero(labels == label))
        if len(shuffled) < needed:
            raise ValueError(
                f"class {name} has {len(shuffled)} images, too few for {train} to train on and "
                f"{'some' if test is None else test} to test on"
            )
        parts[0] += shuffled[:train].tolist()
        parts[1] += shuffled[train : None if test is None else needed].tolist()
    return [[items[index] for index in sorted(part)] for part in parts]


def _content(parts: Sequence[_Items], root: Path) -> str:
    """SHA-256 of the names under ``root``, the labels and the bytes of the files of each part."""
    found = digests([file for items in parts for file, _ in items], root)
    told = [[(os.path.relpath(file, root), label, found[file]) for file, label in items] for items in parts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _folder(items: _Items, transform: Callable[[Image.Image], Tensor]) -> Folder:
    return Folder(
        [file for file, _ in items], torch.tensor([label for _, label in items], dtype=torch.int64), transform
    )
