"""What a segmenter computes. The defaults are the paper's, its lost numbers as they are most likely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LOSSES = ("global", "pixel")
STRATEGIES = ("diverse", "top", "spatial", "dense")
PENALTIES = ("sum", "max")
STORAGES = ("float16", "float32")


@dataclass(frozen=True)
class SegmentConfig:
    """What is computed from images and tags; the defaults are the paper's (sections 3 and 4.1).

    The paper's learning rates are not in any of its public texts: 1e-4, and a tenth of it, are a reconstruction.

    Args:
        loss: of the localization: ``"global"`` softmax (Eq. 2) or ``"pixel"`` softmax (Eq. 1).
        localization_hidden: hidden units of each class's localization network.
        localization_rates: Adam's learning rate in each epoch of the localization.
        strategy: how locations are chosen to be labelled, of STRATEGIES; see :mod:`.sampling`.
        samples: K, locations of each class and of the background in an image.
        penalty: of ``"diverse"`` and ``"spatial"``: similarities to what is chosen already are summed (``"sum"``), or
            the largest counts (``"max"``).
        threshold: of ``"dense"``: a location is background where no normalized score reaches it.
        spatial_sigma: of ``"spatial"``: the width of its Gaussian, as a share of the grid's height.
        hidden: hidden units of the pixel classifier.
        batch, epochs, learning_rate: of its training: points (not images) in a step, passes over all points, Adam's
            fixed learning rate.
        storage: of features and points on disk; float32 for features beyond the range of float16.
        seed: of new weights, negatives and orders.
    """

    loss: Literal["global", "pixel"] = "global"
    localization_hidden: int = 1024
    localization_rates: tuple[float, ...] = (1e-4, 1e-4, 1e-5)
    strategy: Literal["diverse", "top", "spatial", "dense"] = "diverse"
    samples: int = 20
    penalty: Literal["sum", "max"] = "sum"
    threshold: float = 0.2
    spatial_sigma: float = 0.125
    hidden: int = 512
    batch: int = 100
    epochs: int = 2
    learning_rate: float = 1e-4
    storage: Literal["float16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"loss": LOSSES, "strategy": STRATEGIES, "penalty": PENALTIES, "storage": STORAGES}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")
        for name in ("localization_hidden", "samples", "hidden", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rates = self.localization_rates
        if not rates or not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(f"localization_rates must be one finite rate an epoch, not negative, got {rates}")
        for name in ("learning_rate", "threshold", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.spatial_sigma < math.inf:
            raise ValueError(f"spatial_sigma must be finite and positive, got {self.spatial_sigma}")
