import pytest
import timm
import torch
import torchvision

from moe_kernels.models.transfer import backbones


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """ResNet-18 for 7 classes, as a training script saves it."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    return path, state


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("classes", [5, 7])
def test_the_backbone_is_the_sources_and_the_head_is_new(source, name, classes):
    path, state = source
    backbone = backbones.load(name, path)
    torch.manual_seed(1)
    model = backbone.build(classes)
    assert model.fc.weight.shape == (classes, 512)
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items() if not key.startswith("fc."))
    if classes == 7:
        assert not torch.equal(model.fc.weight, state["fc.weight"])
    torch.manual_seed(1)
    assert torch.equal(backbone.build(classes).fc.weight, model.fc.weight)
    assert backbone.description()["model"] == name
    assert backbone.description() == backbones.load(name, path).description()


def test_bare_names_are_timms_first():
    assert backbones.load("resnet18", None).name == "timm/resnet18"
    assert backbones.load("vit_b_16", None).name == "torchvision/vit_b_16"
    assert backbones.load("resnet18", None).description()["weights"] is None


def test_images_are_normalized_as_the_model_was_made_for():
    assert backbones.load("resnet18", None).mean == (0.485, 0.456, 0.406)
    backbone = backbones.load("vit_tiny_patch16_384", None)
    assert (backbone.size, backbone.mean, backbone.std) == (384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_weights_that_do_not_fit_are_listed(source, tmp_path):
    path, state = source
    with pytest.raises(ValueError, match=r"(?s)resnet18.pth does not fit ResNet.*missing: .*conv3.*wrong shape: "):
        backbones.load("resnet50", path)
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"unknown: extra.weight"):
        backbones.load("resnet18", tmp_path / "more.pth")
    with pytest.raises(FileNotFoundError):
        backbones.load("resnet18", tmp_path / "nowhere.pth")


def test_old_files_have_no_batch_counts(source, tmp_path):
    state = source[1]
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pth")
    assert torch.equal(backbones.load("resnet18", tmp_path / "old.pth").build(2).conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "model must be a name of timm or torchvision, got 'resnet19'; near it: .*resnet18"),
        ("torchvision/vit_tiny_patch16_224", "model must be a name of torchvision"),
        ("hf/resnet18", "model must be a name of timm or torchvision, got 'hf/resnet18'"),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        backbones.load(name, None)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_the_hub_is_asked_for_the_librarys_own_weights(monkeypatch, name):
    asked = []

    def create(model, **options):
        asked.append(options)
        if options.get("pretrained") or options.get("weights"):
            raise OSError("no network")
        return torchvision.models.resnet18(num_classes=options["num_classes"])

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(torchvision.models, "get_model", create)
    with pytest.raises(RuntimeError, match=r"could not get the weights of resnet18 \(OSError: no network\)"):
        backbones.load(name)
    assert asked[-1] in ({"pretrained": True}, {"weights": "DEFAULT"})


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("timm/vit_tiny_patch16_224", (224,), 64),
        ("torchvision/vit_b_32", (224,), 256),
        ("torchvision/squeezenet1_1", (64, 300), 8),
        ("torchvision/regnet_y_400mf", (8, 64), None),
    ],
)
def test_images_of_a_size_that_the_model_does_not_take_are_refused(name, taken, refused):
    backbone = backbones.load(name, None)
    for size in taken:
        backbone.check_size(size)
    if refused is not None:
        expected = rf"crop \(--crop\): {name} was made for images of 224 × 224 and cannot take {refused} × {refused} \("
        with pytest.raises(ValueError, match=expected):
            backbone.check_size(refused)


def test_nothing_is_said_of_sizes_where_the_model_cannot_be_tried(monkeypatch):
    def forward(self, images):
        raise TypeError("expected text")

    backbone = backbones.load("torchvision/resnet18", None)
    monkeypatch.setattr(torchvision.models.ResNet, "forward", forward)
    backbone.check_size(64)


def test_a_model_that_computes_with_tensors_while_it_is_made(tmp_path):
    state = torchvision.models.regnet_y_400mf(num_classes=3).state_dict()
    torch.save(state, tmp_path / "regnet.pth")
    model = backbones.load("torchvision/regnet_y_400mf", tmp_path / "regnet.pth").build(2)
    assert torch.equal(model.stem[0].weight, state["stem.0.weight"])
    assert model.fc.weight.shape[0] == 2


def test_a_head_that_is_a_convolution(tmp_path):
    state = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    torch.save(state, tmp_path / "squeezenet.pth")
    model = backbones.load("torchvision/squeezenet1_1", tmp_path / "squeezenet.pth").build(2)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    assert torch.equal(model.features[0].weight, state["features.0.weight"])


def test_the_new_head_is_what_is_named(source):
    path, state = source
    backbone = backbones.load("resnet18", path, head=("fc", "layer4.1"))
    found = backbone.build(5).state_dict()
    assert torch.equal(found["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])
    assert not torch.equal(found["layer4.1.conv1.weight"], state["layer4.1.conv1.weight"])
    assert {"fc.weight", "layer4.1.conv1.weight"} <= set(backbone.description()["new_head"])
    named, found = backbones.load("resnet18", path, head=("fc",)), backbones.load("resnet18", path)
    assert named.description() == found.description()
    with pytest.raises(ValueError, match="head: no parameter of ResNet starts with 'nonsense'"):
        backbones.load("resnet18", path, head=("nonsense",))
    # the source's classifier is not of as many classes
    with pytest.raises(ValueError, match=r"wrong shape: fc.weight \(expected \(1, 512\), got \(7, 512\)\)"):
        backbones.load("resnet18", path, head=("layer4.1",))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(tmp_path, name):
    whole = torchvision.models.get_model(name, weights=None, num_classes=3, init_weights=False)
    torch.save(whole.state_dict(), tmp_path / "source.pth")
    assert any(key.lower().startswith("aux") for key in whole.state_dict())
    backbone = backbones.load(f"torchvision/{name}", tmp_path / "source.pth")
    model = backbone.build(2).train()
    assert torch.equal(next(model.parameters()), next(whole.parameters()))
    # a tensor, and not logits of every classifier
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 2)
    assert model.transform_input
