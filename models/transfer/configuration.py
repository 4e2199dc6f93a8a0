"""What a fine-tuning run computes. The defaults are DTNH's recipe (section V-A)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from moe_kernels.ops.grad_projection import SCOPES

from .regularizers import REGULARIZERS, Regularizer
from .schedules import coefficient_at

PLAIN = "fine-tuning"
METHODS = (PLAIN, *REGULARIZERS)
# What the methods' authors used, in the convention J + λΩ with Ω as the paper has it, without ½: L2's weight decay of
# 1e-4, L2-SP's α = 0.1, DELTA's α = 0.01 with its sum over a batch of 48, attention transfer's β = 1000 with its mean
# over a thousand positions. KnowDist has no published one; its Ω is a sum over positions, and 2e-3 makes a ResNet-18
# of random weights diverge at 224 × 224 with the learning rate of 0.01.
COEFFICIENTS = {PLAIN: 0.0, "l2": 5e-5, "l2-sp": 0.05, "know-dist": 2e-4, "delta": 0.24, "attention-transfer": 1.0}


@dataclass(frozen=True)
class FineTuneConfig:
    """What a run computes; the defaults are DTNH's (section V-A).

    Args:
        method: one of METHODS: ``"fine-tuning"`` has no regularizer; or a :class:`Regularizer` of your own, which has
            its own ``layers``, ``head`` and ``head_decay``.
        dtnh: the regularizer's gradient loses its component against that of the empirical loss.
        coefficient: λ in J + λΩ; by default COEFFICIENTS[method], or the regularizer's own.
        coefficient_decay: what λ is multiplied with after each epoch, in [0, 1].
        parameters: of ``"l2"`` and ``"l2-sp"``: ``"kernels"`` or ``"all"``; by default the regularizer's own.
        layers: of feature regularizers, by module name; by default the last convolution of each stage.
        head: names of the new head's modules or parameters; by default it is found.
        head_decay: weight decay of the new head, where there is a regularizer towards the source.
        scope: over what DTNH looks for a conflict: all parameters at once, as the paper has it, each tensor, or each
            group of one weight decay.
        anchored_only: parameters without an anchor (the head) neither count in that nor change by it.
        seed: of the new head, the order of the data and its augmentation.
        steps, batch: optimizer steps, and images in each over all ranks; an epoch's images are drawn without
            replacement.
        learning_rate, drop_at, momentum: of SGD; the rate is divided by 10 after the share ``drop_at`` of the steps.
        eval_every, eval_batch: after how many steps the test set is looked at, and in what batches.
        head_epochs, estimate_batches: of ``"delta"``: how long a head alone is trained before the channels are weighed,
            and on how many batches they are.
        measure: angles and conflicts of plain feature regularizers too, for the price of a second backward.
        precision: ``"bfloat16"`` runs the model under autocast.

    Raises:
        ValueError: a value out of its range, or one that means nothing for the method.
        TypeError: a number that is none.
    """

    method: str | Regularizer = PLAIN
    dtnh: bool = False
    coefficient: float | None = None
    coefficient_decay: float = 1.0
    parameters: Literal["kernels", "all"] | None = None
    layers: tuple[str, ...] | None = None
    head: tuple[str, ...] | None = None
    head_decay: float = 0.01
    scope: Literal["global", "tensor", "group"] = "global"
    anchored_only: bool = False
    seed: int = 0
    steps: int = 8000
    batch: int = 48
    learning_rate: float = 0.01
    drop_at: float = 0.75
    momentum: float = 0.9
    eval_every: int = 500
    eval_batch: int = 96
    head_epochs: int = 10
    estimate_batches: int = 4
    measure: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        custom = isinstance(self.method, Regularizer)
        if custom and not isinstance(getattr(self.method, "name", None), str):
            raise TypeError(f"method: {type(self.method).__name__} must have a name, a string")
        for name, valid in (
            ("method", (self.method,) if custom else METHODS),
            ("scope", SCOPES),
            ("parameters", (None, "kernels", "all")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in valid:
                listed = ", ".join(str(value) for value in valid if value is not None)
                raise ValueError(f"{name} must be one of {listed}, got {getattr(self, name)!r}")
        for name in ("steps", "batch", "eval_every", "eval_batch", "head_epochs", "estimate_batches"):
            if self._number(name, Integral, "a whole number") < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self._number("seed", Integral, "a whole number") < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        for name in ("coefficient", "head_decay", "learning_rate"):
            if name == "coefficient" and self.coefficient is None:
                continue
            if not 0 <= self._number(name, Real, "a number") < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("coefficient_decay", "drop_at", "momentum"):
            if not 0 <= self._number(name, Real, "a number") <= 1:
                raise ValueError(f"{name} must be in 0 … 1, got {getattr(self, name)}")
        features = not custom and self.method != PLAIN and REGULARIZERS[self.name].uses_features
        for name, given, used in (
            ("dtnh", self.dtnh, self.method != PLAIN),
            ("coefficient", self.coefficient is not None, self.method != PLAIN),
            ("parameters", self.parameters is not None, self.method in ("l2", "l2-sp")),
            ("layers", self.layers is not None, features),
            ("head", self.head is not None, not custom),
            ("head_decay", self.head_decay != type(self).head_decay, not custom),
        ):
            if given and not used:
                raise ValueError(f"{name} means nothing for method {self.name!r}, got {getattr(self, name)!r}")

    def _number(self, name: str, kind: type, expected: str) -> Any:
        """The field ``name``, which is from now on Python's own, as JSON has it."""
        value = getattr(self, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be {expected}, got {value!r}")
        object.__setattr__(self, name, int(value) if kind is Integral else float(value))
        return getattr(self, name)

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name if isinstance(self.method, Regularizer) else self.method

    def identity(self) -> dict[str, Any]:
        """All of it as plain JSON, λ as it is in the first epoch."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        facts |= {"method": self.name, "coefficient": self.initial_coefficient}
        if isinstance(self.method, Regularizer):
            kind = type(self.method)
            facts["regularizer"] = {"class": f"{kind.__module__}.{kind.__qualname__}", **self.method.identity()}
        return facts

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        return self.learning_rate * (1 if step < round(self.drop_at * self.steps) else 0.1)

    @property
    def initial_coefficient(self) -> float:
        """λ in the first epoch."""
        if self.coefficient is not None:
            return self.coefficient
        return self.method.coefficient if isinstance(self.method, Regularizer) else COEFFICIENTS[self.method]

    def coefficient_at(self, step: int, images: int) -> float:
        """λ of ``step``, counted from 0, where an epoch is ``images``."""
        return coefficient_at(step * self.batch // images, self.initial_coefficient, self.coefficient_decay)

    def regularizer(self) -> Regularizer | None:
        """The regularizer, not bound to a model yet; the method itself where that is one."""
        if isinstance(self.method, Regularizer):
            return self.method
        if self.method == PLAIN:
            return None
        options: dict[str, Any] = {} if self.method == "l2" else {"head": self.head, "head_decay": self.head_decay}
        if self.parameters is not None:
            options["parameters"] = self.parameters
        if self.layers is not None:
            options["layers"] = self.layers
        return REGULARIZERS[self.method](self.initial_coefficient, **options)
