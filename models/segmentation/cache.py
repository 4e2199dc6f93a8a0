"""Features on disk, one file an image: computed once, read without a copy.

At 256 × 336 VGG-16's pyramid has 7.1 million values, 14.2 MB in float16 (the hypercolumns themselves would be 45 MB).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from moe_kernels.ops.hypercolumn import Pyramid

from .. import files, runs
from .backbones import Backbone, Features
from .data.tagged import TaggedImages

_ABOUT = "features.json"
_SUFFIX = ".safetensors"
_SOURCE = "image"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class FeatureCache:
    """The features of images in ``folder``, of one backbone in one dtype.

    Args:
        folder: is made if it is missing.
        backbone: what they are of.
        dtype: of the file's values: float16, bfloat16 or float32.

    Raises:
        ValueError: the folder holds features of another backbone or dtype (both are named), or something else.
        OSError: it is a file, or a link that leads nowhere.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: Backbone, dtype: torch.dtype = torch.float16) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(_name, _DTYPES))}, got {_name(dtype)}")
        self.folder, self.backbone, self.dtype = Path(folder), backbone, dtype
        self._check_folder()

    def path(self, name: str) -> Path:
        """The file of an image."""
        if any(len(os.fsencode(part)) > 200 for part in PurePosixPath(name).parts):  # a file system allows 255
            name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}{_SUFFIX}"

    def fill(
        self,
        dataset: TaggedImages,
        digests: Sequence[str] | None = None,
        *,
        batch: int | None = None,
        progress: bool = True,
    ) -> None:
        """Compute what is not there yet, or is of another image of the same name; an interrupted call is resumed.

        Args:
            digests: what :meth:`TaggedImages.digests` gives, where it is known.
            batch: images in a forward, by default 16, on a CPU 1: more gain nothing there, and rounding does not depend
                on what stands beside an image.
            progress: show a bar where somebody looks.

        Raises:
            OSError: the disk has too little room for all; nothing was computed.
            RuntimeError: another process fills the folder, or an image can no longer be read.
            ValueError: a feature is beyond the range of ``dtype``; the image is named.
        """
        with files.lock(self.folder), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            files.remove_leftovers(self.folder)
            digests = dataset.digests() if digests is None else digests
            lacking = set(self.lacking(dict(zip(dataset.names, digests, strict=True))))
            todo = [index for index, name in enumerate(dataset.names) if name in lacking]
            self._check_room(len(todo))
            batch = batch or (1 if self.backbone.device.type == "cpu" else 16)
            writes: list[Future[None]] = []
            with tqdm(
                total=len(dataset),
                initial=len(dataset) - len(todo),
                desc=f"features of {self.backbone.name}",
                unit="image",
                disable=None if progress else True,
            ) as bar:
                for chunk, images in self._prepared(pool, dataset, todo, batch):
                    tensors = self._stored(self.backbone(images.to(self.backbone.device)))
                    _finish(writes)
                    writes = [
                        pool.submit(
                            self._write,
                            dataset.names[index],
                            digests[index],
                            {key: tensor[row] for key, tensor in tensors.items()},
                        )
                        for row, index in enumerate(chunk)
                    ]
                    bar.update(len(chunk))
                _finish(writes)

    def lacking(self, sources: Mapping[str, str]) -> list[str]:
        """Those of the images, name → digest, that have no features here; the same name may have another's."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            there = pool.map(self._source, sources)
            return [name for (name, source), found in zip(sources.items(), there, strict=True) if found != source]

    def features(self, name: str, source: str | None = None) -> Features:
        """The features of an image, a batch of one on the CPU: views of the file, read as they are used.

        Args:
            source: the image's digest, by default any.

        Raises:
            FileNotFoundError: it has none here.
            ValueError: its file is damaged, or of another image than ``source``.
        """
        path = self.path(name)
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no features of {name}; fill the cache with its images first")
        try:
            with safe_open(path, "pt") as file:
                theirs = (file.metadata() or {}).get(_SOURCE)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and fill the cache again") from error
        if source not in (None, theirs):
            raise ValueError(
                f"{path} is of another image of the same name: data sets of one folder must differ in names"
            )
        maps = [
            tensors[f"map{level}"].permute(2, 0, 1)[None] for level in range(sum(key != "image" for key in tensors))
        ]
        return Features(
            Pyramid(tuple(maps), self.backbone.grid), tensors["image"][None] if "image" in tensors else None
        )

    def _check_folder(self) -> None:
        about, ours = self.folder / _ABOUT, runs.identity(self.backbone.description(), {"dtype": _name(self.dtype)})
        if about.exists():
            theirs = files.read_json(about)
            if theirs != ours:
                lines = "\n  ".join(runs.differences(theirs, ours))
                raise ValueError(
                    f"{self.folder} holds features of {theirs.get('backbone')}, not of this {self.backbone.name}:"
                    f"\n  {lines}\nTake another folder, or delete this one."
                )
            return
        if self.folder.is_symlink() and not self.folder.exists():
            raise FileNotFoundError(f"{self.folder} leads to {os.readlink(self.folder)}, which is not there")
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} must be a folder for features, and is a file")
        if self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not empty and no cache of features ({_ABOUT} is missing): take another folder"
            )
        files.write_json(about, ours)

    def _check_room(self, count: int) -> None:
        needed, free = count * self.backbone.values * self.dtype.itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} has {free / 1e9:.1f} GB free, and the features of {count} images take "
                f"{needed / 1e9:.1f} GB: use another disk, a smaller image_size or fewer layers"
            )

    def _source(self, name: str) -> str | None:
        """Of which image the file of ``name`` is; nothing where there is none, or a damaged one."""
        try:
            with safe_open(self.path(name), "pt") as file:
                return (file.metadata() or {}).get(_SOURCE)
        except (OSError, SafetensorError):
            return None

    def _prepared(
        self, pool: ThreadPoolExecutor, dataset: TaggedImages, todo: Sequence[int], batch: int
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Some images at a time, prepared; the next are read while these are used."""
        chunks = [todo[first : first + batch] for first in range(0, len(todo), batch)]

        def begin(chunk: Sequence[int]) -> list[Future[Tensor]]:
            return [pool.submit(lambda index: self.backbone.prepare(dataset.image(index)), index) for index in chunk]

        ahead = begin(chunks[0]) if chunks else []
        for chunk, following in pairwise([*chunks, []]):
            images, ahead = ahead, begin(following)
            yield chunk, torch.stack([image.result() for image in images])

    def _stored(self, features: Features) -> dict[str, Tensor]:
        """As they are in a file, of a whole batch: maps (B, h, w, C), and global features (B, G)."""
        found = {f"map{level}": m.permute(0, 2, 3, 1) for level, m in enumerate(features.pyramid.maps)}
        if features.image is not None:
            found["image"] = features.image
        return {key: tensor.to(self.dtype).cpu() for key, tensor in found.items()}

    def _write(self, name: str, source: str, tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            if not torch.stack(tensor.aminmax()).isfinite().all():  # 20 times as fast as looking at each
                raise ValueError(
                    f"image {name}: a feature is beyond the range of {_name(self.dtype)}; take bfloat16 or float32"
                )
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        files.write_bytes(self.path(name), save(tensors, {_SOURCE: source}))


def _finish(writes: Sequence[Future[None]]) -> None:
    for written in writes:
        written.result()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
