"""Reference of :mod:`moe_kernels.ops.dispatch`. T tokens, k choices, A = T·k assignments, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


def _within_capacity(experts: Tensor, num_experts: int, capacity: int, priority: Tensor | None) -> Tensor:
    """Bool (T, k): first choices are served before second ones, tokens of high priority before others."""
    tokens, top_k = experts.shape
    sequence = torch.arange(tokens, device=experts.device)
    if priority is not None:
        sequence = priority.argsort(descending=True, stable=True)
    queue = experts[sequence].t().flatten()
    chosen = queue[:, None] == torch.arange(num_experts, device=experts.device)
    place = (chosen.cumsum(0) * chosen).sum(1)
    kept = torch.empty_like(experts, dtype=torch.bool)
    kept[sequence] = (place <= capacity).view(top_k, tokens).t()
    return kept


def dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, priority: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order (A,), offsets (E+1,), inverse (T, k), kept (T, k)."""
    kept = torch.ones_like(experts, dtype=torch.bool)
    if capacity is not None:
        kept = _within_capacity(experts, num_experts, capacity, priority)
    key = experts.where(kept, torch.full_like(experts, num_experts)).flatten()
    order = key.argsort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.scatter_add(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)])
    return order, offsets, inverse.view_as(experts), kept


def gather(x: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Rows of ``x`` (T, d) in expert-major order (A, d); the rows of dropped assignments are zero."""
    rows = x[order // inverse.shape[1]]
    position = torch.arange(order.numel(), device=order.device)
    return rows.where((position < offsets[-1])[:, None], rows.new_zeros(()))


def combine(y: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """(T, d): Σ_j gates[t, j] · y[inverse[t, j]] over kept assignments, summed in the dtype of the gates."""
    chosen = y[inverse].to(gates.dtype)
    chosen = chosen.where((inverse < offsets[-1])[..., None], chosen.new_zeros(()))
    return (chosen * gates[..., None]).sum(1).to(y.dtype)
