"""A small convolutional network in float64, for regularizers written out by hand."""

import torch
from torch import nn

from moe_kernels.models.transfer.regularizers import DELTA


class Net(nn.Module):
    """Two convolutions, normalization and dropout between them, and a classifier."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(width, 5, 3)
        self.fc = nn.Linear(5, classes)

    def forward(self, x):
        return self.fc(self.conv2(self.drop(self.norm(self.conv1(x)).relu())).mean((2, 3)))


LAYERS = ["conv1", "conv2"]


def net(**options):
    """A model in float64 whose running statistics are not those of its next batch."""
    model = Net(**options).double()
    nn.init.uniform_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model


def images(count=3):
    return torch.randn(count, 2, 5, 6, dtype=torch.float64)


@torch.no_grad()
def trained(model):
    """``model``, moved away from its source, without dropout: two forwards in training mode are then equal."""
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    model.drop.p = 0.0
    return model.train()


def maps(model, x):
    """Both layers' features by hand, with the mode that the model is in."""
    first = model.conv1(x)
    return {"conv1": first, "conv2": model.conv2(model.drop(model.norm(first).relu()))}


def set_weights(regularizer, model):
    """Any weights of channels, for DELTA."""
    if isinstance(regularizer, DELTA):
        outputs = {name: model.get_submodule(name) for name in regularizer.layers}
        sizes = {name: getattr(m, "out_channels", getattr(m, "out_features", None)) for name, m in outputs.items()}
        regularizer.load_state_dict({"weights": {n: torch.rand(size).softmax(0) for n, size in sizes.items()}})
    return regularizer
