"""What the demo trains: the network, the methods, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import timm
from torch import nn

from . import protocol
from .configuration import PLAIN, FineTuneConfig
from .sources import SOURCES, TARGETS

# The regularizer of the paper's case studies, and all that have a coefficient, with and without DTNH.
BASE = "l2-sp"
REGULARIZED = tuple((method, dtnh) for method, dtnh in protocol.PAPER if method != PLAIN)


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        images: of each source.
        per_class, tested: images of each class of a target, to train on and to test on.
        pretraining, training: of the sources and of each run on a target; method, coefficient and seed are set here.
        coefficients: of each regularizer, what cross-validation chooses from.
        folds: of the cross-validation.
        repeats: of each method on each pair, with seeds from 0 on.
        sources, targets: every one of these with every one of those.
    """

    images: int
    per_class: int
    tested: int
    pretraining: FineTuneConfig
    training: FineTuneConfig
    coefficients: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {"l2-sp": (0.005, 0.05, 0.5), "know-dist": (2e-4, 2e-3, 2e-2)}
    )
    folds: int = 2
    repeats: int = 5
    sources: tuple[str, ...] = SOURCES
    targets: tuple[str, ...] = TARGETS

    def strong(self) -> float:
        """The largest coefficient of L2-SP."""
        return max(self.coefficients[BASE])

    def steps(self) -> int:
        """All optimizer steps of the plan."""
        pairs = len(self.sources) * len(self.targets)
        # from scratch, the columns of the tables, and L2-SP with its strong coefficient
        repeats = len(self.targets) + pairs * (len(protocol.PAPER) + 2)
        folds = pairs * sum(len(self.coefficients[method]) for method, _ in REGULARIZED) * self.folds
        return len(self.sources) * self.pretraining.steps + (repeats * self.repeats + folds) * self.training.steps


def plan(seeds: int = 5, quick: bool = False) -> Plan:
    """The demo's plan; ``quick`` trains so little that its accuracies only show that everything runs.

    The recipe is the paper's (batch of 48, momentum 0.9, the rate divided by 10 after three quarters) with fewer steps
    and twice the rate. The new head has no weight decay, so that columns differ by the regularizer alone.
    """
    pretraining = FineTuneConfig(
        method="l2",
        coefficient=2.5e-4,
        steps=6 if quick else 500,
        batch=64,
        learning_rate=0.05,
        eval_every=6 if quick else 250,
        eval_batch=256,
    )
    training = FineTuneConfig(
        steps=3 if quick else 60,
        eval_every=1 if quick else 12,
        eval_batch=400,
        learning_rate=0.02,
        head_decay=0.0,
    )
    if quick:
        few = {"l2-sp": (0.05, 0.5), "know-dist": (2e-3,)}
        return Plan(128, 2, 2, pretraining, training, few, repeats=seeds, targets=("sketch",))
    return Plan(6400, 10, 40, pretraining, training, repeats=seeds)


def network(classes: int) -> nn.Module:
    """timm's ResNet-10-T, an eighth as wide, for images (B, 3, 32, 32)."""
    return timm.create_model("resnet10t", channels=(8, 16, 32, 64), stem_width=4, stem_type="deep", num_classes=classes)
