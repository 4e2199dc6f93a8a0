"""What is measured on is what it says it is."""

import dataclasses

import pytest
import torch

from moe_kernels.benchmarks import workloads
from moe_kernels.benchmarks.moe_layer import _layer
from moe_kernels.benchmarks.workloads import Draw, Tokens, steer

CPU = torch.device("cpu")


ALL = {device: [w for suite in suites.values() for w in suite] for device, suites in workloads.SUITES.items()}


@pytest.mark.parametrize(("device", "images", "tokens"), [("cpu", 32, 4096), ("cuda", 96, 65536)])
def test_suites_are_the_layer_of_gmoe_small_and_a_large_one(device, images, tokens):
    batch, image, large = (
        {(w.tokens, w.top_k, w.routing) for w in workloads.SUITES[device][name]} for name in ("batch", "image", "large")
    )
    assert batch == {(images * 197, k, routing) for k in (1, 2) for routing in ("balanced", "zipf")}
    assert image == {(197, k, "balanced") for k in (1, 2)}
    assert large == {(tokens, 2, routing) for routing in ("balanced", "zipf")}
    sizes = {(w.dim, w.hidden_dim, w.num_experts) for w in ALL[device]}
    assert sizes == {(384, 1536, 6), (1024, 4096, 32)}


def test_every_device_has_the_same_suites():
    assert {tuple(suites) for suites in workloads.SUITES.values()} == {("batch", "image", "large")}


def test_tiny_is_small_and_of_the_same_kind():
    tiny = dataclasses.replace(workloads.SUITES["cpu"]["large"][0], dtype="float16").tiny()
    assert tiny.tokens * tiny.dim * tiny.hidden_dim < 10**6
    assert (tiny.top_k, tiny.num_experts, tiny.dtype) == (2, 32, "float16")


@pytest.mark.parametrize("suite", [*ALL.values(), workloads.QUICK], ids=[*ALL, "quick"])
def test_workloads_cover_both_counts_and_routings(suite):
    assert {w.top_k for w in suite} == {1, 2}
    assert {w.routing for w in suite} == {"balanced", "zipf"}
    assert len(set(map(str, suite))) == len(suite)
    assert all(w.tokens * w.hidden_dim < 2000 for w in workloads.QUICK)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_means_equal_counts_for_each_choice(top_k):
    experts = Draw(Tokens(1000, top_k, "balanced"), CPU).experts()
    assert experts.shape == (1000, top_k)
    for choice in experts.t():
        counts = torch.bincount(choice, minlength=6)
        assert counts.max() - counts.min() <= 1


def test_zipf_counts_follow_the_weights():
    counts = torch.bincount(Draw(Tokens(20000, 1, "zipf"), CPU).experts().flatten(), minlength=6)
    weights = 1 / torch.arange(1.0, 7.0)
    torch.testing.assert_close(counts / 20000, weights / weights.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize("workload", [Tokens(500, 3, "balanced"), Tokens(500, 3, "zipf")], ids=str)
def test_experts_of_a_token_are_distinct(workload):
    experts = Draw(workload, CPU).experts()
    assert all(len(set(row)) == 3 for row in experts.tolist())


def test_same_workload_same_tensors():
    one, other = (Draw(workloads.SUITES["cpu"]["batch"][0], CPU) for _ in range(2))
    assert torch.equal(one.normal(5, 5), other.normal(5, 5))
    assert torch.equal(one.experts(), other.experts())
    assert torch.equal(one.gates(), other.gates())


@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("routing", ["balanced", "zipf"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_steered_tokens_go_where_they_are_sent(top_k, routing, dtype):
    workload = dataclasses.replace(Tokens(300, top_k, routing, dim=64, hidden_dim=8, projection_dim=32), dtype=dtype)
    draw, layer = Draw(workload, CPU), _layer(workload, CPU)
    wanted, router = draw.experts(), layer.router
    x = steer(draw.normal(300, 64), wanted, router.projection.weight, router.projection.bias, router.expert_embedding)
    assert x.dtype == workload.torch_dtype
    layer(x)
    assert torch.equal(layer.last_routing.experts, wanted)


def test_steering_changes_only_what_the_router_sees():
    x, weight, bias, embedding = torch.randn(50, 16), torch.randn(4, 16), torch.randn(4), torch.randn(3, 4)
    steered = steer(x, torch.randint(3, (50, 1)), weight, bias, embedding)
    hidden_from_router = torch.eye(16) - torch.linalg.pinv(weight) @ weight
    torch.testing.assert_close(steered @ hidden_from_router.t(), x @ hidden_from_router.t(), rtol=1e-4, atol=1e-5)
    norms = [(tokens @ weight.t() + bias).norm(dim=1) for tokens in (x, steered)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)
