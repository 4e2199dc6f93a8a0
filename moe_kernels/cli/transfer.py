"""``moe-kernels transfer``: fine-tuning of pretrained backbones on folders of images, and what it does on digits."""

import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm  # type: ignore[import-untyped]

from moe_kernels.cli import accuracy
from moe_kernels.cli.common import (
    THREADS,
    Device,
    Precision,
    SkipBad,
    Workers,
    check_writable,
    first_rank_first,
    one_sentence,
)
from moe_kernels.cli.transfer_columns import DEFAULTS, PAPER, configurations
from moe_kernels.models import distributed, runs
from moe_kernels.models.transfer import backbones, protocol, report, sources, tables
from moe_kernels.models.transfer import data as targets
from moe_kernels.models.transfer.configuration import METHODS, PLAIN, FineTuneConfig
from moe_kernels.models.transfer.trainer import Diverged

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

EMBEDDED = "embedded:"


class Scope(str, Enum):
    """Over what a conflict is looked for."""

    everything = "global"
    tensor = "tensor"
    group = "group"


@app.command()
def train(
    root: Annotated[
        Path,
        typer.Argument(
            help="The target: ROOT/train/<class>/<image> and ROOT/test/…, or ROOT/<class>/<image>; or an embedded one, "
            f"{EMBEDDED}{{{','.join(sources.TARGETS)}}}."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="A backbone of timm or torchvision; torchvision/NAME says which.")
    ] = "resnet18",
    source: Annotated[
        str,
        typer.Option(help="The source's weights: a .safetensors or .pth file, or hub: the library's own."),
    ] = backbones.HUB,
    source_name: Annotated[
        str | None, typer.Option(help="Of the source in tables. Default: the file's, of hub the model's.")
    ] = None,
    method: Annotated[
        list[str], typer.Option(help=f"{', '.join(METHODS)}; may be repeated. {PAPER}: the five columns of its tables.")
    ] = [DEFAULTS.method],  # noqa: B006
    dtnh: Annotated[
        bool, typer.Option("--dtnh", help="The regularizer's gradient loses what is against the empirical loss's.")
    ] = DEFAULTS.dtnh,
    coefficient: Annotated[float | None, typer.Option(help="λ in J + λΩ. Default: the method's own.")] = None,
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Choose λ for each method on folds of the training images.")
    ] = False,
    grid: Annotated[
        str | None, typer.Option(help="The λ to choose from, 0.01,0.1. Default: powers of ten around the method's own.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    coefficient_decay: Annotated[
        float, typer.Option(help="What λ is multiplied with after each epoch.")
    ] = DEFAULTS.coefficient_decay,
    parameters: Annotated[
        str | None, typer.Option(help="Of l2 and l2-sp: kernels or all. Default: all for l2, kernels for l2-sp.")
    ] = DEFAULTS.parameters,
    layers: Annotated[
        str | None, typer.Option(help="Of feature methods, layer1,layer2. Default: the last convolution of each stage.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Module names of the new head. Default: they are found.")] = None,
    head_decay: Annotated[float, typer.Option(help="Weight decay of the new head.")] = DEFAULTS.head_decay,
    scope: Annotated[Scope, typer.Option(help="Over what DTNH looks for a conflict.")] = Scope.everything,
    anchored_only: Annotated[
        bool, typer.Option("--anchored-only", help="The new head takes no part in that.")
    ] = DEFAULTS.anchored_only,
    measure: Annotated[
        bool, typer.Option("--measure", help="Angles of plain feature methods too, for a second backward.")
    ] = DEFAULTS.measure,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method, each with the next seed.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the first.")] = DEFAULTS.seed,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULTS.steps,
    batch: Annotated[int, typer.Option(help="Images of a step, over all ranks.")] = DEFAULTS.batch,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULTS.learning_rate,
    drop_at: Annotated[
        float,
        typer.Option(
            help="The share of the steps, 0 … 1, after which the learning rate is divided by 10: of the paper's 8,000 "
            "after 6,000; its recipe for CIFAR, 6,000 of 20,000, is 0.3."
        ),
    ] = DEFAULTS.drop_at,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = DEFAULTS.momentum,
    eval_every: Annotated[int, typer.Option(help="Steps between two looks at the test images.")] = DEFAULTS.eval_every,
    train_per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of ROOT/<class>/<image>: images of each class to train on, drawn at random. Embedded: 10 by default.",
        ),
    ] = None,
    test_per_class: Annotated[
        int | None, typer.Option(min=1, help="And of the others to test on. Default: all; embedded: 40.")
    ] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Size of the images. Default: the model's, 224.")] = None,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Size that images of files are cut out of. Default: 256/224 of it.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="bfloat16 runs the model under autocast.")] = Precision.float32,
    device: Device = "auto",
    workers: Workers = 4,
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option(help="Folder for results, report and checkpoints.")] = Path("transfer-runs"),
) -> None:
    """Fine-tune a pretrained backbone on images of other classes, with DTNH's recipe (arXiv 1911.07489).

    Finished runs under OUT are kept and an interrupted one goes on where it was, so the same command may be repeated,
    and several of them, for other targets, sources or methods, may share OUT: the tables are of all that is there.
    """
    with one_sentence(), distributed.process_group(device) as on:
        configs = configurations(
            method,
            dtnh=dtnh,
            coefficient=coefficient,
            coefficient_decay=coefficient_decay,
            parameters=parameters,
            layers=_names(layers),
            head=_names(head),
            head_decay=head_decay,
            scope=scope.value,
            anchored_only=anchored_only,
            seed=seed,
            steps=steps,
            batch=batch,
            learning_rate=lr,
            drop_at=drop_at,
            momentum=momentum,
            eval_every=eval_every,
            measure=measure,
            precision=precision.value,
        )
        _check_coefficients(configs, coefficient, cross_validate, grid)
        check_writable(out)
        backbone = backbones.load(model, source, head=_names(head))
        size = backbone.size if crop is None else crop
        backbone.check_size(size)
        data = _target(str(root), backbone, size, resize, train_per_class, test_per_class, seed, skip_bad)
        name = source_name or (backbone.name if source == backbones.HUB else Path(source).stem)
        pair = protocol.Pair(name, lambda: backbone.build(len(data.classes)), data, backbone.description())
        _check_name(pair, out)
        diverged = []
        for config in configs:
            try:
                if cross_validate and config.method != PLAIN:
                    config = _cross_validated(pair, config, out, _numbers(grid), folds, on, workers)
            except Diverged as error:
                diverged.append(f"{protocol.label(config.name, config.dtnh)}: {error}")
                _say(diverged[-1])
                continue
            for run in protocol.repeats(pair, config, out, repeats):
                try:
                    final = _perform(run, on, workers)["final"]
                    _say(f"{run}: {100 * final['test_accuracy']:.2f} %. Weights: {run.folder / 'final.pt'}")
                except Diverged as error:
                    diverged.append(f"{run}: {error}")
                    _say(diverged[-1])
        if distributed.rank() == 0:
            for table in report.write(out, "Fine-tuning near the source", protocol.finished(out)):
                accuracy.show(f"Source {table.source}: accuracy, %", tables.rows(table))
            typer.echo(f"report: {out / 'report.html'}")
        if diverged:
            more = f"; and {len(diverged) - 1} more" if len(diverged) > 1 else ""
            raise Diverged(f"{diverged[0]}{more}. Runs that diverged are not repeated: another λ needs another --out")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, report and checkpoints.")] = Path("transfer-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeats of each method.")] = 5,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train just enough to see that everything runs; the accuracies mean nothing."),
    ] = False,
) -> None:
    """The tables and figures of DTNH on digits, from a source that helps and from one that does not.

    It takes about twenty minutes on two cores and needs no download. If it is interrupted, in whatever way, the
    same command goes on where it was and ends with the same numbers.
    """
    from moe_kernels.models.transfer import demo as experiment

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    begun = time.monotonic()
    with one_sentence():
        found = experiment.run(out, experiment.plan(seeds, quick))
    for table in found:
        accuracy.show(f"Source {table.source}: accuracy, %", tables.rows(table))
    typer.echo(f"{time.monotonic() - begun:.0f} s. Report: {out / 'report.html'}, {out / 'report.md'}")


