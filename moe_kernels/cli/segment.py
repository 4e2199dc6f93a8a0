"""``moe-kernels segment``: segmentation learned from image tags alone (arXiv 1612.01991)."""

import io
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from moe_kernels.cli import accuracy
from moe_kernels.cli.common import THREADS, Device, SkipBad, one_sentence
from moe_kernels.models import distributed, figures, files, report, segmentation
from moe_kernels.models.data.images import is_image, some
from moe_kernels.models.segmentation import ablation, backbones, crf, data, pictures
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.data import TaggedImages, coco, folder, voc
from moe_kernels.models.segmentation.data.tagged import checked

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Number = TypeVar("Number", int, float)
DEFAULTS = SegmentConfig()
EVALUATION = "evaluation.json"


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

_rates = ",".join(f"{rate:g}" for rate in DEFAULTS.localization_rates)


@app.command()
def fit(
    root: Data,
    out: Annotated[Path, typer.Argument(help="Folder of the segmenter.", file_okay=False)],
    split: Split = None,
    tags: Tags = None,
    classes: Classes = None,
    backbone: Name = "vgg16",
    weights: Weights = "hub",
    image_size: Size = None,
    grid: Grid = None,
    layers: Layers = None,
    ceil_mode: CeilMode = False,
    preprocessing: Preprocessing = Preprocessing.torchvision,
    loss: LossOption = Loss.everywhere,
    localization_hidden: LocalizationHidden = DEFAULTS.localization_hidden,
    localization_rates: Rates = _rates,
    strategy: StrategyOption = Strategy.diverse,
    samples: Samples = DEFAULTS.samples,
    penalty: PenaltyOption = Penalty.sum,
    threshold: Threshold = DEFAULTS.threshold,
    spatial_sigma: Sigma = DEFAULTS.spatial_sigma,
    hidden: Hidden = DEFAULTS.hidden,
    batch: Batch = DEFAULTS.batch,
    epochs: Epochs = DEFAULTS.epochs,
    learning_rate: LearningRate = DEFAULTS.learning_rate,
    storage: StorageOption = Storage.float16,
    seed: Seed = DEFAULTS.seed,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the features, which several OUT may share. Default: OUT/features.", file_okay=False
        ),
    ] = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Fit a segmenter to images and their tags. Masks are not looked at.

    If it is interrupted, in whatever way, the same command goes on where it was and ends with the same segmenter.
    """
    with one_sentence(), distributed.process_group(device) as on:
        config = SegmentConfig(
            loss=loss.value,
            localization_hidden=localization_hidden,
            localization_rates=_numbers("localization-rates", localization_rates, float),
            strategy=strategy.value,
            samples=samples,
            penalty=penalty.value,
            threshold=threshold,
            spatial_sigma=spatial_sigma,
            hidden=hidden,
            batch=batch,
            epochs=epochs,
            learning_rate=learning_rate,
            storage=storage.value,
            seed=seed,
        )
        created = _created(backbone, weights, image_size, grid, layers, ceil_mode, preprocessing)
        network = backbones.create(**created)  # before the images, which may take minutes to check
        dataset = _load(root, split, skip_bad, classes, tags=tags, masks=False)
        segmenter = segmentation.fit(dataset, network, out, config, features=features, created=created, device=on)
        _show_localization(segmenter, segmenter.classes)
        _show_times(segmenter, "fit")
        typer.echo(f"{len(segmenter.classes)} classes, {len(dataset)} images: {out}")


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the label maps, and the pictures of them.", file_okay=False)],
    crf: Refine = False,
    overlay: Annotated[bool, typer.Option(help="Also the label map over its image, NAME-overlay.png.")] = True,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Segment images: a PNG a file, with VOC's palette; 0 is the background, then the classes in their order."""
    with one_sentence(resumes=False), distributed.process_group(device) as on:
        crf = crf and _crf_is_there()
        segmenter = segmentation.Segmenter.load(run, device=on)
        paths = _files(images, out)
        _refuse_overwriting(paths, out, ["", "-overlay"] if overlay else [""])
        found = _tagged(paths, "any", skip_bad)
        palette = pictures.palette().tobytes()
        for index, name in enumerate(tqdm(found.names, desc="prediction", unit="image", disable=None)):
            image = found.image(index)
            labels = segmenter.predict(image, crf=crf)
            picture, buffer = Image.fromarray(labels), io.BytesIO()
            picture.putpalette(palette)
            picture.save(buffer, "png")
            files.write_bytes(out / f"{name}.png", buffer.getvalue())
            if overlay:
                drawn = pictures.overlay(np.asarray(image), labels, segmenter.classes)
                figures.save(drawn, out / f"{name}-overlay.png")
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(segmenter.classes, 1))
        typer.echo(f"{len(found)} images: {out}; 0 background, {numbered}")


