"""Tagged images: from folders in the layouts of VOC and COCO, and from a plain folder with a table.

``tagged`` has the interface that everything else sees; ``voc``, ``coco`` and ``folder`` read one layout each,
``pixels`` the files.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from ...data.images import some
from . import coco, folder, voc
from .tagged import TaggedImages

__all__ = ["TaggedImages", "load"]

_LAYOUTS = {"voc": voc, "coco": coco, "folder": folder}


def load(root: str | os.PathLike[str], **choice: Any) -> TaggedImages:
    """The images under ``root``, in whichever layout it has; ``choice`` are the arguments of that layout's ``load``.

    Raises:
        ValueError: it has none of the layouts, or one without such a choice; or what is in it cannot be used.
    """
    root = Path(os.path.abspath(root))
    for name, layout in _LAYOUTS.items():
        if layout.find(root) is not None:
            if unknown := choice.keys() - inspect.signature(layout.load).parameters:
                raise ValueError(f"{root} has the layout of {name}, for which there is no {some(sorted(unknown))}")
            return layout.load(root, **choice)
    there = f"it has {some(sorted(os.listdir(root)))}" if root.is_dir() else "there is no such folder"
    expected = "".join(f"\n  {name}: {layout.EXPECTED}" for name, layout in _LAYOUTS.items())
    raise ValueError(f"{root} has none of the layouts below; {there}{expected}")
