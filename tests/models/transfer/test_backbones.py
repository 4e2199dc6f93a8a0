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
