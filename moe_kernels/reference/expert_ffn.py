"""Reference of :mod:`moe_kernels.ops.expert_ffn`. T tokens, E experts, k choices, d and h features.

Every expert sees every token, those that it was not given as zeros: E/k times the arithmetic of the kernels, and
in exchange no shape and no branch depends on the routing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.reference import philox

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "silu": F.silu,
}


def expert_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> Tensor:
    """y (T, d) = Σ_e gate_e · (w2_e φ(w1_e x + b1_e) + b2_e), computed in float32 (float64 for float64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens, num_experts, hidden_dim = x.shape[0], w1.shape[0], w1.shape[1]
    zero = torch.zeros((), dtype=dtype, device=x.device)
    expert = (inverse[..., None] >= offsets[1:]).sum(-1)  # (T, k), E where the assignment was dropped
    y = torch.zeros(tokens, w2.shape[1], dtype=dtype, device=x.device)
    for e in range(num_experts):
        chosen = expert == e
        mine = chosen.any(1)[:, None]
        hidden = F.linear(x.to(dtype).where(mine, zero), w1[e].to(dtype), b1[e].to(dtype))
        hidden = ACTIVATIONS[activation](hidden)
        if seed is not None:
            rows = torch.arange(tokens, device=x.device) * num_experts + e
            kept = philox.keep(seed, rows, hidden_dim, dropout_p)
            hidden = hidden.where(kept, zero) / (1 - dropout_p)
        gate = gates.to(dtype).where(chosen, zero).sum(1, keepdim=True)
        output = gate * F.linear(hidden, w2[e].to(dtype), b2[e].to(dtype))
        y = y + output.where(mine, zero)
    return y.to(x.dtype)
