"""From logits to gates and statistics, and back: the part of routing that the cosine and the linear router share.

A tile is (tokens, E_PAD): E experts, padded to a power of two of at least 16, the least side of a tensor-core operand.
"""

import triton
import triton.language as tl

from moe_kernels.triton import philox

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_PDF_SCALE = tl.constexpr(0.3989422804014327)  # 1 / √(2π)


@triton.jit
def _cdf(z):
    """The standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)


@triton.jit
def _pdf(z):
    return _PDF_SCALE * tl.exp(-0.5 * z * z)


@triton.jit
def _softmax(logits):
    """Softmax of each row, and the logarithm of its denominator. A NaN or an infinity makes its whole row NaN."""
    largest = tl.max(logits, axis=1)
    largest = tl.where(tl.max((logits != logits).to(tl.int32), axis=1) > 0, float("nan"), largest)
    weights = tl.exp(logits - largest[:, None])
    total = tl.sum(weights, axis=1)
    return weights / total[:, None], largest + tl.log(total)


@triton.jit
def distributions(logits, seed, token, num_experts, noise_std, E_PAD: tl.constexpr):
    """Noisy logits, clean and routed probabilities, log-partition of the clean logits; −∞ and 0 where padded."""
    expert = tl.arange(0, E_PAD)
    clean, log_partition = _softmax(logits)
    noisy = logits
    routed = clean
    if seed is not None:
        counter = token[:, None] * num_experts + expert[None, :]
        noisy = logits + noise_std * philox.normal(tl.load(seed), counter).to(logits.dtype)
        routed, _ = _softmax(noisy)
    return noisy, clean, routed, log_partition


@triton.jit
def select(
    logits,
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
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Choose and store the experts of a tile of logits (−∞ where padded), and what the tile adds to the statistics.

    partial_sums (blocks, 4·E + 2): scores, importance, load, scaled load, z, entropy. partial_counts (blocks, k, E).
    """
    dtype = logits.dtype
    expert = tl.arange(0, E_PAD)
    choice = tl.arange(0, K_PAD)
    inside = token < tokens
    real = (expert < num_experts)[None, :]
    counted = inside[:, None] & real
    block = tl.program_id(0).to(tl.int64)
    noisy, clean, routed, log_partition = distributions(logits, seed, token, num_experts, noise_std, E_PAD)

    # The largest, ties to the lowest id. NaN, of which a row has none or only, counts as larger than any probability.
    rest = tl.where(real, tl.where(routed == routed, routed, 2.0), -1.0)
    gate = tl.zeros((logits.shape[0], K_PAD), dtype=dtype)
    chosen = tl.zeros((logits.shape[0], K_PAD), dtype=tl.int64)
    total = tl.zeros((logits.shape[0],), dtype=dtype)
    threshold = tl.zeros((logits.shape[0],), dtype=dtype)
    for j in range(TOP_K):
        best = tl.max(rest, axis=1)
        winner = tl.min(tl.where(rest == best[:, None], expert[None, :], E_PAD), axis=1)
        won = expert[None, :] == winner[:, None]
        rest = tl.where(won, -1.0, rest)
        probability = tl.sum(tl.where(won, routed, 0.0), axis=1)
        threshold = tl.sum(tl.where(won, noisy, 0.0), axis=1)
        total += probability
        gate = tl.where(choice[None, :] == j, probability[:, None], gate)
        chosen = tl.where(choice[None, :] == j, winner[:, None].to(tl.int64), chosen)
        count = tl.sum((won & inside[:, None]).to(tl.int32), axis=0)
        tl.store(partial_counts + (block * TOP_K + j) * num_experts + expert, count, mask=expert < num_experts)
    first = tl.sum(tl.where(choice[None, :] == 0, gate, 0.0), axis=1)
    tl.store(confidence + token, first, mask=inside)
    if RENORMALIZE:
        gate = gate / tl.where(total < EPS, EPS, total)[:, None]
    place = token[:, None] * TOP_K + choice[None, :]
    stored = inside[:, None] & (choice < TOP_K)[None, :]
    tl.store(gates + place, gate, mask=stored)
    tl.store(experts + place, chosen, mask=stored)

    sums = partial_sums + block * (4 * num_experts + 2)
    share = expert < num_experts
    tl.store(sums + expert, tl.sum(tl.where(counted, routed, 0.0), axis=0), mask=share)
    tl.store(sums + num_experts + expert, tl.sum(tl.where(counted, clean, 0.0), axis=0), mask=share)
    load = tl.zeros((E_PAD,), dtype=dtype)
    scaled_load = load
    if seed is not None:
        by_logits = _cdf((logits - threshold[:, None]) / noise_std)
        by_probabilities = _cdf((clean - threshold[:, None]) / noise_std)
        load = tl.sum(tl.where(counted, by_logits, 0.0), axis=0)
        scaled_load = tl.sum(tl.where(counted, by_probabilities, 0.0), axis=0)
    tl.store(sums + 2 * num_experts + expert, load, mask=share)
    tl.store(sums + 3 * num_experts + expert, scaled_load, mask=share)
    entropy = log_partition - tl.sum(clean * tl.where(real, logits, 0.0), axis=1)
    square = log_partition * log_partition
    tl.store(sums + 4 * num_experts, tl.sum(tl.where(inside, square, 0.0), axis=0))
    tl.store(sums + 4 * num_experts + 1, tl.sum(tl.where(inside, entropy, 0.0), axis=0))


