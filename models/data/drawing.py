"""What the drawn data sets share: reproducible random numbers, colours and normalization.

Shapes: ``N`` images of ``H`` x ``W`` pixels; pixel values are in [0, 1] until ``normalize``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

MEAN = STD = (0.5, 0.5, 0.5)


def generators(seed: int, indices: np.ndarray) -> list[np.random.Generator]:
    """One generator an image, which depends on ``seed`` and the image's index, not on its neighbours."""
    return [np.random.default_rng((seed, int(index))) for index in indices]


def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres, (size, size) each, in pixels from the middle; y points down."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) - size / 2
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return x, y


def per_image(values: np.ndarray) -> np.ndarray:
    """(N, ...) to (N, ..., 1, 1): one value an image (and channel), for every pixel."""
    return values[..., None, None]


def colour(hue: ArrayLike, saturation: ArrayLike, value: ArrayLike) -> np.ndarray:
    """HSV, each in [0, 1] and (N,), to RGB (N, 3) float32; the hue is a circle."""
    hue, saturation, value = np.broadcast_arrays(hue, saturation, value)
    sector = (np.asarray([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * fall)).astype(np.float32)


def waves(length: np.ndarray, direction: np.ndarray, phase: np.ndarray, size: int) -> np.ndarray:
    """The sum of K plane waves of height 1, (N, size, size).

    Length in pixels, direction in half turns from the x axis and phase in turns are (N, K).
    """
    x, y = pixel_grid(size)
    total = np.zeros((len(length), size, size), np.float32)
    for wavelength, angle, start in zip(length.T, direction.T, phase.T, strict=True):
        along = per_image(np.cos(np.pi * angle)) * x + per_image(np.sin(np.pi * angle)) * y
        total += np.sin(per_image(2 * np.pi / wavelength) * along + per_image(2 * np.pi * start))
    return total


def mix(background: np.ndarray, foreground: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """``foreground`` over ``background``, both (N, 3, H, W) or broadcast to it, by opacity (N, H, W)."""
    return background + (foreground - background) * opacity[:, None]


def normalize(images: np.ndarray) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 1] (clipped) to a float32 tensor in [-1, 1]."""
    clipped = np.clip(images, 0, 1, dtype=np.float32)
    mean, std = (per_image(np.asarray(values, np.float32)) for values in (MEAN, STD))
    return torch.from_numpy((clipped - mean) / std)
