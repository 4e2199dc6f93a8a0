"""The product back to d features, by which ``expert_ffn`` makes y of the hidden features and dx of their gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton import configurations, dispatch
from moe_kernels.triton.grouped import (
    column_parts,
    load_assignments,
    locate,
    row_tile_ends,
    row_tiles_bound,
    rows_product,
)


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_down_kernel(
    hidden, weights, b2, gates, order, offsets, out, assignments,
    H: tl.constexpr, D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_D: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of hidden (A, h) times the expert's (h, d) matrix, plus b2 unless None, times the gate unless None.

    With one choice per token every row goes to its token, out (T, d), else out (A, d) keeps the order. Zero for
    dropped rows.
    """
    COLUMN_TILES: tl.constexpr = triton.cdiv(D, BLOCK_N)
    ends = row_tile_ends(offsets, assignments, EXPERTS, BLOCK_M)
    # From the last row to the first: what the kernel before wrote last is still in the L2 cache.
    tile = tl.max(ends) * COLUMN_TILES - 1 - tl.program_id(0)
    if tile < 0:
        return
    expert, _, first, height, column_tile = locate(
        tile, ends, offsets, assignments, EXPERTS, COLUMN_TILES, BLOCK_M
    )  # fmt: skip
    live = expert < EXPERTS
    row = tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N
    product = rows_product(
        hidden + first * H, tl.minimum(row, height - 1), weights + expert * H * D + column * STRIDE_D, D - column,
        tl.where(live, H, 0), H, STRIDE_H, STRIDE_D, BLOCK_N, BLOCK_K, D % BLOCK_N == 0,
    )  # fmt: skip
    product = column_parts(product, WIDTH)
    to = first + row
    if TOP_K == 1:
        to = load_assignments(order, first + tl.minimum(row, height - 1), assignments)
    if gates is not None:
        gate = tl.load(gates + to)
    for part in tl.static_range(BLOCK_N // WIDTH):
        columns = column + part * WIDTH + tl.arange(0, WIDTH)
        inside = (row < height)[:, None] & (columns < D)[None, :]
        result = product[part]
        if b2 is not None:
            bias = tl.load(b2 + expert * D + columns, mask=columns < tl.where(live, D, 0), other=0.0)
            result += bias.to(result.dtype)[None, :]
        if gates is not None:
            result = tl.where(live, result * gate[:, None], 0.0)
        tl.store(out + to[:, None] * D + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


def down(
    kernel: str, hidden: Tensor, weights: Tensor, transposed: bool, b2: Tensor | None, gates: Tensor | None,
    order: Tensor, offsets: Tensor, inverse: Tensor,
) -> Tensor:  # fmt: skip
    """(T, d): per token the sum of its rows of ``hidden`` (A, h), each times its expert's matrix, plus b2, times gate.

    ``weights`` is (E, d, h), or (E, h, d) if ``transposed``; ``kernel`` names the configuration.
    """
    assignments, hidden_dim = hidden.shape
    experts, dim = weights.shape[0], weights.shape[2 if transposed else 1]
    top_k = inverse.shape[1]
    strides = (dim, 1) if transposed else (1, hidden_dim)
    out = hidden.new_empty(assignments, dim)
    tile = configurations.choose(kernel, hidden, assignments, experts, dim, hidden_dim)
    grid = (row_tiles_bound(assignments, experts, tile.block_m) * triton.cdiv(dim, tile.block_n),)
    expert_ffn_down_kernel[grid](
        hidden, weights, b2, gates if top_k == 1 else None, order, offsets, out, assignments,
        hidden_dim, dim, *strides, experts, top_k, **tile.blocks, WIDTH=tile.width, **tile.launch,
    )  # fmt: skip
    if top_k == 1:
        return out
    if gates is None:
        return dispatch.gather_backward(out, order, offsets, inverse)
    return dispatch.combine(out, gates, order, offsets, inverse)
