"""The models by name: their structure, their start, and where their weights come from."""

import warnings

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from moe_kernels.models import gmoe
from moe_kernels.nn import CosineRouter, MoE, auxiliary_loss

SETTINGS = (
    "hidden_dim",
    "num_experts",
    "activation",
    "dropout",
    "capacity_factor",
    "eval_capacity_factor",
    "batch_priority",
    "balance_loss",
    "z_loss",
)


def mixtures(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layers_are_the_published_ones(top_k):
    model = gmoe.create("gmoe_digits", 10, top_k=top_k)
    published = MoE.tutel(64, 256, 6, top_k=top_k)
    assert list(mixtures(model)) == ["blocks.0.mlp", "blocks.2.mlp"]
    for layer in mixtures(model).values():
        for name in SETTINGS:
            assert getattr(layer, name) == getattr(published, name), name
        for name in ("top_k", "noise", "renormalize", "num_experts"):
            assert getattr(layer.router, name) == getattr(published.router, name), name
        assert isinstance(layer.router, CosineRouter)
        assert layer.router.projection.weight.shape == (256, 64)
        # the ViT's initialization for every linear layer, Tutel's for the rest
        assert 0.018 < float(layer.router.projection.weight.detach().std()) < 0.022
        assert float(layer.router.projection.bias.detach().abs().max()) == 0
        assert 0.008 < float(layer.router.expert_embedding.detach().std()) < 0.012
        assert float(layer.router.log_scale.detach().exp()) == pytest.approx(2)


def test_the_small_model_is_the_papers():
    model = gmoe.create("gmoe_small_patch16_224", 7)
    assert list(mixtures(model)) == ["blocks.8.mlp", "blocks.10.mlp"]
    dense = timm.create_model("deit_small_patch16_224", num_classes=7)
    router = 384 * 256 + 256 + 6 * 256 + 1
    ffn = 2 * 384 * 1536 + 384 + 1536
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in dense.parameters()) + 2 * (5 * ffn + router)
    assert [round(block.drop_path2.drop_prob, 4) for block in (model.blocks[8], model.blocks[10])] == [
        0.0727,
        0.0909,
    ]


def test_other_sizes():
    assert gmoe.list_models() == [
        "gmoe_tiny_patch16_224",
        "gmoe_small_patch16_224",
        "gmoe_base_patch16_224",
        "gmoe_digits",
    ]
    tiny = gmoe.create("gmoe_tiny_patch16_224", 3, layers="every_two", num_experts=2).eval()
    assert [layer.w1.shape for layer in mixtures(tiny).values()] == [(2, 768, 192)] * 6
    with torch.no_grad():
        assert tiny(torch.randn(1, 3, 224, 224)).shape == (1, 3)


def test_the_digits_model_runs_and_has_an_auxiliary_loss():
    torch.manual_seed(0)
    model = gmoe.create("gmoe_digits", 10)
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    auxiliary = auxiliary_loss(model)
    assert float(auxiliary.detach()) > 0
    (logits.square().mean() + 0.01 * auxiliary).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_dense_twin_has_the_same_start():
    torch.manual_seed(3)
    sparse = gmoe.create("gmoe_digits", 10)
    torch.manual_seed(3)
    dense = gmoe.create("gmoe_digits", 10, layers=[])
    assert not mixtures(dense)
    state = sparse.state_dict()
    for key, value in dense.state_dict().items():
        if key in state:
            assert torch.equal(state[key], value)
        else:
            ours = key.replace("fc1.weight", "w1").replace("fc1.bias", "b1")
            ours = ours.replace("fc2.weight", "w2").replace("fc2.bias", "b2")
            assert torch.equal(state[ours], value.expand_as(state[ours]))


