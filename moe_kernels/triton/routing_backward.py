"""Triton kernels of :mod:`moe_kernels.ops.routing`, backward. T tokens, d features, p projected ones, E experts.

A first kernel takes a block of tokens from the upstream gradients to dL and, for the cosine router, to
dq = Σ_e a_e ê_e − (Σ_e dL_e L_e) q / ‖q‖² with a_e = s dL_e / ‖q‖; what is left are products of tall matrices. Sums
over tokens are taken in chunks of a number of tokens that follows from the shapes, and the chunks added in order.

The gradients of parameters are float32 sums over all tokens and multiply in three TF32 products ("tf32x3"); the
gradient of 16-bit x is rounded to 16 bits, for which one TF32 product (11 bits a factor, float32 sums) is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton.routing import EPS, MAX_LOG_SCALE, feature_tile, scale_of, selection_constants, tile
from moe_kernels.triton.selection import select_backward


@triton.jit(do_not_specialize=["tokens", "noise_std"])
def routing_linear_backward_kernel(
    grad_gates,
    grad_sums,
    grad_totals,
    logits,
    experts,
    seed,
    grad_logits,
    tokens,
    num_experts,
    noise_std,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATE_EPS: tl.constexpr,
    T: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """grad_logits (T, E)."""
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    expert = tl.arange(0, E_PAD)
    real = (expert < num_experts)[None, :]
    mask = (token < tokens)[:, None] & real
    place = token[:, None] * num_experts + expert[None, :]
    clean = tl.where(real, tl.load(logits + place, mask=mask, other=0.0), float("-inf"))
    grad = select_backward(
        clean,
        seed,
        grad_gates,
        grad_sums,
        grad_totals,
        experts,
        token,
        tokens,
        num_experts,
        noise_std,
        E_PAD,
        TOP_K,
        RENORMALIZE,
        GATE_EPS,
    )
    tl.store(grad_logits + place, grad, mask=mask)


@triton.jit(do_not_specialize=["tokens", "noise_std"])
def routing_cosine_backward_kernel(
    grad_gates,
    grad_sums,
    grad_totals,
    embedding,
    log_scale,
    logits,
    projected,
    experts,
    seed,
    grad_projected,
    weights,
    partial_scale,
    tokens,
    num_experts,
    projected_dim,
    noise_std,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATE_EPS: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """grad_projected (T, p), dq; weights (T, E), the a_e; partial_scale (blocks,), Σ_t Σ_e dL_e L_e."""
    dtype: tl.constexpr = logits.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = token < tokens
    expert = tl.arange(0, E_PAD)
    real = (expert < num_experts)[None, :]
    mask = inside[:, None] & real
    place = token[:, None] * num_experts + expert[None, :]
    clean = tl.load(logits + place, mask=mask, other=0.0)
    grad = select_backward(
        tl.where(real, clean, float("-inf")),
        seed,
        grad_gates,
        grad_sums,
        grad_totals,
        experts,
        token,
        tokens,
        num_experts,
        noise_std,
        E_PAD,
        TOP_K,
        RENORMALIZE,
        GATE_EPS,
    )
    along = tl.sum(grad * clean, axis=1)
    tl.store(partial_scale + tl.program_id(0), tl.sum(along, axis=0))

    square = tl.zeros((T,), dtype=dtype)
    length = tl.zeros((E_PAD,), dtype=dtype)
    for first in range(0, projected_dim, P):
        i = first + tl.arange(0, P)
        within = (i < projected_dim)[None, :]
        q = tl.load(projected + token[:, None] * projected_dim + i[None, :], mask=inside[:, None] & within, other=0.0)
        square += tl.sum(q * q, axis=1)
        mask_e = (expert < num_experts)[:, None] & within
        direction = tl.load(embedding + expert[:, None] * projected_dim + i[None, :], mask=mask_e, other=0.0)
        length += tl.sum(direction * direction, axis=1)
    norm = tl.sqrt(square)
    clamped = norm < EPS
    inverse = 1.0 / tl.where(clamped, EPS, norm)
    length = tl.sqrt(length)
    length = tl.where(length < EPS, EPS, length)
    weight = grad * (scale_of(log_scale) * inverse)[:, None]
    tl.store(weights + place, weight, mask=mask)
    along_q = tl.where(clamped, 0.0, -along * inverse * inverse)
    weight = weight / length[None, :]
    for first in range(0, projected_dim, P):
        i = first + tl.arange(0, P)
        within = (i < projected_dim)[None, :]
        column = token[:, None] * projected_dim + i[None, :]
        mask_q = inside[:, None] & within
        q = tl.load(projected + column, mask=mask_q, other=0.0)
        mask_e = (expert < num_experts)[:, None] & within
        direction = tl.load(embedding + expert[:, None] * projected_dim + i[None, :], mask=mask_e, other=0.0)
        dq = tl.dot(weight, direction, along_q[:, None] * q, input_precision="tf32x3", out_dtype=dtype)
        tl.store(grad_projected + column, dq, mask=mask_q)


@triton.jit(do_not_specialize=["rows"])
def routing_product_kernel(
    a,
    b,
    out,
    rows,
    inner,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, columns) = a (rows, inner) · b (inner, columns)."""
    dtype: tl.constexpr = a.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), dtype=dtype)
    for first in range(0, inner, K):
        i = first + tl.arange(0, K)
        mask = (row < rows)[:, None] & (i < inner)[None, :]
        left = tl.load(a + row[:, None] * inner + i[None, :], mask=mask, other=0.0)
        mask = (i < inner)[:, None] & (column < columns)[None, :]
        right = tl.load(b + i.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=dtype)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["tokens", "chunk"])
