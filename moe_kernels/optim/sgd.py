"""SGD near an anchor."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from moe_kernels.ops import grad_projection
from moe_kernels.optim.alignment import Given
from moe_kernels.optim.anchored import Anchored
from moe_kernels.optim.arguments import check_number
from moe_kernels.optim.batches import Batch, State


class AnchoredSGD(Anchored):
    """``torch.optim.SGD`` along a direction that draws the parameters w to an anchor w⁰ without hurting the loss.

    With r = 2 (w − w⁰), the gradient of Ω = ‖w − w⁰‖² (L2-SP), the direction is d = a g + b λ r; a and b are given by
    ``rule`` and the sums ⟨g, r⟩, ‖g‖² and ‖r‖² (:mod:`moe_kernels.ops.grad_projection` has the table). For ``dtnh``
    (Wan et al., *Towards Making Deep Transfer Learning Never Hurt*, 2019, Algorithm 1) r loses its component against
    g wherever the two conflict, so that ⟨d, g⟩ = ‖g‖². One backward and one fused step::

        optimizer = AnchoredSGD(model.named_parameters(), lr=0.01, momentum=0.9,
                                anchor=dict(pretrained.named_parameters()), coefficient=0.01)

    Args:
        params: parameters, named parameters, or param groups, as for torch's optimizers. A group may have its own
            ``coefficient``, and its own ``anchor`` where the argument is None.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as of ``torch.optim.SGD``. ``lr`` may be a tensor.
            Weight decay is added after the projection. ``maximize`` climbs the objective and stays near the anchor:
            g is negated, r is not.
        anchor: w⁰. A sequence with a tensor or None for every parameter (over all groups, in order), or, where the
            parameters have names, a mapping; a parameter that has None or no entry is not anchored (r = 0). Shapes are
            those of the parameters; dtype and device are free. For a DTensor, one with the same mesh, or the full
            tensor, the same on every rank. The anchors are copied, in their own dtypes: bfloat16 ones take half the
            memory. None: nothing is anchored, and ``step`` takes the ``regularizer_grads`` of a second backward.
        coefficient: λ ≥ 0, an option of the group: schedules change ``group["coefficient"]``. As Ω has no factor ½,
            λ is half of L2-SP's α: α/2 ‖w − w⁰‖² is ``coefficient=α/2``. A tensor of one element on the device may be
            changed under a CUDA graph.
        rule: ``"none"``, ``"l2sp"``, ``"dtnh"``, ``"pcgrad"``, ``"agem"``, ``"digrap"`` or ``"gradvac"``.
        scope: what is projected as one vector: ``"global"``, all parameters (the paper's notation), ``"tensor"``, each
            by itself (faster, as it finds small tensors still in the cache), or ``"group"``, each param group.
        anchored_only: leave parameters without an anchor out of the sums and of the projection (d = g for them). By
            default they take part, as in the paper: the gradient of a new head counts in ‖g‖², which makes the
            correction smaller while it is large, and in a conflict a > 1 multiplies it, as if the head had a larger lr.
        omega: ω in [0, 1] of ``digrap``. target_cosine: ρ in [−1, 1) of ``gradvac``.
        foreach, fused: by default the fastest that is there. ``fused=True`` asks for the kernels, ``foreach=True`` or
            ``fused=False`` for plain PyTorch.
        measure: also take the sums where the rule needs none (none, l2sp), so that :meth:`facts` has angles.

    Clip g before the step (``clip_grad_norm_`` as usual): d is not clipped. After the step ``p.grad`` still is g,
    without the scale of a gradient scaler. A parameter whose gradient is None is left alone and takes no part.

    State, by parameter: ``anchor`` and, with momentum, ``momentum_buffer``: 4 bytes an element each for float32, 12
    with the gradient. ``state_dict`` has both; a state of other anchors is refused.

    Distributed: under DDP every rank computes the same from the averaged gradients, nothing is communicated. With
    DTensors (FSDP2, tensor parallelism) each rank steps its shards, and the sums are all-reduced once a step over each
    mesh dimension that shards (scope ``tensor`` too); replicas count once. Parameters that only other ranks have, as
    in pipelines, are not known here.

    Raises:
        ValueError, TypeError: an argument that is not possible; anchors that are not finite or whose number, names or
            shapes are not the parameters', and which.
        RuntimeError: ``fused=True`` where there is no kernel, and why.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
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
        check_number("momentum", group["momentum"])
        check_number("dampening", group["dampening"], least=-sys.float_info.max)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected a momentum > 0 and no dampening with it, got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )

    def _state_key(self, group: dict[str, Any]) -> str | None:
        return "momentum_buffer" if group["momentum"] != 0 else None

    def _starts_from_zero(self, group: dict[str, Any]) -> bool:
        # The first buffer is d, which a buffer of zeros becomes too where there is no dampening.
        return not group["dampening"]

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"] != 0:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    def _first_steps(self, group: dict[str, Any], states: list[State]) -> list[bool] | None:
        if group["momentum"] == 0 or self._starts_from_zero(group):
            return None
        return [state.get("momentum_buffer") is None for state in states]

    def _update(self, batch: Batch, group: dict[str, Any], **projection: Any) -> None:
        grad_projection.sgd_(
            batch.params,
            batch.grads,
            batch.references,
            batch.state("momentum_buffer") if group["momentum"] != 0 else [],
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            first_step=batch.first_step,
            **projection,
        )
        # The first step is still to come where a scaler skipped it, for which this waits: with dampening it is another.
        if batch.first_step and projection["found_inf"] is not None and projection["found_inf"]:
            for state in batch.states:
                del state["momentum_buffer"]
