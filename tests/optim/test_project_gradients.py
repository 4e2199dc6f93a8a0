"""The projection by itself, after two backwards."""

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredSGD, project_gradients_


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def two_gradients(model, x):
    """Of a loss, in .grad, and of a penalty on features that does not reach the head."""
    features = model[1](model[0](x))
    penalty = (features - 1).square().sum()
    r = torch.autograd.grad(penalty, list(model.parameters()), retain_graph=True, allow_unused=True)
    (features.sum() + model[2](features).square().sum()).backward()
    return r


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_two_backwards_of_one_forward():
    model = network()
    given = two_gradients(model, torch.randn(5, 4))
    assert given[2] is None
    g = flat([parameter.grad for parameter in model.parameters()])
    r = flat([torch.zeros_like(p) if part is None else part for p, part in zip(model.parameters(), given, strict=True)])
    assert g @ r < 0
    facts = project_gradients_(model.parameters(), given, coefficient=0.5)
    d = flat([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(d, (1 - 0.5 * (g @ r) / (g @ g)) * g + 0.5 * r)
    assert facts.conflicts.tolist() == [1]
    torch.testing.assert_close(facts.cosine.item(), (g @ r / (g.norm() * r.norm())).item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", ["none", "l2sp", "dtnh", "pcgrad", "agem", "digrap", "gradvac"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_it_is_the_step_of_the_optimizer(rule, scope):
    options = {"coefficient": 0.5, "rule": rule, "scope": scope, "omega": 0.5, "target_cosine": 0.2}
    x = torch.randn(5, 4)
    fused, apart = network(), network()
    optimizer = AnchoredSGD(fused.parameters(), lr=0.1, **options, measure=True)
    optimizer.step(regularizer_grads=two_gradients(fused, x))
    facts = project_gradients_(apart.parameters(), two_gradients(apart, x), **options)
    torch.optim.SGD(apart.parameters(), lr=0.1).step()
    torch.testing.assert_close(list(apart.parameters()), list(fused.parameters()))
    for name, fact in optimizer.facts()._asdict().items():
        torch.testing.assert_close(getattr(facts, name), fact, equal_nan=True, msg=name)


def test_two_accumulators():
    """Micro-batches: both gradients are summed, then projected once."""
    x = torch.randn(6, 4)
    whole, parts = network(), network()
    project_gradients_(whole.parameters(), two_gradients(whole, x), coefficient=0.5)
    sums = [torch.zeros_like(parameter) for parameter in parts.parameters()]
    for part in x.chunk(3):
        for total, r in zip(sums, two_gradients(parts, part), strict=True):
            if r is not None:
                total += r
    project_gradients_(parts.parameters(), sums, coefficient=0.5)
    torch.testing.assert_close(
        [parameter.grad for parameter in parts.parameters()],
        [parameter.grad for parameter in whole.parameters()],
    )


def test_parameters_without_a_gradient_and_none_at_all():
    model = network()
    r = two_gradients(model, torch.randn(5, 4))
    model[0].weight.grad = None
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    project_gradients_(model.parameters(), r, coefficient=0.0, rule="l2sp")
    assert model[0].weight.grad is None
    assert all(p.grad is g or torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert project_gradients_([], [], coefficient=0.5).steps.tolist() == [0]
