"""A plain folder: images/, a table tags.csv of what is in them, and masks/ for those that have one.

The table has the two columns ``file`` and ``tags``; several tags are separated by spaces or semicolons:

    file,tags
    beach.jpg,person dog
    kitchen.png,chair;dining table
    wall.jpg,

A row without tags says that none of the classes is there. Where a row has a semicolon its tags may hold spaces.
What the numbers in the masks stand for is said by class_names.txt, a class a line, from 1: by the tags of the table
alone, which may lack a class, they would be another's.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ...data.images import EXTENSIONS, is_image, some
from . import class_names
from .tagged import TaggedImages, checked

EXPECTED = "images/, tags.csv with the columns file and tags, perhaps masks/<name>.png and class_names.txt"
_TABLE = "tags.csv"


def find(root: Path) -> Path | None:
    """``root`` where it has images/ and tags.csv."""
    return root if (root / "images").is_dir() and (root / _TABLE).is_file() else None


def load(
    root: str | os.PathLike[str], *, classes: Sequence[str] | None = None, masks: bool = True, skip_bad: bool = False
) -> TaggedImages:
    """The images of the table, every file of which can be read, in the order of the table.

    Args:
        root: the folder with images/ and tags.csv. A file in the table is a path in images/; its suffix may be missing.
        classes: in the order of the masks' numbers, from 1; by default the lines of class_names.txt (those with a
            leading _ do not count), or where there is none, and no mask is read, the tags in the table, sorted.
        masks: with the masks.
        skip_bad: leave out images whose picture or mask cannot be read, with a warning.

    Raises:
        ValueError: another layout; a table without the two columns or without rows, with a file twice or one that is
            not there; an image that the table does not have; a tag that is not in ``classes``; two images of one name;
            masks whose numbers nothing explains; files that cannot be read (all are named).
    """
    root = Path(os.path.abspath(root))
    if find(root) is None:
        raise ValueError(f"{root} is no plain folder of tagged images: expected {EXPECTED}")
    table, files = _rows(root / _TABLE), _images(root / "images")
    known = files | {path: path for path in files.values()}
    if unknown := [file for file in table if file not in known]:
        raise ValueError(f"{root / _TABLE}: there is no image {', '.join(map(repr, unknown[:8]))} in {root / 'images'}")
    found = {file: known[file] for file in table}
    if untold := sorted(set(files.values()) - set(found.values())):
        raise ValueError(
            f"{root / _TABLE} says nothing of {len(untold)} images: {some(untold)}; give each a row, "
            "without tags where no class is in it"
        )
    names = [PurePosixPath(path).with_suffix("").as_posix() for path in found.values()]
    beside = [root / "masks" / f"{name}.png" for name in names]
    found_masks = [mask if masks and mask.is_file() else None for mask in beside]
    classes = class_names.read(root) if classes is None else classes
    if not classes:
        if any(found_masks):
            raise ValueError(
                f"{root} has masks, and nothing says what their numbers stand for: write {class_names.FILE} there, "
                "a class a line, in the order of their numbers from 1"
            )
        classes = sorted({tag for tags in table.values() for tag in tags})
        if not classes:
            raise ValueError(f"{root / _TABLE} has no tag")
    for file, tags in table.items():
        if unknown := [tag for tag in tags if tag not in classes]:
            raise ValueError(f"{root / _TABLE}: {file} has the tag {some(unknown)}; classes are {some(classes)}")
    return checked(
        TaggedImages(
            names,
            classes,
            np.array([[name in tags for name in classes] for tags in table.values()]),
            [root / "images" / path for path in found.values()],
            found_masks,
        ),
        root,
        skip_bad=skip_bad,
    )


def _rows(table: Path) -> dict[str, list[str]]:
    """File → tags, as they stand in the table."""
    rows: dict[str, list[str]] = {}
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} must be UTF-8: {error}") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        if not {"file", "tags"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table} must have the columns file and tags, got {some(reader.fieldnames or ())}")
        for row in reader:
            name, tags = (row["file"] or "").strip(), row["tags"] or ""
            if row.get(None):
                raise ValueError(
                    f"{table}, line {reader.line_num}: more than two columns; separate tags by ; or a space"
                )
            if name in rows:
                raise ValueError(f"{table}, line {reader.line_num}: {name} is there already")
            rows[name] = [tag.strip() for tag in tags.split(";")] if ";" in tags else tags.split()
            rows[name] = [tag for tag in rows[name] if tag]
    if not rows:
        raise ValueError(f"{table} has no row")
    return rows


def _images(folder: Path) -> dict[str, str]:
    """Path without suffix → path, of the images under ``folder``, both relative to it."""
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not is_image(path.name) or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.with_suffix("").as_posix()
        if name in files:
            raise ValueError(f"{folder} has two images of one name, {files[name]} and {inside.as_posix()}")
        files[name] = inside.as_posix()
    if not files:
        raise ValueError(f"{folder} has no image ({', '.join(EXTENSIONS)})")
    return files
