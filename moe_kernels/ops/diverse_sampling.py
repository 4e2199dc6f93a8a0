"""``diverse_sampling``: the locations of an image that score high and are unlike each other; ``farthest_points`` alone.

B images, C classes, K samples of each. z_i ∈ R^D is the unit-norm column of location i of N: given, or the hypercolumn
of a :class:`~moe_kernels.ops.hypercolumn.Pyramid` divided by its norm (a column of zeros stays one), which then is
never built. s_i is the score of a class. For every class that is present, and with R = Σ or max (*penalty*),

    x₁ = argmax_i s_i        x_k = argmax_i s_i − R_{j<k} ⟨z_i, z_{x_j}⟩                (k = 2 … K)

and then for the background, which has no scores, with x' all samples of all present classes of the image

    b_k = argmin_i R( R_j ⟨z_i, z_{x'_j}⟩, R_{l<k} ⟨z_i, z_{b_l}⟩ )                     (k = 1 … K)

(*Diverse Sampling for Self-Supervised Learning of Semantic Segmentation*, arXiv 1612.01991, Eq. 3-5; which R the paper
means is not known, and it has no weight before it). No location is sampled twice in a class, the background avoids
those of the classes and its own; two classes may share one. Ties go to the lowest index, NaN comes first, as in
``torch.argmax`` and ``torch.argmin``. The first background sample of an image in which no class is present is
location 0. Where a class is absent or no location is left, the index is −1.

Sums are float32 (float64 for float64 columns), whatever the storage. Backends, and dense columns and pyramids, give the
same samples wherever the best location leads by more than the rounding of that, and all features are finite. On a CPU
bit for bit the same for any number of threads and whatever else is in the batch. Not differentiable; nothing waits for
the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.ops.hypercolumn import Pyramid, check_pyramid
from moe_kernels.reference import diverse_sampling as reference

PENALTIES = ("sum", "max")
METRICS = ("cosine", "euclidean")


class Samples(NamedTuple):
    """What :func:`diverse_sampling` returns."""

    indices: Tensor
    """(B, C, K) int64: locations in the order in which they were sampled, −1 where there is none."""
    background: Tensor | None
    """(B, K) int64, the same of the background; None where it was not asked for."""


def _fake_sampling(
    scores: Tensor,
    present: Tensor | None,
    maps: list[Tensor],
    grid: list[int],
    normalized: bool,
    num_samples: int,
    penalty: int,
    background: bool,
) -> tuple[Tensor, Tensor]:
    indices = scores.new_empty(*scores.shape[:2], num_samples, dtype=torch.int64)
    return indices, scores.new_empty(scores.shape[0], num_samples if background else 0, dtype=torch.int64)


_SAMPLING = _library.define(
    "diverse_sampling",
    "(Tensor scores, Tensor? present, Tensor[] maps, SymInt[] grid, bool normalized, int num_samples, int penalty, "
    "bool background) -> (Tensor indices, Tensor background)",
    _fake_sampling,
)
_FARTHEST = _library.define(
    "farthest_points",
    "(Tensor[] maps, SymInt[] grid, int num_points, Tensor start, int metric) -> Tensor",
    lambda maps, grid, num_points, start, metric: start.new_empty(start.shape[0], num_points),
)


def _number(name: str, choice: str, choices: tuple[str, ...]) -> int:
    if choice not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {choice!r}")
    return choices.index(choice)


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {count!r}")
    if count < 0:
        raise ValueError(f"{name}: expected at least 0, got {count}")


def _levels(columns: Tensor | Pyramid) -> tuple[list[Tensor], tuple[int, int]]:
    """The maps and the grid of a pyramid, or those of the one of a single level that dense columns are."""
    if isinstance(columns, Pyramid):
        check_pyramid(columns)
        if columns.channels == 0:
            raise ValueError("columns: expected maps of at least one channel, got none")
        return [level.detach() for level in columns.maps], columns.grid
    _library.check_tensor("columns", columns, ("B", "N", "D"), floating=True, like=columns)
    if 0 in columns.shape[1:]:
        raise ValueError(f"columns: expected a location and a channel at least, got shape {tuple(columns.shape)}")
    return [columns.detach().transpose(1, 2).unsqueeze(3)], (columns.shape[1], 1)


def _kernel(operator: Any, plain: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    return plain if backend.choose("diverse_sampling", like.device.type, like.dtype) == "reference" else operator


def _reference_farthest(maps: list[Tensor], grid: tuple[int, int], k: int, start: Tensor, metric: int) -> Tensor:
    if start.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = start[(start < 0) | (start >= grid[0] * grid[1])]
        if wrong.numel():
            raise RuntimeError(f"start: expected locations in [0, {grid[0] * grid[1]}), got {int(wrong[0])}")
    return reference.farthest_points(maps, grid, k, start, metric)


def diverse_sampling(
    scores: Tensor,
    columns: Tensor | Pyramid,
    num_samples: int,
    *,
    present: Tensor | None = None,
    penalty: str = "sum",
    background: bool = True,
) -> Samples:
    """Sample locations of every image for every class, and for the background, as specified at the top of this module.

    Args:
        scores: (B, C, N) floating; compared in float32 (float64 for float64 columns).
        columns: (B, N, D) floating, of unit norm, or a pyramid of N locations, whose norms are computed here.
        num_samples: K ≥ 0.
        present: (B, C) bool, the classes to sample; None is all.
        penalty: R, ``"sum"`` or ``"max"``.
        background: whether the background is sampled too.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    maps, grid = _levels(columns)
    _check_count("num_samples", num_samples)
    _library.check_tensor("scores", scores, (maps[0].shape[0], "C", grid[0] * grid[1]), floating=True, like=maps[0])
    if present is not None:
        if not isinstance(present, Tensor) or present.dtype != torch.bool:
            raise TypeError(f"present: expected a bool tensor, got {getattr(present, 'dtype', type(present).__name__)}")
        if present.shape != scores.shape[:2] or present.device != scores.device:
            raise ValueError(
                f"present: expected shape {tuple(scores.shape[:2])} on {scores.device}, "
                f"got {tuple(present.shape)} on {present.device}"
            )
    rule = _number("penalty", penalty, PENALTIES)
    scores = _library.cast(scores.detach(), _library.wide_dtype(maps[0].dtype))
    kernel = _kernel(_SAMPLING, reference.diverse_sampling, maps[0])
    dense = not isinstance(columns, Pyramid)
    indices, others = kernel(scores, present, maps, grid, dense, num_samples, rule, background)
    return Samples(indices, others if background else None)


