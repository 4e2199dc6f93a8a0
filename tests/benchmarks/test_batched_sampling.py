"""The batched peers of diverse_sampling, which the registry runs on a GPU only, and its workloads of several images."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moe_kernels.benchmarks import diverse_sampling as benchmark
from moe_kernels.benchmarks.candidates import OURS
from moe_kernels.reference import diverse_sampling as reference


def test_batched_peers_are_the_operators():
    columns, scores = F.normalize(torch.randn(3, 30, 8), dim=2), torch.randn(3, 4, 30)
    maps, grid = [columns.transpose(1, 2).unsqueeze(3)], (30, 1)
    for number, rule in enumerate((benchmark.SUM, benchmark.MAX)):
        found = benchmark.batched_sampling(scores, columns, 6, rule)
        indices, background = reference.diverse_sampling(scores, None, maps, grid, True, 6, number, True)
        assert torch.equal(found["indices"], indices)
        assert torch.equal(found["background"], background)
    start = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(benchmark.batched_farthest(columns, 6), reference.farthest_points(maps, grid, 6, start, 0))


@pytest.mark.parametrize("direction", benchmark.DIRECTIONS)
@pytest.mark.parametrize("workload", benchmark.SUITES["cuda"]["pyramid"] + benchmark.SUITES["cuda"]["columns"], ids=str)
def test_workloads_of_a_gpu(workload, direction):
    small = dataclasses.replace(workload.tiny(), dtype="float16")
    case = benchmark.BENCHMARK.build(small, direction, torch.device("cpu"))
    ours, plain = case.candidates[OURS](), case.candidates[benchmark.PLAIN]()
    assert {name: len(value) for name, value in ours.items()} == {name: len(value) for name, value in plain.items()}
    for name, value in case.exact().items():
        assert torch.equal(ours[name], value)
        assert torch.equal(plain[name], value)
