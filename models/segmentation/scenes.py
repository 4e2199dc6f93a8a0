"""Scenes of real handwritten digits on textured grounds, with tags and exact masks, drawn without a download.

A scene is one to three of scikit-learn's digits (:mod:`~moe_kernels.models.data.digits`), each of another class, on a
picture of 96×128. A digit is a sticker: strokes 36 to 60 pixels high, at a random place, in one colour on paper of
another that is cut around them; the ground is two waves between two colours, light or dark. The object that a mask
shows is the whole sticker, to the pixel: the paper around the strokes and in their holes too.

The digits of training scenes are never in validation scenes. A scene is a function of the seed, the part, the classes
and its number. :func:`pictures_of_letters` draws other objects in the same way, one a picture: capital letters, to
train a backbone with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ..data import digits, letters
from ..data.drawing import colour, mix, normalize, waves
from ..data.images import some
from ..data.splits import seed_hash
from .data.tagged import TaggedImages

SIZE = (96, 128)
CLASSES = digits.CLASSES
PARTS = ("train", "validation")

_SHARES = 3
"""Of the digits: all but the last share are to train with."""
_HEIGHTS = (36, 60)
_MOST = 3
"""Digits of a scene."""
_TRIES = 20
_NOISE = 0.03


def load(
    part: str, count: int, *, classes: Sequence[str] = CLASSES, always: Sequence[str] = (), seed: int = 0
) -> TaggedImages:
    """``count`` scenes of ``classes``, with masks; a smaller count is a prefix of a larger one.

    Args:
        part: of PARTS: which digits there may be.
        always: of ``classes``: one of these is in every scene, in turn.

    Raises:
        ValueError: no such part, or a class that is not there.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if unknown := [name for name in classes if name not in CLASSES]:
        raise ValueError(f"classes must be of {', '.join(CLASSES)}, got {some(unknown)}")
    if unknown := [name for name in always if name not in classes]:
        raise ValueError(f"always must be of the classes {', '.join(classes)}, got {some(unknown)}")
    ink, labels = digits.scanned()
    dealt = digits.partition(labels, _SHARES, seed)
    mine = np.concatenate(dealt[:-1]) if part == PARTS[0] else dealt[-1]
    of_class = {name: mine[labels[mine] == CLASSES.index(name)] for name in classes}
    pictures, masks = np.empty((count, *SIZE, 3), np.uint8), np.empty((count, *SIZE), np.uint8)
    group = "-".join([part, "".join(classes), *(["with", *always] if always else [])])
    for number in range(count):
        rng = np.random.default_rng((seed_hash(group, seed), number))
        first = [always[number % len(always)]] if always else []
        others = rng.permutation([name for name in classes if name not in first]).tolist()
        names = (first + others)[: rng.integers(1, _MOST + 1)]
        stickers = [_digit(ink[rng.choice(of_class[name])], rng.uniform(*_HEIGHTS)) for name in names]
        pictures[number], place = _paint(stickers, rng, SIZE)
        masks[number] = np.array([0, *(1 + list(classes).index(name) for name in names)])[place]
    tags = np.array([np.bincount(mask.ravel(), minlength=len(classes) + 1)[1:] > 0 for mask in masks])
    tags = tags.reshape(count, len(classes))
    return TaggedImages([f"{group}/{number:04}" for number in range(count)], classes, tags, pictures, masks)


