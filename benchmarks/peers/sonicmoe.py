"""SonicMoE: its layer for a routing that is given. Its GELU is the approximation by tanh, ours is exact.

Its kernels take a Hopper or newer GPU, d ≥ 512 in multiples of 64 and E in multiples of 4, so not GMoE's shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def expert_ffn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    if not x.is_cuda:
        raise RuntimeError(f"SonicMoE's kernels are for a GPU, got tensors on {x.device}")
    tokens, top_k = experts.shape
    y, _ = moe_general_routing_inputs(
        x,
        gates.flatten().to(x.dtype),
        torch.arange(tokens, dtype=torch.int32, device=x.device).repeat_interleave(top_k),
        experts.flatten().int(),
        w1.permute(1, 2, 0),
        b1,
        w2.permute(1, 2, 0),
        b2,
        E=w1.shape[0],
        stream_id=torch.cuda.current_stream(x.device).cuda_stream,
        activation_type=ActivationType.GELU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
    )
    return {"y": y}
