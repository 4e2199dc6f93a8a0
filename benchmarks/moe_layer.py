"""``moe_layer``: the whole layer, ``moe_kernels.nn.MoE`` with its cosine router.

Peers: the plain PyTorch router in front of the peers of ``expert_ffn``. Limit: the products of both. The tokens are
made so that the router spreads them as the workload says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from moe_kernels.benchmarks import expert_ffn, routing
from moe_kernels.benchmarks.harness import BOTH, OURS, Benchmark, Case, Function, Problem, bare_products
from moe_kernels.benchmarks.workloads import SEED, Draw, Workload, steer
from moe_kernels.nn import MoE

_ROUTER = {
    "projection": "router.projection.weight",
    "bias": "router.projection.bias",
    "embedding": "router.expert_embedding",
    "log_scale": "router.log_scale",
}
"""The name of a parameter in ``routing`` → in the layer."""


def _layer(workload: Workload, device: torch.device) -> MoE:
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
        weights = {name: parameters[name] for name in expert_ffn.PARAMETERS}
        return experts_function(x, **weights, gates=gates, experts=experts)

    return layer


def _build(workload: Workload, direction: str, device: torch.device) -> Case:
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

    def meaning(x: Tensor, **parameters: Tensor) -> Mapping[str, Tensor]:
        return {"y": functional_call(layer, parameters, (x,))}

    peers = {
        name: problem.candidate(_behind_router(peer, workload.top_k), expert_ffn.split(leaves) if apart else None)
        for name, (peer, apart) in expert_ffn.PEERS.items()
    }
    bare = routing.products(x, projection, direction)
    bare += expert_ffn.products(x, parameters["w1"], parameters["w2"], experts, direction)
    return Case(
        "moe_layer",
        workload,
        direction,
        candidates={OURS: problem.candidate(ours), **peers, "bare products": bare_products(bare)},
        exact=problem.exact(meaning),
        plain=expert_ffn.PLAIN,
        limit="bare products",
    )


BENCHMARK = Benchmark(_build)
