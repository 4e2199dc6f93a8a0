"""Capital letters drawn stroke by stroke, to pretrain on: what a network may know before it sees a digit.

Each letter is a few polylines and arcs, bent by a random affine map and drawn with random width and
colours, with anti-aliasing from the distance of each pixel to the nearest stroke. The four styles are of
none of the domains of ``digits``: full strokes on a gradient of two colours, dotted strokes, outlined
strokes on stripes, and strokes that throw a shadow on a chequered ground; each is drawn light on dark and
dark on light.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .drawing import colour, generators, mix, normalize, per_image, pixel_grid

CLASSES = tuple(string.ascii_uppercase)
SIZE = 32

# Strokes in [-1, 1]², y down: a line is the x and y of its points in turn, an arc is (centre x, centre y,
# radius x, radius y, from, to) in degrees, 0 to the right and 90 down.
_LINES: dict[str, tuple[tuple[float, ...], ...]] = {
    "A": ((-0.8, 1, 0, -1, 0.8, 1), (-0.48, 0.25, 0.48, 0.25)),
    "B": ((0.1, -1, -0.65, -1, -0.65, 1, 0.1, 1), (-0.65, -0.05, 0.1, -0.05)),
    "D": ((-0.1, -1, -0.7, -1, -0.7, 1, -0.1, 1),),
    "E": ((0.65, -1, -0.65, -1, -0.65, 1, 0.65, 1), (-0.65, 0, 0.45, 0)),
    "F": ((0.65, -1, -0.6, -1, -0.6, 1), (-0.6, 0, 0.45, 0)),
    "G": ((0.15, 0.1, 0.8, 0.1, 0.8, 0.75),),
    "H": ((-0.7, -1, -0.7, 1), (0.7, -1, 0.7, 1), (-0.7, 0, 0.7, 0)),
    "I": ((-0.4, -1, 0.4, -1), (0, -1, 0, 1), (-0.4, 1, 0.4, 1)),
    "J": ((0, -1, 0.7, -1), (0.45, -1, 0.45, 0.45)),
    "K": ((-0.65, -1, -0.65, 1), (0.7, -1, -0.65, 0.2), (-0.2, -0.2, 0.75, 1)),
    "L": ((-0.6, -1, -0.6, 1, 0.65, 1),),
    "M": ((-0.8, 1, -0.8, -1, 0, 0.3, 0.8, -1, 0.8, 1),),
    "N": ((-0.7, 1, -0.7, -1, 0.7, 1, 0.7, -1),),
    "P": ((-0.6, 1, -0.6, -1, 0.1, -1), (-0.6, 0.1, 0.1, 0.1)),
    "Q": ((0.15, 0.4, 0.85, 1.05),),
    "R": ((-0.6, 1, -0.6, -1, 0.1, -1), (-0.6, 0.05, 0.1, 0.05, 0.75, 1)),
    "T": ((-0.8, -1, 0.8, -1), (0, -1, 0, 1)),
    "U": ((-0.7, -1, -0.7, 0.35), (0.7, -1, 0.7, 0.35)),
    "V": ((-0.8, -1, 0, 1, 0.8, -1),),
    "W": ((-0.9, -1, -0.5, 1, 0, -0.4, 0.5, 1, 0.9, -1),),
    "X": ((-0.75, -1, 0.75, 1), (0.75, -1, -0.75, 1)),
    "Y": ((-0.75, -1, 0, 0, 0.75, -1), (0, 0, 0, 1)),
    "Z": ((-0.7, -1, 0.7, -1, -0.7, 1, 0.7, 1),),
}
_ARCS: dict[str, tuple[tuple[float, float, float, float, float, float], ...]] = {
    "B": ((0.1, -0.525, 0.5, 0.475, -90, 90), (0.1, 0.475, 0.62, 0.525, -90, 90)),
    "C": ((0.1, 0, 0.85, 1, 45, 315),),
    "D": ((-0.1, 0, 0.85, 1, -90, 90),),
    "G": ((0.1, 0, 0.9, 1, 50, 315),),
    "J": ((-0.05, 0.45, 0.5, 0.55, 0, 160),),
    "O": ((0, 0, 0.8, 1, 0, 360),),
    "P": ((0.1, -0.45, 0.6, 0.55, -90, 90),),
    "Q": ((0, 0, 0.8, 1, 0, 360),),
    "R": ((0.1, -0.475, 0.6, 0.525, -90, 90),),
    "S": ((0.02, -0.5, 0.63, 0.5, 330, 90), (0.0, 0.5, 0.66, 0.5, -90, 150)),
    "U": ((0, 0.35, 0.7, 0.65, 0, 180),),
}
_ARC_SEGMENTS = 10
_DOT_SPACING = 0.24
_CHUNK = 256


def load(count: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw letters: images float32 (N, 3, 32, 32), normalized like the digits, and labels int64 (N,).

    Label i is ``CLASSES``[i]; image n shows letter n mod 26, so the classes are even and a smaller count is
    a prefix of a larger one.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    indices = np.arange(count)
    labels = indices % len(CLASSES)
    images = np.empty((count, 3, SIZE, SIZE), np.float32)
    chance = np.empty((count, 24), np.float32)
    for row, rng in zip(chance, generators(seed, indices), strict=True):
        rng.random(out=row, dtype=np.float32)
    style = (chance[:, 0] * len(STYLES)).astype(np.int64)
    for letter, style_index, chosen in _groups(labels, style):
        distance = _distance(letter, chance[chosen, 1:8], dotted=STYLES[style_index] is _dotted)
        images[chosen] = STYLES[style_index](distance, chance[chosen, 8:])
    return normalize(images), torch.from_numpy(labels)


def distances(labels: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The distance in pixels to the nearest stroke of letters ``labels`` (N,): float32 (N, SIZE, SIZE).

    ``chance`` (N, 7), uniform in [0, 1), bends each letter.
    """
    found = np.empty((len(labels), SIZE, SIZE), np.float32)
    for letter, _, chosen in _groups(labels, np.zeros_like(labels)):
        found[chosen] = _distance(letter, chance[chosen], dotted=False)
    return found


