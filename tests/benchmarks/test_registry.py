"""Every registered case runs, agrees with float64, and measures against what it says."""

import dataclasses

import pytest
import torch

from moe_kernels import backend
from moe_kernels.benchmarks import expert_ffn, harness, registry, routing, workloads
from moe_kernels.benchmarks.harness import BOTH, FORWARD, OURS
from moe_kernels.benchmarks.workloads import Draw, Workload

CPU = torch.device("cpu")
LOOPS = ["eager loop, where", "eager loop, sort", "grouped_mm", "bare products"]
CANDIDATES = {
    "routing": [OURS, "plain PyTorch", "plain + statistics", "bare products"],
    "dispatch": [OURS, "plain PyTorch", "bare copies"],
    "expert_ffn": [OURS, *LOOPS],
    "moe_layer": [OURS, *LOOPS],
}
GRADIENTS = {
    "routing": ["x", "projection", "bias", "embedding", "log_scale"],
    "dispatch": ["x", "gates"],
    "expert_ffn": ["x", "w1", "b1", "w2", "b2", "gates"],
    "moe_layer": ["x", "w1", "b1", "w2", "b2", "router.expert_embedding", "router.log_scale",
                  "router.projection.weight", "router.projection.bias"],
}  # fmt: skip


def test_every_operator_is_measured_and_the_layer():
    assert set(registry.BENCHMARKS) == {*backend.OPERATORS, "moe_layer"}


@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("operator", registry.BENCHMARKS)
def test_every_case_runs_and_everyone_is_accurate(operator, dtype):
    suite = [dataclasses.replace(workload, dtype=dtype) for workload in workloads.QUICK]
    directions = []
    for case in registry.cases(operator, suite, CPU):
        result = harness.measure(case, harness.stopwatch(CPU), rounds=1, sample_seconds=0.0)
        directions.append(result.direction)
        expected = CANDIDATES[operator] if result.direction != "plan" else CANDIDATES[operator][:2]
        assert [row.candidate for row in result.rows] == expected
        for row in result.rows:
            assert row.note == "", row
            assert row.median > 0
            assert (row.forward_error is None) == (row.candidate == result.limit)
            assert (row.gradient_error is None) == (row.candidate == result.limit or result.direction != BOTH)
    assert {FORWARD, BOTH} <= set(directions)


@pytest.mark.parametrize("operator", registry.BENCHMARKS)
def test_every_gradient_is_compared_and_is_not_trivial(operator):
    for case in registry.cases(operator, workloads.QUICK, CPU):
        right = case.exact()
        for name, run in case.candidates.items():
            if name != case.limit:
                gradients = [f"gradient of {leaf}" for leaf in GRADIENTS[operator]] if case.direction == BOTH else []
                found = run()
                assert [key for key in found if key.startswith("gradient")] == gradients
                assert set(found) == set(right)
        assert all(value.dtype in (torch.float64, torch.int64) for value in right.values())
        assert all(value.count_nonzero() > 0 for value in right.values())


def work(products):
    return sum(left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in products)


@pytest.mark.parametrize("workload", [Workload(50, 1, "zipf"), Workload(50, 2, "balanced")], ids=str)
def test_bare_products_are_all_of_the_arithmetic_and_no_more(workload):
    draw, d, h, p = Draw(workload, CPU), workload.dim, workload.hidden_dim, workload.projection_dim
    x, w1, w2 = draw.normal(50, d), draw.normal(6, h, d), draw.normal(6, d, h)
    for direction, times in ((FORWARD, 1), (BOTH, 3)):
        both_layers = expert_ffn.products(x, w1, w2, draw.experts(), direction)
        assert work(both_layers) == times * 50 * workload.top_k * 2 * d * h
        assert work(routing.products(x, draw.normal(p, d), direction)) == times * 50 * d * p


def test_grouped_mm_that_this_torch_lacks_is_said_in_its_row(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    case = next(registry.cases("moe_layer", workloads.QUICK, CPU))
    result = harness.measure(case, harness.stopwatch(CPU), rounds=1, sample_seconds=0.0)
    assert "has no torch.nn.functional.grouped_mm" in result.row("grouped_mm").note
    assert result.fastest_peer() is not None


def test_cases_are_built_one_at_a_time(monkeypatch):
    built = []
    benchmark = dataclasses.replace(registry.BENCHMARKS["routing"], build=lambda *a: built.append(a))
    monkeypatch.setitem(registry.BENCHMARKS, "routing", benchmark)
    iterator = registry.cases("routing", workloads.QUICK, CPU)
    next(iterator)
    assert len(built) == 1
    list(iterator)
    # Of routing only balanced workloads: its cost does not depend on what it chooses.
    assert [(workload.routing, direction) for workload, direction, _ in built] == [
        ("balanced", FORWARD),
        ("balanced", BOTH),
    ]
