"""Routers: modules that turn tokens (T, d) into a :class:`~moe_kernels.ops.routing.Routing`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_kernels.ops.routing import Routing, route, route_linear


def draw_seed(device: torch.device) -> Tensor:
    """An int64 (1,) seed from torch's generator, which activation checkpointing restores and so replays."""
    return torch.randint(2**62, (1,), device=device)


class _Router(nn.Module):
    """What routers share: the choice of experts and the noise on the logits in training."""

    def __init__(self, dim: int, num_experts: int, top_k: int, noise: float, renormalize: bool) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: expected 1 to {num_experts} (the number of experts), got {top_k}")
        if renormalize and top_k == 1:
            raise ValueError("renormalize: a single gate would be constant 1 and give the router no gradient")
        if not noise >= 0:
            raise ValueError(f"noise: expected a number ≥ 0, got {noise}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.noise, self.renormalize = noise, renormalize

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the logits: noise / E in training, 0 in evaluation."""
        return self.noise / self.num_experts if self.training else 0.0

    def _seed(self, x: Tensor) -> Tensor | None:
        return draw_seed(x.device) if self.noise_std > 0 else None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, noise={self.noise}"


class CosineRouter(_Router):
    """GMoE's cosine router (Sec. 3.3): logits = s · cos(W x + b, E_e), s = exp(log_scale) ≤ 100.

    Args:
        dim: features d of a token.
        num_experts: E.
        top_k: experts a token.
        projection_dim: p, width of the hypersphere.
        noise: the logits get Gaussian noise of standard deviation noise / E in training.
        renormalize: divide the gates by their sum; refused for ``top_k=1``.

    Parameters: ``projection`` (Linear d → p with bias), ``expert_embedding`` (E, p) from N(0, 0.01), ``log_scale`` (1,)
    from ln 2, that is τ = 0.5.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        projection_dim: int = 256,
        noise: float = 0.0,
        renormalize: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k, noise, renormalize)
        if projection_dim < 1:
            raise ValueError(f"projection_dim: expected at least 1, got {projection_dim}")
        self.projection = nn.Linear(dim, projection_dim)
        self.expert_embedding = nn.Parameter(torch.empty(num_experts, projection_dim))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own initialization for the projection, N(0, 0.01) and ln 2 for the rest."""
        self.projection.reset_parameters()
        nn.init.normal_(self.expert_embedding, std=0.01)
        nn.init.constant_(self.log_scale, math.log(2))

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, d)."""
        return route(
            x,
            self.projection.weight,
            self.projection.bias,
            self.expert_embedding,
            self.log_scale,
            top_k=self.top_k,
            noise_std=self.noise_std,
            seed=self._seed(x),
            renormalize=self.renormalize,
        )


class LinearRouter(_Router):
    """The linear router of GMoE's Eq. 2 and of V-MoE: logits = W x, without bias.

    Arguments as for :class:`CosineRouter`. Parameter: ``weight`` (E, d) from U(−1/√d, 1/√d).
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, noise: float = 0.0, renormalize: bool = False
    ) -> None:
        super().__init__(dim, num_experts, top_k, noise, renormalize)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own initialization of a linear layer."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, d)."""
        return route_linear(
            x,
            self.weight,
            top_k=self.top_k,
            noise_std=self.noise_std,
            seed=self._seed(x),
            renormalize=self.renormalize,
        )