def _target(
    root: str,
    backbone: backbones.Backbone,
    crop: int,
    resize: int | None,
    train_per_class: int | None,
    test_per_class: int | None,
    seed: int,
    skip_bad: bool,
) -> targets.Target:
    """The target ``root``, normalized as the backbone's images were."""
    if not root.startswith(EMBEDDED):
        return first_rank_first(
            lambda: targets.load(
                root,
                train_per_class=train_per_class,
                test_per_class=test_per_class,
                seed=seed,
                crop=crop,
                resize=round(crop * 256 / 224) if resize is None else resize,
                mean=backbone.mean,
                std=backbone.std,
                skip_bad=skip_bad,
            )
        )
    for name, given in (("resize", resize is not None), ("skip-bad", skip_bad)):
        if given:
            raise ValueError(f"{name} is for images of files; those of {root} are drawn")
    return sources.target(
        root.removeprefix(EMBEDDED),
        10 if train_per_class is None else train_per_class,
        40 if test_per_class is None else test_per_class,
        seed,
        crop,
        mean=backbone.mean,
        std=backbone.std,
    )


def _check_name(pair: protocol.Pair, out: Path) -> None:
    """In the tables of ``out`` a source is one model with its weights."""
    for result in protocol.finished(out):
        theirs, ours = (
            {key: run.get(key) for key in ("model", "weights")} for run in (result["run"], pair.description)
        )
        if result["run"]["source"] == pair.source and theirs != ours:
            lines = "\n  ".join(runs.differences(theirs, ours))
            raise ValueError(
                f"{out} has runs of another source of the name {pair.source}; give this one its own with "
                f"--source-name:\n  {lines}"
            )


