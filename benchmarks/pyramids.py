"""What hypercolumns are measured on: the feature maps of networks, and a few for a smoke test."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.benchmarks.workloads import Draw, Workload
from moe_kernels.ops.hypercolumn import pyramid

Size = tuple[int, int, int]
"""Channels, rows, columns."""
PYRAMID, CHANNELS_LAST, CONTIGUOUS = LAYOUTS = ("pyramid", "channels last", "contiguous")
"""What is given: a pyramid, as an application keeps it, or the maps as a network in this memory format has them."""

MAPS: dict[str, tuple[Size, ...]] = {
    # The last convolution of a block after its pooling: "with pooling applied when available", on 256 × 336 pixels.
    "vgg16": (
        (64, 256, 336),
        (64, 128, 168),
        (128, 128, 168),
        (128, 64, 84),
        *((256, 64, 84),) * 2,
        (256, 32, 42),
        *((512, 32, 42),) * 2,
        *((512, 16, 21),) * 3,
        (512, 8, 10),
    ),
    "vit_base": ((768, 16, 21),),  # of base size, in patches of 16 × 16 of the same pixels
    "few": ((3, 9, 12), (5, 6, 7), (8, 3, 4), (4, 1, 1)),
}
GRIDS = {"vgg16": (64, 84), "vit_base": (64, 84), "few": (6, 7)}


@dataclass(frozen=True)
class FeatureMaps(Workload):
    """Maps of one image by ``network``, one of ``MAPS``, in one of ``LAYOUTS``."""

    network: str
    layout: str = PYRAMID
    outputs: int = 512
    """Of a linear layer."""
    points: int = 60
    """That are gathered: 20 of each of two classes and of the background."""
    columns: int = 20
    """That all hypercolumns are compared with."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        return MAPS[self.network]

    @property
    def grid(self) -> tuple[int, int]:
        return GRIDS[self.network]

    @property
    def channels(self) -> int:
        return sum(channels for channels, _, _ in self.sizes)

    @property
    def locations(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def representative(self) -> bool:
        return self.layout == PYRAMID

    def tiny(self) -> FeatureMaps:
        return dataclasses.replace(self, network="few", outputs=6, points=5, columns=2)

    def __str__(self) -> str:
        return f"{self.network}, D={self.channels} at {self.grid[0]}×{self.grid[1]}, {self.layout}, {self.dtype}"

    def maps(self, draw: Draw[FeatureMaps]) -> tuple[Tensor, ...]:
        """The maps (1, C, h, w), as after a ReLU."""
        format_ = torch.contiguous_format if self.layout == CONTIGUOUS else torch.channels_last
        drawn = tuple(draw.normal(1, *size).relu().contiguous(memory_format=format_) for size in self.sizes)
        return pyramid(drawn, self.grid).maps if self.layout == PYRAMID else drawn


SUITES = {
    "cpu": {
        "vgg16": tuple(FeatureMaps("vgg16", layout) for layout in LAYOUTS),
        "vit_base": (FeatureMaps("vit_base"),),
    },
}
"""Kind of device → name of the suite → its workloads."""
QUICK = tuple(FeatureMaps("few", layout).tiny() for layout in LAYOUTS)
