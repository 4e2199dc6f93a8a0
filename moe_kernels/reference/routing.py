"""Reference of :mod:`moe_kernels.ops.routing`. T tokens, E experts, k choices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.reference import philox

MAX_LOG_SCALE = 4.605170185988092  # ln 100: the learned temperature stays above 0.01


def _select(
    logits: Tensor, seed: Tensor | None, top_k: int, noise_std: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From clean logits: gates, experts (T, k), counts (k, E), sums (4, E), totals (2,), confidence (T,)."""
    tokens, num_experts = logits.shape
    noisy = logits
    if seed is not None:
        noisy = logits + noise_std * philox.normal(seed, tokens, num_experts).to(logits.dtype)
    clean_probabilities, probabilities = logits.softmax(1), noisy.softmax(1)

    # A stable sort gives ties to the lowest id, which topk does not promise.
    experts = probabilities.sort(dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    gates = probabilities.gather(1, experts)
    confidence = gates[:, 0].detach()
    if renormalize:
        gates = gates / gates.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)

    load = scaled_load = logits.new_zeros(num_experts)
    if seed is not None:
        threshold = noisy.gather(1, experts[:, -1:])
        load = torch.special.ndtr((logits - threshold) / noise_std).sum(0)
        scaled_load = torch.special.ndtr((clean_probabilities - threshold) / noise_std).sum(0)
    log_partition = logits.logsumexp(1)
    entropy = log_partition - (clean_probabilities * logits).sum(1)

    counts = torch.zeros(top_k, num_experts, dtype=torch.int64, device=logits.device)
    counts = counts.scatter_add(1, experts.t(), torch.ones_like(experts.t()))
    sums = torch.stack([probabilities.sum(0), clean_probabilities.sum(0), load, scaled_load])
    totals = torch.stack([log_partition.square().sum(), entropy.sum().detach()])
    return gates, experts, counts, sums, totals, confidence


def cosine(
    x: Tensor,
    projection: Tensor,
    bias: Tensor,
    embedding: Tensor,
    log_scale: Tensor,
    seed: Tensor | None,
    top_k: int,
    noise_std: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cosine logits, then the selection."""
    projected = F.linear(x, projection, bias)
    scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
    logits = scale * F.linear(F.normalize(projected, dim=1), F.normalize(embedding, dim=1))
    return _select(logits, seed, top_k, noise_std, renormalize)


def linear(
    x: Tensor, weight: Tensor, seed: Tensor | None, top_k: int, noise_std: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Linear logits, then the selection."""
    return _select(F.linear(x, weight), seed, top_k, noise_std, renormalize)
