"""Triton kernels of :mod:`moe_kernels.ops.dispatch`: a counting sort, and row kernels to gather and combine by it.

T tokens, k choices, A = T·k assignments, E experts, d features. The sort takes blocks of assignments: count each
bucket in each block, prefix sums of these counts over the blocks, then every assignment knows its position. Buckets
are the experts and, behind them, the dropped. Grids follow from shapes, nothing is read back by the host, no atomics.

An id out of range counts as the nearest expert, and positions are checked before memory is indexed by them: what a
caller gets for invalid input is not specified, but no foreign memory is touched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(128)
"""Assignments a block: each is compared with each other one, which ranks them whatever the number of experts."""
BUCKETS = tl.constexpr(32)
"""Buckets that are held at a time."""
BLOCKS = tl.constexpr(1024)
"""Blocks whose counts are summed at a time."""
TILE = 2048
"""Elements of a tile of rows."""


@triton.jit
def _load_block(experts, kept, sequence, tokens, num_experts, TOP_K: tl.constexpr, QUEUE: tl.constexpr):
    """Assignments of this program's block, int64, and their buckets, int32, E + 1 past the end.

    Without ``QUEUE`` in their own order; with it in that of service: all first choices, then all second ones, within
    a choice by token or by ``sequence``.
    """
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < tokens.to(tl.int64) * TOP_K
    assignments = slots
    if QUEUE:
        token = slots % tokens
        if sequence is not None:
            token = tl.load(sequence + token, mask=inside, other=0)
        assignments = token * TOP_K + slots // tokens
    buckets = tl.load(experts + assignments, mask=inside, other=0)
    buckets = tl.minimum(tl.maximum(buckets, 0), num_experts - 1).to(tl.int32)
    if kept is not None:
        buckets = tl.where(tl.load(kept + assignments, mask=inside, other=False), buckets, num_experts)
    return assignments, tl.where(inside, buckets, num_experts + 1)


@triton.jit
def _rank(starts, buckets, num_experts, blocks):
    """How many assignments of its own bucket come before each of this block, in this block and the earlier ones."""
    slots = tl.arange(0, BLOCK)
    earlier = (buckets[None, :] == buckets[:, None]) & (slots[None, :] < slots[:, None])
    start = tl.load(starts + buckets.to(tl.int64) * blocks + tl.program_id(0), mask=buckets <= num_experts, other=0)
    return start + tl.sum(earlier.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks"])
def dispatch_count_kernel(
    experts, kept, sequence, counts, tokens, num_experts, blocks, TOP_K: tl.constexpr, QUEUE: tl.constexpr
):
    """counts (E + 1, blocks): how many assignments of the block go to the bucket."""
    _, buckets = _load_block(experts, kept, sequence, tokens, num_experts, TOP_K, QUEUE)
    for first in range(0, num_experts + 1, BUCKETS):
        tile = first + tl.arange(0, BUCKETS)
        count = tl.sum((buckets[:, None] == tile[None, :]).to(tl.int32), axis=0)
        tl.store(counts + tile.to(tl.int64) * blocks + tl.program_id(0), count, mask=tile <= num_experts)


@triton.jit(do_not_specialize=["blocks"])
def dispatch_prefix_kernel(counts, starts, totals, blocks):
    """For the bucket of this program: starts (E + 1, blocks), its assignments in earlier blocks; totals (E + 1,)."""
    bucket = tl.program_id(0).to(tl.int64)
    carry = tl.zeros((), dtype=tl.int64)
    for first in range(0, blocks, BLOCKS):
        index = first + tl.arange(0, BLOCKS)
        count = tl.load(counts + bucket * blocks + index, mask=index < blocks, other=0).to(tl.int64)
        tl.store(starts + bucket * blocks + index, carry + tl.cumsum(count, axis=0) - count, mask=index < blocks)
        carry += tl.sum(count, axis=0)
    tl.store(totals + bucket, carry)


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks", "capacity"])
def dispatch_keep_kernel(experts, sequence, starts, kept, tokens, num_experts, blocks, capacity, TOP_K: tl.constexpr):
    """kept (T, k): whether fewer than ``capacity`` assignments of its expert were served before."""
    assignments, buckets = _load_block(experts, None, sequence, tokens, num_experts, TOP_K, QUEUE=True)
    rank = _rank(starts, buckets, num_experts, blocks)
    tl.store(kept + assignments, rank < capacity, mask=buckets <= num_experts)


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks"])
def dispatch_scatter_kernel(
    experts, kept, starts, totals, order, offsets, inverse, tokens, num_experts, blocks, TOP_K: tl.constexpr
):
    """order (A,) and inverse (T, k); the program behind the last block writes offsets (E + 1,)."""
    if tl.program_id(0) == blocks:
        carry = tl.zeros((), dtype=tl.int64)
        for first in range(0, num_experts + 1, BUCKETS):
            tile = first + tl.arange(0, BUCKETS)
            total = tl.load(totals + tile, mask=tile <= num_experts, other=0)
            tl.store(offsets + tile, carry + tl.cumsum(total, axis=0) - total, mask=tile <= num_experts)
            carry += tl.sum(total, axis=0)
    else:
        assignments, buckets = _load_block(experts, kept, None, tokens, num_experts, TOP_K, QUEUE=False)
        position = _rank(starts, buckets, num_experts, blocks)
        for first in range(0, num_experts, BUCKETS):
            tile = first + tl.arange(0, BUCKETS)
            total = tl.load(totals + tile, mask=tile < num_experts, other=0)
            position += tl.sum(tl.where(tile[None, :] < buckets[:, None], total[None, :], 0), axis=1)
        inside = buckets <= num_experts
        tl.store(order + position, assignments, mask=inside)
        tl.store(inverse + assignments, position, mask=inside)


@triton.jit
def _kept_positions(offsets, assignments, num_experts):
    """offsets[E], or what there is of it."""
    return tl.minimum(tl.load(offsets + num_experts), assignments)


@triton.jit(do_not_specialize=["tokens", "num_experts"])
def gather_forward_kernel(
    x, order, offsets, out, tokens, num_experts, dim, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out (A, d): the row of each position's token, or zero."""
    assignments = tokens.to(tl.int64) * TOP_K
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = position < assignments
    assignment = tl.load(order + position, mask=inside, other=0)
    kept = (position < _kept_positions(offsets, assignments, num_experts)) & (assignment >= 0)
    kept = kept & (assignment < assignments)
    within = column[None, :] < dim
    row = tl.load(x + (assignment // TOP_K)[:, None] * dim + column[None, :], mask=kept[:, None] & within, other=0.0)
    tl.store(out + position[:, None] * dim + column[None, :], row, mask=inside[:, None] & within)


@triton.jit(do_not_specialize=["tokens", "num_experts"])
def combine_forward_kernel(
    rows,
    gates,
    offsets,
    inverse,
    out,
    tokens,
    num_experts,
    dim,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """out (T, d): Σ_j of the kept rows at the token's positions, times the gates where there are any."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    within = column[None, :] < dim
    end = _kept_positions(offsets, tokens.to(tl.int64) * TOP_K, num_experts)
    total = tl.zeros((ROWS, COLUMNS), dtype=DTYPE)
    for j in range(TOP_K):
        position = tl.load(inverse + token * TOP_K + j, mask=inside, other=-1)
        kept = (position >= 0) & (position < end)
        row = tl.load(rows + position[:, None] * dim + column[None, :], mask=kept[:, None] & within, other=0.0)
        row = row.to(DTYPE)
        if gates is not None:
            row = row * tl.load(gates + token * TOP_K + j, mask=kept, other=0.0)[:, None]
        total += row
    tl.store(out + token[:, None] * dim + column[None, :], total, mask=inside[:, None] & within)


@triton.jit(do_not_specialize=["tokens", "num_experts"])
def combine_backward_kernel(
    grad,
    y,
    gates,
    order,
    offsets,
    grad_y,
    grad_gates,
    tokens,
    num_experts,
    dim,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_y (A, d) and grad_gates (T, k), zero where dropped."""
    dtype: tl.constexpr = gates.dtype.element_ty
    assignments = tokens.to(tl.int64) * TOP_K
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = position < assignments
    assignment = tl.load(order + position, mask=inside, other=-1)
    valid = (assignment >= 0) & (assignment < assignments)
    kept = valid & (position < _kept_positions(offsets, assignments, num_experts))
    gate = tl.load(gates + assignment, mask=kept, other=0.0)
    dot = tl.zeros((ROWS,), dtype=dtype)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        within = column[None, :] < dim
        mask = kept[:, None] & within
        g = tl.load(grad + (assignment // TOP_K)[:, None] * dim + column[None, :], mask=mask, other=0.0).to(dtype)
        value = tl.load(y + position[:, None] * dim + column[None, :], mask=mask, other=0.0).to(dtype)
        dot += tl.sum(g * value, axis=1)
        tl.store(grad_y + position[:, None] * dim + column[None, :], g * gate[:, None], mask=inside[:, None] & within)
    tl.store(grad_gates + assignment, dot, mask=valid)


def _sort(
    experts: Tensor, kept: Tensor | None, sequence: Tensor | None, num_experts: int, queue: bool
) -> tuple[Tensor, Tensor]:
    """starts (E + 1, blocks) and totals (E + 1,) of the assignments in their own order or in that of service."""
    tokens, top_k = experts.shape
    blocks = triton.cdiv(experts.numel(), BLOCK)
    counts = experts.new_empty((num_experts + 1, blocks), dtype=torch.int32)
    starts, totals = experts.new_empty((num_experts + 1, blocks)), experts.new_empty(num_experts + 1)
    if blocks:
        dispatch_count_kernel[(blocks,)](
            experts, kept, sequence, counts, tokens, num_experts, blocks, TOP_K=top_k, QUEUE=queue
        )
    dispatch_prefix_kernel[(num_experts + 1,)](counts, starts, totals, blocks)
    return starts, totals


def dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, priority: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order (A,), offsets (E+1,), inverse (T, k), kept (T, k)."""
    experts = experts.contiguous()
    tokens, top_k = experts.shape
    blocks = triton.cdiv(experts.numel(), BLOCK)
    kept = torch.ones_like(experts, dtype=torch.bool)
    limited = None
    if capacity is not None and blocks:
        sequence = None if priority is None else priority.sort(descending=True, stable=True).indices
        starts, _ = _sort(experts, None, sequence, num_experts, queue=True)
        dispatch_keep_kernel[(blocks,)](
            experts, sequence, starts, kept, tokens, num_experts, blocks, capacity, TOP_K=top_k
        )
        limited = kept
    starts, totals = _sort(experts, limited, None, num_experts, queue=False)
    order, inverse = experts.new_empty(experts.numel()), torch.empty_like(experts)
    offsets = experts.new_empty(num_experts + 1)
    dispatch_scatter_kernel[(blocks + 1,)](
        experts, limited, starts, totals, order, offsets, inverse, tokens, num_experts, blocks, TOP_K=top_k
    )
    return order, offsets, inverse, kept


def _tile(dim: int) -> tuple[int, int]:
    """Rows and columns of a tile; columns of at most 128, so that 384 and its like are covered without waste."""
    columns = min(triton.next_power_of_2(dim), 128)
    return TILE // columns, columns


def gather(x: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Rows of ``x`` (T, d) in expert-major order (A, d); the rows of dropped assignments are zero."""
    (tokens, top_k), dim = inverse.shape, x.shape[1]
    out = x.new_empty((tokens * top_k, dim))
    if out.numel():
        rows, columns = _tile(dim)
        gather_forward_kernel[(triton.cdiv(tokens * top_k, rows), triton.cdiv(dim, columns))](
            x.contiguous(),
            order.contiguous(),
            offsets.contiguous(),
            out,
            tokens,
            offsets.shape[0] - 1,
            dim,
            TOP_K=top_k,
            ROWS=rows,
            COLUMNS=columns,
        )
    return out


def _sum_rows(rows: Tensor, gates: Tensor | None, offsets: Tensor, inverse: Tensor) -> Tensor:
    (tokens, top_k), dim = inverse.shape, rows.shape[1]
    out = rows.new_empty((tokens, dim))
    if out.numel():
        tile, columns = _tile(dim)
        combine_forward_kernel[(triton.cdiv(tokens, tile), triton.cdiv(dim, columns))](
            rows.contiguous(),
            None if gates is None else gates.contiguous(),
            offsets.contiguous(),
            inverse.contiguous(),
            out,
            tokens,
            offsets.shape[0] - 1,
            dim,
            TOP_K=top_k,
            ROWS=tile,
            COLUMNS=columns,
            DTYPE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        )
    return out


def gather_backward(grad: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """(T, d): the sum of a token's rows of ``grad`` (A, d), in the order of its choices."""
    return _sum_rows(grad, None, offsets, inverse)


def combine(y: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """(T, d): Σ_j gates[t, j] · y[inverse[t, j]] over kept assignments, summed in the dtype of the gates."""
    return _sum_rows(y, gates, offsets, inverse)


def combine_backward(
    grad: Tensor, y: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``y`` (A, d) and of ``gates`` (T, k)."""
    (tokens, top_k), dim = inverse.shape, y.shape[1]
    grad_y, grad_gates = y.new_empty(y.shape), gates.new_empty(gates.shape)
    if grad_gates.numel():
        rows, columns = _tile(dim)
        combine_backward_kernel[(triton.cdiv(tokens * top_k, rows),)](
            grad.contiguous(),
            y.contiguous(),
            gates.contiguous(),
            order.contiguous(),
            offsets.contiguous(),
            grad_y,
            grad_gates,
            tokens,
            offsets.shape[0] - 1,
            dim,
            TOP_K=top_k,
            ROWS=rows,
            COLUMNS=columns,
        )
    return grad_y, grad_gates
