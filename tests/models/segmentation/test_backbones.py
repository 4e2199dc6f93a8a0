"""Frozen networks as sources of features."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

from moe_kernels.models.segmentation import backbones
from moe_kernels.models.transfer import backbones as pretrained
from moe_kernels.ops import hypercolumn

# section 4.1: all convolutional layers, behind the pooling where there is one
MAPS = (
    *("conv1_1 64 256 336", "pool1 64 128 168", "conv2_1 128 128 168", "pool2 128 64 84"),
    *("conv3_1 256 64 84", "conv3_2 256 64 84", "pool3 256 32 42"),
    *("conv4_1 512 32 42", "conv4_2 512 32 42", "pool4 512 16 21"),
    *("conv5_1 512 16 21", "conv5_2 512 16 21", "pool5 512 8 10"),
)


def picture(height=40, width=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


FC = 24  # fc6 and fc7 are 4,096 wide in the paper's network, which is half a gigabyte


def torchvisions():
    """torchvision's VGG-16 with narrow fully connected layers and without weights."""
    with torch.device("meta"):
        model = vgg16(weights=None, init_weights=False)
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, FC), nn.Linear(FC, FC)
        model.classifier[6] = nn.Linear(FC, 10)
    return model.eval()


@pytest.fixture(scope="module")
def vgg():
    """A state dict for it that keeps the scale of what goes through."""
    draw, state = torch.Generator().manual_seed(3), {}
    for name, tensor in torchvisions().state_dict().items():
        state[name] = torch.randn(tensor.shape, generator=draw) * math.sqrt(
            2 / tensor[0].numel() if tensor.ndim > 1 else 0.01
        )
    return state


