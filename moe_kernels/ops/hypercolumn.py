"""``hypercolumn``: per-location features from many layers of a network, used without ever being built.

A pyramid is a list of L feature maps (B, C_l, H_l, W_l) of the same images. The hypercolumn z_i ∈ R^D, D = Σ C_l, of
location i of a grid (H, W) has every map's value there: resized as ``F.interpolate(mode="bilinear",
align_corners=False)`` does, without antialiasing, one map's channels behind the other's (Hariharan et al., 2015). There
are N = H·W locations, numbered row by row: i = y·W + x.

Resizing is linear, and so are :func:`linear` and :func:`inner`: they multiply every map at its own resolution and
resize and sum the products, which is exact, and for VGG-16 (4,224 channels at 64 × 84) 3.2 times fewer values.
:func:`gather` reads four pixels a map and location, :func:`norm` resizes a row of the grid at a time.

Storage in float16 or bfloat16 is summed in float32, but for the products of :func:`linear` on a GPU, each of which is
rounded to the dtype of its weight. Everything is deterministic, bit for bit for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.reference import hypercolumn as reference


class Pyramid(NamedTuple):
    """Feature maps and the grid of their hypercolumns; :func:`pyramid` makes one of any maps."""

    maps: tuple[Tensor, ...]
    """(B, C_l, H_l, W_l) of one floating dtype, H_l ≤ H and W_l ≤ W; channels-last in memory, or they are copied."""
    grid: tuple[int, int]
    """(H, W)."""

    @property
    def batch(self) -> int:
        """B."""
        return self.maps[0].shape[0]

    @property
    def channels(self) -> int:
        """D."""
        return sum(m.shape[1] for m in self.maps)

    @property
    def locations(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """Of the maps."""
        return self.maps[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps."""
        return self.maps[0].dtype


def _as_map(pixels: Tensor) -> Tensor:
    """(B, H, W, C) → (B, C, H, W), the same memory."""
    return pixels.permute(0, 3, 1, 2)


