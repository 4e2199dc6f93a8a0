"""What optimizers are measured on: the parameters of networks, many small tensors, and a few for a smoke test."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_kernels.benchmarks.workloads import Workload

Shape = tuple[int, ...]


def _resnet18() -> list[Shape]:
    """torchvision's, with its 1,000 classes."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    last = 64
    for width in (64, 128, 256, 512):
        shapes += [(width, last, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
        if width != last:
            shapes += [(width, last, 1, 1), (width,), (width,)]
        shapes += [(width, width, 3, 3), (width,), (width,)] * 2
        last = width
    return [*shapes, (1000, last), (1000,)]


def _vit(dim: int) -> list[Shape]:
    """timm's ``vit_*_patch16_224`` of this width, with 1,000 classes."""
    norm: list[Shape] = [(dim,), (dim,)]
    attention = [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    mlp = [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    embedding: list[Shape] = [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,)]
    return [*embedding, *(norm + attention + norm + mlp) * 12, *norm, (1000, dim), (1000,)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "resnet18": _resnet18,
    "vit_small": functools.partial(_vit, 384),
    "vit_base": functools.partial(_vit, 768),
    "many": lambda: [(2048,)] * 2000,
    "few": lambda: [(7, 5, 3, 3), (7,), (33, 31), ()],
}


@dataclass(frozen=True)
class ParameterList(Workload):
    """The parameters of ``model``, one of ``SHAPES``, in its order."""

    model: str

    @property
    def shapes(self) -> list[Shape]:
        return SHAPES[self.model]()

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    def tiny(self) -> ParameterList:
        return dataclasses.replace(self, model="few")

    def __str__(self) -> str:
        return f"{self.model}, {self.elements / 1e6:.1f} M in {len(self.shapes)} tensors, {self.dtype}"


def _suites(*models: str) -> dict[str, tuple[ParameterList, ...]]:
    return {model: (ParameterList(model),) for model in models}


SUITES = {
    "cpu": _suites("resnet18", "vit_small", "many"),
    "cuda": _suites("resnet18", "vit_small", "vit_base", "many"),
}
"""Kind of device → name of the suite → its workloads."""
QUICK = (ParameterList("few"),)
