"""Intersection over union, as VOC measures it: one confusion matrix of the pixels of a whole split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from .data.pixels import IGNORED

BACKGROUND = "background"


class MeanIoU:
    """IoU of the background and every class, TP / (TP + FP + FN) over all pixels of all images seen, and their mean.

    Pixels whose mask is 255 count nowhere, and a class that neither masks nor predictions have counts in no mean. It is
    not the mean of the images' own IoU.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = (BACKGROUND, *classes)
        self._index = MulticlassJaccardIndex(
            len(self.classes), average="none", ignore_index=IGNORED, validate_args=False
        )

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Count an image: labels (h, w) in 0 … C each, and 255 in ``mask``, at the size of the original.

        Raises:
            ValueError: two sizes, or a label of no class.
        """
        if prediction.shape != mask.shape or mask.ndim != 2:
            raise ValueError(f"prediction must have the size of its mask, {mask.shape}, got {prediction.shape}")
        judged = mask != IGNORED
        for what, labels in (("prediction", prediction[judged]), ("mask", mask[judged])):
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(
                    f"{what} must have labels in 0 … {len(self.classes) - 1}, got {labels.min()} … {labels.max()}"
                )
        self._index.update(*(torch.from_numpy(labels.astype(np.int64)) for labels in (prediction, mask)))

    def compute(self) -> tuple[float, dict[str, float | None]]:
        """The mean and the IoU of each class, in [0, 1]; ``None`` for one that nothing had.

        Raises:
            ValueError: no pixel was counted.
        """
        pixels = self._index.confmat
        seen = (pixels.sum(0) + pixels.sum(1)) > 0
        if not seen.any():
            raise ValueError("IoU needs an image with a mask that is not all 255, got none")
        values = self._index.compute().double()
        each = {
            name: float(value) if there else None for name, value, there in zip(self.classes, values, seen, strict=True)
        }
        return float(values[seen].mean()), each
