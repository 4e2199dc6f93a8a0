"""ScatterMoE: its two ``parallel_linear`` with biases, as its ``MLP`` calls them, and exact GELU in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


def expert_ffn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    if not x.is_cuda:
        raise RuntimeError(f"ScatterMoE's kernels are for a GPU, got tensors on {x.device}")
    plan = flatten_sort_count(experts, num_experts=w1.shape[0])
    hidden = parallel_linear(x, w1.transpose(1, 2), experts.shape[1], *plan, expert_biases=b1, grouped_out=True)
    weights = gates.to(x.dtype)
    y = parallel_linear(F.gelu(hidden), w2.transpose(1, 2), 1, *plan, expert_biases=b2, gates=weights, grouped_in=True)
    return {"y": y}
