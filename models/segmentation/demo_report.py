"""The report of the demo: the paper's Tables 1 to 4 in form, its claims as they come out, times and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import report
from ..transfer import claims
from ..transfer.claims import Claim
from . import ablation
from .configuration import SegmentConfig
from .demo_plan import ADDED, CLASSES, Plan
from .evaluation import BACKGROUND

STEADY = (5, 50)
SPREAD = 3.4
"""In points: how far the paper's mIoU for K in STEADY lie apart."""
HARM = 1.0
"""In points: what old classes may lose. The paper has them unharmed, without a number."""

Found = Mapping[str, Any]


def write(
    out: Path,
    todo: Plan,
    found: Found,
    times: Mapping[str, float],
    stages: Mapping[str, float],
    additions: Mapping[str, Mapping[str, float]],
) -> None:
    """Write ``report.md`` and ``report.html`` into ``out``, where the pictures are.

    Args:
        found: the content of ``results.json``.
        times: seconds of each part of the demo.
        stages: of the chosen segmenter's fit.
        additions: of each class that was added.
    """
    tables = ablation.sections(found, todo.segmenter)
    sections = [
        *(replace(each, heading=f"Table {number}: {each.heading}") for number, each in enumerate(tables, 1)),
        _result(todo, found),
        report.Section(
            "What the paper claims",
            [
                "Checked on the numbers of this page and told as they come out; numbers are mIoU in percent on "
                f"{todo.validation} validation scenes, of one run. With another seed they move by several points."
            ],
            claims.rows(check(found, todo.segmenter)),
        ),
        _addition(todo, found, additions),
        report.Section("The first validation scenes", _about_picture(), picture="scenes.png"),
        report.Section("The first with an added class", picture="added.png"),
        _times(todo, times, stages),
        report.Section("What was done", _about(todo, found)),
    ]
    report.write(out, "Digits segmented from tags alone", sections)


def check(found: Found, config: SegmentConfig) -> list[Claim]:
    """What the paper claims in its section 4, in its order."""

    def of(**change: Any) -> float:
        return mean(found["variants"][ablation.name_of(replace(config, **change))]["plain"])

    ours = of()
    by_count = {
        row["config"]["samples"]: mean(row["plain"])
        for row in found["variants"].values()
        if (row["config"]["loss"], row["config"]["strategy"]) == (config.loss, config.strategy)
    }
    steady = [value for count, value in by_count.items() if STEADY[0] <= count <= STEADY[1]]
    spread = max(steady, default=0.0) - min(steady, default=0.0)
    others = {strategy: of(strategy=strategy) for strategy in ("top", "spatial", "dense")}
    background = 100 * found["points"]["background"]
    added = found["added"]["old"]
    before, after = old_classes(found["variants"][ablation.name_of(config)]["plain"]["classes"]), old_classes(added)
    refined = None if found["crf"] is None else mean(found["crf"])
    maps = mean(found["maps"])
    return [
        Claim(
            "Table 1: the global softmax is better than the pixel softmax (40.6, 38.0)",
            of(loss="global") > of(loss="pixel"),
            f"{of(loss='global'):.1f}, {of(loss='pixel'):.1f}",
        ),
        Claim(
            "The localization's maps, even at their best threshold, are a poor segmentation (25.7; ours 40.6)",
            maps < ours,
            f"{maps:.1f}; ours {ours:.1f}",
        ),
        *(
            Claim(
                f"Table 2: diverse sampling is better than {strategy} (40.6, {theirs})",
                ours > others[strategy],
                f"{ours:.1f}, {others[strategy]:.1f}",
            )
            for strategy, theirs in (("top", 30.7), ("spatial", 33.4), ("dense", 15.0))
        ),
        Claim(
            "Table 2: dense sampling is the worst",
            others["dense"] < min(ours, others["top"], others["spatial"]),
            ", ".join(f"{name} {value:.1f}" for name, value in others.items()),
        ),
        Claim("Table 3: K = 20 is the best", ours == max(by_count.values()), _counts(by_count)),
        Claim(
            f"Table 3: it matters little from K = {STEADY[0]} to {STEADY[1]} (the paper's are {SPREAD} points apart)",
            spread <= SPREAD if steady else None,
            f"{spread:.1f} points apart",
        ),
        Claim(
            "Samples of the background are usually right (here: at least nine in ten)",
            background >= 90,
            f"{background:.0f} % of them lie on the ground, {100 * found['points']['classes']:.0f} % of the others on "
            "their class",
        ),
        Claim(
            "Table 4: a CRF makes it better (45.2, 40.6)",
            None if refined is None else refined > ours,
            "no CRF was there" if refined is None else f"{refined:.1f}, {ours:.1f}",
        ),
        Claim(
            f"Adding classes does not hurt the old ones (here: by at most {HARM:g} point)",
            after >= before - HARM,
            f"{before:.1f} before, {after:.1f} after",
        ),
    ]


def mean(result: Found) -> float:
    """The mean IoU in percent."""
    return 100 * float(result["mean"])


def old_classes(classes: Mapping[str, float | None]) -> float:
    """The mean IoU of the background and the classes of the first fit, in percent."""
    values = [classes[name] for name in (BACKGROUND, *CLASSES)]
    return 100 * statistics.fmean(value for value in values if value is not None)


