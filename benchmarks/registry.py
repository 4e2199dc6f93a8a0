"""Every operator that is measured, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_kernels.benchmarks import (
    dispatch,
    diverse_sampling,
    expert_ffn,
    grad_projection,
    hypercolumn,
    moe_layer,
    routing,
)
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.workloads import Workload

BENCHMARKS: dict[str, Benchmark[Any]] = {
    "routing": routing.BENCHMARK,
    "dispatch": dispatch.BENCHMARK,
    "expert_ffn": expert_ffn.BENCHMARK,
    "moe_layer": moe_layer.BENCHMARK,
    "grad_projection": grad_projection.BENCHMARK,
    "hypercolumn": hypercolumn.BENCHMARK,
    "diverse_sampling": diverse_sampling.BENCHMARK,
}


def cases(operator: str, workloads: Sequence[Workload], device: torch.device) -> Iterator[Case]:
    """The cases of ``operator``, each built when its turn comes, so that only one is in memory.

    What was compiled for the one before is forgotten: ``torch.compile`` gives up on a function that it has compiled for
    too many shapes.
    """
    benchmark = BENCHMARKS[operator]
    for workload in workloads:
        if workload.representative or not benchmark.representatives:
            for direction in benchmark.directions:
                torch.compiler.reset()
                yield benchmark.build(workload, direction, device)


def weighed(case: Case) -> bool:
    """Whether the peak memory of ``case`` is told."""
    return case.direction == BENCHMARKS[case.operator].weigh and case.workload.representative
