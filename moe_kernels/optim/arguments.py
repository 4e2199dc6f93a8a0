"""Checks that the optimizers and ``project_gradients_`` share."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from moe_kernels.ops.grad_projection import RULES


def check_number(name: str, value: float | Tensor, *, least: float = 0.0) -> None:
    """Raise unless ``value`` is a finite number ≥ ``least``, or a tensor of one element.

    A tensor on a GPU is not looked into: nothing waits for it.
    """
    number: object = value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
        number = value.item()
    if not isinstance(number, Real):
        raise TypeError(f"{name}: expected a number or a tensor of one element, got {type(value).__name__}")
    if not least <= float(number) < math.inf:
        raise ValueError(f"{name}: expected a finite number ≥ {least:g}, got {number}")


def check_rule(rule: str, omega: float, target_cosine: float) -> float:
    """The parameter of ``rule``; raises where one of the three is not possible."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    check_number("omega", omega)
    if omega > 1:
        raise ValueError(f"omega: expected a number in [0, 1], got {omega}")
    check_number("target_cosine", target_cosine, least=-1)
    if target_cosine >= 1:
        raise ValueError(f"target_cosine: expected a number in [-1, 1), got {target_cosine}")
    return float({"digrap": omega, "gradvac": target_cosine}.get(rule, 0.0))