def pictures_of_letters(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Capital letters, each on a square picture: normalized float32 (N, 3, ``size``, ``size``) and labels int64 (N,).

    They are half of the size to nearly all of it. Label i is ``letters.CLASSES``[i]; the classes are even.
    """
    labels = np.arange(count) % len(letters.CLASSES)
    rngs = [np.random.default_rng((seed_hash("letters", seed), number)) for number in range(count)]
    chance = np.array([rng.random(7, np.float32) for rng in rngs], np.float32).reshape(count, 7)
    images = np.empty((count, 3, size, size), np.float32)
    for image, distance, rng in zip(images, letters.distances(labels, chance), rngs, strict=True):
        sticker = _letter(distance, rng.uniform(0.5, 0.9) * size, rng.uniform(1.0, 2.2))
        image[:] = np.moveaxis(_paint([sticker], rng, (size, size))[0], -1, 0) / 255
    return normalize(images), torch.from_numpy(labels)


def _digit(ink: np.ndarray, height: float) -> np.ndarray:
    """Ink (8, 8) as a sticker (2, h, w): its strokes, and the paper around them and in their holes.

    Cubic interpolation and then a steep edge, as ``digits`` has it. The paper is the ink of the cells around each.
    """
    cells = torch.from_numpy(np.pad(ink, 3))[None]
    # wider by two cells and back by one: a closing, whose holes are no holes
    paper = -max_pool2d(-max_pool2d(cells, 5, 1, 2), 3, 1, 1)
    side = round(height * cells.shape[-1] / ink.shape[-1])
    values = interpolate(torch.stack([cells, paper], 1), size=(side, side), mode="bicubic")[0].numpy()
    return _cut(np.clip((values - 0.35) / 0.35, 0, 1))


def _letter(distance: np.ndarray, height: float, half_width: float) -> np.ndarray:
    """The same from the distance (S, S) to a letter, which is about three quarters of S high."""
    scale = height / (0.75 * letters.SIZE)
    values = scale * interpolate(torch.from_numpy(distance)[None, None], scale_factor=scale, mode="bilinear")[0, 0]
    reach = np.array([half_width, half_width + 0.1 * letters.SIZE])[:, None, None]
    return _cut(np.clip(scale * reach + 0.5 - values.numpy(), 0, 1))


def _cut(sticker: np.ndarray) -> np.ndarray:
    """What of it is not empty."""
    rows, columns = np.flatnonzero(sticker[1].any(1)), np.flatnonzero(sticker[1].any(0))
    return sticker[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paint(stickers: Sequence[np.ndarray], rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """A picture uint8 (H, W, 3) and what is where, (H, W): 0 the ground, k + 1 sticker k. Their boxes do not meet.

    The first is always there; another that finds no place is left out.
    """
    hue, light = rng.random(), rng.random() < 0.5
    image, place = _ground(rng, size, hue, light), np.zeros(size, np.int64)
    taken = np.zeros(size, bool)
    for number, sticker in enumerate(stickers, 1):
        height, width = (min(side, limit) for side, limit in zip(sticker.shape[1:], size, strict=True))
        for _ in range(_TRIES):
            top, left = (rng.integers(limit - side + 1) for side, limit in zip((height, width), size, strict=True))
            box = (slice(top, top + height), slice(left, left + width))
            if not taken[box].any():
                break
        else:
            continue
        taken[box] = True
        strokes, paper = sticker[:, :height, :width]
        values = rng.uniform(0.55, 1.0) if light else rng.uniform(0.1, 0.45), rng.uniform(0, 0.25) + (not light) * 0.75
        colours = colour(rng.random(2), rng.uniform(0.1, 0.7, 2), values)[:, None, :, None, None]
        for one, opacity in zip(colours, (paper, strokes), strict=True):
            image[(slice(None), *box)] = mix(image[(slice(None), *box)][None], one, opacity[None])[0]
        place[box][paper >= 0.5] = number
    image += _NOISE * rng.standard_normal(image.shape, np.float32)
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return np.moveaxis(pixels, 0, -1), place


def _ground(rng: np.random.Generator, size: tuple[int, int], hue: float, light: bool) -> np.ndarray:
    """Two waves between two colours: (3, H, W)."""
    value = rng.uniform(0.55, 1.0, 2) if light else rng.uniform(0.1, 0.45, 2)
    one, other = colour([hue, hue + rng.uniform(0.1, 0.5)], rng.uniform(0.2, 0.8, 2), value)[:, None, :, None, None]
    chance = rng.random((3, 1, 2), np.float32)
    pattern = 0.5 + 0.25 * waves(5 + 20 * chance[0], chance[1], chance[2], max(size))[:, : size[0], : size[1]]
    return mix(one, other, pattern)[0]