def _check_coefficients(
    configs: list[FineTuneConfig], coefficient: float | None, cross_validate: bool, grid: str | None
) -> None:
    regularized = {config.name for config in configs} - {PLAIN}
    if coefficient is not None and cross_validate:
        raise ValueError("coefficient and cross-validate exclude one another: give λ, or let it be chosen")
    if grid is not None and not cross_validate:
        raise ValueError("grid is what cross-validate chooses from; pass it too")
    if cross_validate and not regularized:
        raise ValueError(f"cross-validate: method {PLAIN} has no coefficient")
    for name, value in (("coefficient", coefficient), ("grid", grid)):
        if value is not None and len(regularized) != 1:
            raise ValueError(
                f"{name} is of one regularizer, got {len(regularized)}: {', '.join(sorted(regularized)) or 'none'}"
            )


def _cross_validated(
    pair: Any, config: Any, out: Path, coefficients: list[float] | None, folds: int, on: torch.device, workers: int
) -> Any:
    """``config`` with the best coefficient."""
    best = protocol.cross_validate(
        protocol.folds(pair, config, out, coefficients, folds),
        lambda run: _perform(run, on, workers, f", λ = {run.config.coefficient:g}, {run.folder.name}"),
    )
    _say(f"{protocol.label(config.name, config.dtnh)}: cross-validation chooses λ = {best:g}")
    return replace(config, coefficient=best)


def _perform(run: Any, on: torch.device, workers: int, what: str = "") -> Any:
    with tqdm(
        total=run.config.steps, desc=f"{run}{what}", unit="step", disable=None if distributed.rank() == 0 else True
    ) as bar:
        return protocol.perform(run, device=on, workers=workers, on_step=lambda step: bar.update(step - bar.n))


def _say(line: str) -> None:
    if distributed.rank() == 0:
        tqdm.write(line)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"grid must be numbers such as 0.01,0.1, got {text!r}") from None
