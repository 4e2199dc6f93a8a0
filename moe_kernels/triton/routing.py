"""Triton kernels of :mod:`moe_kernels.ops.routing`, forward. T tokens, d features, p projected, E experts, k choices.

Cosine: L = s · n / ‖q‖ with q = Wx + b and the numerators n_e = ê_e·q = (Wᵀê_e)·x + ê_e·b. The (E, d) matrix of the
Wᵀê_e is folded once a call, so the order of the experts depends on one short product in float32, and the wide product
is needed for the norm alone (and by the backward).

float32 products run on the tensor cores as three of TF32 ("tf32x3"), which keeps 22 bits of each factor: their error
is that of a float32 sum of this length. For 16-bit x, which is exact as it is, W is split into a sum of two 16-bit
matrices, two products at the 16-bit rate.

One pass over x: a program takes a block of tokens from x to gates, and writes its share of the statistics, which
a second kernel adds in the order of the blocks. No atomics, no host synchronization.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton import capability
from moe_kernels.triton.selection import select

MAX_EXPERTS = 256
"""More do not fit into the registers of one program, which has at least 16 tokens."""
EPS = tl.constexpr(1e-12)
"""The smallest norm, torch.nn.functional.normalize's."""
MAX_LOG_SCALE = tl.constexpr(4.605170185988092)


@triton.jit
def scale_of(log_scale):
    """s = exp(min(log_scale, ln 100))."""
    return tl.exp(tl.minimum(tl.load(log_scale), MAX_LOG_SCALE))


@triton.jit
def _scores(x, weight, token, tokens, num_experts, dim, E_PAD: tl.constexpr, D: tl.constexpr):
    """x (T, d) times weight (E, d), transposed: a tile (tokens, E_PAD) in the dtype of ``weight``."""
    dtype: tl.constexpr = weight.dtype.element_ty
    expert = tl.arange(0, E_PAD)
    rows = x + token[:, None] * dim
    columns = weight + expert[None, :] * dim
    scores = tl.zeros((token.shape[0], E_PAD), dtype=dtype)
    for first in range(0, dim, D):
        feature = first + tl.arange(0, D)
        within = feature < dim
        a = tl.load(rows + feature[None, :], mask=(token < tokens)[:, None] & within[None, :], other=0.0)
        b = tl.load(columns + feature[:, None], mask=(expert < num_experts)[None, :] & within[:, None], other=0.0)
        scores = tl.dot(a.to(dtype), b, scores, input_precision="tf32x3", out_dtype=dtype)
    return scores


@triton.jit
def routing_fold_kernel(
    projection,
    bias,
    embedding,
    folded,
    folded_bias,
    halves,
    num_experts,
    dim,
    projected_dim,
    E_PAD: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
):
    """folded (E, d), rows Wᵀê_e; folded_bias (E,), ê_e·b; halves (2, p, d), 16-bit with the sum W, or none."""
    dtype: tl.constexpr = embedding.dtype.element_ty
    expert = tl.program_id(1) * E_PAD + tl.arange(0, E_PAD)
    feature = tl.program_id(0) * D + tl.arange(0, D)
    total = tl.zeros((E_PAD, D), dtype=dtype)
    offset = tl.zeros((E_PAD,), dtype=dtype)
    square = tl.zeros((E_PAD,), dtype=dtype)
    for first in range(0, projected_dim, P):
        i = first + tl.arange(0, P)
        inside = i < projected_dim
        mask = (expert < num_experts)[:, None] & inside[None, :]
        direction = tl.load(embedding + expert[:, None] * projected_dim + i[None, :], mask=mask, other=0.0)
        place = i.to(tl.int64)[:, None] * dim + feature[None, :]
        mask = inside[:, None] & (feature < dim)[None, :]
        weight = tl.load(projection + place, mask=mask, other=0.0)
        total = tl.dot(direction, weight, total, input_precision="ieee", out_dtype=dtype)
        offset += tl.sum(direction * tl.load(bias + i, mask=inside, other=0.0)[None, :], axis=1)
        square += tl.sum(direction * direction, axis=1)
        if halves is not None:
            half: tl.constexpr = halves.dtype.element_ty
            high = weight.to(half)
            rest = tl.cast(projected_dim, tl.int64) * dim
            if tl.program_id(1) == 0:
                tl.store(halves + place, high, mask=mask)
                tl.store(halves + rest + place, (weight - high.to(dtype)).to(half), mask=mask)
    norm = tl.sqrt(square)
    norm = tl.where(norm < EPS, EPS, norm)
    mask = (expert < num_experts)[:, None] & (feature < dim)[None, :]
    tl.store(folded + expert[:, None] * dim + feature[None, :], total / norm[:, None], mask=mask)
    if tl.program_id(0) == 0:
        tl.store(folded_bias + expert, offset / norm, mask=expert < num_experts)


