"""Every Ω is its formula, written out by hand in float64; the source stays as it was; bad input is told."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy_regularized import LAYERS, Net, images, maps, net, set_weights, trained

from moe_kernels.models.transfer.architectures import find_stages
from moe_kernels.models.transfer.regularizers import DELTA, AttentionTransfer, KnowledgeDistillation

FEATURES = (KnowledgeDistillation, DELTA, AttentionTransfer)


def compared(kind, model, x, **options):
    """A bound regularizer, the student's features and those of the source."""
    source = copy.deepcopy(model).eval()
    regularizer = kind(0.1, layers=LAYERS, **options).bind(model)
    trained(model)
    model(x)
    return regularizer, maps(model, x), maps(source, x)


def test_knowledge_distillation_is_equation_3():
    model, x = net(), images()
    regularizer, ours, theirs = compared(KnowledgeDistillation, model, x)
    expected = 0
    for name in LAYERS:
        for image in range(3):
            for channel in range(ours[name].shape[1]):
                expected += (ours[name][image, channel] - theirs[name][image, channel]).norm() ** 2 / 3
    penalty = regularizer.penalty()
    torch.testing.assert_close(penalty, expected)
    assert penalty.shape == ()
    assert regularizer.uses_features
    assert regularizer.anchors() == {}
    assert regularizer.decay() == {"fc.weight": 0.01, "fc.bias": 0.01}
    expected = torch.autograd.grad(expected, model.conv1.weight, retain_graph=True)[0]
    assert expected.norm() > 0
    torch.testing.assert_close(torch.autograd.grad(penalty, model.conv1.weight)[0], expected)


def test_a_frozen_head_does_not_decay():
    model = net()
    model.fc.bias.requires_grad_(False)
    assert KnowledgeDistillation(0.1, layers=LAYERS, head_decay=0.2).bind(model).decay() == {"fc.weight": 0.2}


def test_delta_is_its_formula():
    model, x = net(), images()
    regularizer, ours, theirs = compared(DELTA, model, x)
    weights = {"conv1": torch.tensor([0.1, 0.2, 0.3, 0.4]), "conv2": torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])}
    assert regularizer.needs_estimate
    regularizer.load_state_dict({"weights": weights})
    assert not regularizer.needs_estimate
    expected = 0
    for name in LAYERS:
        _, channels, height, width = ours[name].shape
        for image in range(3):
            for channel in range(channels):
                distance = (ours[name][image, channel] - theirs[name][image, channel]).norm() ** 2
                expected += channels * weights[name][channel].double() * distance / (height * width) / 3
    torch.testing.assert_close(regularizer.penalty(), expected)


def test_delta_with_equal_weights_is_the_distance_per_position():
    model, x = net(), images()
    regularizer, ours, theirs = compared(DELTA, model, x)
    regularizer.load_state_dict({"weights": {"conv1": torch.full((4,), 0.25), "conv2": torch.full((5,), 0.2)}})
    expected = sum(
        (ours[name] - theirs[name]).square().sum() / 3 / positions for name, positions in (("conv1", 30), ("conv2", 12))
    )
    torch.testing.assert_close(regularizer.penalty(), expected)


def test_attention_transfer_is_its_formula():
    model, x = net(), images()
    regularizer, ours, theirs = compared(AttentionTransfer, model, x)
    expected = 0
    for name in LAYERS:
        for image in range(3):
            first = sum(ours[name][image, channel].flatten() ** 2 for channel in range(ours[name].shape[1]))
            second = sum(theirs[name][image, channel].flatten() ** 2 for channel in range(ours[name].shape[1]))
            expected += (first / first.norm() - second / second.norm()).norm() ** 2 / 3
    torch.testing.assert_close(regularizer.penalty(), expected)


@pytest.mark.parametrize("kind", FEATURES)
def test_gradients_of_penalties(kind):
    model, x = net(), images(2)
    regularizer = set_weights(kind(1.0, layers=LAYERS).bind(model), model)
    trained(model).eval()

    def penalty(weight, bias):
        torch.func.functional_call(model, {"conv1.weight": weight, "conv2.bias": bias}, (x,))
        return regularizer.penalty()

    point = [model.conv1.weight.detach(), model.conv2.bias.detach()]
    assert torch.autograd.gradcheck(penalty, [value.clone().requires_grad_() for value in point])


