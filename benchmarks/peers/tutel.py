"""Tutel: tokens are copied into a buffer (E, capacity, d), every expert is a slice of two batched products.

Its dispatch and combine kernels, and between them what its ``FusedExpertsNetwork`` does with exact GELU. The capacity
is that of the fullest expert, as with ``capacity_factor=0``: nothing is dropped, and the other experts are padded to
it. Positions are found as its ``extract_critical`` finds them from scores; here the choices are given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_ffn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    from tutel import moe

    indices, locations = [], []
    count = torch.zeros(w1.shape[0], dtype=torch.int64, device=x.device)
    for choice in experts.unbind(1):
        chosen = F.one_hot(choice, w1.shape[0])
        locations.append(((moe.fast_cumsum_sub_one(chosen) + count) * chosen).sum(1).int())
        indices.append(choice.int())
        count = count + chosen.sum(0)
    weights = [gate.contiguous() for gate in gates.unbind(1)]
    plan = (w1.shape[0], indices, locations, weights, int(count.max()), count)

    rows = moe.fast_encode(x, plan)
    hidden = F.gelu(torch.matmul(rows, w1.transpose(1, 2)) + b1[:, None])
    rows = torch.matmul(hidden, w2.transpose(1, 2)) + b2[:, None]
    return {"y": moe.fast_decode(rows, plan)}
