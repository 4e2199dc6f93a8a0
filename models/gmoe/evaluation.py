"""Accuracy of a classifier on a data set, on any device and over any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from .. import distributed
from .data.domains import ImageDataset


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of ``precision``: bfloat16 for ``"bfloat16"``, none for ``"float32"``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def accuracy(
    model: nn.Module,
    dataset: ImageDataset,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    batch: int = 64,
    workers: int = 0,
    precision: str = "float32",
) -> float:
    """Share of the items ``indices`` of ``dataset`` (all by default) that ``model`` classifies correctly.

    The model runs in evaluation mode on the device it is on and is put back into the mode it was in. Each
    rank takes its share of the items.

    Raises:
        ValueError: there is no item.
    """
    if indices is None:
        indices = range(len(dataset))  # type: ignore[arg-type]
    if len(indices) == 0:
        raise ValueError("accuracy needs at least one image, got none")
    device = next(model.parameters()).device
    mine = [int(index) for index in indices[distributed.rank() :: distributed.world()]]
    loader = DataLoader(Subset(dataset, mine), batch_size=batch, num_workers=workers, pin_memory=device.type == "cuda")
    correct = torch.zeros((), dtype=torch.int64, device=device)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        for images, labels in loader:
            correct += (model(images.to(device)).argmax(dim=-1) == labels.to(device)).sum()
    model.train(training)
    return int(distributed.sum_(correct)) / len(indices)