@pytest.mark.parametrize("kind", FEATURES)
def test_it_is_zero_at_the_source_and_not_beyond(kind):
    model, x = net(), images()
    regularizer = set_weights(kind(1.0, layers=LAYERS).bind(model), model)
    model.eval()
    model(x)
    assert regularizer.penalty() == 0
    trained(model).eval()
    model(x)
    assert regularizer.penalty() > 0


@pytest.mark.parametrize("kind", FEATURES)
def test_tokens_have_their_channels_last(kind):
    """(B, N, D) tokens give what (B, D, N, 1) maps give."""

    class Tokens(nn.Module):
        def __init__(self, as_map):
            super().__init__()
            self.mix = nn.Conv2d(3, 4, 1) if as_map else nn.Linear(3, 4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.mix(x)
            return self.fc(x.mean((2, 3)) if x.ndim == 4 else x.mean(1))

    x, penalties = torch.randn(2, 6, 3), []
    tokens, image = Tokens(False), Tokens(True)
    image.load_state_dict(
        {name: value.view(image.state_dict()[name].shape) for name, value in tokens.state_dict().items()}
    )
    for model, inputs in ((tokens, x), (image, x.mT[..., None])):
        regularizer = kind(1.0, layers=["mix"]).bind(model)
        if kind is DELTA:
            regularizer.load_state_dict({"weights": {"mix": torch.tensor([0.1, 0.2, 0.3, 0.4])}})
        with torch.no_grad():
            model.mix.weight[0] += 1
            model.mix.weight[2] -= 1
        model(inputs)
        penalties.append(regularizer.penalty())
    assert penalties[0] > 0
    torch.testing.assert_close(*penalties)


def test_the_source_is_frozen_in_eval_mode():
    model, x = net(), images()
    regularizer = KnowledgeDistillation(0.1, layers=LAYERS).bind(model)
    teacher = regularizer._compared.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert before.keys() == model.state_dict().keys()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model.train()
        (model(x).square().mean() + regularizer.penalty()).backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert not torch.equal(value, model.state_dict()[name]) or name == "norm.weight", name
    assert model.norm.num_batches_tracked == 2  # the student's own forwards, no more


def test_no_gradient_goes_through_the_source():
    model, x = net(), images().requires_grad_()
    regularizer, ours, theirs = compared(KnowledgeDistillation, model, x, head="fc")
    expected = sum((ours[name] - theirs[name].detach()).square().sum() / 3 for name in LAYERS)
    got, expected = (torch.autograd.grad(value, x)[0] for value in (regularizer.penalty(), expected))
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected)


def test_a_source_that_is_another_model():
    model, source, x = net(classes=3), net(classes=9).train(), images()
    regularizer = KnowledgeDistillation(0.1, layers=["conv1"]).bind(model, source)
    model(x)
    expected = (model.conv1(x) - source.conv1(x)).square().sum() / 3
    torch.testing.assert_close(regularizer.penalty(), expected)
    assert source.training
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_hooks_are_removed_and_binding_again_starts_anew():
    model, x = net(), images()
    with KnowledgeDistillation(0.1, layers=LAYERS) as regularizer:
        regularizer.bind(model)
        regularizer.bind(model)
        assert len(model.conv1._forward_hooks) == 1
        model(x)
        regularizer.penalty()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match=r"know-dist: bind\(model\) comes first"):
        regularizer.penalty()


def test_two_regularizers_on_one_model():
    model, x = net(), images()
    first = KnowledgeDistillation(0.1, layers=LAYERS).bind(model)
    trained(model)
    second = AttentionTransfer(0.1, layers=LAYERS).bind(model)  # its source is a copy of a model that has hooks
    model.eval()
    model(x)
    assert second.penalty() == 0
    assert first.penalty() > 0


def vgg():
    """torchvision's, without the 120 million weights of its classifier."""
    model = torchvision.models.vgg11(init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(512, 3))
    return model