@app.command()
def evaluate(
    run: Run,
    root: Data,
    split: TestSplit = None,
    classes: Classes = None,
    crf: Crf = False,
    mask_numbers: MaskNumbersOption = None,
    out: Annotated[
        Path | None, typer.Option(help=f"JSON file to write. Default: RUN/{EVALUATION}.", dir_okay=False)
    ] = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Mean IoU on images with masks, at their own size, without the CRF and, with --crf, with it too."""
    with one_sentence(resumes=False), distributed.process_group(device) as on:
        crf = crf and _crf_is_there()
        segmenter = segmentation.Segmenter.load(run, device=on)
        dataset = _load(root, split or _test_split(root), skip_bad, classes, mask_numbers=mask_numbers)
        found = segmenter.evaluate(dataset, crf=crf)
        kinds = [kind for kind in ("plain", "crf") if kind in found]
        rows = [["class", "IoU, %", "with CRF, %"][: 1 + len(kinds)]]
        for name in found["plain"]["classes"]:
            rows.append([name, *(_percent(found[kind]["classes"][name]) for kind in kinds)])
        rows.append(["**mean**", *(f"**{_percent(found[kind]['mean'])}**" for kind in kinds)])
        path = out or run / EVALUATION
        files.write_json(path, {"data": str(root), "split": split or _test_split(root), **found})
        accuracy.show(f"{found['images']} images", rows)
        typer.echo(f"written to {path}")


@app.command()
def add_class(
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the new class.")],
    images: Annotated[
        list[Path],
        typer.Argument(help="Images that have it: files, folders of them, or tagged data, whose other tags count too."),
    ],
    split: Split = None,
    tags: Tags = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Learn one more class from images of it; the others' localization and points stay as they are.

    If it is interrupted the segmenter is still the old one, and the same command goes on where it was.
    """
    with one_sentence(), distributed.process_group(device) as on:
        segmenter = segmentation.Segmenter.load(run, device=on)
        # a single folder may be one of tagged data
        if len(images) == 1 and any(layout.find(images[0]) is not None for layout in (voc, coco, folder)):
            found = _load(images[0], split, skip_bad, tags=tags, masks=False)
        elif split or tags:
            raise ValueError("split and tags are choices for one folder of tagged data, and these are bare images")
        else:
            found = _tagged(_files(images), name, skip_bad)
        segmenter.add_class(name, found, skip_bad=skip_bad)
        _show_localization(segmenter, [name])
        _show_times(segmenter, f"add {name}")
        typer.echo(f"{len(segmenter.classes)} classes: {run}")


@app.command()
def ablate(
    root: Data,
    out: Annotated[Path, typer.Argument(help="Folder for all segmenters, results and the report.", file_okay=False)],
    split: Split = None,
    tags: Tags = None,
    test: Annotated[Path | None, typer.Option(help="Data with masks to judge by. Default: DATA.")] = None,
    test_split: TestSplit = None,
    mask_numbers: MaskNumbersOption = None,
    classes: Classes = None,
    backbone: Name = "vgg16",
    weights: Weights = "hub",
    image_size: Size = None,
    grid: Grid = None,
    layers: Layers = None,
    ceil_mode: CeilMode = False,
    preprocessing: Preprocessing = Preprocessing.torchvision,
    localization_hidden: LocalizationHidden = DEFAULTS.localization_hidden,
    localization_rates: Rates = _rates,
    samples: Annotated[str, typer.Option(help=f"The K to compare, and {DEFAULTS.samples}.")] = ",".join(
        map(str, ablation.SAMPLES)
    ),
    penalty: PenaltyOption = Penalty.sum,
    hidden: Hidden = DEFAULTS.hidden,
    batch: Batch = DEFAULTS.batch,
    epochs: Epochs = DEFAULTS.epochs,
    learning_rate: LearningRate = DEFAULTS.learning_rate,
    storage: StorageOption = Storage.float16,
    seed: Seed = DEFAULTS.seed,
    crf: Crf = False,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """The paper's Tables 1 to 3: losses, sampling strategies, numbers of samples; and the localization's maps alone.

    If it is interrupted the same command goes on where it was.
    """
    with one_sentence(), distributed.process_group(device) as on:
        crf = crf and _crf_is_there()
        config = SegmentConfig(
            localization_hidden=localization_hidden,
            localization_rates=_numbers("localization-rates", localization_rates, float),
            penalty=penalty.value,
            hidden=hidden,
            batch=batch,
            epochs=epochs,
            learning_rate=learning_rate,
            storage=storage.value,
            seed=seed,
        )
        counts = _numbers("samples", samples, int)
        created = _created(backbone, weights, image_size, grid, layers, ceil_mode, preprocessing)
        network, judge = backbones.create(**created), test or root
        found = ablation.run(
            _load(root, split, skip_bad, classes, tags=tags, masks=False),
            _load(judge, test_split or _test_split(judge), skip_bad, classes, mask_numbers=mask_numbers),
            network,
            out,
            config,
            samples=counts,
            crf=crf,
            created=created,
            device=on,
        )
        sections = ablation.sections(found, config)
        files.write_json(out / "results.json", found)
        report.write(out, "Segmentation from tags, compared", sections)
        for section in sections:
            accuracy.show(section.heading, section.table)
        typer.echo(f"report: {out / 'report.html'}, {out / 'report.md'}")


def _created(
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
        chosen = _listed("layers", layers)
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


def _load(
    root: Path,
    split: str | None,
    skip_bad: bool,
    classes: str | None = None,
    *,
    tags: str | None = None,
    mask_numbers: MaskNumbers | None = None,
    masks: bool = True,
) -> TaggedImages:
    only = None if classes is None else _listed("classes", classes)
    choice = {"split": split, "tags": tags, "mask_numbers": mask_numbers and mask_numbers.value}
    given = {name: value for name, value in choice.items() if value is not None}
    found = data.load(root, masks=masks, skip_bad=skip_bad, **given)
    return found if only is None else found.only(only)


def _test_split(root: Path) -> str | None:
    """The list that is judged by where none is asked for."""
    return "val" if voc.find(root) is not None else "val2017" if coco.find(root) is not None else None


def _files(paths: list[Path], out: Path | None = None) -> dict[str, Path]:
    """The images of ``paths``, which are files or folders of them, by their path in there without the suffix.

    In a folder, what is hidden and what is in the folder ``out`` of results do not count.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        inner = [path] if path.is_file() else _inside(path, out)
        if not inner:
            raise ValueError(f"{path} holds no image")
        for file in inner:
            name = file.relative_to(path.parent if path.is_file() else path).with_suffix("").as_posix()
            if found.setdefault(name, file) != file:
                raise ValueError(f"images must have different names; {found[name]} and {file} are both {name}")
    return found


def _inside(folder: Path, out: Path | None) -> list[Path]:
    results = None if out is None else Path(os.path.relpath(out.resolve(), folder.resolve()))
    found = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        # not where the results are in the folder itself: there is no telling them from images then
        if is_image(file.name) and not hidden and (results == Path() or results not in inside.parents):
            found.append(file)
    return found


def _refuse_overwriting(paths: dict[str, Path], out: Path, endings: Sequence[str]) -> None:
    """Whether every result has a file of its own in ``out``, and none is one of the images."""
    targets = [out / f"{name}{ending}.png" for name in paths for ending in endings]
    images = {path.resolve() for path in paths.values()}
    if lost := [str(target) for target in targets if target.resolve() in images]:
        raise ValueError(f"out must be another folder: there images would be overwritten, {some(lost)}")
    if twice := [str(target) for target, count in Counter(targets).items() if count > 1]:
        raise ValueError(f"results must have different names; of two images would be {some(twice)}")


def _tagged(paths: dict[str, Path], name: str, skip_bad: bool) -> TaggedImages:
    """Files that can be read, by name, all of the class ``name``."""
    root = Path(os.path.commonpath([path.absolute().parent for path in paths.values()]))
    return checked(
        TaggedImages(list(paths), [name], np.ones((len(paths), 1)), list(paths.values())), root, skip_bad=skip_bad
    )


def _crf_is_there() -> bool:
    if why := crf.available():
        typer.echo(f"the CRF is left out: {why}", err=True)
    return not why


def _show_localization(segmenter: Any, classes: Sequence[str]) -> None:
    """How well each class is told from the others: what to look at where a class is not found."""
    tags = [tag for part in segmenter.parts() for listed in part.tags.values() for tag in listed]
    rows = [["class", "images", "log-loss of the localization", "first epoch"]]
    for name in classes:
        losses = segmenter.losses()[name]
        rows.append([name, str(tags.count(name)), f"{losses[-1]:.3f}", f"{losses[0]:.3f}"])
    accuracy.show("Localization: a guess has 0.693", rows)


def _show_times(segmenter: Any, title: str) -> None:
    if times := segmenter.times().get(title):
        told = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in times.items())
        typer.echo(f"{told}; {sum(times.values()):.1f} s in all")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _size(option: str, text: str | None) -> list[int] | None:
    try:
        if text is None:
            return None
        height, width = (int(part) for part in text.split("x"))
        return [height, width]
    except ValueError:
        raise ValueError(f"{option} must be HEIGHTxWIDTH such as 256x336, got {text!r}") from None


def _listed(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{option} must be names with commas between them, got {text!r}")
    return parts


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{option} must be {whole}numbers such as 1,2, got {text!r}") from None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, report and segmenters.", file_okay=False)] = Path(
        "segment-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of scenes, weights and orders.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train just enough to see that everything runs; the numbers mean nothing."),
    ] = False,
) -> None:
    """The paper's tables on scenes of handwritten digits, two classes added on the fly, and pictures of it all.

    It takes a few minutes on two cores and needs no download. If it is interrupted, in whatever way, the same command
    goes on where it was and ends with the same numbers.
    """
    from moe_kernels.models.segmentation import demo as experiment

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    begun = time.monotonic()
    with one_sentence():
        plan = experiment.plan(quick, seed)
        found = experiment.run(out, plan)
    for section in ablation.sections(found, plan.segmenter):
        accuracy.show(section.heading, section.table)
    typer.echo(f"{time.monotonic() - begun:.0f} s. Report: {out / 'report.html'}, {out / 'report.md'}")
