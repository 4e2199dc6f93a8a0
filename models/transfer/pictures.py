"""The curves of DTNH's case studies (Figures 3 to 5), as PNG.

Each takes the results of :func:`~.trainer.finetune`, one a seed: the plain method's and DTNH's. Lines are means over
seeds, with their range as a band.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import figures
from .protocol import label

Results = Sequence[Mapping[str, Any]]


def plot_losses(plain: Results, dtnh: Results, path: str | os.PathLike[str]) -> None:
    """Figure 3: empirical loss (the data term of the training loss) and loss on the test set over iterations."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, key, name in zip(
        figure.subplots(1, 2), ("empirical_loss", "test_loss"), ("empirical loss", "test loss"), strict=True
    ):
        for color, results in zip(figures.colors(2), (plain, dtnh), strict=True):
            _curve(panel, results, key, _name(results), color)
        _finish(panel, name)
    figures.save(figure, path)


def plot_angles_to_loss(plain: Results, dtnh: Results, path: str | os.PathLike[str]) -> None:
    """Figure 4: the angle between direction and gradient of the empirical loss, DTNH's (1) and the plain sum's (3)."""
    _plot_angles(plain, dtnh, "angle_to_loss", (3, 1), "direction and gradient of the empirical loss", path)


def plot_angles_to_regularizer(plain: Results, dtnh: Results, path: str | os.PathLike[str]) -> None:
    """Figure 5: the angle between direction and gradient of the regularizer, DTNH's (2) and the plain sum's (4)."""
    _plot_angles(plain, dtnh, "angle_to_regularizer", (4, 2), "direction and gradient of the regularizer", path)


def _plot_angles(
    plain: Results, dtnh: Results, key: str, numbers: tuple[int, int], between: str, path: str | os.PathLike[str]
) -> None:
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    panel = figure.subplots()
    for color, results, number in zip(figures.colors(2), (plain, dtnh), numbers, strict=True):
        _curve(panel, results, key, f"angle {number}: {_name(results)}", color)
    _finish(panel, "degrees")
    panel.set_title(f"angle between {between}", fontsize=10)
    figures.save(figure, path)


def _curve(panel: Axes, results: Results, key: str, name: str, color: Any) -> None:
    histories = [result["history"] for result in results]
    steps = [entry["step"] for entry in histories[0]]
    values = np.array([[entry[key] for entry in history] for history in histories], float)
    if np.isnan(values).all():
        raise ValueError(f"results of {_name(results)} have no {key}: run it with measure=True")
    figures.curves(panel, steps, values, color=color, label=name)


def _name(results: Results) -> str:
    if not results:
        raise ValueError("results must have at least one finished run, got none")
    return label(results[0]["run"]["method"], results[0]["run"]["dtnh"])


def _finish(panel: Axes, what: str) -> None:
    panel.set(xlabel="iteration", ylabel=what)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
