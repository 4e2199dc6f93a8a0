"""What models give, and models that do not fit."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_transfer import CONFIG, ToyNet, batch_norm_net, config, pretrained, toy_target

from moe_kernels.models.runs import RESULT
from moe_kernels.models.transfer.trainer import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


class Output(dict):
    """What transformers' models give."""

    @property
    def logits(self) -> torch.Tensor:
        return self["logits"]


@pytest.mark.parametrize("method", ["fine-tuning", "delta"])
def test_logits_may_be_in_an_output_or_first_of_a_tuple(tmp_path, method):
    wrappers = {"tensor": lambda logits: logits, "tuple": lambda logits: (logits, None)}
    wrappers["output"] = lambda logits: Output(logits=logits)
    histories = []
    for name, wrap in wrappers.items():

        def build(wrap=wrap) -> nn.Module:
            net = pretrained()
            net.__class__ = type("Wrapped", (ToyNet,), {"forward": lambda self, x: wrap(ToyNet.forward(self, x))})
            return net

        histories.append(finetune(build, toy_target(), config(method), tmp_path / name)["history"])
    assert histories[0] == histories[1] == histories[2]


def with_head(outputs: int) -> nn.Module:
    net = pretrained()
    net.fc = nn.Linear(24, outputs)
    return net


def frozen(*trained: str) -> nn.Module:
    net = pretrained().requires_grad_(False)
    for name in trained:
        net.get_submodule(name).requires_grad_(True)
    return net


def broken() -> nn.Module:
    net = pretrained()
    with torch.no_grad():
        net.layer1[0].conv1.weight[0, 0, 0, 0] = math.nan
    return net


def broken_statistics() -> nn.Module:
    net = batch_norm_net()
    net.layer1[0].norm.running_mean[0] = math.nan
    return net


class Scores(ToyNet):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": super().forward(images)}


@pytest.mark.parametrize(
    ("build", "changes", "error", "message"),
    [
        (lambda: with_head(5), {}, ValueError, r"build: expected a model that gives logits \(8, 3\), got \(8, 5\)"),
        (lambda: with_head(2), {}, ValueError, r"build: expected a model that gives logits \(8, 3\), got \(8, 2\)"),
        (lambda: with_head(5), {"method": "delta"}, ValueError, r"gives logits \(8, 3\), got \(8, 5\)"),
        (Scores, {}, TypeError, r"must give logits, \(B, classes\), or an output with .logits, got dict"),
        (frozen, {}, ValueError, "build: expected a model to train, all parameters of ToyNet are frozen"),
        (broken, {}, ValueError, r"build: the model's weights are not finite in layer1\.0\.conv1\.weight"),
        (broken_statistics, {}, ValueError, r"weights are not finite in layer1\.0\.norm\.running_mean"),
        (pretrained, {"method": "delta", "head": ()}, ValueError, "head: delta weighs its channels with a new head"),
        (
            lambda: frozen("fc"),
            {"method": "know-dist", "dtnh": True},
            ValueError,
            "model: ToyNet has no trainable parameters outside the head",
        ),
        (
            lambda: frozen("fc", "layer2"),
            {"method": "know-dist", "dtnh": True, "layers": ("layer1",)},
            ValueError,
            "method 'know-dist': no parameter that is trained changes its penalty",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, build, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(build, toy_target(), replace(CONFIG, **changes), tmp_path)
    assert not (tmp_path / RESULT).exists()


def test_a_batch_that_the_model_refuses_is_told(tmp_path):
    def build() -> nn.Module:
        net = pretrained()
        net.dropout = nn.BatchNorm1d(24)
        return net

    with pytest.raises(ValueError, match=r"the model refuses a batch of shape \(1, 3, 8, 8\): Expected more than 1"):
        finetune(build, toy_target(), replace(CONFIG, batch=1), tmp_path)