@pytest.fixture(scope="module")
def features_only(vgg, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "features.safetensors"
    save_file({name: tensor for name, tensor in vgg.items() if name.startswith("features")}, file)
    return file


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_vgg_has_the_papers_maps(ceil_mode):
    with torch.device("meta"):
        model = backbones.VGG16(ceil_mode=ceil_mode, fc7=False)
        maps, image = model(torch.empty(1, 3, 256, 336))
    found = [" ".join(map(str, (layer, *m.shape[1:]))) for layer, m in zip(model.layers, maps, strict=True)]
    assert found == [*MAPS[:-1], "pool5 512 8 11" if ceil_mode else MAPS[-1]]
    assert sum(m.shape[1] for m in maps) == 4224
    assert image is None


def test_vgg_is_torchvisions_network_with_fc7_as_a_convolution(vgg):
    model = backbones.VGG16.from_state(vgg, "state").eval()
    theirs = torchvisions()
    theirs.load_state_dict(vgg, assign=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps, image = model(images)
        x, expected = images, []
        for position, layer in enumerate(theirs.features):
            x = layer(x)
            if position in (1, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27, 30):
                expected.append(x.clone())
        fc7 = theirs.classifier[:5](x.flatten(1))
        # at other sizes fc6 sees the map through windows of 7 × 7
        wide = model.features(torch.randn(1, 3, 224, 256))
        both = [theirs.classifier[:5](wide[..., at : at + 7].flatten(1)) for at in (0, 1)]
        pooled = model.fc7(model.fc6(wide).relu()).relu().mean((2, 3))
    assert all((m > 0).any() for m in maps)
    for m, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, other)
    assert image.shape == (1, FC)
    assert (image > 0).any()
    torch.testing.assert_close(image, fc7)
    torch.testing.assert_close(pooled, (both[0] + both[1]) / 2)


def test_fc7_is_averaged_over_the_image(vgg):
    model = backbones.VGG16.from_state(vgg, "state")
    backbone = backbones.Backbone(model, name="vgg16", layers=model.layers, image_size=(224, 256), grid=(8, 8))
    seen = []
    backbone.extractor.fc7.register_forward_hook(lambda module, args, output: seen.append(output.relu()))
    features = backbone.features(picture())
    assert seen[-1].shape == (1, FC, 1, 2)
    assert seen[-1].std(3).max() > 0
    torch.testing.assert_close(features.image, seen[-1].mean((2, 3)))
    assert (backbone.channels, backbone.image_channels) == (4224, FC)


def test_a_vgg_of_convolutions_alone_has_no_global_features(features_only):
    backbone = backbones.create("vgg16", features_only)
    assert (backbone.image_size, backbone.grid) == ((256, 336), (64, 84))
    assert (backbone.channels, backbone.image_channels, backbone.values) == (4224, 0, 7_094_272)
    features = backbone.features(picture())
    assert features.image is None
    assert [tuple(m.shape[1:]) for m in features.pyramid.maps] == [
        *((896, 64, 84), (1280, 32, 42), (1536, 16, 21), (512, 8, 10))
    ]
    assert backbone.name == "vgg16"
    assert backbones.create("vgg16", features_only, ceil_mode=True).values == 7_094_272 + 8 * 512


def test_hypercolumns_are_the_maps_resized(features_only):
    backbone = backbones.create("vgg16", features_only, image_size=(64, 80), layers=["pool3", "conv1_1"])
    assert (backbone.channels, backbone.grid) == (256 + 64, (16, 20))
    image = picture()
    maps, _ = backbone.extractor(backbone.prepare(image)[None])
    expected = [nn.functional.interpolate(m, (16, 20), mode="bilinear") for m in maps]
    assert maps[0].shape[1] == 256
    torch.testing.assert_close(hypercolumn.dense(backbone.features(image).pyramid), torch.cat(expected, 1))


def test_images_of_any_size_are_resized_and_normalized(features_only):
    create = lambda **choice: backbones.create("vgg16", features_only, image_size=(48, 64), layers=["pool1"], **choice)  # noqa: E731
    rgb = torch.tensor([200, 100, 20.0])
    flat = Image.new("RGB", (7, 301), (200, 100, 20))
    imagenet = (rgb / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(create().prepare(flat), imagenet[:, None, None].expand(3, 48, 64))
    caffe = torch.tensor([20, 100, 200.0]) - torch.tensor([103.939, 116.779, 123.68])
    found = create(preprocessing="caffe").prepare(flat)
    torch.testing.assert_close(found, caffe[:, None, None].expand(3, 48, 64), rtol=0, atol=1e-3)
    halves = Image.new("RGB", (100, 20))
    halves.paste((255, 255, 255), (50, 0, 100, 20))
    squeezed = create().prepare(halves)
    assert (squeezed[:, :, :30] < -1.7).all()
    assert (squeezed[:, :, 34:] > 2.2).all()
    assert create().features(Image.new("RGB", (1, 1))).pyramid.maps[0].shape == (1, 64, 12, 16)


def test_a_backbone_is_frozen_and_stays_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    backbone = backbones.wrap(net, ["2"], name="net", image_size=(16, 16), grid=(4, 4))
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    image, before = picture(), net[1].running_mean.clone()
    assert torch.equal(backbone.features(image).pyramid.maps[0], backbone.features(image).pyramid.maps[0])
    assert torch.equal(net[1].running_mean, before)
    # usable under autograd, as inference tensors are not
    weight = torch.randn(2, 4, requires_grad=True)
    hypercolumn.linear(backbone.features(image).pyramid, weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_a_batch_is_its_images(features_only):
    backbone = backbones.create("vgg16", features_only, image_size=(32, 32), layers=["conv3_2", "pool3"])
    images = [picture(seed=seed) for seed in range(3)]
    batch = backbone(torch.stack([backbone.prepare(image) for image in images]))
    assert batch.pyramid.batch == 3
    for row, image in enumerate(images):
        for m, other in zip(batch.pyramid.maps, backbone.features(image).pyramid.maps, strict=True):
            torch.testing.assert_close(m[row], other[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\), got \(1, 3, 32, 40\)"):
        backbone(torch.zeros(1, 3, 32, 40))


def timm_file(name, folder):
    model = timm.create_model(name, pretrained=False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.02 * torch.randn(tensor.shape)
    file = folder / f"{name}.pth"
    torch.save(model.state_dict(), file)
    return model.eval(), file


def test_a_cnn_of_timm(tmp_path):
    model, file = timm_file("test_resnet.r160_in1k", tmp_path)
    backbone = backbones.create("test_resnet.r160_in1k", file)
    assert (backbone.image_size, backbone.grid) == ((256, 336), (64, 84))
    assert backbone.layers == tuple(range(len(model.feature_info)))
    image = picture()
    with torch.no_grad():
        last, expected = model.forward_intermediates(backbone.prepare(image)[None])
        pooled = model.forward_head(last, pre_logits=True)
    maps, found = backbone.extractor(backbone.prepare(image)[None])
    for m, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, other)
    torch.testing.assert_close(found, pooled)
    assert backbone.mean == tuple(model.pretrained_cfg["mean"])
    assert backbones.create("timm/test_resnet.r160_in1k", file).fingerprint == backbone.fingerprint


def test_a_vit_of_timm_gives_normalized_blocks_and_the_class_token(tmp_path):
    model, file = timm_file("test_vit", tmp_path)
    assert model.pretrained_cfg["input_size"][1:] == (160, 160)
    backbone = backbones.create("test_vit", file, image_size=(160, 160))
    blocks = len(model.blocks)
    assert backbone.layers[-1] == blocks - 1
    image = picture()
    with torch.no_grad():
        expected = model.get_intermediate_layers(
            backbone.prepare(image)[None], list(backbone.layers), reshape=True, norm=True
        )
        token = model.forward_features(backbone.prepare(image)[None])[:, 0]
    maps, found = backbone.extractor(backbone.prepare(image)[None])
    for m, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, other)
    torch.testing.assert_close(found, token)
    # another size: positions are resampled
    wide = backbones.create("test_vit", file, layers=[3, 0])
    assert (wide.image_size, wide.layers) == ((256, 336), (3, 0))
    maps, _ = wide.extractor(wide.prepare(image)[None])
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 21)] * 2
    first, _ = backbones.create("test_vit", file, layers=[0]).extractor(wide.prepare(image)[None])
    torch.testing.assert_close(maps[1], first[0])


def test_images_are_of_whole_patches(tmp_path):
    _, file = timm_file("eva02_tiny_patch14_224", tmp_path)
    backbone = backbones.create("eva02_tiny_patch14_224", file)
    assert (backbone.image_size, backbone.grid, backbone.layers) == ((252, 336), (63, 84), (2, 5, 8, 11))
    assert backbone.features(picture()).pyramid.maps[0].shape[2:] == (18, 24)
    with pytest.raises(ValueError, match=r"eva02_tiny_patch14_224 does not work on images of 256 × 336: .*14"):
        backbones.create("eva02_tiny_patch14_224", file, image_size=(256, 336))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, 2, 1))
        self.fc = nn.Linear(5, 3)

    def forward(self, images):
        return self.fc(self.body(self.relu(self.conv(images))).mean((2, 3)))


