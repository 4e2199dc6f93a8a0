"""Labelled points of many images: what the pixel classifier learns from.

They lie on disk, as half a million hypercolumns of VGG-16 take 4.2 GB, and are read by memory map. The global features
of an image stand there once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_kernels.ops import hypercolumn
from moe_kernels.ops.hypercolumn import Pyramid

from ..data.splits import seed_hash
from . import rows
from .ahead import ahead
from .backbones import Features
from .configuration import SegmentConfig
from .localization import Localizer, evidence
from .sampling import sample


def score_maps(nets: Sequence[Localizer], pyramid: Pyramid, loss: str) -> Tensor:
    """Where each class is, (C, N) float32, of one image; ``pyramid`` in float32."""
    if not nets:
        return torch.empty(0, pyramid.locations, device=pyramid.device)
    return torch.cat([evidence(net.maps(pyramid), loss).flatten(1) for net in nets])


@torch.no_grad()
def score(
    folder: str | os.PathLike[str],
    images: Mapping[str, Sequence[int]],
    nets: Mapping[int, Localizer],
    features: Callable[[str], Features],
    config: SegmentConfig,
    run: Mapping[str, Any],
    *,
    share: float = 0.015,
    on_image: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the score maps of the classes that are in each image to ``folder``, or resume, or leave what is there.

    Args:
        images: name → numbers of its classes.
        nets: number of a class → its localization network.
        features: of an image, float32 on the networks' device; called in a thread, a little early.
        run: what identifies the result, plain JSON.
        share: largest share of the time that committing may take.
        on_image: called with the number of finished images, at the start too.
    """
    names = list(images)
    locations = features(names[0]).pyramid.locations
    with rows.Writer(folder, {"scores": ("float32", locations)}, run, share) as writer:
        on_image(writer.done)
        if writer.finished:
            return
        for done, (name, found) in enumerate(_in_order(features, names[writer.done :]), writer.done + 1):
            maps = score_maps([nets[number] for number in images[name]], found.pyramid, config.loss)
            writer.append(scores=maps.cpu().numpy())
            writer.offer(done)
            on_image(done)
        writer.finish(len(names))


