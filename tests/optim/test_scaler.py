"""Gradient scaling: the scale changes nothing, and a step that would not be finite is left out and counted."""

import copy

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD

KINDS = {
    "sgd": lambda params, **kwargs: AnchoredSGD(params, lr=0.1, momentum=0.9, coefficient=0.3, **kwargs),
    "adamw": lambda params, **kwargs: AnchoredAdamW(params, lr=0.1, coefficient=0.3, **kwargs),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture(params=[{}, {"foreach": True}], ids=["kernels", "reference"])
def backend(request):
    return request.param


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def anchors_of(model):
    """Farther from zero, where the loss draws to."""
    return [2 * parameter.detach() for parameter in model.parameters()]


def groups_of(model, count):
    """One group or two: two are measured before the step."""
    parameters = list(model.parameters())
    return [{"params": part} for part in ((parameters,) if count == 1 else (parameters[:2], parameters[2:]))]


def train(model, optimizer, scaler, *, unscale=False, broken=()):
    for step in range(4):
        torch.manual_seed(10 + step)
        loss = model(torch.randn(5, 4)).square().sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step in broken:
            next(model.parameters()).grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("unscale", [False, True], ids=["in_the_step", "before"])
def test_the_scale_does_not_matter(make, backend, groups, unscale):
    ends = []
    for scale in (None, 1.0, 65536.0):
        model = network()
        optimizer = make(groups_of(model, groups), anchor=anchors_of(model), **backend)
        train(model, optimizer, torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None), unscale=unscale)
        ends.append([parameter.detach() for parameter in model.parameters()] + [p.grad for p in model.parameters()])
        assert optimizer.facts().conflicts > 0
        assert not hasattr(optimizer, "grad_scale")
    for plain, one, large in zip(*ends, strict=True):
        assert torch.equal(plain, one)
        assert torch.equal(one, large)  # a power of two: not even rounding differs


def test_regularizer_grads_are_scaled_as_the_gradients(make, backend):
    ends = []
    for scale in (1.0, 1024.0):
        model = network()
        optimizer = make(model.parameters(), **backend)
        scaler = torch.amp.GradScaler("cpu", scale)
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(5, 4)
            penalty = scaler.scale((model(x) - 1).square().sum())
            r = torch.autograd.grad(penalty, list(model.parameters()))
            optimizer.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer, regularizer_grads=r)
            scaler.update()
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("unscale", [False, True], ids=["in_the_step", "before"])
def test_a_gradient_that_is_not_finite_skips_the_step(make, backend, groups, unscale):
    model = network()
    optimizer = make(groups_of(model, groups), anchor=anchors_of(model), **backend)
    scaler = torch.amp.GradScaler("cpu", 2.0)
    train(model, optimizer, scaler)
    state, weights = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(model.state_dict())
    train(model, optimizer, scaler, unscale=unscale, broken=range(4))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert optimizer.facts().skipped.tolist() == [4]
    assert optimizer.facts().steps.tolist() == [4]
    train(model, optimizer, scaler)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert optimizer.facts().steps.tolist() == [8]


def test_without_a_scaler_what_is_not_finite_goes_through(make, backend):
    """As in torch; but the anchors stay what they were."""
    model = network()
    anchors = anchors_of(model)
    optimizer = make(model.parameters(), anchor=anchors, **backend)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    for parameter, anchor in zip(model.parameters(), anchors, strict=True):
        assert parameter.isnan().all()
        assert torch.equal(optimizer.state[parameter]["anchor"], anchor)


def test_a_first_step_that_is_skipped_is_still_to_come(backend):
    """With dampening it is another than those after it."""
    ends = []
    for ours in (True, False):
        model = network()
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
        if ours:
            anchors = anchors_of(model)
            optimizer = AnchoredSGD(model.parameters(), anchor=anchors, coefficient=0.0, **options, **backend)
        else:
            optimizer = torch.optim.SGD(model.parameters(), **options)
        train(model, optimizer, torch.amp.GradScaler("cpu", 4.0), broken=[0, 1])
        ends.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*ends)
