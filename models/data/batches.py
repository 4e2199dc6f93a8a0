"""Batches whose images do not depend on who loads them: each is augmented from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset


def load(items: Iterable[tuple[Dataset[tuple[Tensor, int]], int, int]]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels int64 (B,) of ``items``: (data set, index, seed of the augmentation).

    torch's default generator is as before afterwards.
    """
    images, labels = [], []
    state = torch.get_rng_state()
    try:
        for dataset, index, seed in items:
            torch.default_generator.manual_seed(int(seed))
            image, label = dataset[int(index)]
            images.append(image)
            labels.append(int(label))
    finally:
        torch.set_rng_state(state)
    return torch.stack(images), torch.tensor(labels)
