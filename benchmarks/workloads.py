"""What is measured on: the mixture-of-experts layer of GMoE-S/16, a large one, and tiny shapes for a smoke test.

Optimizers are measured on ``parameter_lists``. Every tensor is drawn on the CPU from one seed, so that it is the same
on every device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 0
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Workload:
    """What a case is measured on; the fields say everything and stand in the results."""

    dtype: str = field(default="float32", kw_only=True)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def representative(self) -> bool:
        """Whether it stands for workloads of the same shapes, where these alone matter."""
        return True

    def tiny(self) -> Workload:
        """The same in small: it loads what a call loads."""
        raise NotImplementedError


W = TypeVar("W", bound=Workload)


@dataclass(frozen=True)
class Tokens(Workload):
    """Shapes of a mixture-of-experts layer, number of choices, and how the tokens are spread over the experts.

    ``routing`` is ``"balanced"`` (every expert is the j-th choice of equally many tokens, to one) or ``"zipf"`` (drawn
    without replacement, expert e with weight 1 / (e + 1)).
    """

    tokens: int
    top_k: int
    routing: str
    dim: int = 384
    hidden_dim: int = 1536
    num_experts: int = 6
    projection_dim: int = 256

    @property
    def representative(self) -> bool:
        return self.routing == "balanced"

    def tiny(self) -> Tokens:
        return dataclasses.replace(self, tokens=2 * self.num_experts, dim=64, hidden_dim=64, projection_dim=16)

    def __str__(self) -> str:
        return (
            f"T={self.tokens} d={self.dim} h={self.hidden_dim} E={self.num_experts} k={self.top_k} "
            f"{self.routing} {self.dtype}"
        )


IMAGE = 197  # tokens of a 224 × 224 image in patches of 16 × 16, with the class token
ROUTINGS = ("balanced", "zipf")


def _gmoe(images: int, routings: tuple[str, ...] = ROUTINGS) -> tuple[Tokens, ...]:
    return tuple(Tokens(images * IMAGE, top_k, routing) for top_k in (1, 2) for routing in routings)


def _large(tokens: int) -> tuple[Tokens, ...]:
    return tuple(Tokens(tokens, 2, routing, dim=1024, hidden_dim=4096, num_experts=32) for routing in ROUTINGS)


SUITES = {
    "cpu": {"batch": _gmoe(32), "image": _gmoe(1, ("balanced",)), "large": _large(4096)},
    # GMoE trains on 32 images from each of three domains.
    "cuda": {"batch": _gmoe(96), "image": _gmoe(1, ("balanced",)), "large": _large(65536)},
}
"""Kind of device → name of the suite → its workloads."""
QUICK = tuple(
    Tokens(40, top_k, routing, dim=16, hidden_dim=32, num_experts=4, projection_dim=8)
    for top_k, routing in ((1, "balanced"), (2, "zipf"))
)


class Draw(Generic[W]):
    """The tensors of one workload on one device."""

    def __init__(self, workload: W, device: torch.device) -> None:
        self.workload, self.device = workload, device
        self.generator = torch.Generator().manual_seed(SEED)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """N(0, std²) in the dtype of the workload."""
        return (torch.randn(shape, generator=self.generator) * std).to(self.device, self.workload.torch_dtype)

    def gates(self: Draw[Tokens]) -> Tensor:
        """(T, k) float32 in (0, 1)."""
        shape = self.workload.tokens, self.workload.top_k
        return torch.rand(shape, generator=self.generator).to(self.device)

    def experts(self: Draw[Tokens]) -> Tensor:
        """(T, k) int64, distinct in each row, spread as the workload says."""
        tokens, top_k, num_experts = self.workload.tokens, self.workload.top_k, self.workload.num_experts
        if self.workload.routing == "zipf":
            weights = 1 / torch.arange(1.0, num_experts + 1)
            chosen = torch.multinomial(weights.expand(tokens, -1), top_k, generator=self.generator)
        else:
            first = torch.randperm(tokens, generator=self.generator) % num_experts
            chosen = (first[:, None] + torch.arange(top_k)) % num_experts
        return chosen.to(self.device)


def steer(x: Tensor, experts: Tensor, projection: Tensor, bias: Tensor, embedding: Tensor) -> Tensor:
    """Move tokens ``x`` (T, d) as little as possible so that the cosine router sends them to ``experts`` (T, k).

    A router's choice is a function of its input, so the input has to be made for the load that is wanted. Needs p ≤ d.
    The margins are wide: rounding does not change a choice, which would make gradients incomparable.
    """
    wide = [tensor.detach().double() for tensor in (x, projection, bias, embedding)]
    tokens, weight, offset, directions = wide
    projected = F.linear(tokens, weight, offset)
    top_k = experts.shape[1]
    share = torch.arange(top_k, 0, -1, dtype=tokens.dtype, device=x.device)[:, None]
    wanted = (F.normalize(directions, dim=1)[experts] * share).sum(1)
    wanted = F.normalize(wanted, dim=1) + F.normalize(projected, dim=1) / 4
    wanted = F.normalize(wanted, dim=1) * projected.norm(dim=1, keepdim=True)
    return (tokens + F.linear(wanted - projected, torch.linalg.pinv(weight))).to(x.dtype)
