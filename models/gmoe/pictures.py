"""Pictures of a study, as PNG: accuracy curves, the domains, and which patches go to which expert.

They are drawn without a display and written atomically.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from moe_kernels.nn import MoE

from .. import figures
from ..data.domains import Domains


def plot_curves(results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Accuracy over training, a panel for each held-out domain: the mean over trials with their range as a band."""
    domains = list(dict.fromkeys("+".join(result["run"]["held_out"]) for result in results))
    models = list(dict.fromkeys(result["run"]["model"] for result in results))
    figure = Figure(figsize=(3.2 * len(domains) + 0.6, 3.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(domains), squeeze=False, sharey=True)[0]
    for panel, domain in zip(panels, domains, strict=True):
        for color, model in zip(figures.colors(len(models)), models, strict=True):
            histories = [
                result["history"]
                for result in results
                if result["run"]["model"] == model and "+".join(result["run"]["held_out"]) == domain
            ]
            if not histories:
                continue
            steps = [entry["step"] for entry in histories[0]]
            for key, style in (("test", "-"), ("validation", ":")):
                values = 100 * np.array([[entry[key] for entry in history] for history in histories], float)
                figures.curves(panel, steps, values, style, color=color, label=f"{model}, {key}")
        panel.set(title=f"{domain} held out", xlabel="step")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0].set_ylabel("accuracy, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 * len(models),
        frameon=False,
    )
    figures.save(figure, path)


def plot_domains(data: Domains, path: str | os.PathLike[str], columns: int = 10) -> None:
    """One image of each class (the first ``columns`` classes), a row for each domain."""
    classes = range(min(columns, len(data.classes)))
    figure = Figure(figsize=(0.9 * len(classes) + 1.2, 0.95 * len(data.domains) + 0.3), layout="constrained")
    grid = figure.subplots(len(data.domains), len(classes), squeeze=False)
    for row, images, domain in zip(grid, _examples(data, classes), data.domains, strict=True):
        for panel, picture in zip(row, data.pixels(images), strict=True):
            _show(panel, picture)
        _row_label(row[0], domain)
    for panel, index in zip(grid[0], classes, strict=True):
        panel.set_title(data.classes[index], fontsize=9)
    figures.save(figure, path)


def patch_experts(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The expert that each patch goes to: for each MoE layer of ``model`` (by its name) its first choices,
    int64 ``(B, rows, columns)``, for images ``(B, 3, H, W)`` with a square grid of patches.

    Raises:
        ValueError: the model has no MoE layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"model must have an MoE layer, {type(model).__name__} has none")
    training = model.training
    model.eval()
    with torch.no_grad():
        model(images)
    model.train(training)
    chosen = {}
    for name, layer in layers.items():
        experts = layer.last_routing.experts[:, 0].reshape(len(images), -1).cpu()
        # the class token and its like stand before the patches
        side = math.isqrt(experts.shape[1])
        chosen[name] = experts[:, -(side**2) :].reshape(len(images), side, side)
    return chosen


def plot_routing(
    model: nn.Module, data: Domains, path: str | os.PathLike[str], *, title: str = "", classes: int = 5
) -> None:
    """Which patches go to which expert in the last MoE layer.

    A row for each domain: images of ``classes`` classes, each beside itself with every patch in its expert's
    colour, and at the end the share of the patches of the domain's first images that each expert gets.
    """
    device = next(model.parameters()).device
    *_, (name, last) = ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))
    colors = np.array(figures.colors(last.w1.shape[0]))
    shown = range(min(classes, len(data.classes)))
    figure = Figure(figsize=(1.9 * len(shown) + 3.2, 1.0 * len(data.domains) + 1.1), layout="constrained")
    widths = [1.0] * (2 * len(shown)) + [3.0]
    grid = figure.subplots(len(data.domains), 2 * len(shown) + 1, squeeze=False, width_ratios=widths)
    for row, index, images in zip(grid, range(len(data.domains)), _examples(data, shown), strict=True):
        experts = patch_experts(model, images.to(device))[name].numpy()
        for column, (picture, chosen) in enumerate(zip(data.pixels(images), experts, strict=True)):
            _show(row[2 * column], picture)
            _show(row[2 * column + 1], _tinted(picture, colors[chosen]))
        _row_label(row[0], data.domains[index])
        some = range(min(128, len(data.evaluation[index])))  # type: ignore[arg-type]
        batch = torch.stack([data.evaluation[index][i][0] for i in some])
        counts = np.bincount(patch_experts(model, batch.to(device))[name].flatten().numpy(), minlength=len(colors))
        row[-1].bar(range(len(colors)), 100 * counts / counts.sum(), color=colors)
        row[-1].set(xticks=[], ylim=(0, 100), yticks=[0, 50, 100])
        row[-1].tick_params(labelsize=7)
        for side in ("top", "right"):
            row[-1].spines[side].set_visible(False)
    grid[0, -1].set_title("% of patches", fontsize=9)
    handles = [Patch(color=color, label=f"expert {i}") for i, color in enumerate(colors)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title or f"expert of each patch in {name}", fontsize=11)
    figures.save(figure, path)


def _examples(data: Domains, classes: Iterable[int]) -> list[Tensor]:
    """For each domain, its first image of each class: (classes, 3, H, W); zeros where the domain has none."""
    examples = []
    for part in data.evaluation:
        labels = torch.as_tensor(part.labels)  # type: ignore[attr-defined]
        found = [torch.nonzero(labels == label).flatten().tolist() for label in classes]
        blank = torch.zeros_like(part[0][0])
        examples.append(torch.stack([part[indices[0]][0] if indices else blank for indices in found]))
    return examples


def _tinted(picture: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """``picture`` (H, W, 3) uint8 in grey under the color of each patch (rows, columns, 3) in [0, 1]."""
    grey = picture.mean(-1, keepdims=True) / 255
    height, width = (
        int(np.ceil(size / cells)) for size, cells in zip(picture.shape[:2], colors.shape[:2], strict=True)
    )
    mask = colors.repeat(height, 0).repeat(width, 1)[: picture.shape[0], : picture.shape[1]]
    return 0.45 * grey + 0.55 * mask


def _show(panel: Axes, picture: np.ndarray) -> None:
    panel.imshow(picture, interpolation="nearest")
    panel.set(xticks=[], yticks=[])


def _row_label(panel: Axes, text: str) -> None:
    panel.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
