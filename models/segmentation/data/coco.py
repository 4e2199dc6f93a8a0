"""The layout of COCO: a folder of images and annotations/instances_<split>.json, whose objects are the tags."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np

from ... import files
from ...data.images import some
from .pixels import labels
from .tagged import TaggedImages, checked

EXPECTED = "annotations/instances_<split>.json and <split>/*.jpg, perhaps SegmentationClass/<split>/*.png"
MASK_NUMBERS = ("position", "id")


def find(root: Path) -> Path | None:
    """``root`` where it has annotations of instances."""
    return root if any(root.glob("annotations/instances_*.json")) else None


def load(
    root: str | os.PathLike[str],
    split: str = "train2017",
    *,
    mask_numbers: str = "position",
    masks: bool = True,
    skip_bad: bool = False,
) -> TaggedImages:
    """The images of one json, every file of which can be read.

    The classes are its categories in the order of their ids, which may have gaps (COCO's are 80 of 1 … 90). Every
    annotated object counts, crowds too; an image without objects has no tag.

    Args:
        root: the folder with annotations/. Images are in ``root/<split>`` or ``root/images/<split>``; masks, as some
            tools make them of the objects, in ``root/SegmentationClass/<split>`` or ``root/masks/<split>``.
        split: ``"train2017"``, ``"val2014"``, …
        mask_numbers: the numbers in the masks: ``"position"``, 1 … 80 in the classes' order, or ``"id"``, 1 … 90.
        masks: with the masks.
        skip_bad: leave out images whose picture or mask cannot be read, with a warning.

    Raises:
        ValueError: no such json, one that is not COCO's or names no image, an id that is of nothing or of two things,
            or files that cannot be read (all are named).
    """
    if mask_numbers not in MASK_NUMBERS:
        raise ValueError(f"mask_numbers must be one of {', '.join(MASK_NUMBERS)}, got {mask_numbers!r}")
    root = Path(os.path.abspath(root))
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        there = sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
        raise ValueError(f"there is no {file}; there are the splits {some(there)}")
    content = files.read_json(file)
    try:
        categories = {
            int(item["id"]): str(item["name"]) for item in sorted(content["categories"], key=lambda c: c["id"])
        }
        pictures = {int(item["id"]): str(item["file_name"]) for item in content["images"]}
        pairs = [(int(item["image_id"]), int(item["category_id"])) for item in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not of COCO's form (categories, images, annotations): {error!r}") from error
    for what, given in (("categories", categories), ("images", pictures)):
        if len(given) < len(content[what]) or not given:
            raise ValueError(
                f"{file}: {what} must be some, each with an id of its own, got {len(content[what])}, {len(given)} ids"
            )
    rows, columns = ({key: place for place, key in enumerate(given)} for given in (pictures, categories))
    tags = np.zeros((len(rows), len(columns)), bool)
    for image, category in pairs:
        if image not in rows or category not in columns:
            raise ValueError(
                f"{file}: an annotation has image_id {image}, category_id {category}; one of them is of nothing"
            )
        tags[rows[image], columns[category]] = True
    names = [PurePosixPath(name).with_suffix("").as_posix() for name in pictures.values()]
    folder = _one_of(root / split, root / "images" / split)
    beside = _one_of(root / "SegmentationClass" / split, root / "masks" / split)
    found = [beside / f"{name}.png" for name in names]
    numbers = labels(len(categories), list(categories) if mask_numbers == "id" else None)
    data = TaggedImages(
        names,
        tuple(categories.values()),
        tags,
        [folder / name for name in pictures.values()],
        [mask if masks and mask.is_file() else None for mask in found],
        numbers=numbers,
    )
    return checked(data, root, skip_bad=skip_bad)


def _one_of(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[0])