def _groups(labels: np.ndarray, style: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """The images of each letter and style, at most ``_CHUNK`` at a time: they share their strokes."""
    for label, letter in enumerate(CLASSES):
        for style_index in range(len(STYLES)):
            chosen = np.flatnonzero((labels == label) & (style == style_index))
            for first in range(0, len(chosen), _CHUNK):
                yield letter, style_index, chosen[first : first + _CHUNK]


def _polylines(letter: str) -> list[np.ndarray]:
    """The strokes of a letter, each (points, 2)."""
    lines = [np.reshape(line, (-1, 2)) for line in _LINES.get(letter, ())]
    for x, y, radius_x, radius_y, start, stop in _ARCS.get(letter, ()):
        angle = np.deg2rad(np.linspace(start, stop, _ARC_SEGMENTS + 1))
        lines.append(np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1))
    return lines


def _segments(letter: str) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (S, 2) of the segments of a letter."""
    lines = _polylines(letter)
    return np.concatenate([line[:-1] for line in lines]), np.concatenate([line[1:] for line in lines])


def _dots(letter: str) -> np.ndarray:
    """Points (S, 2) along the strokes of a letter, evenly spaced on each."""
    dots = []
    for line in _polylines(letter):
        lengths = np.hypot(*np.diff(line, axis=0).T)
        along = np.concatenate([[0], np.cumsum(lengths)])
        places = np.linspace(0, along[-1], max(2, round(along[-1] / _DOT_SPACING) + 1))
        dots.append(np.stack([np.interp(places, along, line[:, axis]) for axis in (0, 1)], axis=1))
    return np.concatenate(dots)


def _distance(letter: str, chance: np.ndarray, *, dotted: bool) -> np.ndarray:
    """The distance in pixels (N, SIZE, SIZE) to a letter's nearest stroke (or dot), bent by ``chance``."""
    start, end = (_dots(letter),) * 2 if dotted else _segments(letter)
    angle = np.deg2rad(20 * chance[:, 0] - 10)
    width, height = 8 + 2 * chance[:, 1], 10.5 + 2 * chance[:, 2]
    shear = 0.3 * chance[:, 3] - 0.15
    cos, sin = np.cos(angle), np.sin(angle)
    # Rotation · shear · scale.
    matrix = np.stack(
        [cos * width, (cos * shear - sin) * height, sin * width, (sin * shear + cos) * height], axis=1
    ).reshape(-1, 2, 2)
    shift = 2 * chance[:, None, 4:6] - 1
    start, end = (points.astype(np.float32) @ matrix.swapaxes(1, 2) + shift for points in (start, end))

    x, y = pixel_grid(SIZE)
    nearest = np.full((len(chance), SIZE, SIZE), np.inf, np.float32)
    for a, b in zip(start.swapaxes(0, 1), end.swapaxes(0, 1), strict=True):
        (ax, ay), (bx, by) = per_image(a.T), per_image((b - a).T)
        dx, dy = x - ax, y - ay
        along = np.clip((dx * bx + dy * by) / np.maximum(bx * bx + by * by, 1e-12), 0, 1)
        np.minimum(nearest, (dx - along * bx) ** 2 + (dy - along * by) ** 2, out=nearest)
    return np.sqrt(nearest)


