"""The report of the demo: tables in the form of the paper's, its claims as they come out, its Figures 3 to 5."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .. import figures, files, report
from . import claims, pictures, protocol, tables
from .configuration import PLAIN
from .data import Target
from .demo_plan import BASE, REGULARIZED, Plan, network
from .protocol import Table, label

# The pairs whose curves are shown: a source that suits its target and one that does not.
SHOWN = (("letters", "inverted"), ("textures", "sketch"))
# In degrees. The paper has angles 2 and 4 close, without a number.
SMALL_GAP = 10.0

Results = list[dict[str, Any]]


def write(
    out: Path,
    todo: Plan,
    tasks: Sequence[Target],
    pretrained: Mapping[str, Any],
    scratch: Results,
    chosen: Results,
    strong: Results,
) -> list[Table]:
    """Write ``results.json``, the report and its pictures into ``out``.

    Args:
        tasks: the sources and the targets.
        pretrained: the result of each source, by name.
        scratch, chosen: from random weights; and the five columns, with the coefficients of cross-validation.
        strong: fine-tuning, and L2-SP with and without DTNH with its strong coefficient.

    Returns:
        The tables of ``chosen``, one a source.
    """
    found, strong_found = protocol.collect(chosen), protocol.collect(strong)
    checked = check(found, strong_found, strong)
    files.write_json(
        out / "results.json",
        {
            "plan": asdict(todo),
            "tables": [tables.to_json(table) for table in found],
            "strong": [tables.to_json(table) for table in strong_found],
            "claims": [asdict(claim) for claim in checked],
            "pretraining": pretrained,
            "runs": {"scratch": scratch, "chosen": chosen, "strong": strong},
        },
    )
    plot_tasks(tasks, out / "tasks.png")
    sections = [
        *(report.Section(f"Source {table.source}", [tables.CAPTION], tables.rows(table)) for table in found),
        report.Section(
            f"With a strong λ of {todo.strong():g}",
            ["L2-SP with the largest coefficient of its grid, whatever cross-validation says of it."],
            _joined(strong_found),
        ),
        report.Section("What the paper claims", _about_claims(todo), claims.rows(checked)),
        *_curves(out, todo, strong),
        report.Section("What DTNH changes", _about_facts(), _facts(strong)),
        report.Section(
            "What a source is worth",
            [
                "Fine-tuning without a regularizer, beside the same network trained from random weights. "
                + " ".join(
                    f"Of unseen {name} the pretrained network has {100 * result['final']['test_accuracy']:.1f} % right."
                    for name, result in pretrained.items()
                )
            ],
            _worth([*protocol.collect(scratch), *found]),
        ),
        report.Section("Coefficients", ["λ, chosen by cross-validation."], _coefficients(chosen)),
        report.Section("What was trained", _about_training(todo), picture="tasks.png"),
    ]
    report.write(out, "Transfer that helps and transfer that hurts", sections)
    return found


def check(chosen: Sequence[Table], strong: Sequence[Table], strong_runs: Results) -> list[claims.Claim]:
    """What the paper claims, in its order; its curves compare runs with one coefficient, so here the strong ones."""
    base, dtnh = label(BASE), label(BASE, True)
    hurts = f"Where {base} is below fine-tuning, {dtnh} is not"
    return [
        claims.never_hurts(f"{hurts} (λ cross-validated)", chosen, BASE),
        claims.never_hurts(f"{hurts} (strong λ)", strong, BASE),
        claims.not_below_base(
            "DTNH is not below its base in any cell (λ cross-validated)", chosen, [BASE, "know-dist"]
        ),
        claims.throughout(
            f"Figure 3: the empirical loss of {dtnh} is below that of {base} at every stage",
            strong_runs,
            BASE,
            "empirical_loss",
            lambda ours, theirs: ours < theirs,
        ),
        claims.throughout(
            "Figure 3: and so is its test loss", strong_runs, BASE, "test_loss", lambda ours, theirs: ours < theirs
        ),
        claims.throughout(
            "Figure 4: angle 1 is not above angle 3 at any stage",
            strong_runs,
            BASE,
            "angle_to_loss",
            lambda ours, theirs: ours <= theirs,
            "°",
        ),
        claims.throughout(
            f"Figure 5: angles 2 and 4 are close at every stage (here: within {SMALL_GAP:g}°)",
            strong_runs,
            BASE,
            "angle_to_regularizer",
            lambda ours, theirs: abs(ours - theirs) <= SMALL_GAP,
            "°",
        ),
    ]


def plot_tasks(tasks: Sequence[Target], path: str | os.PathLike[str], columns: int = 10) -> None:
    """A row for each task: the first test image of each of its first ``columns`` classes."""
    figure = Figure(figsize=(0.9 * columns + 1.2, 0.95 * len(tasks)), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), columns, squeeze=False), tasks, strict=True):
        for panel in row:
            panel.axis("off")
        for label_, panel in enumerate(row[: len(task.classes)]):
            found = torch.nonzero(task.test.labels == label_).flatten().tolist()
            if found:
                image = task.test[found[0]][0].movedim(0, -1)
                panel.imshow((image * torch.tensor(task.std) + torch.tensor(task.mean)).clamp(0, 1).numpy())
        row[0].text(-0.15, 0.5, task.name, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figures.save(figure, path)


def _about_claims(todo: Plan) -> list[str]:
    return [
        "Checked on the numbers of this page and told as they come out. Below fine-tuning means by more than the "
        f"standard error of the difference. A stage is {todo.training.eval_every} of the {todo.training.steps} steps; "
        f"the figures compare separate runs with one λ ({todo.strong():g}) that see the same batches, by means over "
        "seeds."
    ]


def _about_facts() -> list[str]:
    return [
        "Means over all steps of the runs with a strong λ: how often the two gradients conflict, their cosine, and "
        "a in DTNH's direction d = a g + λ r. Where a is near 1 a batch's gradient has little in common with the "
        "regularizer's, and DTNH takes nearly the same step as L2-SP."
    ]


def _about_training(todo: Plan) -> list[str]:
    size = sum(parameter.numel() for parameter in network(10).parameters())
    first, then = todo.pretraining, todo.training
    grids = "; ".join(
        f"{label(name)} {', '.join(f'{v:g}' for v in values)}" for name, values in todo.coefficients.items()
    )
    return [
        f"A ResNet of {size:,} parameters, pretrained for {first.steps} steps on {todo.images:,} images of a source. "
        f"Each target has {10 * todo.per_class} images to train on and {10 * todo.tested} others to test on; the "
        "digits are real, and none is in a source.",
        f"Each run: {then.steps} steps of {then.batch} images, SGD with momentum {then.momentum:g}, learning rate "
        f"{then.learning_rate:g}, a tenth of that after {then.drop_at:.0%} of the steps. For one target and seed all "
        f"methods see the same new head and the same batches. λ is chosen from {grids} on {todo.folds} folds of the "
        "training images.",
        "One picture of each of the first ten classes, of sources and targets.",
    ]


def _joined(found: Sequence[Table]) -> list[list[str]]:
    """The tables of several sources in one."""
    head, *_ = tables.rows(found[0])
    return [
        ["source → target", *head[1:]],
        *([f"{table.source} → {row[0]}", *row[1:]] for table in found for row in tables.rows(table)[1:]),
    ]


def _worth(found: Sequence[Table]) -> list[list[str]]:
    rows = [["target", *(f"from {table.source}" for table in found)]]
    for target in found[0].targets:
        rows.append([target, *(tables.percent(table.values(target, label(PLAIN))) for table in found)])
    return rows


def _coefficients(chosen: Results) -> list[list[str]]:
    found: dict[str, dict[str, str]] = {}
    for run in (result["run"] for result in chosen if result["run"]["method"] != PLAIN):
        pair = found.setdefault(f"{run['source']} → {run['data']}", {})
        pair[label(run["method"], run["dtnh"])] = f"{run['coefficient']:g}"
    columns = [label(method, dtnh) for method, dtnh in REGULARIZED]
    return [["source → target", *columns], *([pair, *(row[c] for c in columns)] for pair, row in found.items())]


def _facts(strong: Results) -> list[list[str]]:
    keys = {"conflict_rate": "conflicts", "cosine": "cosine", "scale": "a"}
    values: dict[str, list[dict[str, float]]] = {}
    for result in strong:
        if (run := result["run"])["dtnh"]:
            values.setdefault(f"{run['source']} → {run['data']}", []).extend(result["history"])
    rows = [["source → target", *keys.values()]]
    for pair, entries in values.items():
        means = [sum(known) / len(known) for key in keys if (known := [e[key] for e in entries if e[key] is not None])]
        rows.append([pair, f"{means[0]:.0%}", f"{means[1]:.3f}", f"{means[2]:.3f}"])
    return rows


def _curves(out: Path, todo: Plan, strong: Results) -> list[report.Section]:
    """Figures 3 to 5 of the shown pairs."""
    sections = []
    for source, target in SHOWN:
        if source not in todo.sources or target not in todo.targets:
            continue
        plain, dtnh = (
            [
                r
                for r in strong
                if (run := r["run"])["method"] == BASE
                and run["dtnh"] is side
                and (run["source"], run["data"]) == (source, target)
            ]
            for side in (False, True)
        )
        for figure, what, plot in (
            (3, "losses", pictures.plot_losses),
            (4, "angles to the loss's gradient", pictures.plot_angles_to_loss),
            (5, "angles to the regularizer's gradient", pictures.plot_angles_to_regularizer),
        ):
            name = f"figure{figure}-{source}-{target}.png"
            plot(plain, dtnh, out / name)
            sections.append(report.Section(f"Figure {figure}: {what}, {source} → {target}", picture=name))
    return sections