MODELS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=3), 64),
    "torchvision vgg11": (vgg, 32),
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=3), 64),
    "timm deit": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3), 32),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("name", MODELS)
def test_default_layers_of_known_models(name, kind):
    make, size = MODELS[name]
    model = make()
    regularizer = set_weights(kind(0.1).bind(model), model)
    stages = find_stages(model)
    assert regularizer.layers == tuple(stage.output if kind is AttentionTransfer else stage.kernel for stage in stages)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 2]))
        optimizer.zero_grad()
        (loss + 1e-3 * regularizer.penalty()).backward()
        optimizer.step()
    model(torch.randn(2, 3, size, size))
    penalty = regularizer.penalty()
    assert penalty.dtype is torch.float32
    assert 0 < penalty < math.inf
    optimizer.zero_grad()
    penalty.backward()
    head = {name: model.get_parameter(name) for name in regularizer.head}
    assert len(head) == 2
    for parameter_name, parameter in head.items():
        assert parameter.grad is None or not parameter.grad.any(), parameter_name
    first = next(iter(model.parameters()))
    assert first.grad.norm() > 0


def test_a_transformers_model_called_by_keyword():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    regularizer = KnowledgeDistillation(0.1).bind(model)
    assert regularizer.head == ("classifier.weight", "classifier.bias")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model(pixel_values=torch.randn(2, 3, 32, 32))
    assert regularizer.penalty() > 0


# surroundings


@pytest.mark.parametrize("kind", FEATURES)
def test_under_autocast_the_distance_is_float32_and_the_source_runs_alike(kind):
    model, x = net().float(), images().float()
    regularizer = set_weights(kind(0.1, layers=LAYERS).bind(model), model)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        inside = regularizer.penalty()
        model(x)
    outside = regularizer.penalty()  # under the autocast of the forward, wherever it is called
    for penalty in (inside, outside):
        assert penalty.dtype is torch.float32
        assert penalty == 0  # a source in float32 would differ by the rounding of bfloat16
    trained(model).eval()
    model(x)
    full = regularizer.penalty().item()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        half = regularizer.penalty()
        model(x)
    assert torch.equal(regularizer.penalty(), half)
    half.backward()
    assert half.item() == pytest.approx(full, rel=0.1)
    assert half.item() != full
    assert model.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", FEATURES)
def test_channels_last_gives_the_same(kind):
    model, x = net(), images()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    weights, penalties = None, []
    for student, inputs in ((model, x), (last, x.contiguous(memory_format=torch.channels_last))):
        regularizer = set_weights(kind(0.1, layers=LAYERS).bind(student), student)
        if kind is DELTA:
            weights = weights or regularizer.state_dict()
            regularizer.load_state_dict(weights)
        if student is model:
            trained(model)
        student.load_state_dict(model.state_dict())
        student.eval()(inputs)
        penalties.append(regularizer.penalty())
    torch.testing.assert_close(*penalties)
    assert penalties[0] > 0


