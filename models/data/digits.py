"""Handwritten digits in four domains: real shapes, drawn in four styles, without a download.

The 1,797 digits that scikit-learn ships (UCI's optical recognition of handwritten digits, 8×8 counts of
ink) are enlarged by cubic convolution and sharpened to strokes, 26 pixels high on a 32×32 RGB image.
Every digit belongs to exactly one domain (the classes are dealt out evenly), so nothing is learnt by
heart across domains. The domains keep the shape and change the style:

- plain: light grey ink on a near-black ground;
- inverted: dark ink on a bright, wavy texture of two colours;
- sketch: only the edges of the strokes, in pencil on grainy paper;
- blurred: turned by up to 20 degrees, light grey on mid-grey, out of focus and noisy.

What an image looks like depends on the seed and its index only. Each has a margin of ``MARGIN`` pixels
around the visible 32, so that the shift by which training augments it uncovers true background.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .domains import Domains, ImageDataset
from .drawing import MEAN, STD, colour, generators, mix, normalize, per_image, pixel_grid, waves

DOMAINS = ("plain", "inverted", "sketch", "blurred")
CLASSES = tuple(str(digit) for digit in range(10))
SIZE = 32
MARGIN = 2
CANVAS = SIZE + 2 * MARGIN
HEIGHT = 26.0


class Digits(ImageDataset):
    """Images with their margin, float32 (N, 3, CANVAS, CANVAS), and labels, int64 (N,).

    An item is a crop of SIZE×SIZE: the middle, or with ``shift`` moved by up to ``MARGIN`` pixels each way,
    drawn from torch's default generator.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, shift: bool) -> None:
        self.images, self.labels, self.shift = images, labels, shift

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left = torch.randint(2 * MARGIN + 1, (2,)).tolist() if self.shift else (MARGIN, MARGIN)
        image = self.images[index, :, top : top + SIZE, left : left + SIZE]
        return image.clone(), int(self.labels[index])


def load(seed: int = 0) -> Domains:
    """The four domains; ``seed`` decides which digit belongs to which domain and how each is drawn.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    ink, labels = scanned()
    train, evaluation = [], []
    for domain, indices in zip(DOMAINS, partition(labels, len(DOMAINS), seed), strict=True):
        images = normalize(render(domain, ink[indices], seed, indices))
        targets = torch.from_numpy(labels[indices])
        train.append(Digits(images, targets, shift=True))
        evaluation.append(Digits(images, targets, shift=False))
    return Domains("digits", CLASSES, DOMAINS, tuple(train), tuple(evaluation), mean=MEAN, std=STD)


def scanned() -> tuple[np.ndarray, np.ndarray]:
    """The digits as they were scanned: ink, float32 (1797, 8, 8) in [0, 1], and labels, int64 (1797,).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'moe-kernels[models]'") from error
    source = load_digits()
    return source.images.astype(np.float32) / 16, source.target.astype(np.int64)


