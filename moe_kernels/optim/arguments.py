"""Checks that the optimizers and ``project_gradients_`` share."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from moe_kernels.ops.grad_projection import RULES


def check_number(name: str, value: float | Tensor) -> None:
    """Raise unless ``value`` is a finite number ≥ 0 or a tensor of one element, which is not looked into."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    elif not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number or a tensor of one element, got {type(value).__name__}")
    elif not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value}")


def check_rule(rule: str, omega: float, target_cosine: float) -> float:
    """The parameter of ``rule``; raises where one of the three is not possible."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= omega <= 1:
        raise ValueError(f"omega: expected a number in [0, 1], got {omega}")
    if not -1 <= target_cosine < 1:
        raise ValueError(f"target_cosine: expected a number in [-1, 1), got {target_cosine}")
    return {"digrap": omega, "gradvac": target_cosine}.get(rule, 0.0)
