"""MegaBlocks: its gather, grouped products and scatter, as its dropless layer with ``mlp_impl="grouped"`` has them.

Its experts have no biases (the layer has one, for all): here they are added in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_ffn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    from megablocks import grouped_gemm_util, ops

    if not x.is_cuda:
        raise RuntimeError(f"MegaBlocks' kernels are for a GPU, got tensors on {x.device}")
    grouped_gemm_util.assert_grouped_gemm_is_available()
    gmm = grouped_gemm_util.ops.gmm
    num_experts, top_k = w1.shape[0], experts.shape[1]
    with torch.no_grad():
        flat = experts.flatten().int()
        expert_of_row, order = ops.sort(flat, max((num_experts - 1).bit_length(), 1))
        counts = ops.histogram(flat, num_experts)
        ends = ops.inclusive_cumsum(counts, 0).view(-1)
        sizes = counts.cpu().long()
    owner = expert_of_row.long()
    rows = ops.gather(x, order, expert_of_row, ends, top_k)
    hidden = F.gelu(gmm(rows, w1, sizes, trans_b=True) + b1[owner])
    rows = gmm(hidden, w2.transpose(1, 2), sizes) + b2[owner]
    return {"y": ops.scatter(rows, order, expert_of_row, gates.flatten().to(x.dtype), ends, top_k)}
