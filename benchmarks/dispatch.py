"""``dispatch``: the plan alone ("plan"), and with the gather to the experts and the weighted combine back.

Peers: a stable argsort, a count and its running sum, index_select, and back by index_select (k = 1) or index_add; and
``torch.compile`` of it. Bare: copies that move the same bytes in order; the plan has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.candidates import BOTH, FORWARD, OURS, Candidate, Function, Outputs, Problem
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.inductor import PREFIX, compiled
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.workloads import QUICK, SUITES, Draw, Tokens
from moe_kernels.ops.dispatch import combine, dispatch, gather

PLAN = "plan"


def _our_plan(*, experts: Tensor, num_experts: int) -> Mapping[str, Tensor]:
    plan = dispatch(experts, num_experts)
    return {"order": plan.order, "offsets": plan.offsets, "inverse": plan.inverse}


def _ours(x: Tensor, gates: Tensor, *, experts: Tensor, num_experts: int) -> Mapping[str, Tensor]:
    plan = dispatch(experts, num_experts)
    return {"y": combine(gather(x, plan), gates, plan)}


def inverse_of(order: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _plain_plan(*, experts: Tensor, num_experts: int) -> Mapping[str, Tensor]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    offsets = F.pad(torch.bincount(flat, minlength=num_experts).cumsum(0), (1, 0))
    return {"order": order, "offsets": offsets, "inverse": inverse_of(order).view_as(experts)}


def plain_gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Rows of ``x`` (T, d) in the order of the assignments, (A, d)."""
    return x.index_select(0, order if top_k == 1 else order // top_k)


def plain_combine(rows: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    """Σ_j gate · row (T, d), in whichever way torch is quicker at it."""
    tokens, top_k = gates.shape
    gates = gates.to(rows.dtype)
    if top_k == 1:
        return rows.index_select(0, inverse_of(order)) * gates
    weighted = rows * gates.flatten().index_select(0, order)[:, None]
    return rows.new_zeros(tokens, rows.shape[1]).index_add(0, order // top_k, weighted)


def _plain(x: Tensor, gates: Tensor, *, experts: Tensor, num_experts: int) -> Mapping[str, Tensor]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    torch.bincount(flat, minlength=num_experts).cumsum(0)  # where the experts of the rows begin
    return {"y": plain_combine(plain_gather(x, order, gates.shape[1]), gates, order)}


def _copies(x: Tensor, top_k: int, direction: str) -> Candidate:
    """Read T rows and write A, then the reverse; the gradients of the two move as much again, at the least."""
    tokens = x.detach()
    rows = tokens.new_zeros(tokens.shape[0], top_k, tokens.shape[1])
    out = torch.empty_like(tokens)

    def run() -> Outputs:
        for _ in range(2 if direction == BOTH else 1):
            rows.copy_(tokens[:, None].expand_as(rows))
            out.copy_(rows[:, 0])
            for choice in range(1, top_k):
                out.add_(rows[:, choice])
        return {}

    return run


def work(workload: Tokens, direction: str) -> Work:
    """Bytes only: ids → order, inverse, offsets and what is kept; gather T → A rows; combine A rows and gates → T.

    In the backward the combine reads T rows and again the A rows and gates, and writes the gradients of both; the
    gather reads A rows and writes T.
    """
    assignments = workload.tokens * workload.top_k
    plan = 8 * (3 * assignments + workload.num_experts + 1) + assignments
    if direction == PLAN:
        return Work(0, plan)
    row, gates = workload.dim * workload.torch_dtype.itemsize, 4 * assignments
    forward = plan + 2 * (workload.tokens + assignments) * row + gates
    if direction == FORWARD:
        return Work(0, forward)
    return Work(0, forward + (2 * workload.tokens + 3 * assignments) * row + 2 * gates)


def _build(workload: Tokens, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    others = {"experts": draw.experts(), "num_experts": workload.num_experts}
    ours: Function
    plain: Function
    if direction == PLAN:
        problem = Problem({}, others=others)
        ours, plain, bare = _our_plan, _plain_plan, None
    else:
        leaves = {"x": draw.normal(workload.tokens, workload.dim), "gates": draw.gates()}
        problem = Problem(leaves, draw.normal(workload.tokens, workload.dim) if direction == BOTH else None, others)
        ours, plain, bare = _ours, _plain, "bare copies"
    candidates = {
        OURS: problem.candidate(ours),
        "plain PyTorch": problem.candidate(plain),
        f"{PREFIX}plain": problem.candidate(compiled(plain)),
    }
    if bare is not None:
        candidates[bare] = _copies(problem.leaves["x"], workload.top_k, direction)
    return Case(
        "dispatch",
        workload,
        direction,
        candidates,
        exact=problem.exact(ours),
        plain="plain PyTorch",
        work=work(workload, direction),
        bare=bare,
    )


BENCHMARK = Benchmark(_build, SUITES, QUICK, directions=(PLAN, FORWARD, BOTH))
