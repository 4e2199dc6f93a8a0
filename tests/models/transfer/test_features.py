"""Collected features are the tensors that the layers gave, of one forward, and nothing of it stays behind."""

import copy
import pickle

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_kernels.models.transfer.features import Features


class Net(nn.Module):
    """A layer, a block that may be checkpointed, and a head."""

    def __init__(self, checkpointing=None):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)
        self.spare = nn.Linear(5, 3)
        self.checkpointing = checkpointing

    def forward(self, x, scale=1.0):
        x = self.stem(x) * scale
        if self.checkpointing is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_inputs_and_gradients():
    model, x = Net(), torch.randn(2, 4)
    features = Features(model, ["block.0", "stem"])
    model(x, scale=3.0)
    args, kwargs, outputs, autocast = features.take()
    assert args[0] is x
    assert kwargs == {"scale": 3.0}
    assert autocast is None
    assert torch.equal(outputs["stem"], model.stem(x))
    assert torch.equal(outputs["block.0"], model.block[0](model.stem(x) * 3))
    outputs["block.0"].sum().backward()
    assert model.stem.weight.grad is not None
    assert model.head.weight.grad is None


def test_it_is_the_last_forward_and_is_given_once():
    model = Net()
    features = Features(model, ["stem"])
    with pytest.raises(RuntimeError, match="no forward of Net that keeps gradients since"):
        features.take()
    model(torch.zeros(2, 4))
    x = torch.randn(3, 4)
    model(x)
    with torch.no_grad():
        model(torch.zeros(5, 4))
    model.stem(torch.zeros(7, 4))  # not in a forward of the model
    assert torch.equal(features.take().outputs["stem"], model.stem(x))
    with pytest.raises(RuntimeError, match="no forward of Net that keeps gradients since"):
        features.take()


def test_forwards_without_gradients_where_they_are_asked_for():
    model, x = Net(), torch.randn(2, 4)
    features = Features(model, ["stem"], needs_grad=False)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            model(x)
        assert torch.equal(features.take().outputs["stem"], model.stem(x))


def test_hooks_are_removed():
    model = Net()
    features = Features(model, ["stem", "head"])
    assert hooks(model) == 4
    model(torch.zeros(2, 4))
    features.close()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="no forward"):
        features.take()
    with pytest.raises(KeyError), Features(model, ["stem"]):
        raise KeyError
    assert hooks(model) == 0


def test_a_forward_that_fails_leaves_nothing_wrong():
    model, x = Net(), torch.randn(2, 4)
    features = Features(model, ["head"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 7))
    with pytest.raises(RuntimeError, match="'head' was called 0 times"):
        features.take()
    model(x)
    assert features.take().outputs["head"].shape == (2, 3)


def test_copies_and_pickles_of_the_model_are_not_hooked():
    model, x = Net(), torch.randn(2, 4)
    features = Features(model, ["stem"])
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.zeros(7, 4))
    assert features.take().outputs["stem"].shape == (2, 5)


def test_what_a_layer_gives_survives_a_successor_that_works_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    expected, output = model[0](x).detach(), model(x)
    features = Features(model, ["0"])
    assert torch.equal(model(x), output)
    assert expected.min() < 0
    assert torch.equal(features.take().outputs["0"], expected)

    class InPlace(Net):
        def forward(self, x):
            return self.head(self.stem(x).relu_())

    model = InPlace()
    features = Features(model, ["stem"])
    model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="'stem': its output was changed in place later in the forward"):
        features.take()
    torch._dynamo.reset()
    x = torch.randn(2, 4)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(features.take().outputs["stem"], model.stem(x))


def test_layers_that_give_no_single_tensor():
    class Odd(Net):
        def forward(self, x):
            x = self.stem(x)
            return self.head(x) + self.head(x)

    model = Odd()
    for layer, calls in (("head", 2), ("spare", 0)):
        features = Features(model, [layer])
        model(torch.zeros(2, 4))
        with pytest.raises(RuntimeError, match=f"'{layer}' was called {calls} times in one forward, expected once"):
            features.take()
    model = nn.Sequential(nn.LSTM(4, 3))
    features = Features(model, ["0"])
    model(torch.zeros(2, 5, 4))
    with pytest.raises(TypeError, match="layer '0': expected a tensor as its output, got tuple"):
        features.take()


def gradients(model, x, layers, twice):
    """Of the outputs and the features, in one backward or in two."""
    model.zero_grad()
    with Features(model, layers) as features:
        loss = model(x).square().sum()
        penalty = sum(output.square().sum() for output in features.take().outputs.values())
        if twice:
            loss.backward(retain_graph=True)
            penalty.backward()
        else:
            (loss + penalty).backward()
        with pytest.raises(RuntimeError, match="no forward"):  # what was computed again is not collected
            features.take()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("twice", [False, True])
def test_activation_checkpointing(twice):
    x, layers = torch.randn(2, 4), ["stem", "block.0", "block.2"]
    plain = Net()
    model = Net("not reentrant")
    model.load_state_dict(plain.state_dict())
    for got, expected in zip(gradients(model, x, layers, twice), gradients(plain, x, layers, twice), strict=True):
        assert torch.equal(got, expected)


def test_reentrant_activation_checkpointing_is_refused():
    model = Net("reentrant")
    features = Features(model, ["block.0"])
    model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match=r"'block.0' was run without gradients.*use_reentrant=False"):
        features.take()


def test_a_compiled_model():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    expected = model[0](x)
    features = Features(model, ["0"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x)
        output = features.take().outputs["0"]
        torch.testing.assert_close(output, expected)
        assert output.min() < 0
        (grad,) = torch.autograd.grad(output.sum(), model[0].bias)
        assert grad.tolist() == [8.0] * 4  # 2 images of 2 × 2 positions
    compiled(x)
    with torch.no_grad():
        compiled(torch.zeros_like(x))
    torch.testing.assert_close(features.take().outputs["0"], expected)


def distributed(rank, folder):
    model, x = Net(), torch.randn(2, 4)
    del model.spare
    wrapped = nn.parallel.DistributedDataParallel(model)
    for bound in (model, wrapped):
        with Features(bound, ["stem"]) as features:
            wrapped(x)
            assert torch.equal(features.take().outputs["stem"], model.stem(x))


def test_a_distributed_model(tmp_path):
    on_ranks(1, tmp_path, (distributed, ()))


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"layers: Net has no module 'blocks.1'; near it: block"):
        Features(Net(), ["blocks.1"])
    with pytest.raises(TypeError, match="got the string 'stem'"):
        Features(Net(), "stem")
