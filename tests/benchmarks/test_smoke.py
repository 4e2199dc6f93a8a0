"""Every candidate of every registered benchmark runs once or twice through pytest-benchmark; no time is asserted."""

import functools

import pytest
import torch

from moe_kernels.benchmarks import registry

pytest.importorskip("pytest_benchmark")

CPU = torch.device("cpu")


@functools.cache
def candidates(operator, direction):
    entry = registry.BENCHMARKS[operator]
    return entry.build(entry.quick[-1], direction, CPU).candidates


NAMES = [
    (operator, direction, candidate)
    for operator, entry in registry.BENCHMARKS.items()
    for direction in entry.directions
    for candidate in candidates(operator, direction)
    if not candidate.startswith("compiled")  # seconds each; the command compiles them
]


@pytest.mark.parametrize(("operator", "direction", "candidate"), NAMES)
def test_candidate(benchmark, operator, direction, candidate):
    run = candidates(operator, direction)[candidate]
    try:
        run()
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(f"{candidate}: {error}")
    benchmark.group = f"{operator}, {direction}"
    benchmark.pedantic(run, rounds=2)