@triton.jit(do_not_specialize=["tokens", "noise_std"])
def routing_cosine_forward_kernel(
    x,
    weight,
    bias,
    folded,
    folded_bias,
    log_scale,
    seed,
    logits,
    projected,
    gates,
    experts,
    confidence,
    partial_sums,
    partial_counts,
    tokens,
    num_experts,
    dim,
    projected_dim,
    noise_std,
    PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATE_EPS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """Everything that a block of tokens gives; ``weight`` (PARTS, p, d) has the sum W."""
    dtype: tl.constexpr = folded.dtype.element_ty
    operand: tl.constexpr = weight.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = token < tokens
    expert = tl.arange(0, E_PAD)
    real = expert < num_experts
    numerators = _scores(x, folded, token, tokens, num_experts, dim, E_PAD, D)
    numerators += tl.load(folded_bias + expert, mask=real, other=0.0)[None, :]

    square = tl.zeros((T,), dtype=dtype)
    for begin in range(0, projected_dim, P):
        i = begin + tl.arange(0, P)
        within = i < projected_dim
        q = tl.zeros((T, P), dtype=dtype)
        for part in tl.static_range(PARTS):
            rows = part * projected_dim + i.to(tl.int64)
            for first in range(0, dim, D):
                feature = first + tl.arange(0, D)
                mask = inside[:, None] & (feature < dim)[None, :]
                a = tl.load(x + token[:, None] * dim + feature[None, :], mask=mask, other=0.0)
                mask = (feature < dim)[:, None] & within[None, :]
                b = tl.load(weight + rows[None, :] * dim + feature[:, None], mask=mask, other=0.0)
                q = tl.dot(a.to(operand), b, q, input_precision="tf32x3", out_dtype=dtype)
        q += tl.load(bias + i, mask=within, other=0.0)[None, :]
        mask = inside[:, None] & within[None, :]
        tl.store(projected + token[:, None] * projected_dim + i[None, :], q, mask=mask)
        square += tl.sum(q * q, axis=1)

    norm = tl.sqrt(square)
    factor = scale_of(log_scale) / tl.where(norm < EPS, EPS, norm)
    clean = tl.where(real[None, :], numerators * factor[:, None], float("-inf"))
    mask = inside[:, None] & real[None, :]
    tl.store(logits + token[:, None] * num_experts + expert[None, :], clean, mask=mask)
    select(
        clean,
        seed,
        gates,
        experts,
        confidence,
        partial_sums,
        partial_counts,
        token,
        tokens,
        num_experts,
        noise_std,
        E_PAD,
        TOP_K,
        K_PAD,
        RENORMALIZE,
        GATE_EPS,
    )


@triton.jit(do_not_specialize=["tokens", "noise_std"])
def routing_linear_forward_kernel(
    x,
    weight,
    seed,
    logits,
    gates,
    experts,
    confidence,
    partial_sums,
    partial_counts,
    tokens,
    num_experts,
    dim,
    noise_std,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATE_EPS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """Everything that a block of tokens gives."""
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    expert = tl.arange(0, E_PAD)
    real = expert < num_experts
    clean = _scores(x, weight, token, tokens, num_experts, dim, E_PAD, D)
    clean = tl.where(real[None, :], clean, float("-inf"))
    mask = (token < tokens)[:, None] & real[None, :]
    tl.store(logits + token[:, None] * num_experts + expert[None, :], clean, mask=mask)
    select(
        clean,
        seed,
        gates,
        experts,
        confidence,
        partial_sums,
        partial_counts,
        token,
        tokens,
        num_experts,
        noise_std,
        E_PAD,
        TOP_K,
        K_PAD,
        RENORMALIZE,
        GATE_EPS,
    )


@triton.jit(do_not_specialize=["blocks"])
def routing_statistics_kernel(
    partial_sums,
    partial_counts,
    sums,
    totals,
    counts,
    blocks,
    num_sums,
    num_counts,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the shares of the blocks: sums (4, E) and totals (2,), num_sums together; counts (k, E), num_counts."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=sums.dtype.element_ty)
    count = tl.zeros((COLUMNS,), dtype=tl.int64)
    for first in range(0, blocks, BLOCKS):
        block = (first + tl.arange(0, BLOCKS)).to(tl.int64)
        inside = (block < blocks)[:, None]
        place = partial_sums + block[:, None] * num_sums + column[None, :]
        total += tl.sum(tl.load(place, mask=inside & (column < num_sums)[None, :], other=0.0), axis=0)
        counted = partial_counts + block[:, None] * num_counts + column[None, :]
        share = tl.load(counted, mask=inside & (column < num_counts)[None, :], other=0)
        count += tl.sum(share, axis=0).to(tl.int64)
    tl.store(sums + column, total, mask=column < num_sums - 2)
    tl.store(totals + column - (num_sums - 2), total, mask=(column >= num_sums - 2) & (column < num_sums))
    tl.store(counts + column, count, mask=column < num_counts)


def tile(extent: int, largest: int) -> int:
    """The side of a tile for this extent: a power of two, of at least the 16 that a tensor-core operand has."""
    power: int = triton.next_power_of_2(extent)
    return max(16, min(power, largest))


def feature_tile(dim: int, num_experts: int = 1) -> int:
    """Features at a time: fewer where rows are not aligned, and every element has an address of its own.

    And no more than leave room in shared memory for the tiles of all experts.
    """
    return tile(dim, min(64 if dim % 16 == 0 else 32, 8192 // tile(num_experts, MAX_EXPERTS)))


def token_block(num_experts: int) -> int:
    """Tokens a program takes: as few as a tensor-core operand has where the tiles of all experts fill the registers."""
    return 64 if num_experts <= 32 else 16


def selection_constants(num_experts: int, top_k: int, renormalize: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Constants and warps that both directions of both routers share; raises on more experts than they hold."""
    if num_experts > MAX_EXPERTS:
        raise NotImplementedError(
            f"the Triton router holds at most {MAX_EXPERTS} experts, got {num_experts}; "
            "use moe_kernels.backend.force('reference')"
        )
    return {
        "TOP_K": top_k,
        "RENORMALIZE": renormalize,
        "GATE_EPS": torch.finfo(dtype).eps,
        "T": token_block(num_experts),
        "E_PAD": tile(num_experts, MAX_EXPERTS),
        "num_warps": 4 if num_experts <= 32 else 8,
    }


class _Outputs:
    """What both routers return, and the shares of the blocks."""

    def __init__(self, x: Tensor, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        tokens = x.shape[0]
        self.blocks = triton.cdiv(tokens, token_block(num_experts))
        self.gates = x.new_empty((tokens, top_k), dtype=dtype)
        self.experts = x.new_empty((tokens, top_k), dtype=torch.int64)
        self.confidence = x.new_empty(tokens, dtype=dtype)
        self.logits = x.new_empty((tokens, num_experts), dtype=dtype)
        self.partial_sums = x.new_empty((self.blocks, 4 * num_experts + 2), dtype=dtype)
        self.partial_counts = x.new_empty((self.blocks, top_k, num_experts), dtype=torch.int32)

    def reduced(self) -> tuple[Tensor, ...]:
        """gates, experts, counts, sums, totals, confidence, logits."""
        _, top_k, num_experts = self.partial_counts.shape
        num_sums, num_counts = 4 * num_experts + 2, top_k * num_experts
        sums, totals = self.gates.new_empty((4, num_experts)), self.gates.new_empty(2)
        counts = self.experts.new_empty((top_k, num_experts))
        routing_statistics_kernel[(triton.cdiv(max(num_sums, num_counts), 32),)](
            self.partial_sums,
            self.partial_counts,
            sums,
            totals,
            counts,
            self.blocks,
            num_sums,
            num_counts,
            BLOCKS=128,
            COLUMNS=32,
        )
        return self.gates, self.experts, counts, sums, totals, self.confidence, self.logits


def routing_cosine(
    x: Tensor,
    projection: Tensor,
    bias: Tensor,
    embedding: Tensor,
    log_scale: Tensor,
    seed: Tensor | None,
    top_k: int,
    noise_std: float,
    renormalize: bool,
) -> tuple[Tensor, ...]:
    """gates, experts, counts, sums, totals, confidence, logits (T, E), projected (T, p), all wide but the integers."""
    (tokens, dim), (num_experts, projected_dim), dtype = x.shape, embedding.shape, projection.dtype
    constants = selection_constants(num_experts, top_k, renormalize, dtype)
    x, projection, bias, embedding = (t.contiguous() for t in (x, projection, bias, embedding))
    out = _Outputs(x, num_experts, top_k, dtype)
    projected = x.new_empty((tokens, projected_dim), dtype=dtype)
    if tokens:
        split = x.dtype != dtype
        weight = x.new_empty((2, projected_dim, dim)) if split else projection
        folded, folded_bias = projection.new_empty((num_experts, dim)), projection.new_empty(num_experts)
        tile_d = feature_tile(dim)
        # As many as leave the registers for the halves of float32 operands, which wgmma takes from shared memory.
        projected_tile = 128 if split else 64 if capability(x.device) >= (9, 0) else 32
        routing_fold_kernel[(triton.cdiv(dim, tile_d), triton.cdiv(num_experts, 16))](
            projection,
            bias,
            embedding,
            folded,
            folded_bias,
            weight if split else None,
            num_experts,
            dim,
            projected_dim,
            E_PAD=16,
            D=tile_d,
            P=tile(projected_dim, 64),
        )
        routing_cosine_forward_kernel[(out.blocks,)](
            x,
            weight,
            bias,
            folded,
            folded_bias,
            log_scale,
            seed,
            out.logits,
            projected,
            out.gates,
            out.experts,
            out.confidence,
            out.partial_sums,
            out.partial_counts,
            tokens,
            num_experts,
            dim,
            projected_dim,
            noise_std,
            PARTS=2 if split else 1,
            K_PAD=triton.next_power_of_2(top_k),
            D=min(feature_tile(dim, num_experts), 64 if split else 32),
            P=tile(projected_dim, projected_tile),
            **constants | {"num_warps": 8},
            num_stages=3,
        )
    return *out.reduced(), projected


def routing_linear(
    x: Tensor, weight: Tensor, seed: Tensor | None, top_k: int, noise_std: float, renormalize: bool
) -> tuple[Tensor, ...]:
    """gates, experts, counts, sums, totals, confidence, logits (T, E), all wide but the integers."""
    (tokens, dim), num_experts, dtype = x.shape, weight.shape[0], weight.dtype
    constants = selection_constants(num_experts, top_k, renormalize, dtype)
    x, weight = x.contiguous(), weight.contiguous()
    out = _Outputs(x, num_experts, top_k, dtype)
    if tokens:
        routing_linear_forward_kernel[(out.blocks,)](
            x,
            weight,
            seed,
            out.logits,
            out.gates,
            out.experts,
            out.confidence,
            out.partial_sums,
            out.partial_counts,
            tokens,
            num_experts,
            dim,
            noise_std,
            K_PAD=triton.next_power_of_2(top_k),
            D=feature_tile(dim, num_experts),
            **constants,
            num_stages=3,
        )
    return out.reduced()
