"""The scale for peak memory, on allocations that are known, and a candidate weighed in a process of its own."""

import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch

from moe_kernels.benchmarks import memory, registry
from moe_kernels.benchmarks.candidates import BOTH, OURS, Problem
from moe_kernels.benchmarks.harness import Result, Row
from moe_kernels.benchmarks.limits import Rates, Work
from moe_kernels.benchmarks.workloads import QUICK

MB = 10**6
CPU = torch.device("cpu")
NOISE = 3  # megabytes that a resident set may be off

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@pytest.fixture(autouse=True)
def _no_free_blocks():
    """What earlier tests have freed goes back to the kernel: a block that is taken again would not be seen."""
    ctypes.CDLL(None).malloc_trim(0)


def megabytes(count):
    """Blocks this large are the kernel's again as soon as they are freed."""
    return torch.ones(count * MB // 4)


def weighed(run):
    run()
    scale = memory.Scale(CPU)
    scale.weigh(run)
    return scale.most / MB


def test_most_that_is_held_at_once():
    def run():
        scratch = megabytes(100)
        kept = megabytes(60)
        del scratch
        return {"y": kept, "more": megabytes(70)}

    assert weighed(run) == pytest.approx(160, abs=NOISE)


def test_what_was_there_before_does_not_count():
    there = megabytes(200)

    def run():
        return {"y": there + 1}

    assert weighed(run) == pytest.approx(200, abs=NOISE)


def test_memory_that_a_candidate_keeps_counts():
    kept = []
    scale = memory.Scale(CPU)
    scale.weigh(lambda: kept.append(megabytes(80)) or {})
    scale.weigh(lambda: {"y": megabytes(50)})
    assert scale.most / MB == pytest.approx(130, abs=NOISE)


class Fused(torch.autograd.Function):
    """y = a + b, whose backward makes both gradients and 50 MB of scratch beside them."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, gradient):
        both = gradient * 2, gradient * 3
        megabytes(50)
        return both


def test_gradients_of_a_fused_backward_are_left_out():
    leaves = {"a": megabytes(100), "b": megabytes(100)}
    candidate = Problem(leaves, megabytes(100)).candidate(lambda a, b: {"y": Fused.apply(a, b)})
    assert weighed(candidate) == pytest.approx(100 + 50, abs=NOISE)  # y and the scratch


def test_gradients_are_not_subtracted_before_they_are_there():
    def one_after_another(a, b):
        large = a.exp()  # kept for the backward: 100 MB
        return {"y": (large * b).sum()[None]}

    leaves = {"a": megabytes(100), "b": megabytes(100)}
    candidate = Problem(leaves, torch.ones(1)).candidate(one_after_another)
    # exp(a) and the product, which the sum has read; later exp(a), the gradient of exp(a), and those of a and b.
    assert weighed(candidate) == pytest.approx(200, abs=NOISE)


def result():
    rows = [Row(OURS, median=1.0), Row("bare", median=1.0), Row("absent", note="not installed")]
    return Result("moe_layer", QUICK[0], BOTH, "plain", "bare", Work(1, 1), Rates(1.0, 1.0), 1.0, rows)


@pytest.mark.parametrize("operator", ["moe_layer", "grad_projection"])
def test_a_candidate_is_weighed_in_a_process_of_its_own(operator):
    benchmark = registry.BENCHMARKS[operator]
    case = benchmark.build(benchmark.quick[0], benchmark.weigh, CPU)
    assert 0 <= memory.peak_bytes(case, OURS, CPU) < 50 * MB
    with pytest.raises(RuntimeError, match="nonsense"):
        memory.peak_bytes(case, "nonsense", CPU)


def test_rows_with_a_speed_are_weighed(monkeypatch):
    case = registry.BENCHMARKS["moe_layer"].build(QUICK[0], BOTH, CPU)
    found = result()
    monkeypatch.setattr(memory, "peak_bytes", lambda case, candidate, device: 7)
    memory.weigh_rows(dataclasses.replace(case, bare="bare"), found, CPU)
    assert [row.peak_bytes for row in found.rows] == [7, None, None]

    def failing(*_):
        raise RuntimeError("no /proc")

    monkeypatch.setattr(memory, "peak_bytes", failing)
    memory.weigh_rows(dataclasses.replace(case, bare="bare"), found := result(), CPU)
    assert found.row(OURS).remarks == ["memory not measured: no /proc"]
