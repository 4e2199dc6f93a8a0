"""``routing``: the cosine router.

Peers: the same in plain PyTorch, once the gates and experts alone and once with the statistics that ours brings along
(counts, importance, z, entropy), and ``torch.compile`` of the first. Bare: the projection, and in the backward its two
products; the products with the E embeddings are left out of it, not out of the limit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.candidates import BOTH, OURS, Problem, Product, bare_products
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.inductor import PREFIX, compiled
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.workloads import QUICK, SUITES, Draw, Tokens, steer
from moe_kernels.ops.routing import route
from moe_kernels.reference.routing import MAX_LOG_SCALE


def _ours(
    x: Tensor, projection: Tensor, bias: Tensor, embedding: Tensor, log_scale: Tensor, *, top_k: int
) -> Mapping[str, Tensor]:
    routing = route(x, projection, bias, embedding, log_scale, top_k=top_k)
    return {"gates": routing.gates, "experts": routing.experts}


def plain_logits(x: Tensor, projection: Tensor, bias: Tensor, embedding: Tensor, log_scale: Tensor) -> Tensor:
    """Cosine logits (T, E) in float32 (float64 for float64); the norm divides the E numerators, not the p features."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    projected = F.linear(x.to(dtype), projection.to(dtype), bias.to(dtype))
    numerators = F.linear(projected, F.normalize(embedding.to(dtype), dim=1))
    scale = log_scale.to(dtype).clamp(max=MAX_LOG_SCALE).exp()
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


def work(workload: Tokens, direction: str) -> Work:
    """The projection to p features and the E cosines of them; forward x → gates and ids, backward gates → gradients."""
    tokens, width, size = workload.tokens, workload.projection_dim, workload.torch_dtype.itemsize
    flops = 2 * tokens * width * (workload.dim + workload.num_experts)
    x = tokens * workload.dim * size
    parameters = (width * (workload.dim + 1 + workload.num_experts) + 1) * size
    gates, ids = 4 * tokens * workload.top_k, 8 * tokens * workload.top_k
    forward = x + parameters + gates + ids
    if direction != BOTH:
        return Work(flops, forward)
    return Work(3 * flops, forward + x + parameters + gates + ids + x + parameters)


def _build(workload: Tokens, direction: str, device: torch.device) -> Case:
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
            f"{PREFIX}plain": problem.candidate(compiled(_plain)),
            "bare products": bare_products(products(x, projection, direction)),
        },
        exact=problem.exact(_ours),
        plain="plain PyTorch",
        work=work(workload, direction),
        bare="bare products",
    )


# The cost does not depend on which experts are chosen.
BENCHMARK = Benchmark(_build, SUITES, QUICK, representatives=True)
