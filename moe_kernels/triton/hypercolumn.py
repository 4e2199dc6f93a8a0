"""Triton kernels of :mod:`moe_kernels.ops.hypercolumn`: weighted sums of the pixels around each location.

B images, N locations of a grid (H, W), P points, D channels in all. A map is (B, h, w, C) here, the channels of a pixel
side by side. Tiles are locations, points or pixels by channels. No atomics: what a pixel's gradient is the sum of is
found by a stable sort of the points' pixels, or from where it lies.

A point out of range counts as −1; no foreign memory is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Elements of a tile."""
TOGETHER = 4
"""Maps that one launch resizes and sums."""

_SIZES = ["rows", "height", "width", "grid_height", "grid_width"]


@triton.jit
def _tap(i, size, out, DTYPE: tl.constexpr):
    """The two pixels, of ``size``, around location ``i`` of ``out``, and the weight of the second."""
    scale = size.to(DTYPE) / out.to(DTYPE)
    if DTYPE == tl.float32:  # noqa: SIM300
        scale = tl.div_rn(size.to(DTYPE), out.to(DTYPE))
    source = tl.maximum(scale * (i + 0.5) - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int64), size - 1)
    return low, tl.minimum(low + 1, size - 1), source - low.to(DTYPE)


@triton.jit
def _weighted(pixels, pixel, weight, inside, column, channels, DTYPE: tl.constexpr):
    """Rows ``pixel`` times their weight, (ROWS, COLUMNS); what has no weight is not read."""
    mask = (inside & (weight != 0.0))[:, None] & (column < channels)[None, :]
    row = tl.load(pixels + pixel[:, None] * channels + column[None, :], mask=mask, other=0.0)
    return weight[:, None] * row.to(DTYPE)


