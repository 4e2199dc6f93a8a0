"""The experts backends of Hugging Face transformers (``ALL_EXPERTS_FUNCTIONS``), on non-gated experts with biases.

Its "eager" backend is each model's own loop, which is "eager loop, where" here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("batched_mm", "grouped_mm", "deepgemm", "sonicmoe")
COPIED_BYTES = 2**32  # of weights that batched_mm may copy: beyond them a machine may not survive the attempt


def expert_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates: Tensor,
    *,
    experts: Tensor,
    implementation: str,
) -> Mapping[str, Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if implementation not in ALL_EXPERTS_FUNCTIONS:
        raise RuntimeError(f"this transformers has no experts backend {implementation!r}")
    copied = experts.numel() * (w1[0].numel() + w2[0].numel()) * w1.element_size()
    if implementation == "batched_mm" and copied > COPIED_BYTES:
        raise RuntimeError(f"it copies the weights for every assignment, {copied / 1e9:.0f} GB here")
    module = SimpleNamespace(
        num_experts=w1.shape[0],
        up_proj=w1,
        up_proj_bias=b1,
        down_proj=w2,
        down_proj_bias=b2,
        act_fn=F.gelu,
        config=SimpleNamespace(hidden_act="gelu"),
        has_gate=False,
        has_bias=True,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
    )
    return {"y": ALL_EXPERTS_FUNCTIONS[implementation](module, x, experts, gates)}
