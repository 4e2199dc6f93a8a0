"""What a step's moments tell about its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops import grad_projection


class Facts(NamedTuple):
    """The last step, and counts of all steps, by segment: of everything, or of every parameter or group (scope).

    g is the gradient of the loss, r that of the regularizer, λ the coefficient, d the direction that was stepped
    along. Tensors on the device of the parameters: reading one waits for it, making them does not. NaN where nothing
    was measured, or where a vector is 0 (λ = 0 too) and has no direction. A group without any gradient keeps what it
    had. Angles are in degrees.
    """

    steps: Tensor
    """int64, steps done since the optimizer was made."""
    conflicts: Tensor
    """int64, of these the ones with ⟨g, r⟩ < 0. The conflict rate is conflicts / steps."""
    skipped: Tensor
    """int64, steps left out because the gradient scaler found a gradient that is not finite."""
    cosine: Tensor
    """float64, of g and r."""
    scale: Tensor
    """float64, a in d = a g + b λ r."""
    direction_to_loss: Tensor
    """float64, ∠(d, g): the paper's angle 1 in a run with dtnh."""
    direction_to_regularizer: Tensor
    """float64, ∠(d, r): the paper's angle 2 in a run with dtnh."""
    sum_to_loss: Tensor
    """float64, ∠(g + λr, g): the paper's angle 3 in a run with l2sp, whose direction is the sum."""
    sum_to_regularizer: Tensor
    """float64, ∠(g + λr, r): the paper's angle 4 in a run with l2sp."""


def facts(record: Tensor, rule: str, parameter: float) -> Facts:
    """All follows from the three moments in ``record`` (S, 6)."""
    dot, loss, regularizer = record[:, :3].unbind(1)
    steps, conflicts, skipped = record[:, 3:].long().unbind(1)
    a, b = grad_projection.weights(rule, record, parameter)
    one = torch.ones_like(a)
    return Facts(
        steps,
        conflicts,
        skipped,
        (dot / (loss.sqrt() * regularizer.sqrt())).clamp(-1, 1),
        a.clone(),
        *_angles(a, b, dot, loss, regularizer),
        *_angles(one, one, dot, loss, regularizer),
    )


def _angles(a: Tensor, b: Tensor, dot: Tensor, loss: Tensor, regularizer: Tensor) -> tuple[Tensor, Tensor]:
    """∠(v, g) and ∠(v, r) of v = a g + b r, in degrees."""
    to_loss, to_regularizer = a * loss + b * dot, a * dot + b * regularizer
    norm = (a * to_loss + b * to_regularizer).clamp(min=0).sqrt()
    loss_angle, regularizer_angle = (
        torch.rad2deg((product / (norm * square.sqrt())).clamp(-1, 1).acos())
        for product, square in ((to_loss, loss), (to_regularizer, regularizer))
    )
    return loss_angle, regularizer_angle
