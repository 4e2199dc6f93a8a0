"""The physical limit: what a machine's own rates allow.

An operator cannot take less time than its matrix products at the rate of a large one, nor less than its compulsory
bytes at the rate of a large copy; the larger of the two is the limit. Both rates are measured beside the candidates, in
every round. They are what torch's library and main memory give: a faster product than the library's, or a workload that
stays in a cache, beats them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_kernels.benchmarks.candidates import Candidate, bare_products


@dataclass(frozen=True)
class Work:
    """What cannot be avoided, in a forward and, where there is one, in the backward after it."""

    flops: int
    """Of the matrix products; a multiplication and an addition are two."""
    bytes: int
    """Each of the two passes reads its inputs once and writes its outputs once; nothing between them is kept."""


@dataclass(frozen=True)
class Rates:
    """What a machine can do in a second."""

    flops: float
    bytes: float
    """Read and written."""

    def seconds(self, work: Work) -> float:
        """The least time that ``work`` takes."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


@dataclass(frozen=True)
class Probes:
    """The calls whose times give the rates, and the work in each."""

    product: Candidate
    copy: Candidate
    work: Work

    def rates(self, product_seconds: float, copy_seconds: float) -> Rates:
        return Rates(self.work.flops / product_seconds, self.work.bytes / copy_seconds)


def probes(device: torch.device, dtype: torch.dtype, *, quick: bool) -> Probes:
    """A square product in ``dtype`` and a copy, both too large for any cache unless ``quick``."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    if quick:
        size, length = 64, 2**12
    left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(length, dtype=torch.uint8, device=device)  # written, so that its pages are there
    target = source.clone()

    def copy() -> dict[str, torch.Tensor]:
        target.copy_(source)
        return {}

    product = bare_products([(left, right, torch.empty_like(left))])
    return Probes(product, copy, Work(flops=2 * size**3, bytes=2 * length))