def test_any_module_can_be_wrapped():
    net = Net()
    layers = ["body.0", "conv", "body.2"]
    backbone = backbones.wrap(net, layers, name="net", image_size=(16, 24), grid=(8, 12), head="fc")
    assert (backbone.channels, backbone.image_channels, backbone.grid) == (15, 3, (8, 12))
    image = picture()
    features = backbone.features(image)
    x = backbone.prepare(image)[None]
    with torch.no_grad():
        first = net.conv(x)
        second = net.body[0](first.relu())
        third = net.body[2](second.relu())
        expected = hypercolumn.pyramid([second, first, third], (8, 12))
        torch.testing.assert_close(hypercolumn.dense(features.pyramid), hypercolumn.dense(expected))
        torch.testing.assert_close(features.image, net(x))
    # a head that gives a map is averaged
    pooled = backbones.wrap(net, layers, name="net", image_size=(16, 24), grid=(8, 12), head="body.2")
    torch.testing.assert_close(pooled.features(image).image, third.mean((2, 3)))
    plain = backbones.wrap(net, layers, name="net", image_size=(16, 24), grid=(8, 12))
    assert plain.features(image).image is None
    assert plain.image_channels == 0


def test_the_fingerprint_tells_what_decides_the_features():
    torch.manual_seed(1)
    net, facts = Net(), {"image_size": (16, 24), "grid": (8, 12)}
    prints = [backbones.wrap(net, ["conv"], name="net", **facts).fingerprint]
    assert backbones.wrap(net, ["conv"], name="net", **facts).fingerprint == prints[0]
    for layers, change in (
        (["body.0"], {}),
        (["conv"], {"grid": (8, 11)}),
        (["conv"], {"image_size": (16, 16)}),
        (["conv"], {"mean": (0.5, 0.5, 0.5)}),
        (["conv"], {"std": (0.5, 0.5, 0.5)}),
        (["conv"], {"head": "fc"}),
    ):
        prints.append(backbones.wrap(net, layers, name="net", **(facts | change)).fingerprint)
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] += 1e-3
    prints.append(backbones.wrap(net, ["conv"], name="net", **facts).fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_choices_of_vgg_are_in_its_fingerprint(features_only):
    facts = {"image_size": (32, 40), "layers": ["pool1", "pool2"]}
    kinds = ({}, {"ceil_mode": True}, {"preprocessing": "caffe"}, {"layers": ["pool2", "pool1"]})
    prints = [backbones.create("vgg16", features_only, **(facts | choice)).fingerprint for choice in kinds]
    assert len(set(prints)) == 4


def test_what_does_not_work_is_said_at_once(tmp_path, vgg, features_only):
    facts = {"name": "net", "image_size": (16, 24), "grid": (8, 12)}
    with pytest.raises(ValueError, match=r"layers: Net has no module 'bodi.0'.*body.0"):
        backbones.wrap(Net(), ["bodi.0"], **facts)
    with pytest.raises(ValueError, match=r"layer 'fc' of net must give maps \(B, C, h, w\).* \(1, 3\)"):
        backbones.wrap(Net(), ["conv", "fc"], **facts)
    with pytest.raises(ValueError, match="net does not work on images of 16 × 24"):
        backbones.wrap(nn.Sequential(nn.Conv2d(4, 4, 3)), ["0"], **facts)
    with pytest.raises(ValueError, match=r"grid must be \(height, width\), both positive, got \(0, 12\)"):
        backbones.wrap(Net(), ["conv"], **(facts | {"grid": (0, 12)}))
    tokens = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))
    with pytest.raises(ValueError, match=r"head '1' must give \(B, G\) or \(B, G, h, w\), got \(1, 4, 308\)"):
        backbones.wrap(tokens, ["0"], **facts, head="1")
    with pytest.raises(ValueError, match=r"layers: Sequential has no module 'fc'"):
        backbones.wrap(tokens, ["0"], **facts, head="fc")
    broken = Net()
    with torch.no_grad():
        broken.body[0].bias[1] = math.nan
    with pytest.raises(ValueError, match=r"net: its weights hold NaN or infinity, in module.body.0.bias"):
        backbones.wrap(broken, ["conv"], **facts)
    with pytest.raises(ValueError, match=r"layers of VGG-16 are conv1_1, .*; got conv9"):
        backbones.create("vgg16", features_only, layers=["pool1", "conv9"])
    with pytest.raises(ValueError, match=r"layers of VGG-16 are .*got nothing"):
        backbones.create("vgg16", features_only, layers=[])
    with pytest.raises(ValueError, match="preprocessing must be one of torchvision, caffe, got 'bgr'"):
        backbones.create("vgg16", features_only, preprocessing="bgr")
    with pytest.raises(ValueError, match="ceil_mode and preprocessing are choices for vgg16, not for resnet18"):
        backbones.create("resnet18", features_only, ceil_mode=True)
    _, file = timm_file("test_resnet", tmp_path)
    with pytest.raises(ValueError, match=r"layers must be numbers in 0 … \d+, got \(7,\)"):
        backbones.create("test_resnet", file, layers=[7])
    with pytest.raises(ValueError, match=r"test_resnet.pth does not fit VGG-16: features.0.weight is missing.* more$"):
        backbones.create("vgg16", file)
    with pytest.raises(ValueError, match=r"does not fit ResNet"):
        backbones.create("test_resnet", features_only)
    for layers in (["layer1"], [""], [0.5]):
        with pytest.raises(ValueError, match=r"layers must be numbers in 0 … "):
            backbones.create("test_resnet", file, layers=layers)
    with pytest.raises(ValueError, match=r"layers of VGG-16 are .*; got 1$"):
        backbones.create("vgg16", features_only, layers=[1])
    for name in ("vgg16", "test_resnet"):
        with pytest.raises(FileNotFoundError, match=r"weights .*nowhere.pth: there is no such file; a segmenter needs"):
            backbones.create(name, tmp_path / "nowhere.pth")
    other = {name: tensor for name, tensor in vgg.items() if name.startswith("features")}
    with pytest.raises(ValueError, match=r"here does not fit VGG-16: features.28.bias is \(3,\)"):
        backbones.VGG16.from_state(other | {"features.28.bias": torch.zeros(3)}, "here")