def routing_token_sum_kernel(
    a,
    b,
    partial,
    partial_sum,
    tokens,
    chunk,
    rows,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """partial (chunks, rows, columns): Σ_t a_t b_tᵀ of a (T, rows) and b (T, columns) over a chunk of tokens.

    partial_sum (chunks, rows): Σ_t a_t, or none.
    """
    dtype: tl.constexpr = a.dtype.element_ty
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    part = tl.program_id(2).to(tl.int64)
    end = tl.minimum((part + 1) * chunk, tokens)
    total = tl.zeros((M, N), dtype=dtype)
    plain = tl.zeros((M,), dtype=dtype)
    for first in range(part * chunk, end, K):
        token = first + tl.arange(0, K).to(tl.int64)
        mask = (row < rows)[:, None] & (token < end)[None, :]
        left = tl.load(a + token[None, :] * rows + row[:, None], mask=mask, other=0.0)
        mask = (token < end)[:, None] & (column < columns)[None, :]
        right = tl.load(b + token[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total = tl.dot(left, right.to(dtype), total, input_precision="tf32x3", out_dtype=dtype)
        if partial_sum is not None:
            plain += tl.sum(left, axis=1)
    place = (part * rows + row)[:, None] * columns + column[None, :]
    tl.store(partial + place, total, mask=(row < rows)[:, None] & (column < columns)[None, :])
    if partial_sum is not None and tl.program_id(1) == 0:
        tl.store(partial_sum + part * rows + row, plain, mask=row < rows)


@triton.jit
def _add_chunks(partial, chunks, stride, place, mask):
    total = tl.zeros(place.shape, dtype=partial.dtype.element_ty)
    for part in range(chunks):
        total += tl.load(partial + tl.cast(part, tl.int64) * stride + place, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["chunks"])
def routing_weight_backward_kernel(partial, partial_bias, grad, grad_bias, chunks, size, rows, BLOCK: tl.constexpr):
    """Add the chunks of the gradient of a weight of ``size`` elements, and of a bias where there is one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(grad + i, _add_chunks(partial, chunks, size, i, i < size), mask=i < size)
    if partial_bias is not None:
        mask = i < rows
        tl.store(grad_bias + i, _add_chunks(partial_bias, chunks, rows, i, mask), mask=mask)


@triton.jit(do_not_specialize=["chunks", "blocks"])
def routing_embedding_backward_kernel(
    partial,
    partial_scale,
    embedding,
    log_scale,
    grad_embedding,
    grad_log_scale,
    chunks,
    blocks,
    num_experts,
    projected_dim,
    P: tl.constexpr,
):
    """One expert a program: its direction's gradient, less what is along the direction, over the norm.

    The program behind the last expert adds up the gradient of log_scale, zero where that is above its limit.
    """
    dtype: tl.constexpr = embedding.dtype.element_ty
    expert = tl.program_id(0).to(tl.int64)
    if expert == num_experts:
        total = tl.zeros((P,), dtype=dtype)
        for first in range(0, blocks, P):
            block = first + tl.arange(0, P)
            total += tl.load(partial_scale + block, mask=block < blocks, other=0.0)
        limited = tl.load(log_scale) > MAX_LOG_SCALE
        tl.store(grad_log_scale, tl.where(limited, 0.0, tl.sum(total, axis=0)))
    else:
        size = tl.cast(num_experts, tl.int64) * projected_dim
        square = tl.zeros((P,), dtype=dtype)
        along = tl.zeros((P,), dtype=dtype)
        for first in range(0, projected_dim, P):
            i = first + tl.arange(0, P)
            mask = i < projected_dim
            direction = tl.load(embedding + expert * projected_dim + i, mask=mask, other=0.0)
            square += direction * direction
            along += direction * _add_chunks(partial, chunks, size, expert * projected_dim + i, mask)
        norm = tl.sqrt(tl.sum(square, axis=0))
        clamped = norm < EPS
        norm = tl.where(clamped, EPS, norm)
        share = tl.where(clamped, 0.0, tl.sum(along, axis=0) / (norm * norm))
        for first in range(0, projected_dim, P):
            i = first + tl.arange(0, P)
            mask = i < projected_dim
            direction = tl.load(embedding + expert * projected_dim + i, mask=mask, other=0.0)
            grad = _add_chunks(partial, chunks, size, expert * projected_dim + i, mask)
            tl.store(grad_embedding + expert * projected_dim + i, (grad - share * direction) / norm, mask=mask)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (T, inner) · b (inner, columns) in ``dtype``."""
    (rows, inner), columns = a.shape, b.shape[1]
    out = a.new_empty((rows, columns), dtype=dtype)
    m, n = 64, feature_tile(columns)
    if out.numel():
        routing_product_kernel[(triton.cdiv(rows, m), triton.cdiv(columns, n))](
            a,
            b,
            out,
            rows,
            inner,
            columns,
            M=m,
            N=n,
            K=tile(inner, n // 2),
            PRECISION="tf32x3" if dtype == a.dtype else "tf32",
            num_warps=4,
            num_stages=3,
        )
    return out


def _token_sums(a: Tensor, b: Tensor, *, bias: bool = False) -> tuple[Tensor, Tensor | None]:
    """(chunks, rows, columns), the sums of a_t b_tᵀ by chunks of tokens, and (chunks, rows), those of a_t."""
    (tokens, rows), columns = a.shape, b.shape[1]
    m, n, k = tile(rows, 64), tile(columns, 64), 32
    tiles = triton.cdiv(rows, m) * triton.cdiv(columns, n)
    chunk = max(256, triton.cdiv(tokens * tiles, 512))  # enough programs for a GPU, without many partial sums
    chunk = triton.cdiv(chunk, k) * k
    chunks = triton.cdiv(tokens, chunk)
    partial = a.new_empty((chunks, rows, columns))
    partial_sum = a.new_empty((chunks, rows)) if bias else None
    if partial.numel():
        routing_token_sum_kernel[(triton.cdiv(rows, m), triton.cdiv(columns, n), chunks)](
            a, b, partial, partial_sum, tokens, chunk, rows, columns, M=m, N=n, K=k, num_warps=4, num_stages=3
        )
    return partial, partial_sum


def _add(partial: Tensor, partial_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The sums over chunks of a weight's gradient and of a bias's."""
    chunks, rows, columns = partial.shape
    grad = partial.new_empty((rows, columns))
    grad_bias = None if partial_bias is None else partial.new_empty(rows)
    routing_weight_backward_kernel[(triton.cdiv(rows * columns, 256),)](
        partial, partial_bias, grad, grad_bias, chunks, rows * columns, rows, BLOCK=256
    )
    return grad, grad_bias


def routing_cosine_backward(
    grad_gates: Tensor,
    grad_sums: Tensor,
    grad_totals: Tensor,
    x: Tensor,
    projection: Tensor,
    embedding: Tensor,
    log_scale: Tensor,
    logits: Tensor,
    projected: Tensor,
    experts: Tensor,
    seed: Tensor | None,
    top_k: int,
    noise_std: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, projection, bias, embedding and log_scale."""
    tokens, (num_experts, projected_dim) = x.shape[0], embedding.shape
    constants = selection_constants(num_experts, top_k, renormalize, logits.dtype)
    x, projection, embedding, logits, projected, experts = (
        t.contiguous() for t in (x, projection, embedding, logits, projected, experts)
    )
    blocks = triton.cdiv(tokens, constants["T"])
    grad_projected, weights = torch.empty_like(projected), torch.empty_like(logits)
    partial_scale = logits.new_empty(blocks)
    if tokens:
        routing_cosine_backward_kernel[(blocks,)](
            grad_gates.contiguous(),
            grad_sums.contiguous(),
            grad_totals.contiguous(),
            embedding,
            log_scale,
            logits,
            projected,
            experts,
            seed,
            grad_projected,
            weights,
            partial_scale,
            tokens,
            num_experts,
            projected_dim,
            noise_std,
            P=tile(projected_dim, 64 if num_experts <= 128 else 32),
            **constants,
        )
    grad_x = _product(grad_projected, projection, x.dtype)
    grad_projection, grad_bias = _add(*_token_sums(grad_projected, x, bias=True))
    partial, _ = _token_sums(weights, projected)
    grad_embedding, grad_log_scale = torch.empty_like(embedding), torch.empty_like(log_scale)
    routing_embedding_backward_kernel[(num_experts + 1,)](
        partial,
        partial_scale,
        embedding,
        log_scale,
        grad_embedding,
        grad_log_scale,
        partial.shape[0],
        blocks,
        num_experts,
        projected_dim,
        P=tile(projected_dim, 256),
    )
    return grad_x, grad_projection, grad_bias, grad_embedding, grad_log_scale


def routing_linear_backward(
    grad_gates: Tensor,
    grad_sums: Tensor,
    grad_totals: Tensor,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    experts: Tensor,
    seed: Tensor | None,
    top_k: int,
    noise_std: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    tokens, num_experts = logits.shape
    constants = selection_constants(num_experts, top_k, renormalize, logits.dtype)
    x, weight, logits, experts = (t.contiguous() for t in (x, weight, logits, experts))
    grad_logits = torch.empty_like(logits)
    if tokens:
        routing_linear_backward_kernel[(triton.cdiv(tokens, constants["T"]),)](
            grad_gates.contiguous(),
            grad_sums.contiguous(),
            grad_totals.contiguous(),
            logits,
            experts,
            seed,
            grad_logits,
            tokens,
            num_experts,
            noise_std,
            **constants | {"num_warps": max(4, constants["E_PAD"] // 16)},
        )
    grad_weight, _ = _add(_token_sums(grad_logits, x)[0])
    return _product(grad_logits, weight, x.dtype), grad_weight