@triton.jit
def select_backward(
    logits,
    seed,
    grad_gates,
    grad_sums,
    grad_totals,
    experts,
    token,
    tokens,
    num_experts,
    noise_std,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Gradient by the clean logits (zero where padded) of everything that :func:`select` stores."""
    expert = tl.arange(0, E_PAD)
    inside = token < tokens
    share = expert < num_experts
    noisy, clean, routed, log_partition = distributions(logits, seed, token, num_experts, noise_std, E_PAD)

    by_gate = tl.zeros_like(logits)
    chosen = tl.zeros_like(logits)
    last = tl.zeros_like(logits)
    for j in range(TOP_K):
        winner = tl.load(experts + token * TOP_K + j, mask=inside, other=0)
        won = expert[None, :] == winner[:, None]
        grad = tl.load(grad_gates + token * TOP_K + j, mask=inside, other=0.0)
        last = tl.where(won, 1.0, 0.0).to(logits.dtype)
        by_gate += last * grad[:, None]
        chosen += last
    if RENORMALIZE:
        total = tl.sum(chosen * routed, axis=1)
        mean = tl.where(total < EPS, 0.0, tl.sum(by_gate * routed, axis=1) / total)  # below EPS it is a constant
        by_gate = chosen * (by_gate - mean[:, None]) / tl.where(total < EPS, EPS, total)[:, None]
    by_routed = by_gate + tl.load(grad_sums + expert, mask=share, other=0.0)[None, :]
    by_clean = tl.zeros_like(logits) + tl.load(grad_sums + num_experts + expert, mask=share, other=0.0)[None, :]
    by_logits = tl.zeros_like(logits)
    if seed is not None:
        threshold = tl.sum(tl.where(last > 0, noisy, 0.0), axis=1)
        by_load = tl.load(grad_sums + 2 * num_experts + expert, mask=share, other=0.0)
        by_scaled = tl.load(grad_sums + 3 * num_experts + expert, mask=share, other=0.0)
        density = _pdf((logits - threshold[:, None]) / noise_std)
        by_logits = by_load[None, :] * density / noise_std
        density = _pdf((clean - threshold[:, None]) / noise_std)
        by_probabilities = by_scaled[None, :] * density / noise_std
        by_clean += by_probabilities
        by_logits -= last * tl.sum(by_logits + by_probabilities, axis=1)[:, None]
    by_partition = 2 * log_partition * tl.load(grad_totals)
    by_routed -= tl.sum(by_routed * routed, axis=1)[:, None]
    by_clean -= tl.sum(by_clean * clean, axis=1)[:, None]
    by_logits += routed * by_routed + clean * (by_clean + by_partition[:, None])
    return tl.where(share[None, :] & inside[:, None], by_logits, 0.0)
