"""``moe-kernels segment``: segmentation learned from image tags alone (arXiv 1612.01991)."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from moe_kernels.cli import accuracy
from moe_kernels.cli.common import THREADS, Device, SkipBad, one_sentence
from moe_kernels.cli.segment_images import default_test_split, image_files, load, refuse_overwriting, tagged
from moe_kernels.cli.segment_options import (
    DEFAULTS,
    RATES,
    Batch,
    CeilMode,
    Classes,
    Crf,
    Data,
    Epochs,
    Grid,
    Hidden,
    Layers,
    LearningRate,
    LocalizationHidden,
    Loss,
    LossOption,
    MaskNumbersOption,
    Name,
    Penalty,
    PenaltyOption,
    Preprocessing,
    Rates,
    Refine,
    Run,
    Samples,
    Seed,
    Sigma,
    Size,
    Split,
    Storage,
    StorageOption,
    Strategy,
    StrategyOption,
    Tags,
    TestSplit,
    Threshold,
    Weights,
    created_by,
    numbers,
)
from moe_kernels.models import distributed, figures, files, report, segmentation
from moe_kernels.models.segmentation import ablation, backbones, crf, pictures
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.data import coco, folder, voc

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

EVALUATION = "evaluation.json"


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
    localization_rates: Rates = RATES,
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
            localization_rates=numbers("localization-rates", localization_rates, float),
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
        created = created_by(backbone, weights, image_size, grid, layers, ceil_mode, preprocessing)
        network = backbones.create(**created)  # before the images, which may take minutes to check
        dataset = load(root, split, skip_bad, classes, tags=tags, masks=False)
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
        paths = image_files(images, out)
        refuse_overwriting(paths, out, ["", "-overlay"] if overlay else [""])
        found = tagged(paths, "any", skip_bad)
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
        dataset = load(root, split or default_test_split(root), skip_bad, classes, mask_numbers=mask_numbers)
        found = segmenter.evaluate(dataset, crf=crf)
        kinds = [kind for kind in ("plain", "crf") if kind in found]
        rows = [["class", "IoU, %", "with CRF, %"][: 1 + len(kinds)]]
        for name in found["plain"]["classes"]:
            rows.append([name, *(_percent(found[kind]["classes"][name]) for kind in kinds)])
        rows.append(["**mean**", *(f"**{_percent(found[kind]['mean'])}**" for kind in kinds)])
        path = out or run / EVALUATION
        files.write_json(path, {"data": str(root), "split": split or default_test_split(root), **found})
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
            found = load(images[0], split, skip_bad, tags=tags, masks=False)
        elif split or tags:
            raise ValueError("split and tags are choices for one folder of tagged data, and these are bare images")
        else:
            found = tagged(image_files(images), name, skip_bad)
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
    localization_rates: Rates = RATES,
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
            localization_rates=numbers("localization-rates", localization_rates, float),
            penalty=penalty.value,
            hidden=hidden,
            batch=batch,
            epochs=epochs,
            learning_rate=learning_rate,
            storage=storage.value,
            seed=seed,
        )
        counts = numbers("samples", samples, int)
        created = created_by(backbone, weights, image_size, grid, layers, ceil_mode, preprocessing)
        network, judge = backbones.create(**created), test or root
        found = ablation.run(
            load(root, split, skip_bad, classes, tags=tags, masks=False),
            load(judge, test_split or default_test_split(judge), skip_bad, classes, mask_numbers=mask_numbers),
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
