"""The physical limit: what the operators cannot avoid, and the probes of what a machine can do."""

import dataclasses

import pytest
import torch

from moe_kernels.benchmarks import dispatch, expert_ffn, limits, moe_layer, routing
from moe_kernels.benchmarks.candidates import BOTH, FORWARD
from moe_kernels.benchmarks.limits import Rates, Work
from moe_kernels.benchmarks.workloads import Tokens

SMALL = Tokens(5, 2, "balanced", dim=7, hidden_dim=11, num_experts=3, projection_dim=2)
GMOE = Tokens(18912, 1, "balanced", dtype="bfloat16")


def test_limit_is_the_larger_of_the_two():
    rates = Rates(flops=10.0, bytes=2.0)
    assert rates.seconds(Work(flops=100, bytes=2)) == 10.0
    assert rates.seconds(Work(flops=10, bytes=20)) == 10.0
    assert rates.seconds(Work(flops=0, bytes=1)) == 0.5


def test_small_work_counted_by_hand():
    d, h, e, p, t, a = 7, 11, 3, 2, 5, 10
    experts, router = e * (2 * d * h + d + h), p * d + p + e * p + 1
    assert expert_ffn.work(SMALL, FORWARD) == Work(4 * a * d * h, 4 * (2 * t * d + experts + a) + 8 * a)
    assert routing.work(SMALL, FORWARD) == Work(2 * t * p * (d + e), 4 * (t * d + router + a) + 8 * a)
    assert moe_layer.work(SMALL, FORWARD) == Work(
        4 * a * d * h + 2 * t * p * (d + e), 4 * (2 * t * d + experts + router)
    )
    assert dispatch.work(SMALL, dispatch.PLAN) == Work(0, 8 * (a + a + a + e + 1) + a)
    assert dispatch.work(SMALL, FORWARD).bytes == dispatch.work(SMALL, dispatch.PLAN).bytes + 4 * (2 * (t + a) * d + a)


@pytest.mark.parametrize(
    "operator", [routing, dispatch, expert_ffn, moe_layer], ids=lambda m: m.__name__.split(".")[-1]
)
def test_backward_takes_twice_the_products_and_more_bytes(operator):
    forward, both = operator.work(SMALL, FORWARD), operator.work(SMALL, BOTH)
    assert both.flops == 3 * forward.flops
    assert 2 * forward.bytes < both.bytes < 4 * forward.bytes


def test_published_limit_of_gmoe():
    """44.6 GFLOP: 56.5 µs forward at 790 TFLOP/s, and 169 µs with the backward."""
    rates = Rates(flops=790e12, bytes=4.3e12)
    assert rates.seconds(expert_ffn.work(GMOE, FORWARD)) == pytest.approx(56.5e-6, rel=2e-3)
    assert rates.seconds(expert_ffn.work(GMOE, BOTH)) == pytest.approx(169.4e-6, rel=2e-3)


def test_bytes_follow_the_dtype():
    wide, narrow = (dataclasses.replace(SMALL, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert moe_layer.work(wide, BOTH).bytes == 2 * moe_layer.work(narrow, BOTH).bytes
    assert moe_layer.work(wide, BOTH).flops == moe_layer.work(narrow, BOTH).flops


def test_probes_state_their_work(probes):
    assert probes.rates(2.0, 4.0) == Rates(probes.work.flops / 2, probes.work.bytes / 4)
    assert probes.product() == {}
    assert probes.copy() == {}
    assert limits.probes(torch.device("cpu"), torch.bfloat16, quick=True).work == probes.work
