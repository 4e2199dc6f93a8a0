"""DELTA's weights of channels: what the loss grows by without each; states and batches that do not fit are told."""

import copy
import math

import pytest
import torch
from torch import nn
from toy_regularized import LAYERS, images, net, trained

from moe_kernels.models.transfer.regularizers import DELTA


def importance(model, batches, layer, channel):
    """How much the loss grows without one filter, by its weights, as the published code does it."""
    growth = []
    for x, labels in batches:
        whole = nn.functional.cross_entropy(model(x), labels)
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.get_submodule(layer).weight[channel] = 0
            without.get_submodule(layer).bias[channel] = 0
        growth.append(nn.functional.cross_entropy(without(x), labels) - whole)
    return sum(growth).item() / len(growth)


def labelled(count=2):
    return [(images(4), torch.tensor([0, 1, 2, 1])) for _ in range(count)]


def test_delta_weighs_channels_by_the_loss_without_them():
    model, batches, calls = net(), labelled(), []
    regularizer = DELTA(0.1, layers=LAYERS).bind(model)
    model.eval()(images())
    with pytest.raises(RuntimeError, match=r"delta: estimate\(model, batches, loss\)"):
        regularizer.penalty()
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    regularizer.estimate(model, iter(batches), nn.functional.cross_entropy, lambda *call: calls.append(call))
    assert calls == [(done, 20) for done in [*range(2, 11), *range(12, 21)]]
    assert model.training
    assert model.conv1.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.conv1._forward_hooks) == 1  # its own, for penalty()
    model.eval()
    for layer, channels in (("conv1", 4), ("conv2", 5)):
        growth = [importance(model, batches, layer, channel) for channel in range(channels)]
        mean = sum(growth) / channels
        deviation = math.sqrt(sum((value - mean) ** 2 for value in growth) / channels)
        scores = [math.exp((value - mean) / deviation / 5) for value in growth]
        expected = torch.tensor([score / sum(scores) for score in scores])
        torch.testing.assert_close(regularizer.state_dict()["weights"][layer], expected)
    model(images())
    assert regularizer.penalty() == 0


def test_channels_that_are_worth_the_same_weigh_the_same():
    model = net()
    nn.init.zeros_(model.fc.weight)
    regularizer = DELTA(0.1, layers=LAYERS).bind(model)
    regularizer.estimate(model, labelled(), nn.functional.cross_entropy)
    assert regularizer.state_dict()["weights"]["conv1"].tolist() == [0.25] * 4


def test_delta_goes_on_from_its_state_to_the_same_bits(tmp_path):
    model, x = net(), images()
    first = DELTA(0.1, layers=LAYERS).bind(copy.deepcopy(model))
    assert first.state_dict() == {}
    first.load_state_dict({})
    assert first.needs_estimate
    first.estimate(first._bound(), labelled(), nn.functional.cross_entropy)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = DELTA(0.1, layers=LAYERS).bind(model)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trained(model).eval()
    first._bound().load_state_dict(model.state_dict())
    first._bound().eval()
    penalties = []
    for regularizer in (first, second):
        regularizer._bound()(x)
        penalties.append(regularizer.penalty())
    assert penalties[0] > 0
    assert torch.equal(*penalties)
    assert all(
        torch.equal(value, second.state_dict()["weights"][name])
        for name, value in first.state_dict()["weights"].items()
    )


def test_states_and_batches_of_delta_that_do_not_fit():
    model = net()
    regularizer = DELTA(0.1, layers=LAYERS).bind(model)
    for state, got in (({"weights": {"conv1": torch.ones(4)}}, "conv1"), ({"a": 1}, "'a'")):
        with pytest.raises(ValueError, match=f"state: expected weights of conv1, conv2, got {got}"):
            regularizer.load_state_dict(state)
    regularizer.load_state_dict({"weights": {"conv1": torch.ones(4), "conv2": torch.ones(4)}})
    model(images())
    with pytest.raises(ValueError, match=r"weights of conv2 have shape \(4,\), its features 5 channels"):
        regularizer.penalty()
    with pytest.raises(ValueError, match="batches: expected at least one batch, got none"):
        regularizer.estimate(model, [], nn.functional.cross_entropy)
    model.eval()
    with pytest.raises(ValueError, match="loss: it is not finite"):
        regularizer.estimate(model, labelled(1), lambda outputs, labels: outputs.sum() * math.nan)
