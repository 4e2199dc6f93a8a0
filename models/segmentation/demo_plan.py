"""What the demo computes: the backbone, the scenes, and the segmenter that the paper's tables vary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..gmoe.trainer import TrainConfig
from . import ablation, scenes
from .configuration import SegmentConfig

ADDED = ("4", "9")
CLASSES = tuple(name for name in scenes.CLASSES if name not in ADDED)
"""Of the first fit: all digits but those that are added."""
GRID = (scenes.SIZE[0] // 4, scenes.SIZE[1] // 4)

_WIDTHS = (16, 32, 64, 128, 128)
LAYERS = tuple(f"0.conv{stage}_{layer}" for stage in range(1, len(_WIDTHS) + 1) for layer in (1, 2))
"""Of :func:`network`: as the paper has it, all, the last of a stage behind its pooling."""


@dataclass(frozen=True)
class Plan:
    """How much is drawn and trained.

    Args:
        letters, size: pictures that the backbone is trained on, and their height and width.
        pretraining: of the backbone; a fifth of the letters is validated on.
        train, validation: scenes of CLASSES, to fit to and to judge by.
        more, more_validation: scenes with one of ADDED to fit to, for each, and with either to judge by.
        segmenter: what the tables vary.
        samples: K of Table 3.
        thresholds: at which the localization's maps are tried as the result.
        shown: scenes in a picture.
    """

    letters: int
    pretraining: TrainConfig
    train: int
    validation: int
    more: int
    more_validation: int
    segmenter: SegmentConfig
    samples: tuple[int, ...] = ablation.SAMPLES
    thresholds: tuple[float, ...] = ablation.THRESHOLDS
    size: int = 64
    shown: int = 4


def plan(quick: bool = False, seed: int = 0) -> Plan:
    """The demo's plan; ``quick`` trains so little that its numbers only show that everything runs.

    The recipe is the paper's, but for the localization's: a quarter of its hidden units, on a sixth of the channels,
    want larger rates, to which the first epochs lead up, and a twentieth of the images two epochs more.
    """
    pretraining = TrainConfig(
        trial=seed,
        steps=12 if quick else 200,
        eval_every=12 if quick else 100,
        batch_per_domain=32 if quick else 64,
        optimizer="adamw",
        learning_rate=3e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=2 if quick else 20,
        eval_batch=256,
    )
    segmenter = SegmentConfig(
        localization_hidden=256,
        localization_rates=(1e-4,) if quick else (1e-4, 3e-4, 1e-3, 1e-3, 1e-4),
        epochs=1 if quick else 2,
        seed=seed,
    )
    if quick:
        return Plan(260, pretraining, 24, 6, 4, 4, segmenter, samples=(1, 20), thresholds=(0.2, 0.5), shown=2)
    return Plan(6500, pretraining, 500, 100, 60, 60, segmenter)


def network(classes: int) -> nn.Module:
    """A VGG in small, with batch normalization: two convolutions a stage, 16 to 128 channels, poolings between.

    At the last convolution a unit sees a square of 140 pixels, most of a scene, as VGG-16's do.
    """
    stages, channels = nn.Sequential(), 3
    for number, width in enumerate(_WIDTHS, 1):
        for layer in (1, 2):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            block = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
            if layer == 2 and number < len(_WIDTHS):
                block.append(nn.MaxPool2d(2))
            stages.add_module(f"conv{number}_{layer}", block)
            channels = width
    return nn.Sequential(stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
