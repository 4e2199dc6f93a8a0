"""Tagged images and a frozen network in small, for tests of what learns from them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_kernels.models.segmentation import backbones
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.data.tagged import TaggedImages

CLASSES = ("red", "green", "blue")
SIZE, GRID = (32, 40), (8, 10)
CONFIG = SegmentConfig(
    localization_hidden=16,
    localization_rates=(1e-2,) * 8 + (1e-3,) * 2,
    samples=4,
    hidden=16,
    batch=20,
    epochs=60,
    learning_rate=3e-3,
)


def toy_images(count: int = 12, classes: tuple[str, ...] = CLASSES, prefix: str = "") -> TaggedImages:
    """Squares of one or two colours on grey noise, with masks; no colour is in all of them."""
    images, masks = np.empty((count, 36, 45, 3), np.uint8), np.zeros((count, 36, 45), np.uint8)
    tags = np.zeros((count, len(classes)), bool)
    for number in range(count):
        draw = np.random.default_rng((len(classes), number))
        images[number] = draw.integers(70, 110, (36, 45, 1))
        for turn in range(1 + number % 2):
            label = (number + turn * (1 + number // 6)) % len(classes)
            top, left, side = draw.integers(0, 20), 22 * turn + draw.integers(0, 6), draw.integers(12, 16)
            place = (number, slice(top, top + side), slice(left, left + side))
            images[place] = 40
            images[(*place, CLASSES.index(classes[label]))] = 240
            masks[place] = label + 1
            tags[number, label] = True
    return TaggedImages([f"{prefix}{number}" for number in range(count)], classes, tags, images, masks)


class ToyNet(nn.Module):
    """Two convolutions with fixed weights; ``head`` has global features."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, 3, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=draw)
        self.relu, self.top = nn.ReLU(), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.top(self.second(self.relu(self.first(images)))))


def toy_backbone(head: bool = True, **changes: Any) -> backbones.Backbone:
    """D = 14, G = 3 or 0."""
    options = {"name": "toy", "image_size": SIZE, "grid": GRID, "head": "head" if head else None} | changes
    return backbones.wrap(ToyNet(), ["relu", "top"], **options)
