"""Scheduling and the product loop that the kernels of ``expert_ffn`` share.

The rows of an expert-major order are cut into tiles of BLOCK_M rows, none of which has rows of two experts. How many
there are is known on the device only, so the grid has a program for as many as there can be, each finds its tile in
``offsets``, and those without one end at once: no table, no synchronization with the host, and a CUDA graph may be
replayed with another routing. The rows that capacity dropped stand behind the experts' and are an expert without
weights.

One program works on one tile. A loop over tiles in fewer programs would keep its invariants in registers (161 instead
of 128 a thread for the up-projection), so that one program instead of two fits a multiprocessor; and with few steps
per product (6 for d = 384) it is the other program's product that fills the time of an epilogue.

E experts (``EXPERTS``), A assignments. Row numbers are int64 before they meet a stride; offsets inside a tile, which
has at most 256 rows, are int32 and take half the registers. Of an invalid plan the result is not specified, but no
foreign memory is touched.
"""

import triton
import triton.language as tl

_GROUP = tl.constexpr(8)  # row tiles that share a panel of weights while it is in the L2 cache


def row_tiles_bound(assignments: int, experts: int, block_m: int) -> int:
    """Row tiles at most: that many if of each expert's rows, and of the dropped ones, one is too many for a tile."""
    return (assignments + (experts + 1) * (block_m - 1)) // block_m


@triton.jit
def load_offsets(offsets, index, mask, assignments):
    """First rows of the experts ``index``; ``assignments`` where not ``mask``."""
    offset = tl.load(offsets + index, mask=mask, other=0)
    return tl.where(mask, tl.minimum(tl.maximum(offset, 0), assignments), assignments)


@triton.jit
def load_assignments(order, rows, assignments):
    """The assignments (int64) at ``rows``, all of which must be inside."""
    return tl.minimum(tl.maximum(tl.load(order + rows), 0), assignments - 1)


@triton.jit
def row_tile_ends(offsets, assignments, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """int32 (next power of two of E + 1,): the row tiles of the experts up to each, at E the dropped rows' too."""
    expert = tl.arange(0, triton.next_power_of_2(EXPERTS + 1))
    first = load_offsets(offsets, expert, expert <= EXPERTS, assignments)
    last = load_offsets(offsets, expert + 1, expert < EXPERTS, assignments)
    ends = tl.cumsum(tl.cdiv(tl.maximum(last - first, 0), BLOCK_M).to(tl.int32))
    # An invalid plan gives a row to several experts; buffers with a row for each row tile have row_tiles_bound of them.
    bound = (tl.cast(assignments, tl.int64) + (EXPERTS + 1) * (BLOCK_M - 1)) // BLOCK_M
    return tl.minimum(ends, bound.to(tl.int32))


@triton.jit
def locate(
    tile, ends, offsets, assignments, EXPERTS: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Of tile number ``tile``: expert (int64), row tile, first row (int64), number of rows, column tile.

    Expert by expert; within one, some row tiles go together through all column tiles, so that the programs that run
    at a time share few panels of rows and of weights, and those stay in the L2 cache.
    """
    passed = ends * COLUMN_TILES <= tile
    expert = tl.sum(passed.to(tl.int32)).to(tl.int64)
    before = tl.max(tl.where(passed, ends, 0))
    row_tiles = tl.min(tl.where(passed, 2147483647, ends)) - before
    local = tile - before * COLUMN_TILES
    group = local // (_GROUP * COLUMN_TILES) * _GROUP
    height = tl.minimum(row_tiles - group, _GROUP)
    local = local % (_GROUP * COLUMN_TILES)
    row_tile = group + local % height
    first = load_offsets(offsets, expert, True, assignments) + row_tile.to(tl.int64) * BLOCK_M
    last = load_offsets(offsets, expert + 1, expert < EXPERTS, assignments)
    return expert, before + row_tile, first, tl.minimum(last - first, BLOCK_M).to(tl.int32), local // height


@triton.jit
def load(pointers, mask, WHOLE: tl.constexpr):
    """A masked load, and without the mask where the caller knows that nothing is outside."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def zero_sums(pointer, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An accumulator for products of what ``pointer`` points to: float32, float64 for float64."""
    return tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def rows_product(
    left, rows, right, width, end, K: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N): the rows ``rows`` of ``left`` (·, K) times the first ``width`` columns of ``right``.

    The sum over K goes to ``end``, K or 0. ``WHOLE``: every tile of ``right`` has BLOCK_N columns. In float32, three
    TF32 products keep the accuracy on the tensor cores, which the input precision "ieee" would not use.
    """
    ks = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_N)
    left_tile = left + (rows[:, None] * K + ks[None, :])
    right_tile = right + (ks[:, None] * STRIDE_K + columns[None, :] * STRIDE_N)
    sums = zero_sums(left, rows.shape[0], BLOCK_N)
    for k in range(0, end, BLOCK_K):
        in_k = k + ks < K
        a = load(left_tile, in_k[None, :], K % BLOCK_K == 0)
        b = load(right_tile, in_k[:, None] & (columns < width)[None, :], K % BLOCK_K == 0 and WHOLE)
        sums = tl.dot(a, b, sums, input_precision="tf32x3", out_dtype=sums.dtype)
        left_tile += BLOCK_K
        right_tile += BLOCK_K * STRIDE_K
    return sums


@triton.jit
def column_parts(tile, WIDTH: tl.constexpr):
    """(M, N) as N / WIDTH (a power of two) times (M, WIDTH), from left to right.

    An epilogue that takes one at a time needs few registers beside the accumulator.
    """
    if tile.shape[1] == WIDTH:
        return (tile,)
    else:
        pair = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(pair, (0, 2, 1)))
        return column_parts(left, WIDTH) + column_parts(right, WIDTH)
