"""What an optimizer keeps from step to step makes no difference to what a step does."""

import copy
import weakref

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD


def lose_gradient(model, optimizer):
    model[0].weight.grad = None


def lose_all_gradients(model, optimizer):
    optimizer.zero_grad()


def other_layout(model, optimizer):
    """As ``model.to(memory_format=...)`` does: the parameter is the same tensor, its memory is another."""
    model.to(memory_format=torch.channels_last)


def with_gaps(model, optimizer):
    for param in model.parameters():
        param.data = torch.stack((param.data, torch.full_like(param.data, torch.nan)), dim=-1)[..., 0]


def gradient_of_other_layout(model, optimizer):
    weight = model[0].weight
    weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)


def reset_state(model, optimizer):
    for state in optimizer.state.values():
        for key in [key for key in state if key not in ("anchor", "step")]:
            state[key] = torch.zeros_like(state[key])


def drop_state(model, optimizer):
    for state in optimizer.state.values():
        for key in [key for key in state if key != "anchor"]:
            del state[key]


def load_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_parameter(model, optimizer):
    """A parameter takes the place of another in its group, without an anchor."""
    old, new = model[2].bias, nn.Parameter(torch.ones(4))
    new.grad = old.grad
    model[2].bias = new
    params = optimizer.param_groups[0]["params"]
    params[[param is old for param in params].index(True)] = new
    del optimizer.state[old]


def more_parameters(model, optimizer):
    head = nn.Linear(4, 4)
    model.append(head)
    for param in head.parameters():
        nn.init.ones_(param)
        param.grad = torch.ones_like(param)
    optimizer.add_param_group({"params": head.parameters()})


def other_state(model, optimizer):
    """In which the tensor is the same whose strides are looked at."""
    for param, state in optimizer.state.items():
        fresh = {key: torch.zeros_like(value) for key, value in state.items() if key in ("step", "exp_avg_sq")}
        optimizer.state[param] = {**state, **fresh}


def group_of_another_hand(model, optimizer):
    """Not by ``add_param_group``."""
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [params.pop()]})


EVENTS = [
    other_state,
    group_of_another_hand,
    lose_gradient,
    lose_all_gradients,
    other_layout,
    with_gaps,
    gradient_of_other_layout,
    reset_state,
    drop_state,
    load_state,
    other_parameter,
    more_parameters,
]


def start(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    anchors = [torch.randn_like(param) for param in model.parameters()]
    if kind == "adamw":
        return model, AnchoredAdamW(model.parameters(), 0.1, anchor=anchors, coefficient=0.3)
    dampening = 0.5 if kind == "dampening" else 0.0
    return model, AnchoredSGD(model.parameters(), 0.1, 0.9, dampening, anchor=anchors, coefficient=0.3)


def step(model, optimizer, number, event=None):
    draw = torch.Generator().manual_seed(number)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=draw)
    if event:
        event(model, optimizer)
    optimizer.step()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("kind", ["sgd", "dampening", "adamw"])
def test_steps_are_those_of_an_optimizer_that_remembers_nothing(kind, event):
    """Which a copy does not: what is kept is no part of it."""
    model, optimizer = start(kind)
    for number in range(2):
        step(model, optimizer, number)
    other_model, other = copy.deepcopy((model, optimizer))
    for number, happens in enumerate([None, event, None, event, None], start=2):
        step(model, optimizer, number, happens)
        other_model, other = copy.deepcopy((other_model, other))
        step(other_model, other, number, happens)
        for found, expected in zip(model.parameters(), other_model.parameters(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_are_freed_after_a_step(kind):
    model, optimizer = start(kind)
    for number in range(2):
        step(model, optimizer, number)
        gradients = [weakref.ref(param.grad) for param in model.parameters()]
        optimizer.zero_grad()
        assert all(gradient() is None for gradient in gradients)
