"""Reference of :mod:`moe_kernels.ops.hypercolumn`: hypercolumns as they are usually built, resized and concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Maps = Sequence[Tensor]
Grid = Sequence[int]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def resize(tensor: Tensor, size: Grid) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear; empty batches too, which torch refuses."""
    if tuple(tensor.shape[2:]) == tuple(size):
        return tensor
    if tensor.numel() == 0:
        return tensor.mean((2, 3), keepdim=True).expand(-1, -1, *size)
    return F.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=False)


def dense(maps: Maps, grid: Grid) -> Tensor:
    """(B, D, H, W): every map resized to the grid, one behind the other."""
    return torch.cat([resize(m, grid) for m in maps], 1)


def gather(maps: Maps, points: Tensor, grid: Grid) -> Tensor:
    """(B, P, D): the hypercolumns of ``points`` (B, P), zero for −1."""
    columns = dense(maps, grid).flatten(2)
    chosen = points.clamp(min=0)[:, None].expand(-1, columns.shape[1], -1)
    found = columns.gather(2, chosen).transpose(1, 2)
    return found.where((points >= 0)[..., None], found.new_zeros(()))


def linear(maps: Maps, grid: Grid, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, O, H, W): the 1×1 convolution of the concatenation, in the dtype of ``weight``."""
    return F.conv2d(dense(maps, grid).to(weight.dtype), weight[..., None, None], bias)


def inner(maps: Maps, grid: Grid, columns: Tensor) -> Tensor:
    """(B, M, H, W): the inner products with ``columns`` (B, M, D), float32 or float64."""
    products = _wide(columns) @ _wide(dense(maps, grid)).flatten(2)
    return products.view(*products.shape[:2], *grid)


def norm(maps: Maps, grid: Grid) -> Tensor:
    """(B, H, W): Euclidean norms, float32 or float64."""
    result: Tensor = torch.linalg.vector_norm(_wide(dense(maps, grid)), dim=1)
    return result


def resize_sum(maps: Maps, grid: Grid, bias: Tensor | None) -> Tensor:
    """(B, O, H, W): the sum of the resized maps (B, O, h, w) and of ``bias`` (O,), in their dtype."""
    total = resize(_wide(maps[0]), grid)
    for m in maps[1:]:
        total = total + resize(_wide(m), grid)
    if bias is not None:
        total = total + _wide(bias)[:, None, None]
    return total.to(maps[0].dtype)