def test_activation_checkpointing_changes_no_gradient():
    class Checkpointed(Net):
        reentrant = False

        def forward(self, x):
            x = checkpoint(lambda x: self.norm(self.conv1(x)).relu(), x, use_reentrant=self.reentrant)
            return self.fc(self.conv2(x).mean((2, 3)))

    model, x, results = net(), images().requires_grad_(), []
    checkpointed = Checkpointed().double()
    checkpointed.load_state_dict(model.state_dict())
    for student in (model, checkpointed):
        regularizer = KnowledgeDistillation(0.1, layers=LAYERS).bind(student)
        torch.manual_seed(1)
        trained(student).eval()
        loss = student(x).square().mean()
        penalty = regularizer.penalty()
        gradients = [
            torch.autograd.grad(value, student.conv1.weight, retain_graph=True)[0] for value in (loss, penalty)
        ]
        results.append([penalty, *gradients])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    checkpointed.reentrant = True
    checkpointed(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        regularizer.penalty()


class NoReading(TorchDispatchMode):
    """Refuses what would wait for a GPU: a tensor's value on the host."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", FEATURES)
def test_no_value_is_read_on_the_host(kind):
    model = net()
    regularizer = set_weights(kind(0.1, layers=LAYERS).bind(model), model)
    with NoReading():
        model(images())
        regularizer.penalty().backward()
        with pytest.raises(AssertionError):
            model.conv1.weight.grad.sum().item()


def test_a_compiled_model_gives_the_same():
    torch._dynamo.reset()
    model, x, results = net(), images(), []
    regularizer = KnowledgeDistillation(0.1, layers=LAYERS).bind(model)
    trained(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for forward in (model, compiled, compiled):
        forward(x)
        penalty = regularizer.penalty()
        results.append([penalty, *torch.autograd.grad(penalty, model.conv1.weight)])
    for expected, *got in zip(*results, strict=True):
        for value in got:
            torch.testing.assert_close(value, expected)
    assert KnowledgeDistillation(0.1, layers=LAYERS).bind(compiled).head == ("fc.weight", "fc.bias")


@pytest.mark.parametrize("kind", FEATURES)
def test_layers_that_do_not_fit(kind):
    with pytest.raises(TypeError, match="layers: expected a sequence of module names, got the string 'conv1'"):
        kind(0.1, layers="conv1")
    with pytest.raises(ValueError, match="layers: Net has no module 'conv3'; near it: conv"):
        kind(0.1, layers=["conv3"]).bind(net())
    with pytest.raises(ValueError, match="layers: none are known for Net; pass their names"):
        kind(0.1).bind(net())
    source = net()
    source.stem = source.conv1
    del source.conv1
    with pytest.raises(ValueError, match="layers of the source: Net has no module 'conv1'"):
        kind(0.1, layers=["conv1"], head="fc").bind(net(), source)
    message = (
        r"layers: conv1 has parameters of shapes \[\(4, 2, 3, 3\), \(4,\)\], in the source \[\(6, 2, 3, 3\), \(6,\)\]"
    )
    with pytest.raises(ValueError, match=message):
        kind(0.1, layers=["conv1"], head="fc").bind(net(), net(width=6))


def test_features_that_do_not_fit():
    strided = net()
    strided.conv1.stride = (2, 2)
    model = net()
    regularizer = KnowledgeDistillation(0.1, layers=["conv1"]).bind(model, strided)
    model(images())
    with pytest.raises(
        ValueError, match=r"features of conv1 have shape \(3, 4, 5, 6\), those of the source \(3, 4, 3, 3\)"
    ):
        regularizer.penalty()
    regularizer = AttentionTransfer(0.1, layers=["fc"], head=()).bind(model)
    model(images())
    with pytest.raises(ValueError, match=r"features of fc have shape \(3, 3\), without positions"):
        regularizer.penalty()
    with pytest.raises(RuntimeError, match="no forward of Net that keeps gradients"):
        regularizer.penalty()


@pytest.mark.parametrize("kind", FEATURES)
def test_a_source_with_other_stages_is_refused(kind):
    """layer1.0.conv2 is the last of a stage in one, and not in the other."""
    small, deep = timm.create_model("resnet10t", num_classes=3), timm.create_model("resnet18", num_classes=3)
    ours, theirs = "layer1.0.conv2, .*", "layer1.1.conv2, .*"
    if kind is AttentionTransfer:  # its layers are the stages themselves
        del deep.layer4
        ours, theirs = "layer1, layer2, layer3, layer4", "layer1, layer2, layer3"
    with pytest.raises(ValueError, match=f"by default those of ResNet are {ours}, those of the source {theirs}; pass"):
        kind(0.1).bind(small, deep)
    named = kind(0.1, layers=["layer1.0.conv2"]).bind(small, deep)
    assert named.layers == ("layer1.0.conv2",)


@pytest.mark.parametrize("kind", FEATURES)
def test_a_frozen_backbone_is_refused(kind):
    model = net().requires_grad_(False)
    model.fc.requires_grad_(True)
    with pytest.raises(ValueError, match="model: Net has no trainable parameters outside the head"):
        kind(0.1, layers=LAYERS).bind(model)
