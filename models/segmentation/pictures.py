"""Segmentations as pictures: label maps in VOC's colours, over their image or beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import figures
from .data.pixels import IGNORED

DPI = 110
_SHORTEST, _LONGEST = (100, 400), 4000  # sides of an overlay: at least and at most, in pixels
TRUTH, RESULT, CRF = "truth", "result", "CRF"


def palette() -> np.ndarray:
    """VOC's colour of each label, uint8 (256, 3): 0 is black, 255 (ignored) a light grey."""
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    # bit 3j + k of a label is bit 7 - j of channel k
    for bit in range(8):
        colours[:, bit % 3] |= ((labels >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def paint(image: np.ndarray, labels: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """An image uint8 (h, w, 3) under the colours of its ``labels`` (h, w), uint8; the background stays as it is.

    Raises:
        ValueError: the sizes differ.
    """
    if image.shape != (*labels.shape, 3):
        raise ValueError(f"image must be (h, w, 3) with the labels' {labels.shape}, got {image.shape}")
    colours = palette()[labels].astype(np.float32)
    mixed = image + opacity * (colours - image) * (labels != 0)[..., None]
    painted: np.ndarray = np.rint(mixed).astype(np.uint8)
    return painted


def overlay(image: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """:func:`paint` with a legend of the classes that are there; label c is ``classes``[c - 1].

    Raises:
        ValueError: the sizes differ, or a label is of no class.
    """
    shown = [int(label) for label in np.unique(labels) if label not in (0, IGNORED)]
    if shown and shown[-1] > len(classes):
        raise ValueError(f"labels must be 0 … {len(classes)} or {IGNORED}, got {shown[-1]}")
    # a small picture and a narrow one are enlarged, so that the legend has room
    longer = max(image.shape)
    scale = min(max(longer, _SHORTEST[1]), _LONGEST) / longer
    height, width = (max(side * scale, _SHORTEST[0]) / DPI for side in labels.shape)
    columns = max(1, int(width / 1.2))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(width, height + 0.25 * rows))
    panel = figure.add_axes((0, 1 - height / (height + 0.25 * rows), 1, height / (height + 0.25 * rows)))
    panel.axis("off")
    panel.imshow(paint(image, labels), aspect="auto")
    if shown:
        handles = [Patch(color=palette()[label] / 255, label=classes[label - 1]) for label in shown]
        figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=9, borderpad=0)
    return figure


@dataclass(frozen=True)
class Row:
    """An image and what became of it.

    Fields:
        image: uint8 (h, w, 3).
        scores: float (classes there, h, w), normalized, and ``labels`` their labels.
        samples: row, column and label of each labelled point, (P, 3), in pixels.
        maps: label maps uint8 (h, w), by the heading of their column.
    """

    image: np.ndarray
    scores: np.ndarray
    labels: Sequence[int]
    samples: np.ndarray
    maps: Mapping[str, np.ndarray]


def plot_rows(rows: Sequence[Row], classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """A line a row: the image, the truth, the localization's scores, the samples, then the other maps."""
    others = [name for name in rows[0].maps if name != TRUTH]
    headings = ["input", TRUTH, "localization", "samples", *others]
    height, width = rows[0].image.shape[:2]
    side = 1.5
    figure = Figure(figsize=(side * len(headings), side * height / width * len(rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), len(headings), squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        for panel in line:
            panel.axis("off")
        line[0].imshow(row.image)
        line[1].imshow(palette()[row.maps[TRUTH]])
        line[2].imshow(_heat(row))
        _plot_samples(line[3], row)
        for panel, name in zip(line[4:], others, strict=True):
            panel.imshow(palette()[row.maps[name]])
    for panel, heading in zip(panels[0], headings, strict=True):
        panel.set_title(heading, fontsize=9)
    shown = sorted({label for row in rows for label in row.labels})
    handles = [Patch(color=palette()[label] / 255, label=classes[label - 1]) for label in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figures.save(figure, path)


def _heat(row: Row) -> np.ndarray:
    """The colour of the class whose score is highest, as bright as that score, (h, w, 3)."""
    if not len(row.labels):
        return np.zeros_like(row.image)
    best = row.scores.argmax(0)
    colours = palette()[np.asarray(row.labels)].astype(np.float32)
    bright: np.ndarray = colours[best] * np.clip(row.scores.max(0), 0, 1)[..., None]
    return bright.astype(np.uint8)


def _plot_samples(panel: Axes, row: Row) -> None:
    """The labelled points on the image in pale grey; those of the background are white."""
    grey = 160 + row.image.mean(2) / 8
    panel.imshow(np.repeat(grey[..., None], 3, 2).astype(np.uint8))
    y, x, labels = row.samples.T
    colours = np.where((labels == 0)[:, None], 255, palette()[labels]) / 255
    panel.scatter(x, y, s=7, c=colours, linewidths=0.3, edgecolors="black")
