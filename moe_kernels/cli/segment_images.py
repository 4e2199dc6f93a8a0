"""Which images a command of ``moe-kernels segment`` means."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_kernels.cli.segment_options import MaskNumbers, listed
from moe_kernels.models.data.images import is_image, some
from moe_kernels.models.segmentation import data
from moe_kernels.models.segmentation.data import TaggedImages, coco, voc
from moe_kernels.models.segmentation.data.tagged import checked


def load(
    root: Path,
    split: str | None,
    skip_bad: bool,
    classes: str | None = None,
    *,
    tags: str | None = None,
    mask_numbers: MaskNumbers | None = None,
    masks: bool = True,
) -> TaggedImages:
    only = None if classes is None else listed("classes", classes)
    choice = {"split": split, "tags": tags, "mask_numbers": mask_numbers and mask_numbers.value}
    given = {name: value for name, value in choice.items() if value is not None}
    found = data.load(root, masks=masks, skip_bad=skip_bad, **given)
    return found if only is None else found.only(only)


def default_test_split(root: Path) -> str | None:
    """The list that is judged by where none is asked for."""
    return "val" if voc.find(root) is not None else "val2017" if coco.find(root) is not None else None


def image_files(paths: list[Path], out: Path | None = None) -> dict[str, Path]:
    """The images of ``paths``, which are files or folders of them, by their path in there without the suffix.

    In a folder, what is hidden and what is in the folder ``out`` of results do not count.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        inner = [path] if path.is_file() else _inside(path, out)
        if not inner:
            raise ValueError(f"{path} holds no image")
        for file in inner:
            name = file.relative_to(path.parent if path.is_file() else path).with_suffix("").as_posix()
            if found.setdefault(name, file) != file:
                raise ValueError(f"images must have different names; {found[name]} and {file} are both {name}")
    return found


def _inside(folder: Path, out: Path | None) -> list[Path]:
    results = None if out is None else Path(os.path.relpath(out.resolve(), folder.resolve()))
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        # not where the results are in the folder itself: there is no telling them from images then
        if is_image(file.name) and not hidden and (results == Path() or results not in inside.parents):
            found.append(file)
    return found


def refuse_overwriting(paths: dict[str, Path], out: Path, endings: Sequence[str]) -> None:
    """Whether every result has a file of its own in ``out``, and none is one of the images."""
    targets = [out / f"{name}{ending}.png" for name in paths for ending in endings]
    images = {path.resolve() for path in paths.values()}
    if lost := [str(target) for target in targets if target.resolve() in images]:
        raise ValueError(f"out must be another folder: there images would be overwritten, {some(lost)}")
    if twice := [str(target) for target, count in Counter(targets).items() if count > 1]:
        raise ValueError(f"results must have different names; of two images would be {some(twice)}")


def tagged(paths: dict[str, Path], name: str, skip_bad: bool) -> TaggedImages:
    """Files that can be read, by name, all of the class ``name``."""
    root = Path(os.path.commonpath([path.absolute().parent for path in paths.values()]))
    return checked(
        TaggedImages(list(paths), [name], np.ones((len(paths), 1)), list(paths.values())), root, skip_bad=skip_bad
    )
