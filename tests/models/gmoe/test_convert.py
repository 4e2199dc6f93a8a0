"""Converted models give the dense outputs, keep what the FFN had, and refuse what cannot be copied."""

import copy
import functools
import warnings

import pytest
import timm.layers
import timm.models.beit
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn

from moe_kernels.models import gmoe
from moe_kernels.nn import CosineRouter, MoE, auxiliary_loss

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}


def timm_model(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 7}
    return timm_vit.VisionTransformer(**(sizes | options))


def torchvision_model():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=5, num_heads=2, hidden_dim=32, mlp_dim=48, num_classes=7
    )


def transformers_model(name, **options):
    config = getattr(transformers, f"{name}Config")(**(TINY | IMAGE | options))
    suffix = "VisionModel" if name.endswith("Vision") else "Model"
    return getattr(transformers, name.removesuffix("Vision") + suffix)(config)


MODELS = {
    "timm": timm_model,
    "timm LayerScale": lambda: timm_model(init_values=0.5),
    "timm post-norm": lambda: timm_model(block_fn=timm_vit.ResPostBlock),
    "timm ReLU": lambda: timm_model(act_layer="relu"),
    "timm BEiT": lambda: timm.models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=7, init_values=0.5
    ),
    "torchvision": torchvision_model,
    "ViT": lambda: transformers_model("ViT"),
    "ViT tanh GELU": lambda: transformers_model("ViT", hidden_act="gelu_pytorch_tanh"),
    "DeiT": lambda: transformers_model("Deit" if hasattr(transformers, "DeitModel") else "DeiT"),
    "DINOv2": lambda: transformers_model("Dinov2", mlp_ratio=2),
    "DINOv3": lambda: transformers_model("DINOv3ViT"),
    "CLIP": lambda: transformers_model("CLIPVision"),
    "SigLIP": lambda: transformers_model("SiglipVision"),
    "BEiT": lambda: transformers_model("Beit", layer_scale_init_value=0.5),
    "Data2Vec (BERT's layout)": lambda: transformers_model("Data2VecVision", layer_scale_init_value=0.5),
}