def test_fc7_needs_images_large_enough(vgg):
    model = backbones.VGG16.from_state(vgg, "state")
    with pytest.raises(ValueError, match="vgg16 does not work on images of 192 × 336"):
        backbones.Backbone(model, name="vgg16", layers=model.layers, image_size=(192, 336))


def test_prefixes_of_wrappers_come_off_and_half_precision_becomes_single(vgg):
    model = backbones.VGG16.from_state({f"module.{name}": tensor.half() for name, tensor in vgg.items()}, "state")
    torch.testing.assert_close(model.features[28].weight, vgg["features.28.weight"].half().float())
    torch.testing.assert_close(model.fc6.weight.flatten(), vgg["classifier.0.weight"].half().float().flatten())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_of_the_hub_are_asked_of_the_library(monkeypatch, vgg):
    asked = []

    def load(name, source="hub"):
        asked.append((name, source))
        if name != "torchvision/vgg16":
            raise RuntimeError("no network")
        return pretrained.Backbone(name, vgg, 224, (0.0,) * 3, (1.0,) * 3, ("classifier.6.weight", "classifier.6.bias"))

    monkeypatch.setattr(pretrained, "load", load)
    assert backbones.create(image_size=(224, 224)).image_channels == FC
    with pytest.raises(RuntimeError, match="no network"):
        backbones.create("test_vit")
    assert asked == [("torchvision/vgg16", "hub"), ("timm/test_vit", "hub")]