def _as_pixels(map_: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C), the same memory."""
    return map_.permute(0, 2, 3, 1)


def _fake_merge(maps: list[Tensor], size: list[int]) -> Tensor:
    return _as_map(maps[0].new_empty(maps[0].shape[0], *size, sum(m.shape[1] for m in maps)))


def _fake_gather(maps: list[Tensor], points: Tensor, grid: list[int]) -> Tensor:
    return maps[0].new_empty(*points.shape, sum(m.shape[1] for m in maps))


def _fake_gather_backward(grad: Tensor, points: Tensor, sizes: list[int], grid: list[int]) -> list[Tensor]:
    shapes = zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True)
    return [_as_map(grad.new_empty(grad.shape[0], h, w, c)) for c, h, w in shapes]


def _fake_resize_sum(maps: list[Tensor], grid: list[int], bias: Tensor | None) -> Tensor:
    return _as_map(maps[0].new_empty(maps[0].shape[0], *grid, maps[0].shape[1]))


def _fake_resize_sum_backward(grad: Tensor, sizes: list[int]) -> list[Tensor]:
    batch, channels = grad.shape[:2]
    return [_as_map(grad.new_empty(batch, h, w, channels)) for h, w in zip(sizes[0::2], sizes[1::2], strict=True)]


def _fake_norm(maps: list[Tensor], grid: list[int]) -> Tensor:
    return maps[0].new_empty(maps[0].shape[0], *grid, dtype=_library.wide_dtype(maps[0].dtype))


_merge = _library.define("hypercolumn_merge", "(Tensor[] maps, SymInt[] size) -> Tensor", _fake_merge)
_gather = _library.define("hypercolumn_gather", "(Tensor[] maps, Tensor points, SymInt[] grid) -> Tensor", _fake_gather)
_gather_backward = _library.define(
    "hypercolumn_gather_backward",
    "(Tensor grad, Tensor points, SymInt[] sizes, SymInt[] grid) -> Tensor[]",
    _fake_gather_backward,
)
_resize_sum = _library.define(
    "hypercolumn_resize_sum", "(Tensor[] maps, SymInt[] grid, Tensor? bias) -> Tensor", _fake_resize_sum
)
_resize_sum_backward = _library.define(
    "hypercolumn_resize_sum_backward", "(Tensor grad, SymInt[] sizes) -> Tensor[]", _fake_resize_sum_backward
)
_norm = _library.define("hypercolumn_norm", "(Tensor[] maps, SymInt[] grid) -> Tensor", _fake_norm)


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shapes = [m.shape[1:] for m in inputs[0]]


def _merge_gradient(ctx: Any, grad: Tensor) -> Any:
    parts = grad.split_with_sizes([channels for channels, _, _ in ctx.shapes], 1)
    return [_resize_sum_backward(g, size)[0] for g, (_, *size) in zip(parts, ctx.shapes, strict=True)], None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, points, grid = inputs
    ctx.save_for_backward(points)
    ctx.sizes, ctx.grid = [size for m in maps for size in m.shape[1:]], grid


def _gather_gradient(ctx: Any, grad: Tensor) -> Any:
    return _gather_backward(grad, *ctx.saved_tensors, ctx.sizes, ctx.grid), None, None


def _resize_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, bias = inputs
    ctx.sizes, ctx.biased = [size for m in maps for size in m.shape[2:]], bias is not None


def _resize_sum_gradient(ctx: Any, grad: Tensor) -> Any:
    return _resize_sum_backward(grad, ctx.sizes), None, grad.sum((0, 2, 3)) if ctx.biased else None


_library.differentiate("hypercolumn_merge", _merge_setup, _merge_gradient)
_library.differentiate("hypercolumn_gather", _gather_setup, _gather_gradient)
_library.differentiate("hypercolumn_resize_sum", _resize_sum_setup, _resize_sum_gradient)
_library.refuse_second_derivative("hypercolumn_gather_backward")
_library.refuse_second_derivative("hypercolumn_resize_sum_backward")


def _check_grid(grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or not all(isinstance(size, (int, torch.SymInt)) and size >= 1 for size in grid):
        raise ValueError(f"grid: expected two integers (H, W) of at least 1, got {tuple(grid)}")
    return grid[0], grid[1]


def _check_maps(maps: Sequence[Tensor], any_dtype: bool) -> None:
    if not maps:
        raise ValueError("maps: expected at least one map, got none")
    batch: int | str = "B"
    for number, m in enumerate(maps):
        name = f"maps[{number}]"
        _library.check_tensor(name, m, (batch, "C", "h", "w"), floating=True, like=maps[0])
        batch = m.shape[0]
        if m.shape[2] < 1 or m.shape[3] < 1:
            raise ValueError(f"{name}: expected at least one pixel, got {tuple(m.shape)}")
        if m.dtype != maps[0].dtype and not any_dtype:
            raise TypeError(f"{name}: expected {maps[0].dtype} as the first map, got {m.dtype}")


def check_pyramid(pyramid: Pyramid) -> None:
    """Raise unless the maps belong together and none is larger than the grid."""
    maps, grid = pyramid
    _check_maps(maps, any_dtype=False)
    height, width = _check_grid(grid)
    for number, m in enumerate(maps):
        if m.shape[2] > height or m.shape[3] > width:
            raise ValueError(
                f"maps[{number}]: expected 1 to {height} rows and 1 to {width} columns, got {tuple(m.shape[2:])}; "
                "pyramid() reduces larger maps"
            )


def pyramid(maps: Sequence[Tensor], grid: tuple[int, int], *, dtype: torch.dtype | None = None) -> Pyramid:
    """Maps of any size as a :class:`Pyramid` of the fewest values, with the same hypercolumns; differentiable.

    A map is reduced along an axis in which it is larger than the grid, which is exact since resizing is separable.
    Neighbours of equal size become one map. The order of the channels is that of the concatenation.

    Args:
        maps: (B, C_l, h, w) each, floating, on one device.
        grid: (H, W) of the hypercolumns.
        dtype: what the maps are stored in; None keeps theirs, which then has to be one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = _check_grid(grid)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    if isinstance(maps, Tensor):
        raise TypeError(f"maps: expected a sequence of tensors, got a tensor of shape {tuple(maps.shape)}")
    maps = tuple(maps)
    _check_maps(maps, any_dtype=dtype is not None)
    wide = functools.reduce(torch.promote_types, (m.dtype for m in maps))
    groups: list[tuple[tuple[int, int], list[Tensor]]] = []
    for m in maps:
        size = min(m.shape[2], height), min(m.shape[3], width)
        if not groups or groups[-1][0] != size:
            groups.append((size, []))
        groups[-1][1].append(_library.cast(m, wide))
    merged = (_merged(group, size) for size, group in groups)
    return Pyramid(tuple(_library.cast(m, dtype or wide) for m in merged), (height, width))


def dense(pyramid: Pyramid) -> Tensor:
    """The hypercolumns themselves, (B, D, H, W): the construction that the others do without; differentiable."""
    check_pyramid(pyramid)
    return _merged(pyramid.maps, pyramid.grid)


def _chosen(like: Tensor) -> str:
    return backend.choose("hypercolumn", like.device.type, like.dtype)