def farthest_points(columns: Tensor | Pyramid, k: int, *, start: int | Tensor = 0, metric: str = "cosine") -> Tensor:
    """(B, k) int64: from ``start`` on, always the location farthest from the nearest of those before (k-center greedy).

    Ties, NaN and −1 as specified at the top of this module.

    Args:
        columns: (B, N, D) floating, of any norm, or a pyramid of N locations.
        k: how many, at least 0.
        start: the first location of every image, in [0, N), or (B,) int64.
        metric: ``"cosine"``: distance 1 − the cosine of the columns, that to a column of zeros 1; ``"euclidean"``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: a tensor of starts is out of range (checked where that needs no host synchronization; elsewhere
            the row is −1).
    """
    maps, grid = _levels(columns)
    batch, locations = maps[0].shape[0], grid[0] * grid[1]
    _check_count("k", k)
    if isinstance(start, Tensor):
        _library.check_tensor("start", start, (batch,), floating=False, like=maps[0])
    else:
        if not 0 <= start < locations:
            raise ValueError(f"start: expected a location in [0, {locations}), got {start}")
        start = torch.full((batch,), start, dtype=torch.int64, device=maps[0].device)
    kernel = _kernel(_FARTHEST, _reference_farthest, maps[0])
    result: Tensor = kernel(maps, grid, k, start, _number("metric", metric, METRICS))
    return result