def scores_of(folder: str | os.PathLike[str], images: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """What :func:`score` wrote: name → (classes of the image, N), memory-mapped."""
    maps = rows.read(folder)["scores"]
    ends = np.cumsum([len(numbers) for numbers in images.values()])
    return {name: maps[end - len(images[name]) : end] for name, end in zip(images, ends, strict=True)}


def highest(scores: Mapping[str, np.ndarray], images: Mapping[str, Sequence[int]]) -> dict[int, float]:
    """The highest score of each class, averaged over the images that have it."""
    found: dict[int, list[float]] = {}
    for name, numbers in images.items():
        for number, row in zip(numbers, scores[name], strict=True):
            found.setdefault(number, []).append(float(row.max()))
    return {number: float(np.mean(values)) for number, values in found.items()}


@torch.no_grad()
def collect(
    folder: str | os.PathLike[str],
    images: Mapping[str, Sequence[int]],
    scores: Mapping[str, np.ndarray],
    highest: Mapping[int, float],
    features: Callable[[str], Features],
    config: SegmentConfig,
    run: Mapping[str, Any],
    *,
    share: float = 0.015,
    on_image: Callable[[int], None] = lambda done: None,
) -> None:
    """Choose locations in each image, and write their hypercolumns and labels to ``folder``, or resume.

    The arrays are ``columns`` (P, D) and ``image`` (images, G) of dtype ``config.storage``, and ``about`` int32 (P, 3):
    label (0 the background, number + 1 a class), number of the image, location.

    Args:
        images, run, share, on_image: as in :func:`score`.
        scores, highest: what :func:`scores_of` and :func:`highest` give.
        features: of an image in dtype ``config.storage``, on the device to work on.
    """
    names = list(images)
    first = features(names[0])
    layout = {
        "columns": (config.storage, first.pyramid.channels),
        "image": (config.storage, 0 if first.image is None else first.image.shape[1]),
        "about": ("int32", 3),
    }
    with rows.Writer(folder, layout, run, share) as writer:
        on_image(writer.done)
        if writer.finished:
            return
        for place, (name, found) in enumerate(_in_order(features, names[writer.done :]), writer.done):
            device, numbers = found.pyramid.device, images[name]
            level = torch.tensor([highest[number] for number in numbers], device=device)
            # a copy: maps of a read-only file
            maps = torch.from_numpy(np.array(scores[name])).to(device)
            chosen = sample(maps, found.pyramid, config, highest=level, seed=seed_hash(config.seed, "dense", name))
            columns = hypercolumn.gather(found.pyramid, chosen.locations[None])[0]
            labels = np.array([0, *(number + 1 for number in numbers)], np.int32)[chosen.labels.cpu().numpy()]
            locations = chosen.locations.cpu().numpy().astype(np.int32)
            about = np.stack([labels, np.full_like(labels, place), locations], 1)
            image = columns.new_empty(1, 0) if found.image is None else found.image
            writer.append(columns=columns.cpu().numpy(), image=image.cpu().numpy(), about=about)
            writer.offer(place + 1)
            on_image(place + 1)
        writer.finish(len(names))


def about(folder: str | os.PathLike[str]) -> np.ndarray:
    """int32 (P, 3): label, number of the image and location of every point that :func:`collect` wrote."""
    return rows.read(folder)["about"]


def _in_order(features: Callable[[str], Features], names: Sequence[str]) -> Any:
    return zip(names, ahead(features, names), strict=True)


class Points:
    """The points of one or more folders that :func:`collect` wrote, as one sequence.

    Attributes:
        labels: int64 (P,).
        channels, image_channels: D and G.

    Raises:
        ValueError: a folder is not finished.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]]) -> None:
        self._parts = [rows.read(folder) for folder in folders]
        rows.read_ahead(folders)
        self._ends = np.cumsum([len(part["about"]) for part in self._parts])
        self.labels = np.concatenate([part["about"][:, 0] for part in self._parts]).astype(np.int64)
        self.channels, self.image_channels = (self._parts[0][name].shape[1] for name in ("columns", "image"))

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of points ``chosen`` int64 (b,): hypercolumn and global features (b, D + G) as stored, labels int64 (b,)."""
        features = np.empty((len(chosen), self.channels + self.image_channels), self._parts[0]["columns"].dtype)
        owners = np.searchsorted(self._ends, chosen, side="right")
        for number, part in enumerate(self._parts):
            mine = owners == number
            place = chosen[mine] - (self._ends[number] - len(part["about"]))
            features[mine, : self.channels] = part["columns"][place]
            features[mine, self.channels :] = part["image"][part["about"][place, 1]]
        return torch.from_numpy(features), torch.from_numpy(self.labels[chosen])

    @property
    def nbytes(self) -> int:
        """Of all features as stored."""
        return sum(part[name].nbytes for part in self._parts for name in ("columns", "image"))

    def on(self, device: str | torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """:meth:`gather` from the memory of ``device``, where a copy of all is kept, by points int64 (b,) there."""
        columns, image = (_copy([part[name] for part in self._parts], device) for name in ("columns", "image"))
        firsts = np.cumsum([0, *(len(part["image"]) for part in self._parts)])[:-1]
        images = [part["about"][:, 1] + first for part, first in zip(self._parts, firsts, strict=True)]
        owners, labels = (torch.from_numpy(numbers).to(device) for numbers in (np.concatenate(images), self.labels))

        def gather(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat([columns[chosen], image[owners[chosen]]], 1), labels[chosen]

        return gather


def _copy(parts: Sequence[np.ndarray], device: str | torch.device) -> Tensor:
    """Rows of several arrays as one tensor on ``device``, copied a few at a time."""
    dtype = torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
    whole = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=dtype, device=device)
    done = 0
    for part in parts:
        for rows_ in np.array_split(part, len(part) // 4096 + 1):
            whole[done : done + len(rows_)] = torch.from_numpy(np.array(rows_))
            done += len(rows_)
    return whole