# Each style: distance (N, H, W), chance (N, 16) uniform in [0, 1) -> (N, 3, H, W).


def _gradient(distance: np.ndarray, chance: np.ndarray) -> np.ndarray:
    ink, ground = _contrast(chance)
    # The same lightness, the hue turned by a third of the circle.
    other = np.roll(ground, 1, axis=1)
    ramp = np.clip(0.5 + _along(chance[:, 6]) / SIZE, 0, 1)
    return mix(mix(per_image(ground), per_image(other), ramp), per_image(ink), _ink(distance, _half_width(chance)))


def _dotted(distance: np.ndarray, chance: np.ndarray) -> np.ndarray:
    ink, ground = _contrast(chance)
    return mix(per_image(ground), per_image(ink), _ink(distance, 0.95 + 0.35 * chance[:, 7]))


def _outlined(distance: np.ndarray, chance: np.ndarray) -> np.ndarray:
    ink, ground = _contrast(chance)
    stripes = np.clip(0.5 + 2 * np.sin(_along(chance[:, 6]) * per_image(2 * np.pi / (5 + 5 * chance[:, 8]))), 0, 1)
    striped = mix(per_image(ground), per_image(0.65 * ground + 0.35 * ink), stripes)
    half = _half_width(chance)
    outlined = mix(striped, per_image(ground), _ink(distance, half + 1.3))
    return mix(outlined, per_image(ink), _ink(distance, half))


def _shadowed(distance: np.ndarray, chance: np.ndarray) -> np.ndarray:
    ink, ground = _contrast(chance)
    side = 4 + np.floor(4 * chance[:, 8])
    x, y = (np.floor(axis / per_image(side)) for axis in pixel_grid(SIZE))
    chequered = mix(per_image(ground), per_image(0.8 * ground + 0.2 * ink), (x + y) % 2)
    half = _half_width(chance)
    strokes = _ink(distance, half)
    shadow = np.pad(strokes, ((0, 0), (2, 0), (2, 0)))[:, :SIZE, :SIZE]
    shadowed = mix(chequered, per_image(0.5 * ground + 0.5 * colour(chance[:, 5], 0.8, 0.6)), shadow)
    return mix(shadowed, per_image(ink), strokes)


STYLES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    _gradient,
    _dotted,
    _outlined,
    _shadowed,
)


def _contrast(chance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours (N, 3) for ink and ground, one light and one dark, either way round."""
    light = colour(chance[:, 0], 0.15 + 0.3 * chance[:, 1], 0.9 + 0.1 * chance[:, 2])
    dark = colour(chance[:, 0] + 0.3 + 0.4 * chance[:, 3], 0.5 + 0.5 * chance[:, 1], 0.15 + 0.2 * chance[:, 2])
    flip = chance[:, 4:5] < 0.5
    return np.where(flip, dark, light), np.where(flip, light, dark)


def _half_width(chance: np.ndarray) -> np.ndarray:
    return 1.0 + 0.9 * chance[:, 7]


def _ink(distance: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Opacity (N, H, W) of strokes: 1 inside, falling over one pixel at the edge."""
    return np.clip(per_image(half_width) + 0.5 - distance, 0, 1)


def _along(direction: np.ndarray) -> np.ndarray:
    """The position of each pixel along a direction (N,) (1 is a full turn), in pixels from the middle."""
    x, y = pixel_grid(SIZE)
    return per_image(np.cos(2 * np.pi * direction)) * x + per_image(np.sin(2 * np.pi * direction)) * y
