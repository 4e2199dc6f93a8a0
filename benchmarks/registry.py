"""Every operator that is measured, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moe_kernels.benchmarks import dispatch, expert_ffn, moe_layer, routing
from moe_kernels.benchmarks.candidates import BOTH
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.workloads import Workload

BENCHMARKS: dict[str, Benchmark] = {
    "routing": routing.BENCHMARK,
    "dispatch": dispatch.BENCHMARK,
    "expert_ffn": expert_ffn.BENCHMARK,
    "moe_layer": moe_layer.BENCHMARK,
}


def cases(operator: str, workloads: Sequence[Workload], device: torch.device) -> Iterator[Case]:
    """The cases of ``operator``, each built when its turn comes, so that only one is in memory.

    What was compiled for the one before is forgotten: ``torch.compile`` gives up on a function that it has compiled for
    too many shapes.
    """
    benchmark = BENCHMARKS[operator]
    for workload in workloads:
        if workload.routing in benchmark.routings:
            for direction in benchmark.directions:
                torch.compiler.reset()
                yield benchmark.build(workload, direction, device)


def weighed(case: Case) -> bool:
    """Whether the peak memory of ``case`` is told: of a forward and backward, which the routing hardly changes."""
    return BENCHMARKS[case.operator].weigh and case.direction == BOTH and case.workload.routing == "balanced"
