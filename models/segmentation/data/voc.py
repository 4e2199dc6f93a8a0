"""The layout of PASCAL VOC 2012, for its own images and for others that are kept the same way.

Lists of images come in two forms, names (``2007_000032``) and pairs of paths (``/JPEGImages/2007_000032.jpg
/SegmentationClassAug/2007_000032.png``), and the augmented training set of 10,582 images under several names.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from ...data.images import is_image, some
from . import class_names
from .tagged import TaggedImages, checked, tagged_by_masks

EXPECTED = "JPEGImages/, ImageSets/Segmentation/<split>.txt, Annotations/*.xml or SegmentationClass/*.png"
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
TRAIN_AUG = 10_582
_AUGMENTED = ("train_aug", "trainaug")
_TAGS = ("xml", "masks")


def find(root: Path) -> Path | None:
    """The folder with JPEGImages and ImageSets: ``root``, or VOC2012 in it."""
    for place in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (place / "JPEGImages").is_dir() and (place / "ImageSets").is_dir():
            return place
    return None


def load(
    root: str | os.PathLike[str],
    split: str = "train_aug",
    *,
    tags: str | None = None,
    classes: Sequence[str] | None = None,
    masks: bool = True,
    skip_bad: bool = False,
) -> TaggedImages:
    """The images of a list, every file of which can be read.

    Args:
        root: VOC2012, or VOCdevkit, or the folder of that.
        split: a list in ImageSets/Segmentation, else in ImageSets/Main (``"Main/train"`` says so), or a .txt file
            anywhere. ``"train_aug"`` is found as trainaug and in SegmentationAug too, or put together of train and aug.
        tags: from the objects of Annotations/*.xml (``"xml"``; difficult ones count), or from what the masks show
            (``"masks"``); by default from the masks of images that have no xml.
        classes: in the order of the masks' numbers, from 1; by default the lines of class_names.txt in ``root`` (those
            with a leading _ do not count), or where there is none VOC's 20.
        masks: with the masks; without them only those are read that tags are taken from.
        skip_bad: leave out images whose picture or mask cannot be read, with a warning.

    Masks are looked for in SegmentationClass, those of train_aug first in SegmentationClassAug; a list of pairs says
    which it means.

    Raises:
        ValueError: no such layout or list, one that names no image or one twice, an object of no class, an image with
            neither xml nor mask, or files that cannot be read (all are named).
    """
    if tags is not None and tags not in _TAGS:
        raise ValueError(f"tags must be one of {', '.join(_TAGS)}, got {tags!r}")
    root = Path(os.path.abspath(root))
    place = find(root)
    if place is None:
        raise ValueError(f"{root} has not the layout of VOC: expected {EXPECTED}")
    names, given = _listed(place, split)
    classes = tuple(classes) if classes is not None else class_names.read(place) or CLASSES
    with os.scandir(place / "JPEGImages") as entries:
        # of several forms of one picture the .jpg, which is VOC's own
        files = sorted(
            (entry.path for entry in entries if is_image(entry.name)), key=lambda path: path.endswith(".jpg")
        )
    there = {PurePosixPath(file).stem: file for file in files}
    images = [there.get(name, f"{place}/JPEGImages/{name}.jpg") for name in names]
    augmented = split in _AUGMENTED
    folders = ("SegmentationClassAug", "SegmentationClass")[:: 1 if augmented else -1]
    found = [_mask(place, name, given.get(name), folders) for name in names]
    annotations = [place / "Annotations" / f"{name}.xml" for name in names]
    by_xml = [tags != "masks" and file.exists() for file in annotations]
    for name, xml, mask in zip(names, by_xml, found, strict=True):
        if not xml and (tags == "xml" or mask is None):
            wanted = {"xml": "xml in Annotations", "masks": f"mask in {' or '.join(folders)}"}
            lacking = " or ".join(wanted[kind] for kind in ([tags] if tags else _TAGS))
            raise ValueError(f"image {name} of {split} has no tags: {place} has no {lacking} of it")
    shown = np.zeros((len(names), len(classes)), bool)
    for row in np.flatnonzero(by_xml):
        shown[row, _objects(annotations[row], classes)] = True
    if augmented and len(names) != TRAIN_AUG:
        warnings.warn(f"{split} lists {len(names):,} images; that of VOC 2012 lists {TRAIN_AUG:,}", stacklevel=2)
    kept = [mask if masks or not xml else None for mask, xml in zip(found, by_xml, strict=True)]
    data = checked(TaggedImages(names, classes, shown, images, kept), root, skip_bad=skip_bad)
    of_masks = {name for name, xml in zip(names, by_xml, strict=True) if not xml}
    return tagged_by_masks(data, [index for index, name in enumerate(data.names) if name in of_masks])


def _listed(place: Path, split: str) -> tuple[list[str], dict[str, Path]]:
    """The names in a list, in order, and the masks of those that it gives with them."""
    names: list[str] = []
    masks: dict[str, Path] = {}
    files = _lists(place, split)
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not (words := line.split()):
                continue
            # a second word may also be 1, 0 or -1: whether a class is in the image
            name = PurePosixPath(words[0]).stem if is_image(words[0]) else words[0]
            if len(words) > 1 and is_image(words[1]):
                path = PurePosixPath(words[1])
                masks[name] = place / path.parent.name / path.name
            names.append(name)
    where = " and ".join(map(str, files))
    if not names:
        raise ValueError(f"{where} lists no image")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where} lists {some(twice)} more than once")
    return names, masks


def _lists(place: Path, split: str) -> list[Path]:
    """The file of a split, or the two that are one together."""
    if split.endswith(".txt"):
        if not (file := Path(split)).is_file():
            raise ValueError(f"split {split}: there is no such file")
        return [file]
    sets = place / "ImageSets"
    for name in _AUGMENTED if split in _AUGMENTED else (split,):
        for folder in ("Segmentation", "SegmentationAug", "Main", "."):
            if (file := sets / folder / f"{name}.txt").is_file():
                return [file]
    parts = [sets / "Segmentation" / f"{name}.txt" for name in ("train", "aug")]
    if split in _AUGMENTED and all(part.is_file() for part in parts):
        return parts
    there = sorted(str(file.relative_to(sets).with_suffix("")) for file in sets.rglob("*.txt"))
    raise ValueError(f"there is no list {split!r} in {sets}; there are {some(there)}")


def _mask(place: Path, name: str, given: Path | None, folders: Sequence[str]) -> Path | None:
    places = [place / folder / f"{name}.png" for folder in folders]
    return next((file for file in ([given] if given else places) if file.is_file()), None)


def _objects(file: Path, classes: Sequence[str]) -> list[int]:
    """The classes of the objects in an annotation; their parts have names of their own and do not count."""
    try:
        names = [(item.findtext("name") or "").strip() for item in ElementTree.parse(file).getroot().iter("object")]
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is no XML: {error}") from error
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(
            f"{file}: {some(unknown)} is none of the classes, which are {some(classes)}; name others in classes= or "
            f"{class_names.FILE}"
        )
    return [classes.index(name) for name in names]
