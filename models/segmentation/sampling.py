"""Which locations of an image are labelled, from the score maps of its classes (the paper's section 3.2).

    diverse   the highest scores less the similarity to what is chosen already (Eq. 3, 4); the background is what is
              least like all of it (Eq. 5): ``moe_kernels.ops.diverse_sampling``
    spatial   the same with exp(−d²/2σ²) of the distance on the grid as similarity
    top       the highest scores; the background is where the highest score of any class is lowest
    dense     locations at random, as many as the others take: each gets the class with the highest normalized score, or
              the background where that is below a threshold

The paper names the last three and gives no formula: the Gaussian, the background of ``"top"``, and that ``"dense"``
draws from its labels instead of training on millions of them, are reconstructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops.diverse_sampling import diverse_sampling
from moe_kernels.ops.hypercolumn import Pyramid

from .configuration import SegmentConfig


class Samples(NamedTuple):
    """P labelled locations of an image, class by class, then the background."""

    locations: Tensor
    """(P,) int64, in [0, N)."""
    labels: Tensor
    """(P,) int64: 0 the background, r + 1 the class of row r of the scores."""


def sample(scores: Tensor, pyramid: Pyramid, config: SegmentConfig, *, highest: Tensor, seed: int = 0) -> Samples:
    """Choose locations by ``config.strategy``.

    Args:
        scores: (C, N) float32, of the C classes that are in the image; C may be 0.
        pyramid: of this one image.
        highest: (C,) what :func:`normalized` needs; for ``"dense"``.
        seed: for ``"dense"``.
    """
    samples, classes = config.samples, len(scores)
    if config.strategy == "dense":
        drawn = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
        drawn = drawn[: samples * (classes + 1)].to(scores.device)
        return Samples(drawn, label_map(normalized(scores, highest), config.threshold)[drawn])
    if config.strategy == "top":
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :samples]
        background = _lowest(scores, chosen, samples)
    elif config.strategy == "spatial":
        chosen, background = _spatial(scores, pyramid.grid, samples, config.penalty, config.spatial_sigma)
    else:
        found = diverse_sampling(scores[None], pyramid, samples, penalty=config.penalty)
        chosen, background = found.indices[0], found.background[0]
    labels = torch.arange(1, classes + 1, device=scores.device)[:, None].expand_as(chosen)
    locations = torch.cat([chosen.flatten(), background])
    labels = torch.cat([labels.flatten(), torch.zeros_like(background)])
    return Samples(locations[locations >= 0], labels[locations >= 0])


def normalized(scores: Tensor, highest: Tensor) -> Tensor:
    """``scores`` (C, …) so that the highest score of a class is 1 on average over the images that have it.

    ``highest`` (C,) is that average before. Where it is not positive the scores are moved and not scaled.
    """
    highest = highest.view(-1, *[1] * (scores.ndim - 1))
    return torch.where(highest > 0, scores / highest, scores - highest + 1)


def label_map(scores: Tensor, threshold: float) -> Tensor:
    """(C, …) → int64 (…): r + 1 where row r is highest, 0 where no score reaches ``threshold``."""
    if not len(scores):
        return torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
    best, row = scores.max(0)
    return torch.where(best >= threshold, row + 1, 0)


def _lowest(scores: Tensor, chosen: Tensor, samples: int) -> Tensor:
    """The locations, none of them ``chosen``, where the highest score is lowest."""
    if not len(scores):
        return torch.arange(min(samples, scores.shape[1]), device=scores.device)
    highest = scores.amax(0).index_fill(0, chosen.flatten(), torch.inf)
    order = highest.argsort(stable=True)[:samples]
    return torch.where(highest[order] < torch.inf, order, -1)


def _spatial(scores: Tensor, grid: tuple[int, int], samples: int, penalty: str, sigma: float) -> tuple[Tensor, Tensor]:
    """What :func:`diverse_sampling` does with another similarity: (C, K) and (K,), −1 where no location is left."""
    classes, device = len(scores), scores.device
    along = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    # similarity of rows and of columns, whose product is that of locations
    rows, columns = (torch.exp(-0.5 * ((x[:, None] - x) / (sigma * grid[0])) ** 2) for x in along)
    merge = torch.add if penalty == "sum" else torch.maximum

    def similarity(locations: Tensor) -> Tensor:
        return (rows[locations // grid[1]][:, :, None] * columns[locations % grid[1]][:, None]).flatten(1)

    penalties, free = torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)
    lane = torch.arange(classes, device=device)
    chosen = []
    for _ in range(samples):
        best = (scores - penalties).masked_fill(~free, -torch.inf).argmax(1)
        chosen.append(torch.where(free[lane, best], best, -1))
        free[lane, best] = False
        penalties = merge(penalties, similarity(best))
    known = penalties.sum(0) if penalty == "sum" or not classes else penalties.amax(0)
    left = free.all(0)
    background = []
    for _ in range(samples):
        best = known.masked_fill(~left, torch.inf).argmin()
        background.append(torch.where(left[best], best, -1))
        left[best] = False
        known = merge(known, similarity(best[None])[0])
    return torch.stack(chosen, 1) if classes else lane.view(0, 1).expand(0, samples), torch.stack(background)
