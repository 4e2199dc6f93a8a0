"""Masks out of image files, as class numbers."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

IGNORED = 255
"""In a mask: a pixel that counts nowhere (VOC's borders)."""
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_INDICES = ("P", "L", "1", *_SIXTEEN_BITS)


def read_mask(file: str | os.PathLike[str], numbers: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """A mask, uint8 (h, w): 0 background, 1 … C the classes, ``IGNORED`` elsewhere.

    The file holds numbers: a palette image (its indices are read, never its colours) or grey.

    Args:
        numbers: int16 (256,), what a number in the file stands for, −1 for nothing; see :func:`labels`.
        size: (width, height) that it must have.

    Raises:
        ValueError: a number that stands for nothing, another size, or an image of colours.
        Exception: as for :func:`~moe_kernels.models.data.rgb.read_rgb`.
    """
    with Image.open(file) as image:
        if image.mode not in _INDICES:
            raise ValueError(f"expected a palette or grey image of class numbers, got mode {image.mode}")
        if size is not None and image.size != size:
            raise ValueError(f"expected the size of its image, {_by(size)}, got {_by(image.size)}")
        return classes_of(np.asarray(image), numbers)


def classes_of(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """What the ``values`` (h, w) of a mask stand for, uint8, by the table ``numbers`` of :func:`labels`.

    Raises:
        ValueError: a value that stands for nothing.
    """
    inside = values if values.dtype in (np.uint8, bool) else np.clip(values, -1, len(numbers))
    table = np.append(numbers, (-1, -1))  # for what is too large, and for −1
    found = table[inside.astype(np.int64)]
    if (found < 0).any():
        unknown = np.unique(values[found < 0])
        raise ValueError(f"unknown label {', '.join(map(str, unknown[:8]))}; known are {ranges(numbers)}")
    return found.astype(np.uint8)


def labels(count: int, values: list[int] | None = None) -> np.ndarray:
    """What the numbers in a mask file stand for: 0 the background, ``IGNORED`` nothing, ``values`` the classes.

    Args:
        count: of classes.
        values: the number of each class in the files, by default 1 … ``count``.

    Raises:
        ValueError: a number outside 1 … 254.
    """
    values = list(range(1, count + 1)) if values is None else values
    if not all(0 < value < IGNORED for value in values):
        raise ValueError(
            f"the classes' numbers in masks must be in 1 … {IGNORED - 1}, got {min(values)} … {max(values)}"
        )
    numbers = np.full(IGNORED + 1, -1, np.int16)
    numbers[values] = np.arange(1, count + 1)
    numbers[[0, IGNORED]] = 0, IGNORED
    return numbers


def size_of(file: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height, from the head of the file."""
    with Image.open(file) as image:
        return image.size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def ranges(numbers: np.ndarray) -> str:
    """The numbers that stand for something: 0–20, 255."""
    known = np.flatnonzero(numbers >= 0)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
