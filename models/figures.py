"""What pictures share. They are drawn without a display and written atomically, as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import files


def colors(count: int) -> list[tuple[float, float, float]]:
    """``count`` colors, as different as they can be."""
    name = "tab10" if count <= 10 else "tab20"
    wheel = matplotlib.colormaps[name].colors  # type: ignore[attr-defined]
    return [wheel[i % len(wheel)] for i in range(count)]


def curves(panel: Axes, steps: Sequence[int], values: np.ndarray, style: str = "-", **options: Any) -> None:
    """The mean over runs of ``values`` (runs, steps); a solid line has the runs' range as a band around it."""
    panel.plot(steps, values.mean(0), style, **options)
    if style == "-":
        panel.fill_between(steps, values.min(0), values.max(0), color=options.get("color"), alpha=0.15, linewidth=0)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
