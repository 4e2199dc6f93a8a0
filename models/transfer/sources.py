"""Two sources and three targets, drawn without a download, so that each source suits some targets and not others.

Sources, to pretrain on: ``letters``, strokes on all sorts of grounds (:mod:`~moe_kernels.models.data.letters`), whose
classes are shapes and whose grounds say nothing; and ``textures``, without any shape, whose classes are the direction,
coarseness and grain of waves. Targets, with few images to train on: handwritten digits ``inverted`` (dark ink on wavy
textures) and as a ``sketch`` (:mod:`~moe_kernels.models.data.digits`), for which the texture is what has to be
overlooked; and ``weaves``, classes of which are the pair of directions in which two waves cross.

The digits are real, scikit-learn's; none of them is in a source, and each is in one target, to train on or to test on.
What is drawn depends on a seed and an index, and no index is in two parts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..data import digits, letters
from ..data.drawing import MEAN, STD, colour, generators, mix, normalize, per_image, waves
from ..data.splits import seed_hash
from .data import Target, from_tensors

SOURCES = ("letters", "textures")
TARGETS = ("inverted", "sketch", "weaves")

SIZE, CANVAS = digits.SIZE, digits.CANVAS
"""What is seen of an image, and what it is randomly cut out of in training."""

_STYLES = ("inverted", "sketch")
_DIRECTIONS, _CROSSED, _GRAINS = 8, 5, 6
_TEXTURES = tuple(
    f"{grain} {scale} at {180 * direction / _DIRECTIONS:g}°"
    for grain in ("striped", "grainy")
    for scale in ("fine", "coarse")
    for direction in range(_DIRECTIONS)
)
_WEAVES = tuple(combinations(range(_CROSSED), 2))


def source(name: str, count: int = 6400, seed: int = 0) -> Target:
    """``count`` images of a source; the last tenth is to test on.

    Raises:
        ValueError: no such source, or fewer than two images a class.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}, got {name!r}")
    classes = letters.CLASSES if name == "letters" else _TEXTURES
    if count < 2 * len(classes):
        raise ValueError(f"count must be at least {2 * len(classes)}, two for each class of {name}, got {count}")
    if name == "letters":
        images, labels = letters.load(count, seed)
        images = pad(images, 4 * (digits.MARGIN,), mode="replicate")
    else:
        images, labels = textures(np.arange(count), seed)
    tested = max(len(classes), count // 10)
    return _task(name, classes, (images[:-tested], labels[:-tested]), (images[-tested:], labels[-tested:]), seed=seed)


def target(
    name: str,
    per_class: int = 10,
    tested: int = 40,
    seed: int = 0,
    size: int = SIZE,
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Target:
    """A target with ``per_class`` images of each of its ten classes to train on and ``tested`` to test on.

    Images of another ``size`` are interpolated; ``mean`` and ``std``, a value a channel, are what they are normalized
    with.

    Raises:
        ValueError: no such target, or more images than there are.
    """
    if name not in TARGETS:
        raise ValueError(f"name must be one of {', '.join(TARGETS)}, got {name!r}")
    if min(per_class, tested) < 1:
        raise ValueError(f"per_class and tested must be at least 1, got {per_class} and {tested}")
    if name not in _STYLES:
        count = 10 * (per_class + tested)
        images, labels = weaves(np.arange(count), seed)
        train, test = slice(None, 10 * per_class), slice(10 * per_class, None)
        classes = tuple(f"{180 * a / _CROSSED:g}° × {180 * b / _CROSSED:g}°" for a, b in _WEAVES)
        return _task(
            name, classes, (images[train], labels[train]), (images[test], labels[test]), size, mean, std, seed=seed
        )

    ink, labels = digits.scanned()
    half = digits.partition(labels, len(_STYLES), seed)[_STYLES.index(name)]
    draw = np.random.default_rng((seed, _STYLES.index(name)))
    of_class = [draw.permutation(half[labels[half] == label]) for label in range(len(digits.CLASSES))]
    if (least := min(map(len, of_class))) < per_class + tested:
        raise ValueError(f"per_class and tested must be at most {least} together, got {per_class} and {tested}")
    parts = []
    for chosen in (slice(per_class), slice(per_class, per_class + tested)):
        indices = np.sort(np.concatenate([some[chosen] for some in of_class]))
        images = normalize(digits.render(name, ink[indices], seed, indices))
        parts.append((images, torch.from_numpy(labels[indices])))
    return _task(name, digits.CLASSES, parts[0], parts[1], size, mean, std, seed=seed)


def textures(indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Textures ``indices`` (N,) of the source: normalized images (N, 3, CANVAS, CANVAS) and labels int64 (N,).

    Striped ones are one wave, grainy ones many of about the same direction and length.
    """
    labels = indices % len(_TEXTURES)
    chance, noise = _chance("textures", seed, indices)
    grainy, coarse, direction = np.unravel_index(labels, (2, 2, _DIRECTIONS))
    directions = _turned(direction[:, None], chance[:, 8:9], _DIRECTIONS)
    lengths = np.where(coarse[:, None], 9 + 4 * chance[:, 9:10], 4 + 2 * chance[:, 9:10])
    spread, stretch, phase = chance[:, 10:].reshape(len(indices), 3, _GRAINS).swapaxes(0, 1)
    pattern = waves(lengths, directions, phase[:, :1], CANVAS)
    many = np.flatnonzero(grainy)
    pattern[many] = waves(
        lengths[many] * (0.7 + 0.6 * stretch[many]),
        directions[many] + 0.06 * (2 * spread[many] - 1),
        phase[many],
        CANVAS,
    ) / np.sqrt(_GRAINS)
    return _painted(pattern, chance, noise), torch.from_numpy(labels)


def weaves(indices: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Weaves ``indices`` (N,): normalized images (N, 3, CANVAS, CANVAS) and labels int64 (N,)."""
    labels = indices % len(_WEAVES)
    chance, noise = _chance("weaves", seed, indices)
    directions = _turned(np.array(_WEAVES)[labels], chance[:, 8:10], _CROSSED)
    pattern = waves(4 + 8 * chance[:, 10:12], directions, chance[:, 12:14], CANVAS)
    return _painted(pattern / np.sqrt(2), chance, noise), torch.from_numpy(labels)


def _chance(name: str, seed: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each image, uniform numbers in [0, 1) and normal ones (N, CANVAS, CANVAS)."""
    rngs = generators(seed_hash(name, seed), indices)
    return (
        np.stack([rng.random(10 + 3 * _GRAINS, np.float32) for rng in rngs]),
        np.stack([rng.standard_normal((CANVAS, CANVAS), np.float32) for rng in rngs]),
    )


def _turned(direction: np.ndarray, chance: np.ndarray, count: int) -> np.ndarray:
    """Direction (N, K) of ``count`` even ones, in half turns, off by up to a quarter of the way to the next."""
    return ((direction + 0.25 * (2 * chance - 1)) / count).astype(np.float32)


def _painted(pattern: np.ndarray, chance: np.ndarray, noise: np.ndarray) -> Tensor:
    """A pattern (N, H, W) of variance 1/2 in two colours drawn from ``chance[:, :8]``, with noise; normalized."""
    hue = chance[:, 0]
    one = colour(hue, 0.2 + 0.6 * chance[:, 1], 0.2 + 0.8 * chance[:, 2])
    other = colour(hue + 0.2 + 0.6 * chance[:, 3], 0.2 + 0.6 * chance[:, 4], 0.2 + 0.8 * chance[:, 5])
    opacity = np.clip(0.5 + 0.5 * pattern, 0, 1)
    return normalize(mix(per_image(one), per_image(other), opacity) + 0.1 * noise[:, None])


def _task(
    name: str,
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    size: int = SIZE,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    *,
    seed: int,
) -> Target:
    """A task of images that were drawn with ``seed`` and normalized with MEAN and STD."""
    if size != SIZE:
        canvas = round(CANVAS * size / SIZE)
        train, test = (
            (interpolate(images, size=(canvas, canvas), mode="bilinear", antialias=True), labels)
            for images, labels in (train, test)
        )
    if (mean, std) != (MEAN, STD):
        own_mean, own_std, new_mean, new_std = (
            torch.tensor(values)[:, None, None] for values in (MEAN, STD, mean, std)
        )
        train, test = (((images * own_std + own_mean - new_mean) / new_std, labels) for images, labels in (train, test))
    task = from_tensors(name, classes, train, test, crop=size, mean=mean, std=std)
    return replace(task, origin={"seed": seed, **task.origin})
