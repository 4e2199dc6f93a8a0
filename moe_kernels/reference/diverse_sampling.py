"""Reference of :mod:`moe_kernels.ops.diverse_sampling`. B images, C classes, N locations, D channels, K samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.reference import hypercolumn

SUM = 0
EUCLIDEAN = 1


def _columns(maps: Sequence[Tensor], grid: Sequence[int], normalized: bool) -> Tensor:
    """(B, N, D) in float32 (float64 for float64), of length 1 (or 0) unless they are ``normalized`` as they stand."""
    wide = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    columns: Tensor = hypercolumn.dense([level.to(wide) for level in maps], grid).flatten(2).transpose(1, 2)
    if not normalized:
        norm = torch.linalg.vector_norm(columns, dim=2, keepdim=True)
        columns = columns / norm.where(norm != 0, 1)
    return columns


def _first_best(values: Tensor, taken: Tensor) -> Tensor:
    """(...,): where ``values`` (..., N) are largest among those not ``taken``: NaN first, the lowest index; else −1."""
    best = values.masked_fill(taken, -torch.inf).amax(-1, keepdim=True)
    candidates = ~taken & ((values == best) | (values.isnan() & best.isnan()))
    return candidates.byte().argmax(-1).where(candidates.any(-1), -1)


def _take(taken: Tensor, picked: Tensor) -> Tensor:
    """``taken`` (..., N) with the locations ``picked`` (..., K), of which −1 is none."""
    locations = torch.arange(taken.shape[-1], device=taken.device)
    return taken | (picked.unsqueeze(-1) == locations).any(-2)


def _gather(columns: Tensor, picked: Tensor) -> Tensor:
    """(B, P, D): the columns at ``picked`` (B, P); −1 gives a zero column."""
    rows = columns.gather(1, picked.clamp(min=0).unsqueeze(-1).expand(-1, -1, columns.shape[2]))
    return rows.where((picked >= 0).unsqueeze(-1), 0)


def _penalty(columns: Tensor, picked: Tensor, penalty: int) -> Tensor:
    """(B, N): the sum or the largest of the similarities to the columns ``picked`` (B, P); 0 where there are none."""
    none = picked < 0
    similarity = columns @ _gather(columns, picked).transpose(1, 2)
    if penalty == SUM:
        return similarity.where(~none.unsqueeze(1), 0).sum(2)
    largest = similarity.where(~none.unsqueeze(1), -torch.inf).amax(2)
    return largest.where(~none.all(1, keepdim=True), 0)


def diverse_sampling(
    scores: Tensor,
    present: Tensor | None,
    maps: Sequence[Tensor],
    grid: Sequence[int],
    normalized: bool,
    num_samples: int,
    penalty: int,
    background: bool,
) -> tuple[Tensor, Tensor]:
    """indices (B, C, K) and background (B, K), or (B, 0) without it."""
    batch, classes, locations = scores.shape
    columns = _columns(maps, grid, normalized)
    scores = scores.to(columns.dtype)
    absent = torch.zeros(batch, classes, dtype=torch.bool, device=scores.device) if present is None else ~present

    picks = torch.full((batch, classes, num_samples), -1, device=scores.device)
    for number in range(classes):
        mine = picks[:, number]  # filled step by step
        taken = absent[:, number, None].expand(-1, locations)
        for k in range(num_samples):
            values = scores[:, number]
            if k > 0:
                values = values - _penalty(columns, mine[:, :k], penalty)
            mine[:, k] = _first_best(values, _take(taken, mine))

    others = torch.full((batch, num_samples if background else 0), -1, device=scores.device)
    for k in range(others.shape[1]):
        seen = torch.cat([picks.flatten(1), others[:, :k]], dim=1)
        values = -_penalty(columns, seen, penalty) if seen.shape[1] else columns.new_zeros(batch, locations)
        others[:, k] = _first_best(values, _take(torch.zeros_like(values, dtype=torch.bool), seen))
    return picks, others


def farthest_points(maps: Sequence[Tensor], grid: Sequence[int], num_points: int, start: Tensor, metric: int) -> Tensor:
    """(B, k): from ``start`` on, the location that is farthest from the nearest of those before."""
    columns = _columns(maps, grid, normalized=metric == EUCLIDEAN)
    squares = columns.square().sum(2)
    picks = torch.full((start.shape[0], num_points), -1, device=start.device)
    picks[:, :1] = start.unsqueeze(1)
    farness = torch.full_like(squares, torch.inf)
    for k in range(1, num_points):
        last = picks[:, k - 1 : k]
        farther = -(columns @ _gather(columns, last).transpose(1, 2)).squeeze(2)
        if metric == EUCLIDEAN:
            farther = squares + squares.gather(1, last.clamp(min=0)) + 2 * farther
        farness = torch.minimum(farness, farther)
        picks[:, k] = _first_best(farness, _take(torch.zeros_like(farness, dtype=torch.bool), picks))
    return picks
