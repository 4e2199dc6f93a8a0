"""``moe_layer``: the whole layer, ``moe_kernels.nn.MoE`` with its cosine router.

Peers: the plain PyTorch router in front of the peers of ``expert_ffn``, compiled with it where they are. Bare: the
products of both. The tokens are made so that the router spreads them as the workload says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_kernels.benchmarks import expert_ffn, routing
from moe_kernels.benchmarks.candidates import BOTH, OURS, Function, Problem, bare_products
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.peers import PARAMETERS, candidates
from moe_kernels.benchmarks.workloads import QUICK, SEED, SUITES, Draw, Tokens, steer
from moe_kernels.nn import MoE

_ROUTER = {
    "projection": "router.projection.weight",
    "bias": "router.projection.bias",
    "embedding": "router.expert_embedding",
    "log_scale": "router.log_scale",
}
"""The name of a parameter in ``routing`` → in the layer."""


def _layer(workload: Tokens, device: torch.device) -> MoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = MoE(
            workload.dim,
            workload.hidden_dim,
            workload.num_experts,
            workload.top_k,
            projection_dim=workload.projection_dim,
        )
    return layer.to(device, workload.torch_dtype)


def _behind_router(experts_function: Function, top_k: int) -> Function:
    """The layer in plain PyTorch: router, then ``experts_function``."""

    def layer(x: Tensor, **parameters: Tensor) -> Mapping[str, Tensor]:
        logits = routing.plain_logits(x, **{name: parameters[key] for name, key in _ROUTER.items()})
        gates, experts = logits.softmax(1).topk(top_k)
        weights = {name: parameters[name] for name in PARAMETERS}
        return experts_function(x, **weights, gates=gates, experts=experts)

    return layer


def work(workload: Tokens, direction: str) -> Work:
    """The products of router and experts; tokens and parameters in, tokens or gradients out, routing stays inside."""
    flops = routing.work(workload, direction).flops + expert_ffn.work(workload, direction).flops
    size, dim, hidden_dim = workload.torch_dtype.itemsize, workload.dim, workload.hidden_dim
    router = workload.projection_dim * (dim + 1 + workload.num_experts) + 1
    parameters = (router + workload.num_experts * (2 * dim * hidden_dim + dim + hidden_dim)) * size
    tokens = workload.tokens * dim * size
    forward = tokens + parameters + tokens
    if direction != BOTH:
        return Work(flops, forward)
    return Work(flops, forward + (tokens + tokens + parameters) + (tokens + parameters))


def _build(workload: Tokens, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    layer = _layer(workload, device)
    parameters = dict(layer.named_parameters())
    projection, bias, embedding = (parameters[_ROUTER[name]] for name in ("projection", "bias", "embedding"))
    experts = draw.experts()
    x = steer(draw.normal(workload.tokens, workload.dim), experts, projection, bias, embedding)
    leaves: dict[str, Tensor] = {"x": x, **parameters}
    cotangent = None
    if direction == BOTH:
        # The gradient of ½‖y‖². With a random one the gradient of the scale is a sum that cancels, and how far a
        # candidate is off there a matter of luck.
        with torch.no_grad():
            cotangent = layer(x)
    problem = Problem(leaves, cotangent)

    def ours(x: Tensor, **_: Tensor) -> Mapping[str, Tensor]:
        return {"y": layer(x)}

    bare = routing.products(x, projection, direction)
    bare += expert_ffn.products(x, parameters["w1"], parameters["w2"], experts, direction)
    return Case(
        "moe_layer",
        workload,
        direction,
        candidates={
            OURS: problem.candidate(ours),
            **candidates(problem, expert_ffn.PEERS, lambda peer: _behind_router(peer, workload.top_k)),
            "bare products": bare_products(bare),
        },
        exact=problem.exact(_behind_router(expert_ffn.EXACT, workload.top_k)),
        plain=expert_ffn.PLAIN,
        work=work(workload, direction),
        bare="bare products",
    )


BENCHMARK = Benchmark(_build, SUITES, QUICK, weigh=BOTH)
