"""The options of ``moe-kernels segment``, and what their text means."""

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from moe_kernels.models.segmentation.configuration import SegmentConfig

Number = TypeVar("Number", int, float)
DEFAULTS = SegmentConfig()


class Loss(str, Enum):
    """Of the localization."""

    everywhere = "global"
    pixel = "pixel"


class Strategy(str, Enum):
    """How locations are chosen."""

    diverse = "diverse"
    top = "top"
    spatial = "spatial"
    dense = "dense"


class Penalty(str, Enum):
    """Over what is chosen already."""

    sum = "sum"
    max = "max"


class Storage(str, Enum):
    """Of features and points on disk."""

    float16 = "float16"
    float32 = "float32"


class Preprocessing(str, Enum):
    """Of images for VGG-16."""

    torchvision = "torchvision"
    caffe = "caffe"


class MaskNumbers(str, Enum):
    """What the numbers in COCO's masks are."""

    position = "position"
    id = "id"


Data = Annotated[
    Path,
    typer.Argument(help="VOC's layout, COCO's, or images/ and tags.csv; to judge by, masks/ and class_names.txt."),
]
Run = Annotated[Path, typer.Argument(help="Folder of a segmenter, as `segment fit` made it.")]
Split = Annotated[
    str | None, typer.Option(help="List of images, of VOC's and COCO's layouts. Default: train_aug, train2017.")
]
TestSplit = Annotated[str | None, typer.Option(help="List of images to judge by. Default: val, val2017.")]
Classes = Annotated[
    str | None, typer.Option(help="Only these of the data, cat,dog; in masks the others are background. Default: all.")
]
Tags = Annotated[str | None, typer.Option(help="Of VOC's layout: xml or masks. Default: xml where there is one.")]
MaskNumbersOption = Annotated[
    MaskNumbers | None,
    typer.Option(
        "--mask-numbers", help="In masks of COCO's layout: position, 1 to 80, or id, 1 to 90. Default: position."
    ),
]
Crf = Annotated[bool, typer.Option("--crf", help="With a dense CRF too: needs the extra crf.")]
Refine = Annotated[bool, typer.Option("--crf", help="Refine by a dense CRF: needs the extra crf.")]
Name = Annotated[str, typer.Option("--backbone", help="vgg16, or a model of timm.")]
Weights = Annotated[str, typer.Option(help="A .safetensors or .pth file, or hub: the library's own, downloaded.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the images. Default: 256x336, or next to it.")]
Grid = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the hypercolumns. Default: a quarter of that.")]
Layers = Annotated[
    str | None, typer.Option(help="conv1_1,pool1,… of vgg16, 0,1,… of timm. Default: all of a CNN, 4 of a ViT.")
]
CeilMode = Annotated[bool, typer.Option("--ceil-mode", help="Poolings of vgg16 keep the rest, as in Caffe.")]
LossOption = Annotated[Loss, typer.Option(help="Softmax of the localization (Eq. 2 or 1).")]
LocalizationHidden = Annotated[int, typer.Option(help="Hidden units of a localization network.")]
Rates = Annotated[str, typer.Option(help="Adam's learning rate in each epoch of the localization.")]
StrategyOption = Annotated[Strategy, typer.Option(help="How locations are chosen to be labelled.")]
Samples = Annotated[int, typer.Option(help="K, locations of each class and of the background in an image.")]
PenaltyOption = Annotated[Penalty, typer.Option(help="Sum of the similarities to what is chosen, or the largest.")]
Threshold = Annotated[float, typer.Option(help="Of dense: background is where no normalized score reaches it.")]
Sigma = Annotated[float, typer.Option(help="Of spatial: width of the Gaussian, as a share of the grid's height.")]
Hidden = Annotated[int, typer.Option(help="Hidden units of the pixel classifier.")]
Batch = Annotated[int, typer.Option(help="Points in a step of its training.")]
Epochs = Annotated[int, typer.Option(help="Of its training.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Adam's, of its training.")]
StorageOption = Annotated[Storage, typer.Option(help="Of features and points on disk.")]
Seed = Annotated[int, typer.Option(help="Of new weights, negatives and orders.")]

RATES = ",".join(f"{rate:g}" for rate in DEFAULTS.localization_rates)


def created_by(
    name: str,
    weights: str,
    image_size: str | None,
    grid: str | None,
    layers: str | None,
    ceil_mode: bool,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """The arguments of ``backbones.create``, plain JSON that holds in any folder."""
    chosen: list[Any] | None = None
    if layers is not None:
        chosen = listed("layers", layers)
        chosen = [int(part) for part in chosen] if all(part.isdigit() for part in chosen) else chosen
    return {
        "name": name,
        "weights": weights if weights == "hub" else os.path.abspath(weights),
        "image_size": _size("image-size", image_size),
        "grid": _size("grid", grid),
        "layers": chosen,
        "ceil_mode": ceil_mode,
        "preprocessing": preprocessing.value,
    }


def _size(option: str, text: str | None) -> list[int] | None:
    try:
        if text is None:
            return None
        height, width = (int(part) for part in text.split("x"))
        return [height, width]
    except ValueError:
        raise ValueError(f"{option} must be HEIGHTxWIDTH such as 256x336, got {text!r}") from None


def listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{option} must be names with commas between them, got {text!r}")
    return parts


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{option} must be {whole}numbers such as 1,2, got {text!r}") from None
