"""What an optimizer keeps: anchors, states, copies, and what it refuses to load."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD

OPTIMIZERS = {
    "sgd": (AnchoredSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (AnchoredSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adamw": (AnchoredAdamW, torch.optim.AdamW, {"lr": 0.1}),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    return OPTIMIZERS[request.param]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def anchors_of(model, dtype=None):
    return {name: parameter.detach().to(dtype or parameter.dtype) - 1 for name, parameter in model.named_parameters()}


def made(kind, model, anchor=None, **kwargs):
    ours, _, options = kind
    anchor = anchors_of(model) if anchor is None else anchor
    return ours(model.named_parameters(), anchor=anchor, coefficient=0.3, **(options | kwargs))


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def saved(state):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(model, other):
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name


def test_anchors_are_copies_that_never_change(kind):
    model = network()
    live = dict(model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in live.items()}
    optimizer = made(kind, model, anchor=live)
    train(model, optimizer, range(3))
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, range(3, 5))
    for each in (optimizer, copy.deepcopy(optimizer)):
        anchors = [each.state[parameter]["anchor"] for group in each.param_groups for parameter in group["params"]]
        for anchor, (name, original) in zip(anchors, start.items(), strict=True):
            assert torch.equal(anchor, original), name
            assert not torch.equal(live[name], original), name
            assert not anchor.requires_grad


def test_a_resumed_run_has_the_same_bits(kind):
    model = network()
    anchor = anchors_of(model)
    optimizer = made(kind, model, anchor)
    train(model, optimizer, range(3))
    state, weights = saved(optimizer.state_dict()), saved(model.state_dict())
    train(model, optimizer, range(3, 6))

    other = network()
    other.load_state_dict(weights)
    resumed = made(kind, other, anchor)
    resumed.load_state_dict(state)
    train(other, resumed, range(3, 6))
    assert_same(model, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_go_on_alike_and_apart(kind, how):
    model = network()
    optimizer = made(kind, model, scope="tensor")
    train(model, optimizer, range(3))
    other, twin = how((model, optimizer))
    assert twin.facts().steps.tolist() == [3] * 4
    train(model, optimizer, range(3, 6))
    assert not torch.equal(model[0].weight, other[0].weight)
    train(other, twin, range(3, 6))
    assert_same(model, other)


def test_an_anchor_keeps_its_dtype(kind):
    """torch casts a loaded state to the dtype of the parameter."""
    model = network(torch.bfloat16)
    anchor = anchors_of(model, torch.float32)
    optimizer = made(kind, model, anchor)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    kept = optimizer.state[model[0].weight]
    assert kept["anchor"].dtype == torch.float32
    assert torch.equal(kept["anchor"], anchor["0.weight"])
    assert all(value.dtype == torch.bfloat16 for key, value in kept.items() if key not in ("anchor", "step"))
    train(model, optimizer, range(2, 4))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda anchor: anchor | {"2.bias": anchor["2.bias"] + 1}, r"2\.bias"),
        (
            lambda anchor: {name: tensor + 1 for name, tensor in anchor.items()},
            r"0\.weight, 0\.bias, 2\.weight, 2\.bias",
        ),
        (lambda anchor: anchor | {"0.bias": None}, r"0\.bias"),
        (lambda anchor: anchor | {"0.weight": anchor["0.weight"].double()}, r"0\.weight"),
    ],
    ids=["one", "all", "none", "dtype"],
)
def test_a_state_of_other_anchors_is_refused(kind, change, found):
    model = network()
    anchor = anchors_of(model)
    optimizer, other = made(kind, model, anchor), made(kind, model, change(anchor), lr=5.0)
    message = f"state_dict: expected the anchors of this optimizer, got others for {found}$"
    for mine, theirs in ((optimizer, other), (other, optimizer)):
        lr = mine.param_groups[0]["lr"]
        with pytest.raises(ValueError, match=message):
            mine.load_state_dict(saved(theirs.state_dict()))
        assert mine.param_groups[0]["lr"] == lr


def test_a_state_of_torchs_optimizer_is_taken(kind):
    """Its momentum goes on; anchors and options that it does not have stay as they are."""
    _, theirs, options = kind
    model = network()
    expected = theirs(model.parameters(), **options)
    train(model, expected, range(3))
    twin = copy.deepcopy(model)
    optimizer = made(kind, twin, rule="none", lr=5.0)
    anchors = anchors_of(twin)
    optimizer.param_groups[0]["coefficient"] = 0.25
    optimizer.load_state_dict(saved(expected.state_dict()))
    assert optimizer.param_groups[0]["lr"] == options["lr"]
    assert optimizer.param_groups[0]["coefficient"] == 0.25
    train(model, expected, range(3, 6))
    train(twin, optimizer, range(3, 6))
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()))
    for name, parameter in twin.named_parameters():
        assert torch.equal(optimizer.state[parameter]["anchor"], anchors[name])


def test_a_state_for_torchs_optimizer(kind):
    _, theirs, options = kind
    model = network()
    optimizer = made(kind, model, rule="none")
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    expected = theirs(twin.parameters(), **options)
    expected.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(twin, expected, range(3, 6))
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()))


def test_other_groups_are_refused_as_torch_does(kind):
    model = network()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}]
    optimizer = made(kind, model)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(kind[0](groups, coefficient=0.3, **kind[2]).state_dict())


def test_state_keys_are_torchs(kind):
    _, theirs, options = kind
    model = network()
    optimizer, expected = made(kind, model), theirs(model.parameters(), **options)
    train(model, expected, range(1))
    train(model, optimizer, range(1))
    for parameter in model.parameters():
        assert optimizer.state[parameter].keys() == expected.state[parameter].keys() | {"anchor"}
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 1, 2, 3]


def test_states_as_older_versions_of_torch_wrote_them():
    """Where the count of steps was a number, and no momentum was None."""
    model = network()
    optimizer = made(OPTIMIZERS["adamw"], model)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    state = saved(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    other = made(OPTIMIZERS["adamw"], twin, anchors_of(network()))
    other.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert_same(model, twin)

    model = network()
    optimizer = made(OPTIMIZERS["sgd"], model)
    twin, other = copy.deepcopy((model, optimizer))
    for entry in other.state.values():
        entry["momentum_buffer"] = None
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    assert_same(model, twin)


def test_a_state_of_amsgrad_is_refused():
    model = network()
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="state_dict: expected one without amsgrad"):
        made(OPTIMIZERS["adamw"], model).load_state_dict(amsgrad.state_dict())


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_distributed_checkpoint_of_no_anchors(momentum):
    model = network()
    weights = copy.deepcopy(model.state_dict())
    optimizer = AnchoredSGD(model.parameters(), lr=0.1, momentum=momentum, coefficient=0.3)
    found = get_optimizer_state_dict(model, optimizer)
    assert found["param_groups"][0]["lr"] == 0.1
    assert {tuple(state) for state in found["state"].values()} == {("momentum_buffer",) if momentum else ()}
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
