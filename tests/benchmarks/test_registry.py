"""Every registered case runs, agrees with float64, and measures against what it says."""

import dataclasses
import os
import shutil

import pytest
import torch

from moe_kernels import backend
from moe_kernels.benchmarks import (
    diverse_sampling,
    expert_ffn,
    grad_projection,
    harness,
    hypercolumn,
    inductor,
    registry,
    routing,
    stopwatches,
    workloads,
)
from moe_kernels.benchmarks.candidates import BOTH, FORWARD, OURS
from moe_kernels.benchmarks.workloads import Draw, Tokens

CPU = torch.device("cpu")
LIBRARIES = [
    "transformers batched_mm",
    "transformers grouped_mm",
    "transformers deepgemm",
    "transformers sonicmoe",
    "Tutel",
    "ScatterMoE",
    "MegaBlocks",
    "SonicMoE",
]
LOOPS = ["eager loop, where", "eager loop, sort", "grouped_mm", "compiled loop", "compiled grouped_mm"]
CANDIDATES = {
    "routing": [OURS, "plain PyTorch", "plain + statistics", "compiled plain", "bare products"],
    "dispatch": [OURS, "plain PyTorch", "compiled plain", "bare copies"],
    "expert_ffn": [OURS, *LOOPS, *LIBRARIES, "bare products"],
    "moe_layer": [OURS, *LOOPS, *LIBRARIES, "bare products"],
    "grad_projection": [OURS, "foreach", "foreach, fused step", "eager loop", "compiled foreach"],
    "hypercolumn": [OURS, "plain PyTorch", "compiled plain"],
    "diverse_sampling": [OURS, "plain PyTorch"],
}
FARTHEST = ["fpsample", "torch_quickfps", "torch_cluster"]
EXCUSES = {
    "compiled grouped_mm": "torch.compile takes grouped_mm in bfloat16 only",
    "transformers deepgemm": "",
    "transformers sonicmoe": "requires gated experts",
    "Tutel": "only supports float32 and float64",
    "ScatterMoE": "",
    "MegaBlocks": "",
    "SonicMoE": "",
}
"""What a CPU may lack though its library is there → a part of the reason."""
GRADIENTS = {
    "routing": ["x", "projection", "bias", "embedding", "log_scale"],
    "dispatch": ["x", "gates"],
    "expert_ffn": ["x", "w1", "b1", "w2", "b2", "gates"],
    "moe_layer": ["x", "w1", "b1", "w2", "b2", "router.expert_embedding", "router.log_scale",
                  "router.projection.weight", "router.projection.bias"],
}  # fmt: skip


def test_every_operator_is_measured_and_the_layer():
    assert set(registry.BENCHMARKS) == {*backend.OPERATORS, "moe_layer"}


def measured(case, probes):
    return harness.measure(case, stopwatches.wall_clock(CPU), probes, rounds=1, sample_seconds=0.0)


@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("operator", registry.BENCHMARKS)
def test_every_case_runs_and_everyone_is_accurate_or_says_why_not(operator, dtype, probes, uncompiled):
    suite = [dataclasses.replace(workload, dtype=dtype) for workload in registry.BENCHMARKS[operator].quick]
    directions = set()
    for case in registry.cases(operator, suite, CPU):
        result = measured(case, probes)
        directions.add(result.direction)
        expected = [name for name in CANDIDATES[operator] if result.direction != "plan" or name != "bare copies"]
        if operator == "grad_projection":
            expected.append(f"torch {result.direction.partition(',')[0]}, fused")
        if operator == "diverse_sampling":
            expected += ["plain PyTorch, builds the columns"] * (case.workload.layout == diverse_sampling.PYRAMID)
            expected += FARTHEST if result.direction == diverse_sampling.FARTHEST else []
        assert [row.candidate for row in result.rows] == expected
        for row in result.rows:
            if row.candidate in (*LIBRARIES, *FARTHEST) and row.note.startswith("not installed: "):
                continue
            if row.candidate in EXCUSES and row.note:
                assert row.note.startswith("does not run here: ")
                assert EXCUSES[row.candidate] in row.note
                continue
            if row.candidate == "foreach, fused step" and dtype != "float32":  # pytorch/pytorch#191763
                assert row.note == "" or result.direction.startswith("SGD")
                continue
            assert row.note == "", row
            assert row.median > 0
            assert row.ratio_to_limit > 0
            assert (row.forward_error is None) == (row.candidate == result.bare)
            assert (row.gradient_error is None) == (row.candidate == result.bare or result.direction != BOTH)
    assert directions == set(registry.BENCHMARKS[operator].directions)


