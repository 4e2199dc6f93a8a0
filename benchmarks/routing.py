"""``routing``: the cosine router.

Peers: the same in plain PyTorch, once the gates and experts alone and once with the statistics that ours brings along
(counts, importance, z, entropy). Limit: the projection, and in the backward its two products; the products with the
E embeddings are left out of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.harness import BOTH, OURS, Benchmark, Case, Problem, Product, bare_products
from moe_kernels.benchmarks.workloads import Draw, Workload, steer
from moe_kernels.ops.routing import route
from moe_kernels.reference.routing import MAX_LOG_SCALE


def _ours(
    x: Tensor, projection: Tensor, bias: Tensor, embedding: Tensor, log_scale: Tensor, *, top_k: int
) -> Mapping[str, Tensor]:
    routing = route(x, projection, bias, embedding, log_scale, top_k=top_k)
    return {"gates": routing.gates, "experts": routing.experts}


def plain_logits(x: Tensor, projection: Tensor, bias: Tensor, embedding: Tensor, log_scale: Tensor) -> Tensor:
    """Cosine logits (T, E) in float32; the norm divides the E numerators and not the p projected features."""
    projected = F.linear(x.float(), projection.float(), bias.float())
    numerators = F.linear(projected, F.normalize(embedding.float(), dim=1))
    scale = log_scale.float().clamp(max=MAX_LOG_SCALE).exp()
    norms: Tensor = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
    return numerators * (scale / norms)


def _plain(*, top_k: int, **leaves: Tensor) -> Mapping[str, Tensor]:
    gates, experts = plain_logits(**leaves).softmax(1).topk(top_k)
    return {"gates": gates, "experts": experts}


def _plain_with_statistics(*, top_k: int, **leaves: Tensor) -> Mapping[str, Tensor]:
    logits = plain_logits(**leaves)
    probabilities = logits.softmax(1)
    gates, experts = probabilities.topk(top_k)
    F.one_hot(experts, logits.shape[1]).sum(0)  # counts
    probabilities.sum(0)  # importance
    log_partition = logits.logsumexp(1)
    log_partition.square().sum()  # z
    (log_partition.detach() - (probabilities.detach() * logits.detach()).sum(1)).sum()  # entropy
    return {"gates": gates, "experts": experts}


def products(x: Tensor, projection: Tensor, direction: str) -> list[Product]:
    """The products of the projection."""
    x, projection = x.detach(), projection.detach()
    projected = x.new_empty(x.shape[0], projection.shape[0])
    forward = [(x, projection.t(), projected)]
    backward = [
        (projected, projection, torch.empty_like(x)),
        (projected.t(), x, torch.empty_like(projection)),
    ]
    return forward + backward if direction == BOTH else forward


def _build(workload: Workload, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    dim, width = workload.dim, workload.projection_dim
    projection, bias = draw.normal(width, dim, std=dim**-0.5), draw.normal(width, std=dim**-0.5)
    embedding = draw.normal(workload.num_experts, width, std=0.01)
    x = steer(draw.normal(workload.tokens, dim), draw.experts(), projection, bias, embedding)
    log_scale = torch.full((1,), 2.0, device=device, dtype=workload.torch_dtype).log()
    leaves = {"x": x, "projection": projection, "bias": bias, "embedding": embedding, "log_scale": log_scale}
    problem = Problem(leaves, draw.gates() if direction == BOTH else None, {"top_k": workload.top_k})
    return Case(
        "routing",
        workload,
        direction,
        candidates={
            OURS: problem.candidate(_ours),
            "plain PyTorch": problem.candidate(_plain),
            "plain + statistics": problem.candidate(_plain_with_statistics),
            "bare products": bare_products(products(x, projection, direction)),
        },
        exact=problem.exact(_ours),
        plain="plain PyTorch",
        limit="bare products",
    )


# The cost does not depend on which experts are chosen.
BENCHMARK = Benchmark(_build, routings=("balanced",))