def test_arguments_replace_the_published_ones():
    model = gmoe.create("gmoe_digits", 10, noise=0.5, balance_loss="gshard", dropout=0.0, projection_dim=16)
    for layer in mixtures(model).values():
        assert (layer.router.noise, layer.balance_loss, layer.dropout) == (0.5, "gshard", 0.0)
        assert layer.capacity_factor == 1.5
        assert layer.router.projection.weight.shape == (16, 64)
    linear = gmoe.create("gmoe_digits", 10, router="linear", num_experts=4)
    assert mixtures(linear)["blocks.0.mlp"].router.weight.shape == (4, 64)


def test_a_router_module_brings_its_own():
    router = CosineRouter(64, 4, top_k=2, projection_dim=8, noise=0.25, renormalize=True)
    model = gmoe.create("gmoe_digits", 10, num_experts=4, top_k=2, router=router)
    for layer in mixtures(model).values():
        assert (layer.router.noise, layer.router.renormalize) == (0.25, True)
        assert torch.equal(layer.router.projection.weight, router.projection.weight)


def test_creating_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmoe.create("gmoe_digits", 10)


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"name: expected one of gmoe_tiny.*gmoe_digits, got 'gmoe_huge'"):
        gmoe.create("gmoe_huge", 10)


def test_nobody_publishes_the_digits_model():
    with pytest.raises(ValueError, match="pretrained: gmoe_digits has no published weights"):
        gmoe.create("gmoe_digits", 10, pretrained=True)


def test_a_failing_download_says_how_to_pass_a_file(monkeypatch):
    def offline(name, pretrained, **options):
        assert (name, pretrained) == ("deit_small_patch16_224.fb_in1k", True)
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"deit_small.*no route to host.*pretrained='/path/to/"):
        gmoe.create("gmoe_small_patch16_224", 7, pretrained=True)


def pretrained_dense(classes):
    torch.manual_seed(7)
    model = gmoe.create("gmoe_digits", classes, layers=[])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_dense_file_becomes_the_experts(tmp_path, suffix):
    source = pretrained_dense(10)
    path = tmp_path / f"dense{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save({"model": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    model = gmoe.create("gmoe_digits", 10, pretrained=path)
    layer = model.blocks[2].mlp
    assert torch.equal(layer.w1, source.blocks[2].mlp.fc1.weight.expand_as(layer.w1))
    assert torch.equal(layer.b2, source.blocks[2].mlp.fc2.bias.expand_as(layer.b2))
    assert torch.equal(model.head.weight, source.head.weight)
    dense = gmoe.create("gmoe_digits", 10, pretrained=str(path), layers=[])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(dense.eval()(x), source.eval()(x))


def test_a_file_with_another_head(tmp_path):
    source = pretrained_dense(26)
    torch.save(source.state_dict(), tmp_path / "letters.pt")
    with pytest.warns(UserWarning, match=r"letters\.pt: its head is for another number of classes"):
        model = gmoe.create("gmoe_digits", 10, pretrained=tmp_path / "letters.pt")
    assert model.head.weight.shape == (10, 64)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_a_file_of_another_model(tmp_path):
    path = tmp_path / "other.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict(), path)
    with pytest.raises(ValueError, match=r"(?s)other\.pt does not fit.*unknown: .*blocks\.6.*pos_embed \(exp"):
        gmoe.create("gmoe_digits", 10, pretrained=path)


@pytest.mark.parametrize("official", [False, True])
def test_a_file_of_a_gmoe(tmp_path, official):
    torch.manual_seed(0)
    source = gmoe.create("gmoe_digits", 10)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "gmoe.pt"
    state = gmoe.to_official_state_dict(source) if official else source.state_dict()
    torch.save({"model_dict": {f"model.{key}": value for key, value in state.items()}, "args": {}}, path)
    model = gmoe.create("gmoe_digits", 10, pretrained=path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), source.eval()(x))
    with pytest.raises(ValueError, match=r"expected \(4, 256, 64\), got \(6, 256, 64\)"):
        gmoe.create("gmoe_digits", 10, pretrained=path, num_experts=4)
