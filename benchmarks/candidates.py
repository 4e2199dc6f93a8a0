"""Candidates: functions bound to the tensors of one case, ready to be called and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_kernels import backend

FORWARD = "forward"
BOTH = "forward+backward"
OURS = "ours"
GRADIENT = "gradient of "

Value = Tensor | Sequence[Tensor]
"""One tensor, or several: of every expert, or of every parameter."""
Outputs = Mapping[str, Value]
Candidate = Callable[[], Outputs]
Function = Callable[..., Mapping[str, Tensor]]
Product = tuple[Tensor, Tensor, Tensor]
"""The two factors and the tensor that the product is written to."""


def _tensors(values: Mapping[str, Value]) -> list[Tensor]:
    return [tensor for value in values.values() for tensor in ([value] if isinstance(value, Tensor) else value)]


@dataclass(frozen=True)
class Problem:
    """What the functions of a case are called with, and differentiated by."""

    leaves: Mapping[str, Tensor]
    """Arguments by name; made to require a gradient."""
    cotangent: Tensor | None = None
    """Where there is one, gradients are computed: of the product of this with a function's first output."""
    others: Mapping[str, object] = field(default_factory=dict)
    """Further arguments by name."""

    def __post_init__(self) -> None:
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def candidate(self, function: Function, leaves: Mapping[str, Value] | None = None) -> Candidate:
        """A call of ``function``, whose result has its outputs and the gradient of each leaf as "gradient of <leaf>".

        Without a cotangent it runs under ``no_grad``. ``leaves`` replaces those of the problem by the same in another
        form.
        """
        given: Mapping[str, Value] = self.leaves if leaves is None else leaves

        def forward() -> Outputs:
            with torch.no_grad():
                return function(**given, **self.others)

        def both() -> Outputs:
            outputs = function(**given, **self.others)
            gradients = iter(torch.autograd.grad(next(iter(outputs.values())), _tensors(given), self.cotangent))
            result: dict[str, Value] = {name: output.detach() for name, output in outputs.items()}
            for name, leaf in given.items():
                result[GRADIENT + name] = (
                    next(gradients) if isinstance(leaf, Tensor) else [next(gradients) for _ in leaf]
                )
            return result

        return forward if self.cotangent is None else both

    def exact(self, function: Function) -> Candidate:
        """The same call in float64, our operators in it on the reference backend; nothing of it outlives the call."""

        def on_reference() -> Outputs:
            leaves = {name: leaf.detach().double() for name, leaf in self.leaves.items()}
            cotangent = None if self.cotangent is None else self.cotangent.double()
            with backend.force("reference"):
                return Problem(leaves, cotangent, self.others).candidate(function)()

        return on_reference


def bare_products(products: Sequence[Product]) -> Candidate:
    """The matrix products alone, into memory that is already there."""

    def run() -> Outputs:
        for left, right, out in products:
            torch.mm(left, right, out=out)
        return {}

    return run
