"""Accuracy and loss of a classifier on a data set, on any device and over any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from . import distributed
from .data.domains import ImageDataset


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of ``precision``: bfloat16 for ``"bfloat16"``, none for ``"float32"``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def logits_of(output: Any) -> Tensor:
    """The logits in what a model gives: a tensor, the first of a tuple, or ``.logits`` of a transformers output.

    Raises:
        TypeError: anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits = output[0] if type(output) is tuple and output else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must give logits, (B, classes), or an output with .logits, got {type(output).__name__}"
        )
    return logits


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
    return accuracy_and_loss(model, dataset, indices, batch=batch, workers=workers, precision=precision)[0]


def accuracy_and_loss(
    model: nn.Module,
    dataset: ImageDataset,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    batch: int = 64,
    workers: int = 0,
    precision: str = "float32",
) -> tuple[float, float]:
    """:func:`accuracy`, and the mean cross entropy of the same items."""
    if indices is None:
        indices = range(len(dataset))
    if len(indices) == 0:
        raise ValueError("accuracy needs at least one image, got none")
    device = next(model.parameters()).device
    mine = [int(index) for index in indices[distributed.rank() :: distributed.world()]]
    loader = DataLoader(Subset(dataset, mine), batch_size=batch, num_workers=workers, pin_memory=device.type == "cuda")
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # right ones, cross entropy
    training = model.training
    model.eval()
    with torch.no_grad():
        for images, labels in loader:
            with autocast(device, precision):
                logits = logits_of(model(images.to(device)))
            labels = labels.to(device)
            sums[0] += (logits.argmax(dim=-1) == labels).sum()
            sums[1] += cross_entropy(logits.float(), labels, reduction="sum")
    model.train(training)
    right, loss = distributed.sum_(sums).tolist()
    return right / len(indices), loss / len(indices)
