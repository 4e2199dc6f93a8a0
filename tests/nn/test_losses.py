"""Each loss against its formula written out token by token, and the properties that make it a balancing loss."""

import math

import pytest
import torch

from moe_kernels.nn import losses
from moe_kernels.ops.routing import route_linear
from moe_kernels.reference import philox

SEED = torch.tensor([77])
T, D, E = 40, 8, 5


def routed(k=2, noise_std=0.3, T=T):
    x = torch.randn(T, D, dtype=torch.float64)
    weight = torch.randn(E, D, dtype=torch.float64, requires_grad=True)
    routing = route_linear(x, weight, top_k=k, noise_std=noise_std, seed=SEED)
    clean = x @ weight.T
    noisy = clean + noise_std * philox.normal(SEED, T, E).double()
    return routing, clean, noisy, weight


@pytest.mark.parametrize("k", [1, 3])
def test_gshard(k):
    routing, _, noisy, _ = routed(k)
    first = noisy.argmax(1)
    expected = sum(noisy.softmax(1)[:, e].mean() * (first == e).double().mean() for e in range(E)) * E
    torch.testing.assert_close(losses.gshard(routing), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_switch(k):
    routing, _, noisy, _ = routed(k)
    chosen = noisy.topk(k, 1).indices
    expected = sum(noisy.softmax(1)[:, e].mean() * (chosen == e).sum() / (T * k) for e in range(E)) * E
    torch.testing.assert_close(losses.switch(routing), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_load_importance_and_tutel(k):
    routing, clean, noisy, _ = routed(k)
    threshold = noisy.topk(k, 1).values[:, -1:]
    importance = clean.softmax(1).sum(0)

    def mean_squared_variation(load, correction):
        return sum(v.var(correction=correction) / v.mean() ** 2 for v in (importance, load)) / 2

    def cdf(z):
        return 0.5 * torch.erfc(-z / math.sqrt(2))

    vmoe = mean_squared_variation(cdf((clean - threshold) / 0.3).sum(0), 0)
    tutel = mean_squared_variation(cdf((clean.softmax(1) - threshold) / 0.3).sum(0), 1)
    torch.testing.assert_close(losses.load_importance(routing), vmoe)
    torch.testing.assert_close(losses.tutel(routing), tutel)


def test_z_loss():
    routing, clean, _, _ = routed()
    torch.testing.assert_close(losses.z_loss(routing), clean.logsumexp(1).square().mean())


@pytest.mark.parametrize("name", losses.BALANCE_LOSSES)
def test_losses_are_differentiable_and_larger_when_one_expert_takes_all(name):
    routing, _, _, weight = routed(k=1)
    loss = losses.BALANCE_LOSSES[name](routing)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0
    x = torch.randn(T, D).abs()
    biased = torch.zeros(E, D)
    biased[2] = 3
    collapsed = route_linear(x, biased, top_k=1, noise_std=0.3, seed=SEED)
    assert losses.BALANCE_LOSSES[name](collapsed) > 1.5 * loss


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ["gshard", "switch"])
def test_perfect_balance_costs_one(name, k):
    # Every expert is the best of a fifth of the tokens, by a margin that makes the probabilities nearly one-hot.
    x = torch.eye(E).repeat(8, 1) * 200
    weight = torch.eye(E) + 0.4 * torch.eye(E).roll(1, 0)
    assert losses.BALANCE_LOSSES[name](route_linear(x, weight, top_k=k)).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", [*losses.BALANCE_LOSSES, "z"])
def test_no_tokens_cost_nothing(name):
    routing, _, _, weight = routed(T=0)
    loss = losses.z_loss(routing) if name == "z" else losses.BALANCE_LOSSES[name](routing)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad == 0).all()
