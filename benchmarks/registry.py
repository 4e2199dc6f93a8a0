"""Every operator that is measured, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moe_kernels.benchmarks import dispatch, expert_ffn, moe_layer, routing
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.workloads import Workload

BENCHMARKS: dict[str, Benchmark] = {
    "routing": routing.BENCHMARK,
    "dispatch": dispatch.BENCHMARK,
    "expert_ffn": expert_ffn.BENCHMARK,
    "moe_layer": moe_layer.BENCHMARK,
}


def cases(operator: str, workloads: Sequence[Workload], device: torch.device) -> Iterator[Case]:
    """The cases of ``operator``, each built when its turn comes, so that only one is in memory."""
    benchmark = BENCHMARKS[operator]
    for workload in workloads:
        if workload.routing in benchmark.routings:
            for direction in benchmark.directions:
                yield benchmark.build(workload, direction, device)
