"""What keeps a fine-tuned model near its source: small objects with one interface.

The objective is J + λ·Ω, as in Eq. 1 of DTNH (Wan et al. 2019, arXiv 1911.07489), with Ω as the paper writes it,
without a factor ½: ``coefficient`` is λ, and the α of code that minimizes J + α/2·‖w − w₀‖² is 2λ. Those in weight
space (:mod:`.weight_space`) give what the gradient is computed from, ``anchors()``; those on features
(:mod:`.feature_space`) give Ω itself, ``penalty()``::

    regularizer = KnowledgeDistillation(0.1).bind(model)   # the source's weights in it, not yet wrapped or compiled
    loss = criterion(model(images), labels) + regularizer.coefficient * regularizer.penalty()

The new head is near nothing: it has its own weight decay, ``decay()``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

from .architectures import Head, head_parameters, unwrap

Self = TypeVar("Self", bound="Regularizer")


class Regularizer:
    """The interface. ``bind`` first; after ``close`` it may be bound to another model.

    One of your own has a ``name`` and ``prepare``, and either ``anchors``, or ``uses_features = True`` and ``penalty``.
    What it was made with goes into ``identity``, what it learns from data into ``state_dict``. A distance of features
    needs only :meth:`.FeatureRegularizer.distance`.

    Args:
        coefficient: λ ≥ 0.
        head: names of the modules or parameters that are new, ``()`` for none; by default they are found
            (:func:`~moe_kernels.models.transfer.architectures.head_parameters`).
        head_decay: weight decay of the head, as an optimizer takes it (gradient ``head_decay · w``): the β of the
            published code of L2-SP and DELTA, 0.01 in both.

    Attributes:
        name: how tables and the command line call it.
        uses_features: Ω is what ``penalty`` gives, a function of features, not the distance from ``anchors``.
        needs_estimate: ``estimate`` has to be called before ``penalty``.
    """

    name: str
    uses_features = False

    def __init__(self, coefficient: float, *, head: Head = None, head_decay: float = 0.01) -> None:
        self.coefficient = _checked("coefficient", coefficient)
        self.head_decay = _checked("head_decay", head_decay)
        self._given_head = (head,) if isinstance(head, str) else None if head is None else tuple(head)
        self._head: tuple[str, ...] = ()
        self._model: nn.Module | None = None

    def bind(self: Self, model: nn.Module, source: nn.Module | None = None) -> Self:
        """Take the source's weights as the reference and ``model`` as what is trained. Returns itself.

        Args:
            model: with the source's weights and the new head, on its device, before it is wrapped or compiled.
            source: a model that holds the source's weights, where ``model`` does not; its head may differ.

        Raises:
            ValueError: no head or no layers are found, names that do not exist, or a source that does not fit: in
                weight space each parameter outside the head must be there in its shape, of features each layer must
                have its parameters in their shapes, and where none are named both must have the same. The message
                says which do not fit.
        """
        self.close()
        model, source = unwrap(model), None if source is None else unwrap(source)
        self._head = head_parameters(model, self._given_head)
        self.prepare(model, model if source is None else source)
        self._model = model
        return self

    def prepare(self, model: nn.Module, source: nn.Module) -> None:
        """What :meth:`bind` does with the two, unwrapped; ``source`` may be ``model``, which changes later."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove hooks and forget the source."""
        self._model, self._head = None, ()

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's parameters."""
        self._bound()
        return self._head

    @property
    def needs_estimate(self) -> bool:
        return False

    def anchors(self) -> dict[str, Tensor]:
        """Parameter name → w₀, detached, of the parameter's shape, dtype and strides: Ω = Σ ‖w − w₀‖². Not copied."""
        self._bound()
        return {}

    def penalty(self) -> Tensor | None:
        """Ω of the model's last forward that kept gradients; ``None`` for regularizers in weight space."""
        self._bound()
        return None

    def decay(self) -> dict[str, float]:
        """Parameter name → plain weight decay, of those that have one."""
        trained = {name for name, parameter in self._bound().named_parameters() if parameter.requires_grad}
        return {name: self.head_decay for name in self._head if name in trained and self.head_decay > 0}

    def identity(self) -> dict[str, Any]:
        """The name and the arguments it was made with, as plain JSON."""
        head = None if self._given_head is None else list(self._given_head)
        return {"name": self.name, "coefficient": self.coefficient, "head": head, "head_decay": self.head_decay}

    def state_dict(self) -> dict[str, Any]:
        """What was estimated from data; empty where nothing is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the ``state_dict`` of a regularizer of this kind; bind first.

        Raises:
            ValueError: it belongs to another kind, or to other layers.
        """
        if state:
            raise ValueError(f"state: {self.name} has none, got {', '.join(map(repr, state))}")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.identity().items() if name != "name")
        return f"{type(self).__name__}({arguments})"

    def _bound(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError(f"{self.name}: bind(model) comes first")
        return self._model


def _checked(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of 0 or more, got {value!r}")
    return float(value)
