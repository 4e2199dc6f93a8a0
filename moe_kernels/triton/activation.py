"""The activations and the dropout of ``expert_ffn`` in Triton."""

import math

import triton
import triton.language as tl

from moe_kernels.triton import philox

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_INVERSE_SQRT_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TANH_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))  # 0.5 (1 + tanh u) = σ(2u)


@triton.jit
def value_and_slope(z, ACTIVATION: tl.constexpr):
    """φ(z) and φ'(z), float32 (or float64) of the shape of ``z``; what is not used is not computed."""
    if ACTIVATION == "relu":
        value = tl.where(z < 0, 0.0, z)  # this way round NaN stays NaN
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)
        value = z * cdf
        slope = cdf + z * (tl.exp(-0.5 * z * z) * _INVERSE_SQRT_TWO_PI)
    else:  # z σ(u(z))
        if ACTIVATION == "gelu_tanh":
            u = _TANH_SCALE * z * (1 + 0.044715 * z * z)
            u_slope = _TANH_SCALE * (1 + 0.134145 * z * z)
        elif ACTIVATION == "quick_gelu":
            u = 1.702 * z
            u_slope = 1.702
        else:
            tl.static_assert(ACTIVATION == "silu")
            u = z
            u_slope = 1.0
        sigmoid = 1 / (1 + tl.exp(-u))
        value = z * sigmoid
        slope = sigmoid + z * (sigmoid * (1 - sigmoid) * u_slope)
    return value, slope


@triton.jit
def dropout_factors(
    seed, token, expert, column, dropout_p, H: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr
):
    """(len(token), WIDTH) float32: 0 or 1 / (1 − p) for the hidden features ``column`` (a multiple of 4) and on."""
    kept = philox.keep(tl.load(seed), token * EXPERTS + expert, column // 4, triton.cdiv(H, 4), dropout_p, WIDTH)
    return tl.where(kept, 1 / (1 - dropout_p), 0.0)
