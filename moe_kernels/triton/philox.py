"""The generator of :mod:`moe_kernels.reference.philox` in Triton: the same words at the same counters, bit for bit."""

import math

import triton
import triton.language as tl

_TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def words(seed, counter):
    """Four uint32 words for every 64-bit ``counter`` (int64, any shape); ``seed`` is an int64 scalar."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def uniform(word):
    """The middle of one of 2²³ equal intervals of (0, 1), exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def normal(seed, counter):
    """Standard normal float32 by Box–Muller, from the first two words at ``counter``."""
    word0, word1, _, _ = words(seed, counter)
    return tl.sqrt_rn(-2.0 * tl.log(uniform(word0))) * tl.cos(_TWO_PI * uniform(word1))


@triton.jit
def keep(seed, rows, first_group, groups_per_row, dropout_p, COLUMNS: tl.constexpr):
    """Bool (len(rows), COLUMNS), true with probability 1 − p: columns 4·first_group and on of the int64 ``rows``.

    Four consecutive columns share one counter, row · groups_per_row + group, so a counter is worked on once.
    """
    groups = first_group + tl.arange(0, COLUMNS // 4)
    word0, word1, word2, word3 = words(seed, rows[:, None] * groups_per_row + groups[None, :])
    even = tl.join(uniform(word0) >= dropout_p, uniform(word2) >= dropout_p)
    odd = tl.join(uniform(word1) >= dropout_p, uniform(word3) >= dropout_p)
    return tl.reshape(tl.join(even, odd), (rows.shape[0], COLUMNS))