@pytest.mark.parametrize("operator", registry.BENCHMARKS)
def test_every_gradient_is_compared_and_is_not_trivial(operator, uncompiled):
    for case in registry.cases(operator, registry.BENCHMARKS[operator].quick, CPU):
        right = case.exact()
        for name, run in case.candidates.items():
            if name != case.bare and name not in (*LIBRARIES, *FARTHEST, *EXCUSES):
                gradients = [f"gradient of {leaf}" for leaf in GRADIENTS[operator]] if case.direction == BOTH else []
                found = run()
                assert [key for key in found if key.startswith("gradient")] == gradients
                assert set(found) == set(right)
        values = [tensor for value in right.values() for tensor in ([value] if torch.is_tensor(value) else value)]
        assert all(value.dtype in (torch.float64, torch.int64) for value in values)
        assert all(value.count_nonzero() > 0 for value in values)


@pytest.mark.parametrize("operator", registry.BENCHMARKS)
def test_float64_is_what_the_reference_computes(operator):
    wide = [dataclasses.replace(workload, dtype="float64") for workload in registry.BENCHMARKS[operator].quick]
    for case in registry.cases(operator, wide, CPU):
        with backend.force("reference"):
            right = case.exact()
            forward, gradient = harness.errors(case.candidates[OURS](), right)
        assert forward < 1e-13
        assert gradient is None or gradient < 1e-7  # that of the gates, which are float32


def work(products):
    return sum(left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in products)


@pytest.mark.parametrize("workload", [Tokens(50, 1, "zipf"), Tokens(50, 2, "balanced")], ids=str)
def test_bare_products_are_all_of_the_arithmetic_and_no_more(workload):
    draw, d, h, p = Draw(workload, CPU), workload.dim, workload.hidden_dim, workload.projection_dim
    x, w1, w2 = draw.normal(50, d), draw.normal(6, h, d), draw.normal(6, d, h)
    for direction, times in ((FORWARD, 1), (BOTH, 3)):
        both_layers = expert_ffn.products(x, w1, w2, draw.experts(), direction)
        assert work(both_layers) == times * 50 * workload.top_k * 2 * d * h
        assert work(routing.products(x, draw.normal(p, d), direction)) == times * 50 * d * p


def test_grouped_mm_that_this_torch_lacks_is_said_in_its_row(monkeypatch, probes, uncompiled):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    case = next(registry.cases("moe_layer", workloads.QUICK, CPU))
    result = measured(case, probes)
    assert "has no torch.nn.functional.grouped_mm" in result.row("grouped_mm").note
    assert result.fastest_peer() is not None


def test_missing_compiler_is_said_in_the_row(monkeypatch, probes):
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = next(registry.cases("routing", workloads.QUICK, CPU))
    note = measured(case, probes).row("compiled plain").note
    assert note == "does not run here: torch.compile needs a C++ compiler, and there is no 'no-such-compiler'"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_compiled_candidate_is_compiled_for_each_case(probes):
    for case in registry.cases("dispatch", workloads.QUICK[:1], CPU):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        result = measured(case, probes)
        assert result.row(f"{inductor.PREFIX}plain").note == ""
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_batched_mm_that_would_fill_the_memory_is_refused():
    transformers = pytest.importorskip("transformers")
    assert transformers
    large = registry.BENCHMARKS["expert_ffn"].build(Tokens(400, 2, "balanced", dim=1024, hidden_dim=2048), FORWARD, CPU)
    with pytest.raises(RuntimeError, match="copies the weights for every assignment, 13 GB"):
        large.candidates["transformers batched_mm"]()


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


def test_memory_is_told_of_forward_and_backward_of_the_balanced_experts_and_of_one_step():
    weighed = {
        (operator, getattr(case.workload, "routing", None), case.direction)
        for operator in registry.BENCHMARKS
        for case in registry.cases(operator, registry.BENCHMARKS[operator].quick, CPU)
        if registry.weighed(case)
    }
    assert weighed == {
        *((operator, "balanced", BOTH) for operator in ("expert_ffn", "moe_layer")),
        ("grad_projection", None, grad_projection.SGD),
        ("hypercolumn", None, hypercolumn.LINEAR),
    }