def _counts(by_count: Mapping[int, float]) -> str:
    return ", ".join(f"K = {count}: {value:.1f}" for count, value in sorted(by_count.items()))


def _result(todo: Plan, found: Found) -> report.Section:
    maps, plain = found["maps"], found["variants"][ablation.name_of(todo.segmenter)]["plain"]
    rows = [
        ["the localization's maps", maps, f"best of {len(todo.thresholds)} thresholds: {maps['threshold']:g}"],
        ["segmenter", plain, "no post-processing"],
    ]
    if found["crf"] is not None:
        rows.append(["segmenter and CRF", found["crf"], "its authors' default parameters"])
    labels = [BACKGROUND, *CLASSES]
    missing = [] if found["crf"] is not None else ['Without the CRF, which needs "moe-kernels[crf]".']
    return report.Section(
        "Table 4: The segmenter",
        ["IoU in percent on the validation scenes: of the background, of each class, and their mean.", *missing],
        [
            ["method", "mIoU", *labels, "comments"],
            *([name, f"{mean(each):.1f}", *_classes(each["classes"], labels), comment] for name, each, comment in rows),
        ],
    )


def _classes(found: Mapping[str, float | None], labels: Sequence[str]) -> list[str]:
    return ["–" if (value := found[name]) is None else f"{100 * value:.0f}" for name in labels]


def _addition(todo: Plan, found: Found, additions: Mapping[str, Mapping[str, float]]) -> report.Section:
    before = found["variants"][ablation.name_of(todo.segmenter)]["plain"]["classes"]
    old, new = found["added"]["old"], found["added"]["new"]
    of_all = 100 * statistics.fmean(value for value in new.values() if value is not None)
    labels = [BACKGROUND, *CLASSES, *ADDED]
    seconds = " and ".join(f"{sum(additions[f'add {name}'].values()):.1f} s" for name in ADDED)
    return report.Section(
        "Two classes more",
        [
            f"{' and '.join(ADDED)} were taught to the finished segmenter, one after the other, from {todo.more} "
            f"scenes with each; that took {seconds}. Each time one localization network was trained, points were "
            "sampled in the new scenes and the classifier was trained anew; the other localization networks and the "
            "old points stayed as they were. IoU in percent.",
        ],
        [
            ["scenes", "mean", *labels],
            ["old classes, before", f"{old_classes(before):.1f}", *_classes(before, labels[: -len(ADDED)]), "", ""],
            ["old classes, after", f"{old_classes(old):.1f}", *_classes(old, labels[: -len(ADDED)]), "", ""],
            ["all classes, after", f"{of_all:.1f}", *_classes(new, labels)],
        ],
    )


def _times(todo: Plan, times: Mapping[str, float], stages: Mapping[str, float]) -> report.Section:
    whole = sum(times.values())
    rows = [["part", "seconds"], *([name, f"{seconds:.1f}"] for name, seconds in times.items())]
    rows.append(["**all**", f"**{whole:.0f}**"])
    rows += [[f"the chosen segmenter: {name}", f"{seconds:.1f}"] for name, seconds in stages.items()]
    return report.Section(
        "Times",
        [
            "Without what killed processes did. The chosen segmenter is one of the variants; features and "
            f"localization are of {todo.train} scenes and {len(CLASSES)} classes, and other variants share them."
        ],
        rows,
    )


def _about_picture() -> list[str]:
    return [
        "localization: the class of those in the tags whose score is highest, as bright as that score. samples: the "
        "points that would be labelled if it were a training scene, in the colour of their class; those of the "
        "background are white."
    ]


def _about(todo: Plan, found: Found) -> list[str]:
    config, first = todo.segmenter, todo.pretraining
    facts = asdict(config)
    rates = " → ".join(f"{count} × {rate:g}" for rate, count in _runs(facts["localization_rates"]))
    return [
        f"The backbone, a VGG of ten convolutions, was trained for {first.steps} steps of {first.batch_per_domain} "
        f"pictures on {todo.letters:,} capital letters, drawn like the digits "
        f"({100 * found['letters']:.1f} % of unseen ones right), and frozen.",
        f"{todo.train} training scenes of the digits {' '.join(CLASSES)} with their tags, {todo.validation} validation "
        "scenes; an object is the whole sticker, paper and strokes.",
        f"Localization: {config.localization_hidden} hidden units, Adam, a learning rate an epoch ({rates}). "
        f"Classifier: {config.hidden} hidden units, batches of {config.batch} points, {config.epochs} epochs, learning "
        f"rate {config.learning_rate:g}. The paper's are 1024 hidden units and three epochs; 512 hidden units, batches "
        "of 100, two epochs.",
        "This page was written by `moe-kernels segment demo`.",
    ]


def _runs(rates: Sequence[float]) -> list[tuple[float, int]]:
    """Each rate and how many epochs it lasts."""
    found: list[tuple[float, int]] = []
    for rate in rates:
        if found and found[-1][0] == rate:
            found[-1] = (rate, found[-1][1] + 1)
        else:
            found.append((rate, 1))
    return found
