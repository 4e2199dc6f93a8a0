"""Regularizers towards weights: L2-SP and L2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.nn import MoE

from ..data.images import some
from .architectures import Head
from .regularizer import Regularizer

_PARAMETERS = ("kernels", "all")


class L2SP(Regularizer):
    """Ω = ‖w − w₀‖² (Eq. 2), the starting point as the reference: Li et al. 2018, arXiv 1802.01483.

    Args:
        coefficient: λ; the published code's α = 0.1 is 0.05 here.
        parameters: ``"kernels"``, as the published code: weights of convolutions and linear layers, without biases
            and normalization, and of the head its kernel decays; or ``"all"`` trainable parameters.
        head, head_decay: as in :class:`Regularizer`.
    """

    name = "l2-sp"

    def __init__(
        self, coefficient: float, *, parameters: str = "kernels", head: Head = None, head_decay: float = 0.01
    ) -> None:
        super().__init__(coefficient, head=head, head_decay=head_decay)
        if parameters not in _PARAMETERS:
            raise ValueError(f"parameters: expected one of {', '.join(_PARAMETERS)}, got {parameters!r}")
        self.parameters = parameters
        self._anchors: dict[str, Tensor] = {}

    def anchors(self) -> dict[str, Tensor]:
        self._bound()
        return dict(self._anchors)

    def decay(self) -> dict[str, float]:
        chosen = self._chosen(self._bound())
        return {name: value for name, value in super().decay().items() if name in chosen}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "parameters": self.parameters}

    def close(self) -> None:
        super().close()
        self._anchors = {}

    def prepare(self, model: nn.Module, source: nn.Module) -> None:
        anchored = {name: weight for name, weight in self._chosen(model).items() if name not in self._head}
        if not anchored:
            raise ValueError(f"parameters: {type(model).__name__} has no trainable {self.parameters} outside the head")
        self._check_source(model, source)
        given = dict(source.named_parameters())
        self._anchors = {name: self._anchor(name, weight, given[name]) for name, weight in anchored.items()}

    def _check_source(self, model: nn.Module, source: nn.Module) -> None:
        """Refuse a source of another architecture: what it lacks would be taken for new and have no anchor."""
        given = dict(source.named_parameters())
        unlike = [
            f"{name} {tuple(weight.shape)} ({tuple(given[name].shape) if name in given else 'missing'} there)"
            for name, weight in model.named_parameters()
            if name not in self._head and (name not in given or given[name].shape != weight.shape)
        ]
        if unlike:
            raise ValueError(
                f"source: {type(source).__name__} does not have the parameters of {type(model).__name__} outside its "
                f"head: {some(unlike, limit=6)}. If they are new, name them in head"
            )

    def _chosen(self, model: nn.Module) -> dict[str, Tensor]:
        kernels = _kernels(model) if self.parameters == "kernels" else None
        return {
            name: weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and (kernels is None or name in kernels)
        }

    def _anchor(self, name: str, weight: Tensor, given: Tensor) -> Tensor:
        """w₀ of the parameter ``name``."""
        if not given.isfinite().all():
            raise ValueError(f"source: {name} holds values that are not finite")
        return torch.empty_like(weight, requires_grad=False).copy_(given.detach())


class L2(L2SP):
    """Ω = ‖w‖², the head's included: weight decay of 2λ, as a regularizer so that the rules of ``AnchoredSGD`` apply.

    Its anchors are zeros. Fine-tuning without DTNH needs neither: the optimizer's ``weight_decay`` is the same.

    Args:
        coefficient: λ; a weight decay of 1e-4 is 5e-5.
        parameters: as in :class:`L2SP`.
    """

    name = "l2"

    def __init__(self, coefficient: float, *, parameters: str = "all") -> None:
        super().__init__(coefficient, parameters=parameters, head=(), head_decay=0.0)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "coefficient": self.coefficient, "parameters": self.parameters}

    def prepare(self, model: nn.Module, source: nn.Module) -> None:
        super().prepare(model, model)  # zero is zero for any source

    def _anchor(self, name: str, weight: Tensor, given: Tensor) -> Tensor:
        return torch.zeros_like(weight, requires_grad=False)


def _kernels(model: nn.Module) -> set[str]:
    """Names of the parameters of at least two dimensions that are called weights, and of the experts' w1 and w2."""
    found = {name for name, weight in model.named_parameters() if weight.ndim >= 2 and "weight" in name}
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            found |= {f"{path}.{name}" if path else name for name in ("w1", "w2")}
    return found
