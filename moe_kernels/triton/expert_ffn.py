"""Forward of ``expert_ffn`` in Triton; specified in :mod:`moe_kernels.ops.expert_ffn`.

Two products: *up* gathers the rows of x in its loads and has bias, activation and dropout in its epilogue; *down*
multiplies by the gate and, for one choice per token, scatters its rows straight to y (a permutation), else leaves
them in expert-major order for the weighted sum of ``combine``. Nothing is added atomically: the result is the same,
bit for bit, at every run.

T tokens, d features (``D``), h hidden features (``H``), E experts, k choices (``TOP_K``), A = T·k assignments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton import configurations
from moe_kernels.triton.activation import dropout_factors, value_and_slope
from moe_kernels.triton.down import down
from moe_kernels.triton.expert_ffn_backward import expert_ffn_backward
from moe_kernels.triton.grouped import (
    column_parts,
    load_assignments,
    locate,
    row_tile_ends,
    row_tiles_bound,
    rows_product,
)

__all__ = ["expert_ffn", "expert_ffn_backward"]


@triton.jit
def saturated(z, dtype: tl.constexpr):
    """``z`` in ``dtype``; what float16 cannot hold becomes its largest number, so that the backward stays finite."""
    if dtype == tl.float16:
        z = tl.where(z > 65504.0, 65504.0, tl.where(z < -65504.0, -65504.0, z))
    return z.to(dtype)


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_up_kernel(
    x, w1, b1, order, offsets, seed, preactivation, hidden, assignments, dropout_p,
    D: tl.constexpr, H: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """hidden (A, h) = dropout(φ(z)) and, unless None, preactivation (A, h) = z = w1 x + b1; z = 0 for dropped rows."""
    COLUMN_TILES: tl.constexpr = triton.cdiv(H, BLOCK_N)
    ends = row_tile_ends(offsets, assignments, EXPERTS, BLOCK_M)
    tile = tl.program_id(0)
    if tile >= tl.max(ends) * COLUMN_TILES:
        return
    expert, _, first, height, column_tile = locate(
        tile, ends, offsets, assignments, EXPERTS, COLUMN_TILES, BLOCK_M
    )  # fmt: skip
    live = expert < EXPERTS
    row = tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N
    token = load_assignments(order, first + tl.minimum(row, height - 1), assignments) // TOP_K
    product = rows_product(
        x, token, w1 + (expert * H + column) * D, H - column, tl.where(live, D, 0),
        D, 1, D, BLOCK_N, BLOCK_K, H % BLOCK_N == 0,
    )  # fmt: skip
    product = column_parts(product, WIDTH)
    for part in tl.static_range(BLOCK_N // WIDTH):
        columns = column + part * WIDTH + tl.arange(0, WIDTH)
        inside = (row < height)[:, None] & (columns < H)[None, :]
        at = first * H + (row[:, None] * H + columns[None, :])
        bias = tl.load(b1 + expert * H + columns, mask=columns < tl.where(live, H, 0), other=0.0)
        z = product[part] + bias.to(product[part].dtype)[None, :]
        if preactivation is not None:
            tl.store(preactivation + at, saturated(z, preactivation.dtype.element_ty), mask=inside)
        value, _ = value_and_slope(z, ACTIVATION)
        if seed is not None:
            value *= dropout_factors(seed, token, expert, column + part * WIDTH, dropout_p, H, EXPERTS, WIDTH)
        tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)


def expert_ffn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, order: Tensor, offsets: Tensor,
    inverse: Tensor, seed: Tensor | None, activation: str, dropout_p: float, save_preactivation: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (T, d) and the pre-activation (A, h), or (0, h) unless it is to be saved; as the operator."""
    x, gates, order, offsets, inverse = (tensor.contiguous() for tensor in (x, gates, order, offsets, inverse))
    w1, b1, w2, b2 = (parameter.to(x.dtype).contiguous() for parameter in (w1, b1, w2, b2))
    assignments, (experts, hidden_dim, dim) = order.shape[0], w1.shape
    hidden = x.new_empty(assignments, hidden_dim)
    preactivation = x.new_empty(assignments if save_preactivation else 0, hidden_dim)
    tile = configurations.choose("up", x, assignments, experts, dim, hidden_dim)
    grid = (row_tiles_bound(assignments, experts, tile.block_m) * triton.cdiv(hidden_dim, tile.block_n),)
    expert_ffn_up_kernel[grid](
        x, w1, b1, order, offsets, seed, preactivation if save_preactivation else None, hidden, assignments, dropout_p,
        dim, hidden_dim, experts, inverse.shape[1], activation, **tile.blocks, WIDTH=tile.width, **tile.launch,
    )  # fmt: skip
    return down("down", hidden, w2, False, b2, gates, order, offsets, inverse), preactivation