def partition(labels: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """Deal the items of each class out to ``parts`` parts; returns the sorted indices of each.

    The parts differ by at most one item in every class, and in total: each class is dealt from where the
    last ended.
    """
    rng = np.random.default_rng(seed)
    dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    order = rng.permutation(parts)
    return [np.sort(dealt[first::parts]) for first in order]


def render(domain: str, ink: np.ndarray, seed: int, indices: np.ndarray) -> np.ndarray:
    """Draw ink (N, 8, 8) in [0, 1] in the style of a domain; ``indices`` (N,) say which images it is.

    Returns float32 (N, 3, CANVAS, CANVAS), mostly in [0, 1] (noise may leave it: clip to show).

    Raises:
        ValueError: no such domain.
    """
    if domain not in STYLES:
        raise ValueError(f"digits have no domain {domain!r}; its domains are {', '.join(DOMAINS)}")
    rngs = generators(seed, indices)
    chance = np.stack([rng.random(16, np.float32) for rng in rngs])
    grain = np.stack([rng.standard_normal((CANVAS, CANVAS), np.float32) for rng in rngs])
    images = STYLES[domain](ink, chance, grain)
    return np.broadcast_to(images, (len(ink), 3, CANVAS, CANVAS)).astype(np.float32)


# Each style: ink (N, 8, 8), chance (N, 16) uniform in [0, 1), grain (N, H, W) normal -> (N, 3 or 1, H, W).


def _plain(ink: np.ndarray, chance: np.ndarray, grain: np.ndarray) -> np.ndarray:
    ground, light = 0.12 * chance[:, 0], 0.85 + 0.15 * chance[:, 1]
    return mix(per_image(ground)[:, None], per_image(light)[:, None], _strokes(ink))


def _inverted(ink: np.ndarray, chance: np.ndarray, grain: np.ndarray) -> np.ndarray:
    hue = chance[:, 0]
    one = colour(hue, 0.3 + 0.4 * chance[:, 1], 0.85 + 0.15 * chance[:, 2])
    other = colour(hue + 0.15 + 0.3 * chance[:, 3], 0.3 + 0.4 * chance[:, 4], 0.6 + 0.25 * chance[:, 5])
    dark = colour(hue + 0.5, 0.5 * chance[:, 6], 0.05 + 0.15 * chance[:, 7])
    texture = mix(per_image(one), per_image(other), _waves(chance[:, 8:14]))
    return mix(texture, per_image(dark), _strokes(ink))


def _sketch(ink: np.ndarray, chance: np.ndarray, grain: np.ndarray) -> np.ndarray:
    strokes = _strokes(ink)
    down, across = np.gradient(strokes, axis=(1, 2))
    edges = np.clip(2.2 * np.hypot(down, across) - 0.15, 0, 1)
    paper, pencil = 0.88 + 0.1 * chance[:, 0], 0.05 + 0.3 * chance[:, 1]
    # The tooth of the paper takes the pencil unevenly.
    edges *= np.clip(0.95 + 0.2 * grain, 0, 1)
    return mix(per_image(paper)[:, None] + 0.02 * grain[:, None], per_image(pencil)[:, None], edges)


def _blurred(ink: np.ndarray, chance: np.ndarray, grain: np.ndarray) -> np.ndarray:
    strokes = _blur(_strokes(ink, np.deg2rad(40 * chance[:, 0] - 20)), 0.7 + 0.6 * chance[:, 1])
    ground = 0.25 + 0.25 * chance[:, 2]
    light = ground + 0.45 + 0.15 * chance[:, 3]
    noise = per_image(0.03 + 0.04 * chance[:, 4]) * grain
    return mix(per_image(ground)[:, None], per_image(light)[:, None], strokes) + noise[:, None]


STYLES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "inverted": _inverted,
    "sketch": _sketch,
    "blurred": _blurred,
}


def _strokes(ink: np.ndarray, angle: np.ndarray | None = None) -> np.ndarray:
    """Ink (N, 8, 8), turned by ``angle`` (N,) (radians), as sharp strokes (N, H, W) in [0, 1]."""
    x, y = pixel_grid(CANVAS)
    if angle is None:
        angle = np.zeros(len(ink), np.float32)
    cos, sin = per_image(np.cos(angle)), per_image(np.sin(angle))
    scale = ink.shape[-1] / HEIGHT
    values = _interpolate(ink, (cos * x + sin * y) * scale, (cos * y - sin * x) * scale)
    return np.clip((values - 0.35) / 0.35, 0, 1)


def _interpolate(images: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cubic convolution (Keys, 1981, a = -1/2) of (N, S, S) at points (N, H, W) from the middle."""
    size = images.shape[-1]
    rows = _cubic_weights(y + (size - 1) / 2, size)
    columns = _cubic_weights(x + (size - 1) / 2, size)
    return np.einsum("nhwi,nij,nhwj->nhw", rows, images, columns, optimize=True)


def _cubic_weights(position: np.ndarray, size: int) -> np.ndarray:
    """The weight of each of ``size`` samples at every position, (..., size)."""
    t = np.abs(position[..., None] - np.arange(size, dtype=np.float32))
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def _waves(chance: np.ndarray) -> np.ndarray:
    """A smooth pattern in [0, 1], (N, H, W): two waves, each with length, direction and phase."""
    length, direction, phase = np.moveaxis(chance.reshape(len(chance), 2, 3), 2, 0)
    return 0.5 + 0.25 * waves(7 + 9 * length, direction, phase, CANVAS)


def _blur(images: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian blur of (N, H, H), each image with its own ``sigma`` (N,) in pixels."""
    pixels = np.arange(images.shape[-1], dtype=np.float32)
    kernel = np.exp(-((pixels[:, None] - pixels) ** 2) / (2 * per_image(sigma) ** 2))
    kernel /= per_image(sigma * np.sqrt(2 * np.pi))
    return kernel @ images @ kernel
