"""Heads and layers are found in the models that people use; where they are not, the message says what there is."""

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
import torchvision
from torch import nn

from moe_kernels.models import gmoe
from moe_kernels.models.transfer.architectures import (
    Stage,
    check_layers,
    find_head,
    find_stages,
    head_parameters,
    unwrap,
)


def timm_deit(**options):
    return timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=5, **options)


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=5, num_heads=2, hidden_dim=32, mlp_dim=48, num_classes=5
    )


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


RESNET = ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"]
VGG = ["features.0", "features.3", "features.8", "features.13", "features.18"]

# model, the modules of its head, its kernels, the outputs of its stages
MODELS = {
    "torchvision resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        ["fc"],
        RESNET,
        ["layer1", "layer2", "layer3", "layer4"],
    ),
    "timm resnet18": (
        lambda: timm.create_model("resnet18", num_classes=5),
        ["fc"],
        RESNET,
        ["layer1", "layer2", "layer3", "layer4"],
    ),
    "timm resnet26 (bottlenecks)": (
        lambda: timm.create_model("resnet26", num_classes=5),
        ["fc"],
        ["layer1.1.conv3", "layer2.1.conv3", "layer3.1.conv3", "layer4.1.conv3"],
        ["layer1", "layer2", "layer3", "layer4"],
    ),
    "torchvision vgg11": (
        lambda: torchvision.models.vgg11(num_classes=5, init_weights=False),
        ["classifier.6"],
        VGG,
        ["features.2", "features.5", "features.10", "features.15", "features.20"],
    ),
    "timm deit": (
        timm_deit,
        ["head"],
        [f"blocks.{i}.mlp.fc2" for i in (2, 5, 8, 11)],
        [f"blocks.{i}" for i in (2, 5, 8, 11)],
    ),
    "torchvision vit of 5 blocks": (
        torchvision_vit,
        ["heads.head"],
        [f"encoder.layers.encoder_layer_{i}.mlp.3" for i in (1, 2, 3, 4)],
        [f"encoder.layers.encoder_layer_{i}" for i in (1, 2, 3, 4)],
    ),
    "transformers vit": (
        transformers_vit,
        ["classifier"],
        [f"vit.layers.{i}.mlp.fc2" for i in (1, 3, 5, 7)],
        [f"vit.layers.{i}" for i in (1, 3, 5, 7)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_stages_are_found(name):
    make, heads, kernels, outputs = MODELS[name]
    with torch.device("meta"):
        model = make()
    assert find_head(model) == tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))
    stages = find_stages(model)
    if name == "transformers vit":  # older releases call the same layers otherwise
        assert len(stages) == 4
        assert [stage.output.rsplit(".", 1)[1] for stage in stages] == ["1", "3", "5", "7"]
        assert {model.get_submodule(stage.kernel).out_features for stage in stages} == {32}
    else:
        assert stages == tuple(map(Stage, outputs, kernels))


def test_a_head_of_two_parts():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5)
    assert find_head(model) == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def test_a_head_that_is_a_convolution():
    model = torchvision.models.squeezenet1_1(num_classes=5)
    assert find_head(model) == ("classifier.1.weight", "classifier.1.bias")


def test_shallow_models_have_fewer_stages():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
    model = timm_vit.VisionTransformer(**options, depth=3)
    assert [stage.output for stage in find_stages(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    model = nn.Module()
    model.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))
    assert find_stages(model) == (Stage("features.2", "features.0"),)


def test_a_mixture_of_experts_is_compared_at_the_output_of_its_block():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    model = gmoe.convert(timm_vit.VisionTransformer(**options), [2], num_experts=2, top_k=2, renormalize=True)
    assert [stage.kernel for stage in find_stages(model)] == [
        "blocks.0.mlp.fc2",
        "blocks.1.mlp.fc2",
        "blocks.2",
        "blocks.3.mlp.fc2",
    ]


def mlp(classes=3, width=4):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))


def test_the_head_is_what_is_named():
    model = mlp()
    assert head_parameters(model, "2") == ("2.weight", "2.bias")
    assert head_parameters(model, ("2.bias", "0")) == ("0.weight", "0.bias", "2.bias")  # in the model's order
    assert head_parameters(model, ()) == ()
    assert head_parameters(nn.Sequential(mlp()), "0.2") == ("0.2.weight", "0.2.bias")  # no prefix of part of a name
    assert head_parameters(torchvision.models.resnet18(num_classes=5)) == ("fc.weight", "fc.bias")


def test_what_is_not_found_is_told():
    with pytest.raises(ValueError, match=r"no classifier found in Sequential; pass head=.*linear layers: 0, 2"):
        find_head(mlp())
    with pytest.raises(ValueError, match="no classifier found"):
        head_parameters(mlp())
    with pytest.raises(ValueError, match="no classifier found in ResNet"):
        find_head(timm.create_model("resnet18", num_classes=0))
    two = nn.ModuleDict({"fc": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no classifier found"):
        find_head(two)
    with pytest.raises(
        ValueError, match=r"head: no parameter of ResNet starts with 'layer4.1.conv3'; near it: .*conv2"
    ):
        head_parameters(torchvision.models.resnet18(), "layer4.1.conv3")
    with pytest.raises(
        ValueError, match=r"layers: none are known for DenseNet.*features.conv0.*classifier.*121 in all"
    ):
        find_stages(torchvision.models.densenet121())
    with pytest.raises(ValueError, match="layers: none are known for SqueezeNet"):
        find_stages(torchvision.models.squeezenet1_0())
    with torch.device("meta"):
        one_layer = timm.create_model("hrnet_w18_small")
    with pytest.raises(ValueError, match=r"layers: none are known for HighResolutionNet.*stage4"):
        find_stages(one_layer)
    odd = torchvision.models.resnet18()
    odd.layer3 = nn.Sequential(nn.Conv2d(128, 256, 1))
    with pytest.raises(ValueError, match="layers: none are known for ResNet"):
        find_stages(odd)


def test_names_of_layers_are_checked():
    model = torchvision.models.resnet18()
    check_layers(model, ["layer1.0.conv1", "layer2"])
    with pytest.raises(ValueError, match=r"layers: ResNet has no module 'layer4.2.conv2'; near it: layer4.1.conv2"):
        check_layers(model, ["layer1", "layer4.2.conv2"])
    with pytest.raises(ValueError, match="layers: ResNet has no module ''"):
        check_layers(model, [""])
    with pytest.raises(TypeError, match="layers: expected a sequence of module names, got the string 'layer1'"):
        check_layers(model, "layer1")
    for layers in ([], ["layer1", "layer1"]):
        with pytest.raises(ValueError, match="layers: expected different module names, at least one"):
            check_layers(model, layers)


def test_wrappers_are_taken_off():
    model = mlp()
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model
    assert head_parameters(torch.compile(model), "2") == ("2.weight", "2.bias")
    with pytest.raises(TypeError, match=r"nn\.DataParallel is not supported"):
        unwrap(nn.DataParallel(model))
