"""Anchors are where the weights started, of what is meant and of nothing else; bad input is told."""

import copy
import math

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn
from toy_regularized import net, trained

from moe_kernels.models import gmoe
from moe_kernels.models.transfer.regularizers import L2, L2SP


def test_l2sp_anchors_kernels_where_they_started():
    model = net()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    regularizer = L2SP(0.05).bind(model)
    trained(model)
    anchors = regularizer.anchors()
    assert set(anchors) == {"conv1.weight", "conv2.weight"}
    for name, anchor in anchors.items():
        assert torch.equal(anchor, start[name])
        assert not anchor.requires_grad
    assert regularizer.head == ("fc.weight", "fc.bias")
    assert regularizer.decay() == {"fc.weight": 0.01}
    assert regularizer.penalty() is None
    assert not regularizer.uses_features


def test_l2sp_of_all_parameters():
    model = net()
    model.conv2.weight.requires_grad_(False)
    regularizer = L2SP(0.05, parameters="all", head_decay=0.3).bind(model)
    assert set(regularizer.anchors()) == {"conv1.weight", "conv1.bias", "norm.weight", "norm.bias", "conv2.bias"}
    assert regularizer.decay() == {"fc.weight": 0.3, "fc.bias": 0.3}
    model.fc.bias.requires_grad_(False)
    assert regularizer.decay() == {"fc.weight": 0.3}
    assert L2SP(0.05, head_decay=0).bind(model).decay() == {}


def test_l2sp_from_another_model():
    model, source = net(classes=3), net(classes=7)
    anchors = L2SP(0.05, parameters="all").bind(model, source).anchors()
    assert "fc.weight" not in anchors
    for name, anchor in anchors.items():
        assert torch.equal(anchor, source.get_parameter(name))
        assert not torch.equal(anchor, model.get_parameter(name)) or name.startswith("norm")


def test_anchors_have_the_layout_and_the_dtype_of_their_parameters():
    model = net().to(torch.bfloat16, memory_format=torch.channels_last)
    source = copy.deepcopy(model).to(torch.float64, memory_format=torch.contiguous_format)
    for regularizer in (L2SP(1.0).bind(model), L2SP(1.0).bind(model, source), L2(1.0).bind(model)):
        for name, anchor in regularizer.anchors().items():
            parameter = model.get_parameter(name)
            assert anchor.dtype is torch.bfloat16
            assert anchor.stride() == parameter.stride()
            assert anchor.data_ptr() != parameter.data_ptr()


def test_l2_anchors_everything_at_zero():
    model = net()
    regularizer = L2(0.01).bind(model)
    anchors = regularizer.anchors()
    assert set(anchors) == {name for name, _ in model.named_parameters()}
    assert not any(anchor.any() for anchor in anchors.values())
    assert set(L2(0.01, parameters="kernels").bind(model).anchors()) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert regularizer.decay() == {}
    assert regularizer.head == ()


def test_the_kernels_of_transformers_and_experts():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
    model = gmoe.convert(timm_vit.VisionTransformer(**options), [2], num_experts=2, top_k=2, renormalize=True)
    anchors = L2SP(0.1).bind(model).anchors()
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= set(anchors)
    assert {"blocks.2.mlp.w1", "blocks.2.mlp.w2"} <= set(anchors)
    absent = {"cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.2.mlp.b1", "head.weight"}
    assert absent <= {name for name, _ in model.named_parameters()} - set(anchors)


def test_bad_parameters_of_weight_space():
    with pytest.raises(ValueError, match="parameters: expected one of kernels, all, got 'weights'"):
        L2SP(0.1, parameters="weights")
    model = net()
    for layer in (model.conv1, model.conv2):
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters: Net has no trainable kernels outside the head"):
        L2SP(0.1).bind(model)
    broken = net()
    with torch.no_grad():
        broken.conv2.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"source: conv2.weight holds values that are not finite"):
        L2SP(0.1).bind(broken)
    with pytest.raises(ValueError, match="head: no parameter of Net starts with 'classifier'"):
        L2SP(0.1, head="classifier").bind(net())
    with pytest.raises(ValueError, match="state: l2-sp has none, got 'weights'"):
        L2SP(0.1).bind(net()).load_state_dict({"weights": {}})


def test_a_source_of_another_architecture_is_refused():
    """What it lacks would be taken for new and be anchored to nothing."""
    small, deep = timm.create_model("resnet10t", num_classes=3), timm.create_model("resnet50", num_classes=3)
    with pytest.raises(
        ValueError, match=r"source: ResNet does not have the parameters of ResNet outside its head: "
    ) as e:
        L2SP(0.1).bind(small, deep)
    assert "conv1.0.weight (24, 3, 3, 3) (missing there)" in str(e.value)
    assert "more. If they are new, name them in head" in str(e.value)
    with pytest.raises(ValueError, match=r"conv1.weight \(4, 2, 3, 3\) \(\(6, 2, 3, 3\) there\)"):
        L2SP(0.1).bind(net(), net(width=6))
    # frozen ones and those that the kernels are not count too: they are what the source is known by
    model, source = net(), net()
    model.norm.requires_grad_(False)
    source.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"outside its head: norm.weight \(4,\) \(missing there\), norm.bias"):
        L2SP(0.1).bind(model, source)
    source = net()
    source.conv1 = nn.Conv2d(3, 4, 3)
    regularizer = L2SP(0.1, head=("fc", "conv1")).bind(net(), source)
    assert set(regularizer.anchors()) == {"conv2.weight"}
    # zeros are zeros for any source
    assert set(L2(0.1).bind(small, deep).anchors()) == {name for name, _ in small.named_parameters()}
