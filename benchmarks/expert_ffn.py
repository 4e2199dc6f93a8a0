"""``expert_ffn``: from tokens, gates and expert ids to outputs, the sorting of the ids included for everyone.

Peers in plain PyTorch: the eager loop over experts in two forms, one that finds an expert's tokens by ``torch.where``
and adds its outputs in place, one that sorts once, splits and concatenates; both have one parameter tensor for each
expert, as a list of modules has, and so pay nothing for slicing. ``torch.nn.functional.grouped_mm`` with biases, GELU
and gates around it. ``torch.compile`` of the second and of the third. The libraries stand in ``peers``. Bare: the
products on rows that were gathered before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.candidates import BOTH, OURS, Function, Problem, Product, bare_products
from moe_kernels.benchmarks.dispatch import plain_combine, plain_gather
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.inductor import PREFIX
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.peers import LIBRARIES, Peer, apart, candidates
from moe_kernels.benchmarks.workloads import QUICK, SUITES, Draw, Tokens
from moe_kernels.ops.dispatch import dispatch
from moe_kernels.ops.expert_ffn import expert_ffn

PLAIN = "eager loop, sort"


def _ours(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    return {"y": expert_ffn(x, w1, b1, w2, b2, gates, dispatch(experts, w1.shape[0]))}


def _expert(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _loop_where(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    gates: Tensor,
    *,
    experts: Tensor,
) -> Mapping[str, Tensor]:
    y = torch.zeros_like(x)
    gates = gates.to(x.dtype)
    for e, parameters in enumerate(zip(w1, b1, w2, b2, strict=True)):
        token, choice = torch.where(experts == e)
        y.index_add_(0, token, _expert(x.index_select(0, token), *parameters) * gates[token, choice, None])
    return {"y": y}


def _loop_sort(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    gates: Tensor,
    *,
    experts: Tensor,
) -> Mapping[str, Tensor]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=len(w1)).tolist()
    segments = torch.split(plain_gather(x, order, gates.shape[1]), counts)
    outputs = [_expert(*inputs) for inputs in zip(segments, w1, b1, w2, b2, strict=True)]
    return {"y": plain_combine(torch.cat(outputs), gates, order)}


def _grouped(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *, experts: Tensor
) -> Mapping[str, Tensor]:
    if not hasattr(F, "grouped_mm"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=w1.shape[0])
    ends = counts.cumsum(0, dtype=torch.int32)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        biases = torch.repeat_interleave(bias, counts, dim=0, output_size=order.numel())
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends).add_(biases)

    rows = plain_gather(x, order, gates.shape[1])
    return {"y": plain_combine(linear(F.gelu(linear(rows, w1, b1)), w2, b2), gates, order)}


EXACT: Function = _loop_sort
"""What float64 is computed by: the reference does every expert on every token, which a large workload cannot afford."""


def _compiled_grouped(x: Tensor, *args: Tensor, **kwargs: Tensor) -> Mapping[str, Tensor]:
    if x.dtype != torch.bfloat16:
        raise RuntimeError(f"torch.compile takes grouped_mm in bfloat16 only, got {x.dtype}")
    return _grouped(x, *args, **kwargs)


PEERS: dict[str, Peer] = {
    "eager loop, where": Peer(_loop_where, apart),
    PLAIN: Peer(_loop_sort, apart),
    "grouped_mm": Peer(_grouped),
    f"{PREFIX}loop": Peer(_loop_sort, apart, compile=True),
    f"{PREFIX}grouped_mm": Peer(_compiled_grouped, compile=True),
    **LIBRARIES,
}


def products(x: Tensor, w1: Tensor, w2: Tensor, experts: Tensor, direction: str) -> list[Product]:
    """The products of every expert, each on its own rows."""
    x, w1, w2 = (tensor.detach() for tensor in (x, w1, w2))
    flat = experts.flatten()
    rows = plain_gather(x, flat.argsort(stable=True), experts.shape[1])
    found: list[Product] = []
    counts: list[int] = torch.bincount(flat, minlength=w1.shape[0]).tolist()
    for e, segment in enumerate(torch.split(rows, counts)):
        hidden, out = segment.new_empty(len(segment), w1.shape[1]), torch.empty_like(segment)
        found += [(segment, w1[e].t(), hidden), (hidden, w2[e].t(), out)]
        if direction == BOTH:
            grad_hidden = torch.empty_like(hidden)
            found += [
                (out, w2[e], grad_hidden),
                (out.t(), hidden, torch.empty_like(w2[e])),
                (grad_hidden, w1[e], torch.empty_like(segment)),
                (grad_hidden.t(), segment, torch.empty_like(w1[e])),
            ]
    return found


def work(workload: Tokens, direction: str) -> Work:
    """The two products of every assignment; tokens, ids, gates and parameters in, tokens or gradients out."""
    assignments, size = workload.tokens * workload.top_k, workload.torch_dtype.itemsize
    dim, hidden_dim = workload.dim, workload.hidden_dim
    flops = 2 * assignments * 2 * dim * hidden_dim
    tokens = workload.tokens * dim * size
    parameters = workload.num_experts * (2 * dim * hidden_dim + dim + hidden_dim) * size
    gates, ids = 4 * assignments, 8 * assignments
    forward = tokens + ids + gates + parameters + tokens
    if direction != BOTH:
        return Work(flops, forward)
    return Work(3 * flops, forward + (tokens + tokens + ids + gates + parameters) + (tokens + gates + parameters))


def _build(workload: Tokens, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    tokens, dim, hidden_dim, num_experts = workload.tokens, workload.dim, workload.hidden_dim, workload.num_experts
    experts = draw.experts()
    leaves = {
        "x": draw.normal(tokens, dim),
        "w1": draw.normal(num_experts, hidden_dim, dim, std=dim**-0.5),
        "b1": draw.normal(num_experts, hidden_dim, std=dim**-0.5),
        "w2": draw.normal(num_experts, dim, hidden_dim, std=hidden_dim**-0.5),
        "b2": draw.normal(num_experts, dim, std=hidden_dim**-0.5),
        "gates": draw.gates(),
    }
    problem = Problem(leaves, draw.normal(tokens, dim) if direction == BOTH else None, {"experts": experts})
    bare = products(leaves["x"], leaves["w1"], leaves["w2"], experts, direction)
    return Case(
        "expert_ffn",
        workload,
        direction,
        candidates={
            OURS: problem.candidate(_ours),
            **candidates(problem, PEERS, lambda peer: peer),
            "bare products": bare_products(bare),
        },
        exact=problem.exact(EXACT),
        plain=PLAIN,
        work=work(workload, direction),
        bare="bare products",
    )


BENCHMARK = Benchmark(_build, SUITES, QUICK, weigh=BOTH)