def _merged(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps resized to one size, as one map; on a GPU by torch, whose resize and concatenation are fast there."""
    if len(maps) == 1 and maps[0].shape[2:] == size:
        return _as_map(_as_pixels(maps[0]).contiguous())
    if _chosen(maps[0]) != "cpp":
        return _as_map(torch.cat([_as_pixels(reference.resize(m, size)) for m in maps], 3).contiguous())
    result: Tensor = _merge(list(maps), size)
    return result


def gather(pyramid: Pyramid, points: Tensor) -> Tensor:
    """The hypercolumns of some locations; differentiable in the maps.

    Args:
        pyramid: of B images and D channels.
        points: (B, P) int64, locations in [0, N), or −1 for a column of zeros.

    Returns:
        (B, P, D) in the dtype of the maps.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: a location is out of range (checked where that needs no host synchronization).
    """
    check_pyramid(pyramid)
    _library.check_tensor("points", points, (pyramid.batch, "P"), floating=False, like=pyramid.maps[0])
    if _chosen(pyramid.maps[0]) != "reference":
        result: Tensor = _gather(list(pyramid.maps), points, pyramid.grid)
        return result
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = points[(points < -1) | (points >= pyramid.locations)]
        if wrong.numel():
            raise RuntimeError(f"points: expected locations in [-1, {pyramid.locations}), got {int(wrong[0])}")
    return reference.gather(pyramid.maps, points, pyramid.grid)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Of the products with such a tensor: on the CPU torch's are slow in 16 bits."""
    return _library.wide_dtype(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype


def linear(pyramid: Pyramid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1×1 convolution of the hypercolumns, (B, O, H, W); differentiable in the maps, the weight and the bias.

    A nonlinearity comes after it, as it does after the convolution of the concatenation.

    Args:
        pyramid: of B images and D channels; its maps are converted to the dtype of ``weight``.
        weight: (O, D) floating.
        bias: (O,) of the same dtype.

    Returns:
        (B, O, H, W) in the dtype of ``weight``, channels-last in memory.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_pyramid(pyramid)
    _library.check_tensor("weight", weight, ("O", pyramid.channels), floating=True, like=pyramid.maps[0])
    if bias is not None:
        _library.check_tensor("bias", bias, (weight.shape[0],), floating=True, like=weight)
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias: expected {weight.dtype} as the weight, got {bias.dtype}")
    with _library.without_autocast(weight.device.type):
        if _chosen(pyramid.maps[0]) == "reference":
            return reference.linear(pyramid.maps, pyramid.grid, weight, bias)
        dtype = _product_dtype(weight)
        weights = _library.cast(weight, dtype).split_with_sizes([m.shape[1] for m in pyramid.maps], 1)
        operands = [(_as_pixels(_library.cast(m, dtype)), w.t()) for m, w in zip(pyramid.maps, weights, strict=True)]
        if bias is not None:
            bias = _library.cast(bias, dtype)
        # What needs no resizing is added by the products themselves; autograd forbids to do that in place.
        products = [_as_map(pixels @ w) for pixels, w in operands if pixels.shape[1:3] != pyramid.grid]
        if products:
            rows = _as_pixels(_resize_sum(products, pyramid.grid, bias)).flatten(0, 2)
        else:
            rows = operands[0][1].new_zeros(pyramid.batch * pyramid.locations, weight.shape[0])
            rows = rows if bias is None else rows + bias
        for pixels, w in operands:
            if pixels.shape[1:3] == pyramid.grid:
                add = rows.addmm if torch.is_grad_enabled() else rows.addmm_
                rows = add(pixels.flatten(0, 2), w)
        return _library.cast(_as_map(rows.view(pyramid.batch, *pyramid.grid, weight.shape[0])), weight.dtype)


def inner(pyramid: Pyramid, columns: Tensor) -> Tensor:
    """The inner products of all hypercolumns with given ones; differentiable in both.

    Args:
        pyramid: of B images and D channels.
        columns: (B, M, D) floating.

    Returns:
        (B, M, H, W) float32, float64 for float64 maps.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_pyramid(pyramid)
    _library.check_tensor(
        "columns", columns, (pyramid.batch, "M", pyramid.channels), floating=True, like=pyramid.maps[0]
    )
    dtype = _library.wide_dtype(pyramid.dtype)
    columns = _library.cast(columns, dtype)
    with _library.without_autocast(columns.device.type):
        if _chosen(pyramid.maps[0]) == "reference":
            return reference.inner(pyramid.maps, pyramid.grid, columns)
        parts = columns.transpose(1, 2).split_with_sizes([m.shape[1] for m in pyramid.maps], 1)
        products = [
            _as_map(
                (_as_pixels(_library.cast(m, dtype)).flatten(1, 2) @ part).view(m.shape[0], *m.shape[2:], part.shape[2])
            )
            for m, part in zip(pyramid.maps, parts, strict=True)
        ]
        result: Tensor = _resize_sum(products, pyramid.grid, None)
        return result


@torch.no_grad()
def norm(pyramid: Pyramid) -> Tensor:
    """Euclidean norms of all hypercolumns, (B, H, W) float32, float64 for float64 maps; without a gradient."""
    check_pyramid(pyramid)
    if _chosen(pyramid.maps[0]) == "reference":
        return reference.norm(pyramid.maps, pyramid.grid)
    result: Tensor = _norm(list(pyramid.maps), pyramid.grid)
    return result