@triton.jit
def _resized(
    pixels, image, location, inside, column, channels, height, width, grid_height, grid_width, DTYPE: tl.constexpr
):
    """The map at locations of images, (ROWS, COLUMNS)."""
    y, next_y, wy = _tap(location // grid_width, height, grid_height, DTYPE)
    x, next_x, wx = _tap(location % grid_width, width, grid_width, DTYPE)
    top, bottom = (image * height + y) * width, (image * height + next_y) * width
    total = _weighted(pixels, top + x, (1 - wy) * (1 - wx), inside, column, channels, DTYPE)
    total += _weighted(pixels, top + next_x, (1 - wy) * wx, inside, column, channels, DTYPE)
    total += _weighted(pixels, bottom + x, wy * (1 - wx), inside, column, channels, DTYPE)
    return total + _weighted(pixels, bottom + next_x, wy * wx, inside, column, channels, DTYPE)


@triton.jit(do_not_specialize=[*_SIZES, "per_image"])
def hypercolumn_gather_kernel(
    pixels,
    points,
    out,
    rows,
    per_image,
    channels,
    dim,
    height,
    width,
    grid_height,
    grid_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The channels of one map in out (B·P, D), from where they begin."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    point = tl.load(points + row, mask=row < rows, other=-1)
    inside = (point >= 0) & (point < grid_height.to(tl.int64) * grid_width)
    found = _resized(
        pixels, row // per_image, point, inside, column, channels, height, width, grid_height, grid_width, DTYPE
    )
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    tl.store(out + row[:, None] * dim + column[None, :], found, mask=mask)


@triton.jit(do_not_specialize=[*_SIZES, "per_image"])
def hypercolumn_corners_kernel(
    points,
    pixel,
    weight,
    rows,
    per_image,
    height,
    width,
    grid_height,
    grid_width,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """pixel (B·P, 4), counted through all images, and weight (B·P, 4); behind the last pixel where there is none."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    point = tl.load(points + row, mask=row < rows, other=-1)
    inside = (point >= 0) & (point < grid_height.to(tl.int64) * grid_width)
    point = tl.where(inside, point, 0)
    y, next_y, wy = _tap(point // grid_width, height, grid_height, DTYPE)
    x, next_x, wx = _tap(point % grid_width, width, grid_width, DTYPE)
    corner = tl.arange(0, 4)[None, :]
    below, right = corner >= 2, corner % 2 == 1
    w = tl.where(below, wy[:, None], 1 - wy[:, None]) * tl.where(right, wx[:, None], 1 - wx[:, None])
    at = ((row // per_image * height)[:, None] + tl.where(below, next_y[:, None], y[:, None])) * width
    at += tl.where(right, next_x[:, None], x[:, None])
    nowhere = (rows // per_image).to(tl.int64) * height * width
    place, mask = row[:, None] * 4 + corner, (row < rows)[:, None]
    tl.store(pixel + place, tl.where(inside[:, None] & (w != 0.0), at, nowhere), mask=mask)
    tl.store(weight + place, w, mask=mask)


@triton.jit
def hypercolumn_gather_backward_kernel(
    grad, order, weight, starts, out, channels, dim, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """out (B·h·w, C): the sum of the rows of grad (B·P, D) at this pixel, in the order of the points."""
    pixel = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < channels
    total = tl.zeros((COLUMNS,), dtype=DTYPE)
    for i in range(tl.load(starts + pixel), tl.load(starts + pixel + 1)):
        corner = tl.load(order + i)
        row = tl.load(grad + corner // 4 * dim + column, mask=within, other=0.0)
        total += tl.load(weight + corner) * row.to(DTYPE)
    tl.store(out + pixel * channels + column, total, mask=within)


@triton.jit(
    do_not_specialize=["locations", "grid_height", "grid_width", "h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3"]
)
def hypercolumn_resize_sum_kernel(
    m0,
    m1,
    m2,
    m3,
    before,
    bias,
    out,
    locations,
    channels,
    grid_height,
    grid_width,
    h0,
    w0,
    h1,
    w1,
    h2,
    w2,
    h3,
    w3,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out (B·N, O): the sum of up to four maps at each location, of ``bias`` (O,) and of ``before`` (B·N, O)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = row < locations, column < channels
    per_image = grid_height.to(tl.int64) * grid_width
    image, at = row // per_image, row % per_image
    mask, place = inside[:, None] & within[None, :], row[:, None] * channels + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=DTYPE)
    if bias is not None:
        total += tl.load(bias + column, mask=within, other=0.0).to(DTYPE)[None, :]
    if before is not None:
        total += tl.load(before + place, mask=mask, other=0.0)
    total += _resized(m0, image, at, inside, column, channels, h0, w0, grid_height, grid_width, DTYPE)
    if m1 is not None:
        total += _resized(m1, image, at, inside, column, channels, h1, w1, grid_height, grid_width, DTYPE)
    if m2 is not None:
        total += _resized(m2, image, at, inside, column, channels, h2, w2, grid_height, grid_width, DTYPE)
    if m3 is not None:
        total += _resized(m3, image, at, inside, column, channels, h3, w3, grid_height, grid_width, DTYPE)
    tl.store(out + place, total, mask=mask)


@triton.jit
def _share(i, pixel, size, out, DTYPE: tl.constexpr):
    """The weight of ``pixel`` at location ``i``, 0 where that is none."""
    low, high, weight = _tap(i, size, out, DTYPE)
    share = tl.where(low == pixel, 1 - weight, 0.0) + tl.where(high == pixel, weight, 0.0)
    return tl.where((i >= 0) & (i < out), share, 0.0)


@triton.jit(do_not_specialize=[*_SIZES, "span_y", "span_x"])
def hypercolumn_resize_backward_kernel(
    grad,
    out,
    rows,
    channels,
    height,
    width,
    grid_height,
    grid_width,
    span_y,
    span_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out (B·h·w, O): the sum over the locations of grad (B·N, O) around each pixel, weighted as in the resize.

    Pixel i of h has weight strictly between the locations ((2i − 1) H / h − 1) / 2 and ((2i + 3) H / h − 1) / 2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = row < rows, (column < channels)[None, :]
    image, y, x = row // width // height, row // width % height, row % width
    top = ((2 * y - 1) * grid_height - height) // (2 * height)
    left = ((2 * x - 1) * grid_width - width) // (2 * width)
    total = tl.zeros((ROWS, COLUMNS), dtype=DTYPE)
    for i in range(span_y):
        wy = _share(top + i, y, height, grid_height, DTYPE)
        for j in range(span_x):
            weight = wy * _share(left + j, x, width, grid_width, DTYPE)
            place = ((image * grid_height + top + i) * grid_width + left + j) * channels
            mask = (inside & (weight != 0.0))[:, None] & within
            found = tl.load(grad + place[:, None] + column[None, :], mask=mask, other=0.0)
            total += weight[:, None] * found.to(DTYPE)
    tl.store(out + row[:, None] * channels + column[None, :], total, mask=inside[:, None] & within)


@triton.jit(do_not_specialize=["locations", "height", "width", "grid_height", "grid_width"])
def hypercolumn_square_sum_kernel(
    pixels,
    out,
    locations,
    channels,
    height,
    width,
    grid_height,
    grid_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out (B·N,): the sum over the channels of the squares of one map at each location."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < locations
    per_image = grid_height.to(tl.int64) * grid_width
    image, at = row // per_image, row % per_image
    squares = tl.zeros((ROWS, COLUMNS), dtype=DTYPE)
    for first in range(0, channels, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        found = _resized(pixels, image, at, inside, column, channels, height, width, grid_height, grid_width, DTYPE)
        squares += found * found
    tl.store(out + row, tl.sum(squares, axis=1), mask=inside)


def _pixels(tensor: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h, w, C) without gaps."""
    return tensor.permute(0, 2, 3, 1).contiguous()


def _types(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Of the arithmetic."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = min(triton.next_power_of_2(max(channels, 1)), 128)
    return TILE // columns, columns


def hypercolumn_gather(maps: Sequence[Tensor], points: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, P, D): the hypercolumns of ``points`` (B, P), zero for −1."""
    rows, dim, first = points.numel(), sum(m.shape[1] for m in maps), 0
    out = maps[0].new_empty((*points.shape, dim))
    points = points.contiguous()
    for m in maps:
        channels, height, width = m.shape[1:]
        if rows and channels:
            tile, columns = _tile(channels)
            hypercolumn_gather_kernel[(triton.cdiv(rows, tile), triton.cdiv(channels, columns))](
                _pixels(m),
                points,
                out[..., first:],
                rows,
                points.shape[1],
                channels,
                dim,
                height,
                width,
                *grid,
                ROWS=tile,
                COLUMNS=columns,
                DTYPE=_types(m.dtype)[1],
            )
        first += channels
    return out


def hypercolumn_gather_backward(
    grad: Tensor, points: Tensor, sizes: Sequence[int], grid: Sequence[int]
) -> list[Tensor]:
    """The gradients of the maps, whose (C, h, w) are ``sizes``."""
    (batch, per_image, dim), rows, first = grad.shape, points.numel(), 0
    wide, dtype = _types(grad.dtype)
    grad, points = grad.contiguous(), points.contiguous()
    grads = []
    for channels, height, width in zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True):
        out = grad.new_empty((batch, height, width, channels))
        if out.numel() and rows == 0:
            out.zero_()
        elif out.numel():
            pixel, weight = points.new_empty((rows, 4)), grad.new_empty((rows, 4), dtype=wide)
            hypercolumn_corners_kernel[(triton.cdiv(rows, TILE // 4),)](
                points, pixel, weight, rows, per_image, height, width, *grid, ROWS=TILE // 4, DTYPE=dtype
            )
            sequence, order = pixel.flatten().sort(stable=True)
            pixels = batch * height * width
            starts = torch.searchsorted(sequence, torch.arange(pixels + 1, device=grad.device))
            columns = _tile(channels)[1]
            hypercolumn_gather_backward_kernel[(pixels, triton.cdiv(channels, columns))](
                grad[..., first:], order, weight, starts, out, channels, dim, COLUMNS=columns, DTYPE=dtype
            )
        grads.append(out.permute(0, 3, 1, 2))
        first += channels
    return grads


def hypercolumn_resize_sum(maps: Sequence[Tensor], grid: Sequence[int], bias: Tensor | None) -> Tensor:
    """(B, O, H, W): the sum of the resized maps (B, O, h, w) and of ``bias`` (O,)."""
    batch, channels = maps[0].shape[:2]
    wide, dtype = _types(maps[0].dtype)
    locations, total = batch * grid[0] * grid[1], None
    tile, columns = _tile(channels)
    for first in range(0, len(maps), TOGETHER):
        some = [_pixels(m) for m in maps[first : first + TOGETHER]]
        last = first + TOGETHER >= len(maps)
        out = maps[0].new_empty((batch, *grid, channels), dtype=maps[0].dtype if last else wide)
        if out.numel():
            absent = TOGETHER - len(some)
            hypercolumn_resize_sum_kernel[(triton.cdiv(locations, tile), triton.cdiv(channels, columns))](
                *some,
                *[None] * absent,
                total,
                bias if first == 0 else None,
                out,
                locations,
                channels,
                *grid,
                *(size for m in some for size in m.shape[1:3]),
                *[0] * (2 * absent),
                ROWS=tile,
                COLUMNS=columns,
                DTYPE=dtype,
            )
        total = out
    assert total is not None
    return total.permute(0, 3, 1, 2)


def hypercolumn_resize_sum_backward(grad: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The gradients of the maps, whose (h, w) are ``sizes``."""
    pixels = _pixels(grad)
    batch, *grid, channels = pixels.shape
    grads = []
    for size in zip(sizes[0::2], sizes[1::2], strict=True):
        out = grad.new_empty((batch, *size, channels))
        if size == tuple(grid):
            out.copy_(pixels)
        elif out.numel():
            rows, (tile, columns) = batch * size[0] * size[1], _tile(channels)
            hypercolumn_resize_backward_kernel[(triton.cdiv(rows, tile), triton.cdiv(channels, columns))](
                pixels,
                out,
                rows,
                channels,
                *size,
                *grid,
                *(triton.cdiv(2 * locations, size) + 1 for size, locations in zip(size, grid, strict=True)),
                ROWS=tile,
                COLUMNS=columns,
                DTYPE=_types(grad.dtype)[1],
            )
        grads.append(out.permute(0, 3, 1, 2))
    return grads


def hypercolumn_norm(maps: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """(B, H, W): Euclidean norms."""
    batch = maps[0].shape[0]
    wide, dtype = _types(maps[0].dtype)
    squares = maps[0].new_zeros((len(maps), batch, *grid), dtype=wide)
    for m, out in zip(maps, squares, strict=True):
        channels, height, width = m.shape[1:]
        if out.numel() and channels:
            tile, columns = _tile(channels)
            hypercolumn_square_sum_kernel[(triton.cdiv(out.numel(), tile),)](
                _pixels(m),
                out,
                out.numel(),
                channels,
                height,
                width,
                *grid,
                ROWS=tile,
                COLUMNS=columns,
                DTYPE=dtype,
            )
    return squares.sum(0).sqrt()