def build(name):
    """A model with weights large enough for a wrong FFN to show in the outputs."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
    return model


@torch.no_grad()
def outputs(model):
    torch.manual_seed(1)
    output = model(torch.randn(3, 3, 32, 32))
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def error(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def convert_quietly(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gmoe.convert(model, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_conversion_is_exact(name):
    model = build(name)
    dense = outputs(model)
    one = gmoe.convert(copy.deepcopy(model), "every_two", num_experts=1)
    assert sum(isinstance(module, MoE) for module in one.modules()) == 3
    assert error(outputs(one), dense) < 1e-5
    for router in ("cosine", "linear"):
        equal = gmoe.convert(copy.deepcopy(model), "every_two", num_experts=4, top_k=2, renormalize=True, router=router)
        assert error(outputs(equal), dense) < 1e-5
    # other experts must show, else nothing above was tested
    for layer in (module for module in one.modules() if isinstance(module, MoE)):
        nn.init.zeros_(layer.w1)
    assert error(outputs(one), dense) > 0.02


class Ffn(nn.Module):
    """An FFN whose activation may be a module or a function that an attribute holds."""

    def __init__(self, activation, dim=8, hidden=12):
        super().__init__()
        self.act = activation
        self.fc2 = nn.Linear(hidden, dim)  # before fc1 on purpose: order of registration means nothing
        self.fc1 = nn.Linear(dim, hidden)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


def blocks_of(make, count=3):
    return nn.Sequential(*(Block(make()) for _ in range(count)))


ACTIVATIONS = {
    "gelu": [nn.GELU(), timm.layers.GELU(), F.gelu, transformers.activations.ACT2FN["gelu"]],
    "gelu_tanh": [
        nn.GELU("tanh"),
        timm.layers.GELUTanh(),
        functools.partial(F.gelu, approximate="tanh"),
        *(transformers.activations.ACT2FN[name] for name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
    ],
    "quick_gelu": [timm.layers.QuickGELU(), transformers.activations.ACT2FN["quick_gelu"]],
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu],
    "silu": [nn.SiLU(), F.silu, timm.layers.Swish(), transformers.activations.ACT2FN["silu"]],
}


@pytest.mark.parametrize(
    ("name", "activation"), [(name, activation) for name, many in ACTIVATIONS.items() for activation in many]
)
def test_every_activation_is_recognised(name, activation):
    torch.manual_seed(0)
    model = blocks_of(lambda: Ffn(copy.deepcopy(activation))).eval()
    x = 3 * torch.randn(20, 8)
    dense = model(x)
    gmoe.convert(model, num_experts=1)
    assert model[0].mlp.activation == name
    assert error(model(x), dense) < 1e-5


class WithResidual(Ffn):
    def forward(self, x):
        return x + super().forward(x)


class MyGelu(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class WithHiddenNorm(timm.layers.Mlp):
    def __init__(self):
        super().__init__(8, 12, norm_layer=nn.LayerNorm)


REFUSED = {
    "gated": [
        lambda: timm.layers.SwiGLU(8, 12),
        lambda: timm.layers.SwiGLUPacked(8, 12),
        lambda: timm.layers.GluMlp(8, 12),
        lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 8)),
    ],
    "norm inside, norm": [lambda: WithHiddenNorm()],
    r"act \(Mish\)": [lambda: Ffn(nn.Mish())],
    r"act \(MyGelu\)": [lambda: Ffn(MyGelu())],
    "something else": [lambda: WithResidual(nn.ReLU())],
    r"fc1 \(Conv2d\)|0 nn.Linear": [lambda: timm.layers.Mlp(8, 12, use_conv=True)],
    "linear → linear": [lambda: Ffn(torch.exp), lambda: Ffn(nn.Identity())],
}


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, many in REFUSED.items() for make in many])
def test_an_ffn_that_cannot_be_copied_is_named_and_the_model_unchanged(reason, make):
    model = blocks_of(lambda: Ffn(nn.GELU()), 4)
    model[2].mlp = make()
    before = list(model.modules())
    pattern = rf"^2\.mlp \({type(model[2].mlp).__name__}\).*({reason})"
    with pytest.raises(ValueError, match=pattern):
        gmoe.convert(model, [0, 2], num_experts=1)
    assert list(model.modules()) == before


def test_gated_dinov2_is_refused():
    model = transformers_model("Dinov2", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match=r"layer.2.mlp \(Dinov2SwiGLUFFN\).*gated"):
        gmoe.convert(model)


def test_a_mixture_is_not_converted_twice():
    model = convert_quietly(timm_model(), layers=[2])
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp.*mixture of experts already"):
        gmoe.convert(model, [0, 2], num_experts=1)
    gmoe.convert(model, [0], num_experts=1)
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == [True, False, True, False, False]


def converted_blocks(depth, layers):
    model = gmoe.convert(timm_model(depth=depth), layers, num_experts=1)
    return [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]


def test_layers_choose_the_papers_blocks():
    assert converted_blocks(12, "every_two") == [0, 2, 4, 6, 8, 10]
    assert converted_blocks(12, "last_two") == [8, 10]
    assert converted_blocks(5, "last_two") == [2, 4]
    assert converted_blocks(5, (4, 1)) == [1, 4]
    assert converted_blocks(5, []) == []


@pytest.mark.parametrize("layers", [[5], [-1], [0, 0], "last_three", "0"])
def test_wrong_layers_list_the_valid_ones(layers):
    with pytest.raises(ValueError, match=r"layers: expected .* 0 … 4, got"):
        gmoe.convert(timm_model(), layers)


@pytest.mark.parametrize("layers", [[0.0], [True], ["0"]])
def test_layers_that_are_no_integers(layers):
    with pytest.raises(TypeError, match="layers: expected"):
        gmoe.convert(timm_model(), layers)


def test_last_two_of_too_few():
    with pytest.raises(ValueError, match="at least 3 blocks, got 2"):
        gmoe.convert(timm_model(depth=2), "last_two")


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match=r"no transformer blocks found in ResNet.*\.mlp.*\.intermediate"):
        gmoe.convert(torchvision.models.resnet18())


def test_a_model_with_two_towers():
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=TINY | IMAGE)
    model = transformers.CLIPModel(config)
    with pytest.raises(ValueError, match=r"2 lists of transformer blocks \(text_model.*vision_model"):
        gmoe.convert(model)
    gmoe.convert(model.vision_model, num_experts=1)
    kinds = [type(layer.mlp) for layer in model.vision_model.encoder.layers]
    assert [kind is MoE for kind in kinds] == [False, False, True, False, True]


def test_dropout_is_carried_over():
    model = timm_model(proj_drop_rate=0.25).eval()
    dense = outputs(model)
    gmoe.convert(model, [0], num_experts=1)
    layer = model.blocks[0].mlp
    assert layer.dropout == 0.25
    assert set(layer.state_dict()) == set(MoE(4, 4, 1).state_dict())
    assert error(outputs(model), dense) < 1e-5
    y = layer.train()(torch.randn(400, 32))
    assert 0.2 < float((y == 0).float().mean()) < 0.3  # after fc2
    assert float((layer.eval()(torch.randn(400, 32)) == 0).float().mean()) == 0
    assert copy.deepcopy(layer).output_dropout == 0.25


def test_one_dropout_that_is_called_twice_counts_twice():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    model = gmoe.convert(blocks_of(Old), [0], num_experts=1)
    assert (model[0].mlp.dropout, model[0].mlp.output_dropout) == (0.5, 0.5)


def test_dropout_can_be_chosen_and_activation_cannot():
    model = gmoe.convert(timm_model(), [0], num_experts=1, dropout=0.1)
    assert model.blocks[0].mlp.dropout == 0.1
    with pytest.raises(ValueError, match="activation"):
        gmoe.convert(model, [1], num_experts=1, activation="relu")


def test_dtype_mode_and_requires_grad_are_the_ffns():
    model = timm_model().bfloat16().train()
    model.blocks[2].eval()
    model.blocks[2].mlp.fc1.weight.requires_grad_(False)
    model.blocks[2].mlp.fc2.bias.requires_grad_(False)
    convert_quietly(model, num_experts=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    first, second = model.blocks[2].mlp, model.blocks[4].mlp
    assert not any(module.training for module in first.modules())
    assert all(module.training for module in second.modules())
    assert [p.requires_grad for p in (first.w1, first.b1, first.w2, first.b2)] == [False, True, True, False]
    assert all(parameter.requires_grad for parameter in first.router.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())


def test_experts_are_copies_and_not_views():
    model = timm_model()
    fc1 = model.blocks[2].mlp.fc1
    convert_quietly(model, layers=[2], num_experts=3)
    layer = model.blocks[2].mlp
    assert layer.w1.shape == (3, *fc1.weight.shape)
    assert torch.equal(layer.w1, fc1.weight.expand(3, -1, -1))
    with torch.no_grad():
        layer.w1[0] += 1
    assert not torch.equal(layer.w1[0], layer.w1[1])
    assert torch.equal(layer.w1[1], fc1.weight)


def test_an_ffn_without_biases():
    torch.manual_seed(0)
    model = blocks_of(lambda: timm.layers.Mlp(8, 12, bias=False)).eval()
    x = torch.randn(9, 8)
    dense = model(x)
    gmoe.convert(model, num_experts=1)
    assert error(model(x), dense) < 1e-5


def test_the_meta_device():
    with torch.device("meta"):
        model = timm_model()
    convert_quietly(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_raw_gates_scale_the_branch():
    model = build("timm")
    x = torch.randn(50, 32)
    dense = model.blocks[2].mlp(x)
    layer = convert_quietly(model, layers=[2], num_experts=4).blocks[2].mlp
    y = layer(x)
    assert torch.allclose(y, layer.last_routing.gates * dense, atol=1e-5)


def test_raw_gates_are_announced_once():
    with pytest.warns(UserWarning, match=r"about 1/6 of its FFN") as found:
        gmoe.convert(timm_model(), "every_two")
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gmoe.convert(timm_model(), num_experts=1)
        gmoe.convert(timm_model(), top_k=2, renormalize=True)
        gmoe.convert(timm_model(), [])


def test_a_router_module_is_a_pattern():
    router = CosineRouter(32, 4, top_k=2, projection_dim=16, renormalize=True)
    model = gmoe.convert(timm_model(), num_experts=4, top_k=2, router=router)
    first, second = model.blocks[2].mlp.router, model.blocks[4].mlp.router
    assert first is not router
    assert first is not second
    assert first.projection.weight.data_ptr() != second.projection.weight.data_ptr()
    assert torch.equal(first.projection.weight, router.projection.weight)


def test_a_converted_model_trains():
    torch.manual_seed(0)
    model = convert_quietly(timm_model(), num_experts=4, noise=1.0, balance_loss="load_importance", capacity_factor=1.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = torch.randn(14, 3, 32, 32), torch.arange(14) % 7
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        auxiliary = auxiliary_loss(model)
        optimizer.zero_grad()
        (loss + 0.01 * auxiliary).backward()
        assert all(parameter.grad is not None for parameter in model.blocks[2].mlp.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert auxiliary.requires_grad
