"""AdamW near an anchor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops import grad_projection
from moe_kernels.optim.alignment import Given
from moe_kernels.optim.anchored import Anchored
from moe_kernels.optim.arguments import check_number
from moe_kernels.optim.batches import Batch


class AnchoredAdamW(Anchored):
    """``torch.optim.AdamW`` along a direction that draws the parameters to an anchor without hurting the loss.

    The direction d takes the place of the gradient in both moments of Adam; the decoupled weight decay comes after it.
    Without amsgrad.

    Args:
        lr, betas, eps, weight_decay, maximize: as of ``torch.optim.AdamW``. ``lr`` may be a tensor.
        Others as of :class:`~moe_kernels.optim.AnchoredSGD`, and so is all else that its documentation says.

    State, by parameter: ``anchor``, ``exp_avg`` and ``exp_avg_sq``, 4 bytes an element each for float32, and ``step``.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        anchor: Given | None = None,
        coefficient: float | Tensor,
        rule: str = "dtnh",
        scope: str = "global",
        anchored_only: bool = False,
        omega: float = 1.0,
        target_cosine: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        measure: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "coefficient": coefficient,
        }
        super().__init__(
            params,
            defaults,
            anchor=anchor,
            rule=rule,
            scope=scope,
            anchored_only=anchored_only,
            omega=omega,
            target_cosine=target_cosine,
            measure=measure,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"])
        betas = group["betas"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")

    def _state_key(self, group: dict[str, Any]) -> str | None:
        return "exp_avg"

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        self.state[param] |= {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`AnchoredSGD.load_state_dict`; a state of AMSGrad is refused too."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict: expected one without amsgrad, which AnchoredAdamW does not have")
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "step" in state:  # which an optimizer of torch that is not fused keeps on the CPU
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)

    def _update(self, batch: Batch, group: dict[str, Any], **projection: Any) -> None:
        beta1, beta2 = group["betas"]
        steps = batch.state("step")
        # Not the number 1, of which torch would make a tensor for each of the steps.
        torch._foreach_add_(steps, torch.ones((), device=batch.device), alpha=1.0)
        grad_projection.adamw_(
            batch.params,
            batch.grads,
            batch.references,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            **projection,
        )
        if projection["found_inf"] is not None:  # a step that was skipped does not count
            torch._foreach_sub_(steps, [projection["found_inf"]] * len(steps))
