"""The paper's comparisons (section 4.2, Tables 1 to 3) on any tagged images: losses, strategies, numbers of samples.

Every variant is a segmenter in a folder of its own. What variants have in common (the features, the localization, its
score maps) is computed once and linked into each.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import files, report, runs
from ..data.images import some
from . import saved
from .backbones import Backbone
from .configuration import LOSSES, STRATEGIES, SegmentConfig
from .data.tagged import TaggedImages
from .segmenter import Segmenter, fit
from .stages import FEATURES, LOCALIZATION, Part, share

SAMPLES = (1, 5, 10, 20, 50)
THRESHOLDS = tuple(step / 20 for step in range(21))
_EVALUATION = "evaluation.json"


def variants(config: SegmentConfig, samples: Sequence[int] = SAMPLES) -> dict[str, SegmentConfig]:
    """The segmenters of the three tables by name: ``config``, and others that differ from it in one thing."""
    found = [config]
    found += [replace(config, loss=loss) for loss in LOSSES]
    found += [replace(config, strategy=strategy) for strategy in STRATEGIES]
    found += [replace(config, samples=count) for count in samples]
    return {name_of(variant): variant for variant in found}


def name_of(config: SegmentConfig) -> str:
    """``"global-diverse-20"``."""
    return f"{config.loss}-{config.strategy}-{config.samples}"


def run(
    train: TaggedImages,
    test: TaggedImages,
    backbone: Backbone,
    out: str | os.PathLike[str],
    config: SegmentConfig | None = None,
    *,
    samples: Sequence[int] = SAMPLES,
    thresholds: Sequence[float] = THRESHOLDS,
    crf: bool = False,
    created: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Fit every variant to ``train`` and judge it by the masks of ``test``, or resume; finished ones are not repeated.

    Of a variant that is judged its points are deleted, but for that of ``config``.

    Args:
        samples: K of the last table.
        thresholds: at which the localization's maps are tried as the result.
        crf: with the dense CRF too.
        created, device, progress: as for :func:`.segmenter.fit`.

    Returns:
        ``variants``: what :meth:`Segmenter.evaluate` found and ``config``, by name. ``maps``: the same of the maps of
        ``config``'s localization, at the ``threshold`` that is best on ``test``.

    Raises:
        ValueError: as for :func:`.segmenter.fit`; or ``test`` has no masks, or a class that ``train`` has not.
    """
    config, out = config or SegmentConfig(), Path(out)
    if not test.has_masks:
        raise ValueError("test images must have masks to judge by; none has one")
    if unknown := [name for name in test.classes if name not in train.classes]:
        raise ValueError(
            f"test images must have the classes that are trained, {some(train.classes)}; got {some(unknown)}"
        )
    if not thresholds:
        raise ValueError("thresholds must be at least one, got none")
    todo = variants(config, samples)
    if (most := max(variant.samples for variant in todo.values())) > backbone.grid[0] * backbone.grid[1]:
        raise ValueError(f"samples must be at most the locations of the grid, {backbone.grid}, got {most}")
    content = _digest(test)
    judged = {"test": content, "crf": crf}
    found: dict[str, Any] = {"variants": {}}
    for name, variant in todo.items():
        folder = out / name
        share(folder, {FEATURES: out / FEATURES, LOCALIZATION: out / f"{LOCALIZATION}-{variant.loss}"})
        share(Part.place(folder, 0), {Part.SCORES: out / f"{Part.SCORES}-{variant.loss}"})
        segmenter = fit(train, backbone, folder, variant, created=created, device=device, progress=progress)
        result = _kept(folder / _EVALUATION, judged)
        if result is None:
            result = segmenter.evaluate(test, crf=crf, progress=progress)
            files.write_json(folder / _EVALUATION, {"run": judged, **result})
        if variant != config:
            shutil.rmtree(segmenter.parts()[0].points, ignore_errors=True)
        found["variants"][name] = {"config": runs.identity(asdict(variant)), **result}
    segmenter = Segmenter.load(out / name_of(config), backbone, device=device)
    judged = {"test": content, "thresholds": list(thresholds)}
    path = segmenter.folder / f"maps-{_EVALUATION}"
    result = _kept(path, judged)
    if result is None:
        tried = segmenter.evaluate_localization(test, thresholds, progress=progress)
        threshold = max(tried, key=lambda threshold: tried[threshold]["mean"])
        result = {"threshold": threshold, **tried[threshold]}
        files.write_json(path, {"run": judged, **result})
    return found | {"maps": result}


def _digest(test: TaggedImages) -> str:
    """What tells images with masks from others: names, classes, pictures, and what the masks say."""
    masks = (test.mask(index) for index in range(len(test)))
    told = ("" if mask is None else f"{mask.shape} {hashlib.sha256(mask).hexdigest()}" for mask in masks)
    return saved.digest([*test.classes, *map(str, zip(test.names, test.digests(), told, strict=True))])


def _kept(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found before, of the same ``run``."""
    found: dict[str, Any] = files.read_json(path) if path.exists() else {}
    return found if found.pop("run", None) == run else None


def sections(found: Mapping[str, Any], config: SegmentConfig | None = None) -> list[report.Section]:
    """The tables of what :func:`run` found, for ``models.report``: mean IoU in percent; the best of a table is bold."""
    config = config or SegmentConfig()
    rows = found["variants"]
    crf = "crf" in next(iter(rows.values()))

    def table(head: str, names: Mapping[str, str]) -> list[list[str]]:
        kinds = ["plain", "crf"] if crf else ["plain"]
        best = {kind: max(rows[name][kind]["mean"] for name in names.values()) for kind in kinds}
        lines = [[head, "mIoU, %", "with CRF, %"][: 1 + len(kinds)]]
        for label, name in names.items():
            means = [(rows[name][kind]["mean"], best[kind]) for kind in kinds]
            lines.append(
                [label, *(f"**{100 * mean:.1f}**" if mean == top else f"{100 * mean:.1f}" for mean, top in means)]
            )
        return lines

    def named(change: str, values: Sequence[Any]) -> dict[str, str]:
        return {str(value): name_of(replace(config, **{change: value})) for value in values}

    counts = sorted(
        row["config"]["samples"]
        for row in rows.values()
        if (row["config"]["loss"], row["config"]["strategy"]) == (config.loss, config.strategy)
    )
    maps = found["maps"]
    common = f"{config.loss} softmax, {config.strategy} sampling, K = {config.samples}, but for what a table compares."
    return [
        report.Section("Localization", (f"All tables: {common}",), table("softmax", named("loss", LOSSES[::-1]))),
        report.Section(
            "Sampling",
            (
                f"The localization's maps themselves, at their best threshold on these images, {maps['threshold']:g}: "
                f"{100 * maps['mean']:.1f} %.",
            ),
            table("strategy", named("strategy", STRATEGIES[::-1])),
        ),
        report.Section("Samples a class and image", (), table("K", named("samples", counts))),
    ]
