"""The mixture-of-experts layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.nn import losses
from moe_kernels.nn.routers import CosineRouter, LinearRouter, draw_seed
from moe_kernels.ops.dispatch import dispatch, expert_capacity
from moe_kernels.ops.expert_ffn import ACTIVATIONS, SAVE, expert_ffn
from moe_kernels.ops.routing import Routing

TUTEL: dict[str, Any] = {
    "noise": 1.0,
    "dropout": 0.1,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 1.5,
    "batch_priority": True,
    "balance_loss": "tutel",
}
"""The settings of GMoE's published layer, whatever top_k is; see :meth:`MoE.tutel`."""

ROUTERS: dict[str, Callable[..., nn.Module]] = {"cosine": CosineRouter, "linear": LinearRouter}


class Telemetry(NamedTuple):
    """How the last forward routed; tensors on the device of the layer, so that reading them is the caller's choice."""

    load: Tensor
    """(E,) fraction of the kept assignments that each expert got."""
    entropy: Tensor
    """() mean entropy of the routing probabilities in nats, at most ln E."""
    dead_experts: Tensor
    """() int64, experts without a token."""
    dropped: Tensor
    """() int64, assignments dropped by capacity."""


class MoE(nn.Module):
    """A sparse mixture of feed-forward experts: y = Σ_j gate_j · FFN_{e_j}(x) (GMoE, Eq. 2).

    Args:
        dim: features d of a token.
        hidden_dim: hidden features h of an expert.
        num_experts: E.
        top_k: experts a token. With a router module the router's own counts, and another value here raises.
        router: ``"cosine"``, ``"linear"``, or a module that maps (T, d) to a ``Routing`` and has ``top_k`` and
            ``num_experts``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"silu"``.
        dropout: on the hidden features, in training.
        capacity_factor: in training every expert keeps at most k · int(factor · ceil(T / E)) assignments, T the
            tokens of the call; None keeps all.
        eval_capacity_factor: the same in evaluation.
        batch_priority: where capacity binds, keep the tokens of highest probability (V-MoE), else the first ones.
        balance_loss: ``"gshard"``, ``"switch"``, ``"load_importance"`` or ``"tutel"``, as specified in
            ``moe_kernels.nn.losses``; the last two need noise.
        z_loss: weight of the router z-loss beside the balancing loss.
        renormalize: divide the gates by their sum; refused for ``top_k=1``.
        noise, projection_dim: of the router that is made from its name.
        save: what the backward keeps, ``"preactivation"``, ``"input"`` (less memory, one product more) or ``"auto"``,
            the one that takes less time on the device.

    Parameters: ``w1`` (E, h, d), ``b1`` (E, h), ``w2`` (E, d, h), ``b2`` (E, d), submodule ``router``.

    Under activation checkpointing use ``use_reentrant=False``: the reentrant form runs the forward without gradient,
    and with it goes the gradient of the balancing loss.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 1,
        router: str | nn.Module = "cosine",
        activation: str = "gelu",
        dropout: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        batch_priority: bool = False,
        balance_loss: str | None = None,
        z_loss: float = 0.0,
        renormalize: bool = False,
        noise: float = 0.0,
        projection_dim: int = 256,
        save: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if save not in SAVE:
            raise ValueError(f"save: expected one of {', '.join(SAVE)}, got {save!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None and not factor > 0:
                raise ValueError(f"{name}: expected a number > 0 or None, got {factor}")
        if isinstance(router, str):
            if router not in ROUTERS:
                raise ValueError(f"router: expected one of {', '.join(ROUTERS)} or a module, got {router!r}")
            shape = {"projection_dim": projection_dim} if router == "cosine" else {}
            router = ROUTERS[router](dim, num_experts, top_k, noise=noise, renormalize=renormalize, **shape)
        else:
            _check_router(router, dim, num_experts, top_k, noise, renormalize)
        if balance_loss is not None and balance_loss not in losses.BALANCE_LOSSES:
            expected = ", ".join(losses.BALANCE_LOSSES)
            raise ValueError(f"balance_loss: expected one of {expected} or None, got {balance_loss!r}")
        if balance_loss in losses.NEED_NOISE and not getattr(router, "noise", 0) > 0:
            raise ValueError(f"balance_loss: {balance_loss!r} is a function of the noise, which is 0")
        self.dim, self.hidden_dim, self.num_experts = dim, hidden_dim, num_experts
        self.activation, self.dropout, self.save = activation, dropout, save
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.batch_priority, self.balance_loss, self.z_loss = batch_priority, balance_loss, z_loss
        self.router = router
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        self._auxiliary: Tensor | None = None
        self._routing: Routing | None = None
        self._kept: Tensor | None = None
        self.reset_parameters()

    @classmethod
    def tutel(cls, dim: int, hidden_dim: int, num_experts: int, top_k: int = 1, **changes: Any) -> MoE:
        """The layer that GMoE's published results used, as Tutel computes it.

        Cosine router with projection 256 and noise 1, hidden dropout 0.1, capacity k · int(1.5 · ceil(T / E)) in
        training and in evaluation, batch priority, gates renormalized for k > 1, Tutel's load-importance loss.
        ``changes`` replaces any of these.
        """
        return cls(dim, hidden_dim, num_experts, top_k, **(TUTEL | {"renormalize": top_k > 1} | changes))

    @classmethod
    def from_ffn(cls, fc1: nn.Linear, fc2: nn.Linear, num_experts: int = 6, **kwargs: Any) -> MoE:
        """Sparse upcycling: every expert starts as the feed-forward network fc2(activation(fc1(x))).

        ``kwargs`` as for the constructor. Device and dtype are those of ``fc1``; a layer without bias gets bias 0.
        """
        if fc2.in_features != fc1.out_features or fc2.out_features != fc1.in_features:
            raise ValueError(
                f"fc2: expected {fc1.out_features} → {fc1.in_features} features, the reverse of fc1, "
                f"got {fc2.in_features} → {fc2.out_features}"
            )
        layer = cls(fc1.in_features, fc1.out_features, num_experts, **kwargs).to(fc1.weight)
        with torch.no_grad():
            for weight, bias, linear in ((layer.w1, layer.b1, fc1), (layer.w2, layer.b2, fc2)):
                weight.copy_(linear.weight.expand_as(weight))
                bias.zero_() if linear.bias is None else bias.copy_(linear.bias.expand_as(bias))
        return layer

    def reset_parameters(self) -> None:
        """torch's own initialization of a linear layer, for each expert."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., d); all leading dimensions are tokens."""
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected shape (..., {self.dim}), got {tuple(x.shape)}")
        tokens = x.reshape(-1, self.dim)
        routing: Routing = self.router(tokens)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = priority = None
        if factor is not None:
            capacity = expert_capacity(tokens.shape[0], self.num_experts, routing.experts.shape[1], factor)
            if self.batch_priority:
                priority = routing.statistics.confidence
        plan = dispatch(routing.experts, self.num_experts, capacity=capacity, priority=priority)
        dropout = self.dropout if self.training else 0.0
        y = expert_ffn(
            tokens,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            routing.gates,
            plan,
            activation=self.activation,
            dropout_p=dropout,
            seed=draw_seed(x.device) if dropout > 0 else None,
            save=self.save,
        )
        self._remember(routing, plan.kept)
        return y.view(x.shape)

    def _remember(self, routing: Routing, kept: Tensor) -> None:
        self._auxiliary = self._balance(routing) if self.training else None
        statistics = type(routing.statistics)(*(tensor.detach() for tensor in routing.statistics))
        self._routing = Routing(routing.gates.detach(), routing.experts, statistics)
        self._kept = kept

    def _balance(self, routing: Routing) -> Tensor | None:
        terms = []
        if self.balance_loss is not None:
            terms.append(losses.BALANCE_LOSSES[self.balance_loss](routing))
        if self.z_loss:
            terms.append(self.z_loss * losses.z_loss(routing))
        return torch.stack(terms).sum() if terms else None

    def __getstate__(self) -> dict[str, Any]:
        """What the last forward left behind is not part of a copy."""
        return self.__dict__ | {"_auxiliary": None, "_routing": None, "_kept": None}

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Balancing loss + z_loss · z of the last training forward; None in evaluation or where there is none."""
        return self._auxiliary

    @property
    def last_routing(self) -> Routing | None:
        """The detached routing of the last forward, None before it."""
        return self._routing

    def telemetry(self) -> Telemetry:
        """How the last forward routed, without host synchronization."""
        if self._routing is None or self._kept is None:
            raise RuntimeError("telemetry: expected a forward before it, got none")
        experts, kept = self._routing.experts, self._kept
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, experts.flatten(), kept.flatten().long())
        entropy = self._routing.statistics.entropy / max(experts.shape[0], 1)
        return Telemetry(counts / counts.sum().clamp(min=1), entropy, (counts == 0).sum(), (~kept).sum())

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, hidden_dim={self.hidden_dim}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, balance_loss={self.balance_loss!r}"
        )


def _check_router(router: nn.Module, dim: int, num_experts: int, top_k: int, noise: float, renormalize: bool) -> None:
    """A router module counts; what the layer was told must not contradict it."""
    if not isinstance(router, nn.Module):
        raise TypeError(f"router: expected a name or a module, got {type(router).__name__}")
    for name, wanted in (("dim", dim), ("num_experts", num_experts)):
        found = getattr(router, name, wanted)
        if found != wanted:
            raise ValueError(f"router: expected {name}={wanted}, got a router with {name}={found}")
    for name, told, default in (
        ("top_k", top_k, 1),
        ("noise", noise, 0.0),
        ("renormalize", renormalize, False),
    ):
        found = getattr(router, name, told)
        if told not in (default, found):
            raise ValueError(f"{name}: the router module has {name}={found}, got {told} for the layer")


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum over the MoE layers of ``model`` of the auxiliary loss of their last training forward.

    Differentiable and local to the rank; a zero that needs no gradient where no layer has one.
    """
    terms = [module.auxiliary_loss for module in model.modules() if isinstance(module, MoE)]
    found = [term for term in terms if term is not None]
    if found:
        return torch.stack([term.to(found[0].device) for term in found]).sum()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.zeros((), device=device)
