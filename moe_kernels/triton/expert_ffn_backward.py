"""Backward of ``expert_ffn`` in Triton; specified in :mod:`moe_kernels.ops.expert_ffn`.

With A = dropout(φ(z)), dA = dy w2 and g the gate, row by row in expert-major order:

    dz = g dA dropout φ'(z)      dgate = ⟨dA, A⟩ + ⟨dy, b2⟩      dx = dz w1
    dw1 = dzᵀ x   db1 = Σ dz     dw2 = dyᵀ (g A)                  db2 = Σ g dy

so neither A nor the experts' outputs are kept by the forward: one kernel makes dz and g A of the pre-activation (or of
a second product, where only the input was kept) in the epilogue of dA. Rows of x and dy are gathered in the loads, on
the rows of dA and on the summed dimension of dw1 and dw2. Sums that several programs share (over the columns for
dgate, over the rows for db1 and db2) are written as partial sums and added in a fixed order: no atomics, the same
result bit for bit at every run.

T tokens, d features (``D``), h hidden features (``H``), E experts, k choices (``TOP_K``), A = T·k assignments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton import configurations
from moe_kernels.triton.activation import dropout_factors, value_and_slope
from moe_kernels.triton.down import down
from moe_kernels.triton.grouped import (
    column_parts,
    load,
    load_assignments,
    load_offsets,
    locate,
    row_tile_ends,
    row_tiles_bound,
    rows_product,
    zero_sums,
)


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_dz_kernel(
    grad, x, w1, b1, w2, gates, preactivation, order, offsets, seed, dz, scaled, dots, sums, assignments, dropout_p,
    D: tl.constexpr, H: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dz and scaled = g A, (A, h); dots (A, column tiles), parts of ⟨dA, A⟩; sums (row tiles, h), parts of Σ dz.

    z is read from ``preactivation`` or, where that is None, computed again. Dropped rows are not written.
    """
    COLUMN_TILES: tl.constexpr = triton.cdiv(H, BLOCK_N)
    WHOLE: tl.constexpr = H % BLOCK_N == 0
    ends = row_tile_ends(offsets, assignments, EXPERTS, BLOCK_M)
    tile = tl.program_id(0)
    if tile >= tl.max(ends) * COLUMN_TILES:
        return
    expert, row_tile, first, height, column_tile = locate(
        tile, ends, offsets, assignments, EXPERTS, COLUMN_TILES, BLOCK_M
    )
    if expert == EXPERTS:
        return
    row = tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N
    assignment = load_assignments(order, first + tl.minimum(row, height - 1), assignments)
    token = assignment // TOP_K
    grad_hidden = rows_product(
        grad, token, w2 + expert * H * D + column, H - column, D, D, H, 1, BLOCK_N, BLOCK_K, WHOLE
    )
    grad_hidden = column_parts(grad_hidden, WIDTH)
    if preactivation is None:
        product = rows_product(
            x, token, w1 + (expert * H + column) * D, H - column, D, D, 1, D, BLOCK_N, BLOCK_K, WHOLE
        )
        product = column_parts(product, WIDTH)
    gate = tl.load(gates + assignment)[:, None]
    dot = tl.zeros_like(gate)
    for part in tl.static_range(BLOCK_N // WIDTH):
        columns = column + part * WIDTH + tl.arange(0, WIDTH)
        inside = (row < height)[:, None] & (columns < H)[None, :]
        at = first * H + (row[:, None] * H + columns[None, :])
        if preactivation is None:
            bias = tl.load(b1 + expert * H + columns, mask=columns < H, other=0.0)
            z = product[part] + bias.to(gate.dtype)[None, :]
        else:
            z = tl.load(preactivation + at, mask=inside, other=0.0).to(gate.dtype)
        value, slope = value_and_slope(z, ACTIVATION)
        if seed is not None:
            factors = dropout_factors(seed, token, expert, column + part * WIDTH, dropout_p, H, EXPERTS, WIDTH)
            value *= factors
            slope *= factors
        dot += tl.sum(grad_hidden[part] * value, 1, keep_dims=True)
        tl.store(scaled + at, (gate * value).to(scaled.dtype.element_ty), mask=inside)
        slope *= gate * grad_hidden[part]
        tl.store(dz + at, slope.to(dz.dtype.element_ty), mask=inside)
        sum_rows = tl.sum(tl.where(inside, slope, 0.0), 0)
        tl.store(sums + row_tile.to(tl.int64) * H + columns, sum_rows, mask=columns < H)
    at = (first + row[:, None]) * COLUMN_TILES + column_tile
    tl.store(dots + at, dot, mask=(row < height)[:, None])


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_gates_kernel(
    grad, b2, gates, dots, order, offsets, grad_gates, sums, assignments,
    D: tl.constexpr, DOTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_gates (T, k) = ⟨dA, A⟩ from its ``DOTS`` parts + ⟨dy, b2⟩, zero if dropped; sums (row tiles, d) of g dy."""
    ends = row_tile_ends(offsets, assignments, EXPERTS, BLOCK_M)
    tile = tl.program_id(0)
    if tile >= tl.max(ends):
        return
    expert, row_tile, first, height, _ = locate(tile, ends, offsets, assignments, EXPERTS, 1, BLOCK_M)
    live = expert < EXPERTS
    row = tl.arange(0, BLOCK_M)
    inside = row < height
    assignment = load_assignments(order, first + tl.minimum(row, height - 1), assignments)
    gate = tl.where(inside, tl.load(gates + assignment), 0.0)
    dot = tl.zeros_like(gate)
    for part in range(0, tl.where(live, DOTS, 0)):
        dot += tl.load(dots + (first + row) * DOTS + part, mask=inside, other=0.0)
    for column in range(0, tl.where(live, D, 0), BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (columns < D)[None, :]
        dy = tl.load(grad + (assignment // TOP_K)[:, None] * D + columns[None, :], mask=mask, other=0.0)
        dy = dy.to(gate.dtype)
        bias = tl.load(b2 + expert * D + columns, mask=columns < D, other=0.0).to(gate.dtype)
        dot += tl.sum(dy * bias[None, :], 1)
        tl.store(sums + row_tile.to(tl.int64) * D + columns, tl.sum(gate[:, None] * dy, 0), mask=columns < D)
    tl.store(grad_gates + assignment, dot, mask=inside)


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_bias_kernel(
    sums, offsets, out, assignments,
    N: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (E, N): for every expert the sum of its row tiles' ``sums`` (row tiles of BLOCK_M, N), BLOCK_K at a time."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ends = row_tile_ends(offsets, assignments, EXPERTS, BLOCK_M)
    segment = tl.arange(0, ends.shape[0])
    begin = tl.sum(tl.where(segment == expert - 1, ends, 0))
    end = tl.sum(tl.where(segment == expert, ends, 0))
    total = tl.zeros((BLOCK_N,), sums.dtype.element_ty)
    for tile in range(begin, end, BLOCK_K):
        tiles = tile + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = (tiles < end)[:, None] & (columns < N)[None, :]
        total += tl.sum(tl.load(sums + tiles[:, None] * N + columns[None, :], mask=mask, other=0.0), 0)
    tl.store(out + expert.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["assignments"])
def expert_ffn_weight_kernel(
    left, right, order, offsets, out, assignments,
    M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (E, M, N): for every expert leftᵀ right over its rows.

    One of the two has a row a token and is gathered, the other a row an assignment. One program sums all rows of an
    expert, in order; without rows it writes zeros.
    """
    ROW_TILES: tl.constexpr = triton.cdiv(M, BLOCK_M)
    COLUMN_TILES: tl.constexpr = triton.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    expert = tl.program_id(0).to(tl.int64) // (ROW_TILES * COLUMN_TILES)
    # The gathered side, d, is the narrow one: its panels go round fastest and are read from the L2 cache.
    if GATHER_LEFT:
        i, j = tile % ROW_TILES, tile // ROW_TILES
    else:
        i, j = tile // COLUMN_TILES, tile % COLUMN_TILES
    first = load_offsets(offsets, expert, True, assignments)
    count = (load_offsets(offsets, expert + 1, True, assignments) - first).to(tl.int32)
    ms = i * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = j * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    if GATHER_LEFT:
        dense = right + first * N + (ks[:, None] * N + ns[None, :])
    else:
        dense = left + first * M + (ks[:, None] * M + ms[None, :])
    sums = zero_sums(left, BLOCK_M, BLOCK_N)
    for k in range(0, count, BLOCK_K):
        # Past the end the dense side is zero and the gathered side repeats a row of the same expert.
        in_k = (k + ks < count)[:, None]
        token = (load_assignments(order, first + tl.minimum(k + ks, count - 1), assignments) // TOP_K)[:, None]
        if GATHER_LEFT:
            a = load(left + token * M + ms[None, :], (ms < M)[None, :], M % BLOCK_M == 0)
            b = tl.load(dense, mask=in_k & (ns < N)[None, :], other=0.0)
            dense += BLOCK_K * N
        else:
            a = tl.load(dense, mask=in_k & (ms < M)[None, :], other=0.0)
            b = load(right + token * N + ns[None, :], (ns < N)[None, :], N % BLOCK_N == 0)
            dense += BLOCK_K * M
        sums = tl.dot(tl.trans(a), b, sums, input_precision="tf32x3", out_dtype=sums.dtype)
    at = (expert * M + ms[:, None]) * N + ns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


def _weight_gradient(
    kernel: str, left: Tensor, right: Tensor, parameter: Tensor, order: Tensor, offsets: Tensor, top_k: int,
    gather_left: bool,
) -> Tensor:  # fmt: skip
    """Σ over every expert's rows of ``left`` ⊗ ``right``, of the shape and dtype of ``parameter``."""
    assignments, (experts, rows, columns) = order.shape[0], parameter.shape
    out = torch.empty_like(parameter)
    dim, hidden_dim = (rows, columns) if gather_left else (columns, rows)
    tile = configurations.choose(kernel, left, assignments, experts, dim, hidden_dim)
    grid = (experts * triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n),)
    expert_ffn_weight_kernel[grid](
        left, right, order, offsets, out, assignments, rows, columns, top_k, gather_left, **tile.blocks, **tile.launch
    )
    return out


def _bias_gradient(sums: Tensor, parameter: Tensor, offsets: Tensor, assignments: int, block_m: int) -> Tensor:
    """The row tiles' ``sums`` added up for every expert, of the shape and dtype of ``parameter``."""
    out = torch.empty_like(parameter)
    experts, columns = parameter.shape
    expert_ffn_bias_kernel[(experts, triton.cdiv(columns, 64))](
        sums, offsets, out, assignments, columns, experts, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=32
    )
    return out


def expert_ffn_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, preactivation: Tensor,
    order: Tensor, offsets: Tensor, inverse: Tensor, seed: Tensor | None, activation: str, dropout_p: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, w1, b1, w2, b2 and gates, each in its dtype; as the operator."""
    parameters = [tensor.contiguous() for tensor in (w1, b1, w2, b2)]
    grad, x, gates, preactivation, order, offsets, inverse = (
        tensor.contiguous() for tensor in (grad, x, gates, preactivation, order, offsets, inverse)
    )
    narrow1, bias1, narrow2, bias2 = (parameter.to(x.dtype) for parameter in parameters)
    assignments, (experts, hidden_dim, dim) = order.shape[0], w1.shape
    top_k = inverse.shape[1]
    saved = preactivation if preactivation.shape[0] == assignments else None

    kernel = "dz" if saved is not None else "dz_recompute"
    tile = configurations.choose(kernel, x, assignments, experts, dim, hidden_dim)
    row_tiles = row_tiles_bound(assignments, experts, tile.block_m)
    column_tiles = triton.cdiv(hidden_dim, tile.block_n)
    dz, scaled = x.new_empty(assignments, hidden_dim), x.new_empty(assignments, hidden_dim)
    dots, sums = gates.new_empty(assignments, column_tiles), gates.new_empty(row_tiles, hidden_dim)
    expert_ffn_dz_kernel[(row_tiles * column_tiles,)](
        grad, x, narrow1, bias1, narrow2, gates, saved, order, offsets, seed, dz, scaled, dots, sums, assignments,
        dropout_p, dim, hidden_dim, experts, top_k, activation, **tile.blocks, WIDTH=tile.width, **tile.launch,
    )  # fmt: skip
    grad_b1 = _bias_gradient(sums, parameters[1], offsets, assignments, tile.block_m)

    tile = configurations.GATES
    row_tiles = row_tiles_bound(assignments, experts, tile.block_m)
    grad_gates, sums = torch.empty_like(gates), gates.new_empty(row_tiles, dim)
    expert_ffn_gates_kernel[(row_tiles,)](
        grad, bias2, gates, dots, order, offsets, grad_gates, sums, assignments,
        dim, column_tiles, experts, top_k, tile.block_m, tile.block_n,
    )  # fmt: skip
    grad_b2 = _bias_gradient(sums, parameters[3], offsets, assignments, tile.block_m)

    grad_w2 = _weight_gradient("dw2", grad, scaled, parameters[2], order, offsets, top_k, gather_left=True)
    grad_w1 = _weight_gradient("dw1", dz, x, parameters[0], order, offsets, top_k, gather_left=False)
    grad_x = down("dx", dz, narrow1, True, None, None, order, offsets, inverse)
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_gates
