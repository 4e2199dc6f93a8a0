"""A data set in the layout of VOC 2012 in small: coloured shapes on grey texture, small pictures of odd sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disc", "square", "cross", "ring")
_COLOURS = {"disc": (210, 40, 40), "square": (40, 180, 60), "cross": (50, 70, 220), "ring": (230, 210, 40)}
TRAIN, VAL = 16, 6
"""How many images each list has."""
# How pictures are stored, in turn; Pillow writes the third as CMYK. VOC's own are all of the first kind.
_FORMS = (("RGB", "jpg"), ("RGB", "png"), ("CMYK", "jpg"), ("RGB", "jpg"), ("P", "png"), ("RGBA", "png"))


def names(split: str) -> list[str]:
    """The images of ``"train"`` or ``"val"``."""
    numbers = range(TRAIN) if split == "train" else range(TRAIN, TRAIN + VAL)
    return [f"2007_{number:06d}" for number in numbers]


def contents(number: int) -> list[str]:
    """The classes in an image: every second has two, no class is in all of them."""
    return [CLASSES[number % 4], CLASSES[(number + 1 + number // 8) % 4]][: 1 + number % 2]


def make(folder: Path) -> Path:
    """Write the data set under ``folder``; the path to pass on, which ends in VOCdevkit/VOC2012.

    ``class_names.txt`` names the classes. Masks have borders of 255; annotations call every third object difficult.
    The lists are train, val, trainval and, in the form of two paths a line, train_aug, whose masks are in
    SegmentationClassAug.
    """
    root = folder / "VOCdevkit" / "VOC2012"
    places = ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation")
    for place in places:
        (root / place).mkdir(parents=True)
    (root / "class_names.txt").write_text("\n".join(("__ignore__", "_background_", *CLASSES)) + "\n")
    train, val = names("train"), names("val")
    for number, name in enumerate(train + val):
        picture, mask, boxes = draw(number)
        mode, suffix = _FORMS[number % len(_FORMS)]
        Image.fromarray(picture).convert(mode).save(root / "JPEGImages" / f"{name}.{suffix}", quality=95)
        save_mask(mask, root / "SegmentationClass" / f"{name}.png")
        if name in train:
            Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(_annotation(name, picture.shape, boxes))
    lists = {"train": train, "val": val, "trainval": train + val}
    lists["train_aug"] = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in train]
    for split, lines in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def draw(number: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """A picture (h, w, 3), its mask (h, w) and the boxes (class, (xmin, ymin, xmax, ymax)) from 1."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(41, 71, 2))
    grey = 110 + 25 * np.sin(np.arange(width) / rng.uniform(1, 4)) + rng.normal(0, 12, (height, width))
    picture = np.repeat(grey[..., None], 3, 2)
    mask = np.zeros((height, width), np.uint8)
    boxes = []
    present = contents(number)
    for turn, name in enumerate(present):
        # side by side, so that none hides another
        room = width // len(present)
        radius = int(rng.integers(8, min(room, height) // 2 - 1))
        x = turn * room + int(rng.integers(radius + 1, room - radius))
        y = int(rng.integers(radius + 1, height - radius))
        dy, dx = np.mgrid[:height, :width] - np.array([y, x])[:, None, None]
        inside = {
            "disc": np.hypot(dx, dy) <= radius,
            "square": np.maximum(abs(dx), abs(dy)) <= 0.8 * radius,
            "cross": (np.minimum(abs(dx), abs(dy)) <= radius / 3) & (np.maximum(abs(dx), abs(dy)) <= radius),
            "ring": (np.hypot(dx, dy) <= radius) & (np.hypot(dx, dy) >= 0.5 * radius),
        }[name]
        picture[inside] = np.array(_COLOURS[name]) + rng.normal(0, 12, (int(inside.sum()), 3))
        mask[_grown(inside) & ~inside] = 255
        mask[inside] = CLASSES.index(name) + 1
        rows, columns = np.flatnonzero(inside.any(1)) + 1, np.flatnonzero(inside.any(0)) + 1
        boxes.append((name, (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))))
    return np.clip(picture, 0, 255).astype(np.uint8), mask, boxes


def save_mask(mask: np.ndarray, path: Path) -> None:
    """As a palette image whose indices are the values and whose colours are VOC's."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((np.arange(256) >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    image = Image.fromarray(mask)
    image.putpalette(colours.tobytes())
    image.save(path)


def _grown(inside: np.ndarray) -> np.ndarray:
    padded = np.pad(inside, 1)
    return padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]


def _annotation(name: str, shape: tuple[int, ...], boxes: list[tuple[str, tuple[int, int, int, int]]]) -> str:
    objects = "".join(
        f"<object><name>{kind}</name><difficult>{int(turn % 3 == 1)}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        # the parts of a person have names of their own, which are no classes
        f"<part><name>head</name></part></object>"
        for turn, (kind, box) in enumerate(boxes)
    )
    return (
        f"<annotation><filename>{name}.jpg</filename><size><width>{shape[1]}</width><height>{shape[0]}</height>"
        f"<depth>3</depth></size><segmented>1</segmented>{objects}</annotation>"
    )
