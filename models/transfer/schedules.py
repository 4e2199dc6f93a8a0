"""How a regularizer's coefficient changes in training: a function of the epoch alone, with no state to save."""

from __future__ import annotations

import math


def coefficient_at(epoch: int, initial: float, ratio: float = 1.0) -> float:
    """λ_e = λ · ratio^e: the coefficient in epoch ``epoch``, counted from 0.

    "Regularization coefficient decays at certain ratio, ranging from 0 to 1, per epoch" (Wan et al. 2019,
    arXiv 1911.07489, section V-A). A ratio of 1 keeps it; with 0 it acts in epoch 0 only.

    Raises:
        ValueError: a negative epoch, a coefficient that is negative or not finite, a ratio outside 0 … 1.
    """
    if epoch < 0:
        raise ValueError(f"epoch: expected 0 or more, got {epoch}")
    if not (math.isfinite(initial) and initial >= 0):
        raise ValueError(f"initial: expected a finite coefficient of 0 or more, got {initial}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a number in 0 … 1, got {ratio}")
    return float(initial * ratio**epoch)
