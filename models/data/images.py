"""Image files: finding them in folders, refusing those that cannot be read, and a data set of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from .checking import reason
from .domains import ImageDataset
from .rgb import read_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Folder(ImageDataset):
    """Images on disk: paths, labels int64 (N,) and what is done to a decoded image."""

    def __init__(self, files: list[str], labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.labels, self.transform = files, labels, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = read_rgb(self.files[index], over_white=False)  # as the published protocols do
        except Exception as error:
            raise RuntimeError(f"{self.files[index]} can no longer be read: {reason(error)}") from error
        return self.transform(image), int(self.labels[index])


def to_tensor(mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> list[nn.Module]:
    """The last steps of a transform: an RGB image to float32 (3, H, W), normalized a channel."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def images_in(root: Path, classes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Path and label of the images root/<class>/<image>, in ImageFolder's order; folders inside a class count."""
    for label, name in enumerate(classes):
        folders = []
        for folder, inner, files in os.walk(root / name, onerror=_raise, followlinks=True):
            inner[:] = [other for other in inner if not other.startswith(".")]
            folders.append((folder, files))
        for folder, files in sorted(folders):
            yield from ((os.path.join(folder, file), label) for file in sorted(files) if is_image(file))


def _raise(error: OSError) -> None:
    raise error


def refuse_or_leave_out(
    bad: Mapping[str, str], total: int, root: Path, *, skip_bad: bool, what: str = "images"
) -> None:
    """Say which files (with reasons) of ``total`` cannot be read: a ``ValueError``, or with ``skip_bad`` a warning."""
    if not bad:
        return
    lines = "".join(f"\n  {file}: {why}" for file, why in bad.items())
    text = f"{len(bad)} of {total} {what} under {root} cannot be read"
    if not skip_bad:
        raise ValueError(f"{text}; replace them, or leave them out with skip_bad=True (--skip-bad):{lines}")
    warnings.warn(f"{text} and are left out:{lines}", stacklevel=3)


def at_depth(folder: Path, depth: int) -> Iterator[Path]:
    """The images exactly ``depth`` folders below ``folder``, lazily: often only the first is wanted."""
    if depth == 0:
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if is_image(entry.name) and not entry.is_dir())
    else:
        for inner in subfolders(folder):
            yield from at_depth(inner, depth - 1)


def subfolders(folder: Path) -> list[Path]:
    """Sorted by name; hidden ones do not count."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    return [folder / name for name in sorted(names)]


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def some(names: Sequence[str], joint: str = ", ", limit: int = 12) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (joint.join(names[:limit]) or "nothing") + more
