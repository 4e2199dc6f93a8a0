"""Images with tags, and with masks to be judged by: what every layout on disk and every generator gives."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...data.checking import reason, unreadable
from ...data.images import refuse_or_leave_out, some
from ...data.rgb import read_rgb
from .pixels import IGNORED, classes_of, labels, ranges, read_mask, size_of

_Picture = str | Path | np.ndarray


class TaggedImages:
    """n images, each with the set of classes that are in it. Immutable.

    Attributes:
        names: n unique names, relative paths without a suffix: what a cache and predictions are filed under.
        classes: C unique names; in a mask, class c (from 0) is c + 1 and 0 is the background.
        tags: bool (n, C), which class is in which image.

    Args:
        images: n files, or arrays uint8 (h, w, 3); an array (n, h, w, 3) will do.
        masks: n files or arrays uint8 (h, w), ``None`` where there is none; by default none at all.
        numbers: what the numbers in mask files stand for (:func:`pixels.labels`), by default themselves.

    Raises:
        ValueError: lengths or shapes that do not fit, the same name twice, a name that is no relative path, a class
            that :func:`check_class` refuses.
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        tags: np.ndarray,
        images: Sequence[_Picture] | np.ndarray,
        masks: Sequence[_Picture | None] | np.ndarray | None = None,
        *,
        numbers: np.ndarray | None = None,
    ) -> None:
        self.names, self.classes, self.tags = tuple(names), tuple(classes), np.array(tags, bool)
        self.tags.setflags(write=False)
        self._images, self._masks = images, [None] * len(names) if masks is None else masks
        _refuse_twice("class", self.classes)
        _refuse_twice("image", self.names)
        if not 1 <= len(self.classes) < IGNORED:
            raise ValueError(f"classes must be 1 … {IGNORED - 1} names, got {len(self.classes)}")
        self._numbers = labels(len(self.classes)) if numbers is None else numbers
        if self.tags.shape != (len(self), len(self.classes)):
            raise ValueError(
                f"tags must be ({len(self)}, {len(self.classes)}), images by classes, got {self.tags.shape}"
            )
        for what, given in (("images", self._images), ("masks", self._masks)):
            if len(given) != len(self):
                raise ValueError(f"{what} must be {len(self)}, one a name, got {len(given)}")
        for name in self.classes:
            check_class(name)
        for name in self.names:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"names must be relative paths without '..', got {name!r}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask."""
        return any(mask is not None for mask in self._masks)

    def image(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises:
            RuntimeError: its file can no longer be read.
        """
        source = self._images[index]
        if isinstance(source, np.ndarray):
            return Image.fromarray(source)
        try:
            return read_rgb(source)
        except Exception as error:
            raise RuntimeError(f"{source} can no longer be read: {reason(error)}") from error

    def mask(self, index: int) -> np.ndarray | None:
        """The mask, uint8 (h, w): 0 background, 1 … C classes, 255 ignored; ``None`` where there is none.

        Raises:
            ValueError: it holds a label that is of no class; the image is named.
            RuntimeError: its file can no longer be read.
        """
        source = self._masks[index]
        if source is None:
            return None
        if isinstance(source, np.ndarray):
            try:
                return classes_of(source, self._numbers)
            except ValueError as error:
                raise ValueError(f"mask of {self.names[index]}: {error}") from error
        try:
            return read_mask(source, self._numbers)
        except Exception as error:
            raise RuntimeError(f"{source} can no longer be read: {reason(error)}") from error

    def digest(self, index: int) -> str:
        """What tells the image from another of the same name: a hash of its file or pixels."""
        source = self._images[index]
        if isinstance(source, np.ndarray):
            content = np.ascontiguousarray(source).tobytes() + str(source.shape).encode()
        else:
            content = Path(source).read_bytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def digests(self) -> list[str]:
        """The :meth:`digest` of every image; all files are read.

        Raises:
            OSError: one cannot be.
        """
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.digest, range(len(self))))

    def subset(self, indices: Iterable[int]) -> TaggedImages:
        """The images ``indices`` in that order, of the same classes."""
        chosen = [int(index) for index in indices]
        images, masks = ([given[index] for index in chosen] for given in (self._images, self._masks))
        names = [self.names[index] for index in chosen]
        return TaggedImages(names, self.classes, self.tags[chosen], images, masks, numbers=self._numbers)

    def with_tags(self, tags: np.ndarray) -> TaggedImages:
        """The same images with other ``tags``."""
        return TaggedImages(self.names, self.classes, tags, self._images, self._masks, numbers=self._numbers)

    def renamed(self, names: Sequence[str]) -> TaggedImages:
        """The same images under other ``names``."""
        return TaggedImages(names, self.classes, self.tags, self._images, self._masks, numbers=self._numbers)

    def only(self, classes: Sequence[str]) -> TaggedImages:
        """All images with the tags of ``classes`` alone, in that order; in masks the other classes are background.

        Raises:
            ValueError: a class that there is not.
        """
        if unknown := [name for name in classes if name not in self.classes]:
            raise ValueError(f"classes: there is no {some(unknown)}; there are {some(self.classes)}")
        columns = [self.classes.index(name) for name in classes]
        new = np.full(IGNORED + 1, 0, np.int16)
        new[[0, IGNORED, *(column + 1 for column in columns)]] = [0, IGNORED, *range(1, len(columns) + 1)]
        numbers = np.where(self._numbers < 0, -1, new[self._numbers]).astype(np.int16)
        return TaggedImages(self.names, classes, self.tags[:, columns], self._images, self._masks, numbers=numbers)

    def check_trainable(self) -> None:
        """Whether a localization of every class can be learned; images without a tag are named in a warning.

        Raises:
            ValueError: no image; a class that no image has; a class that every image has.
        """
        if not len(self):
            raise ValueError("expected images to learn from, got none")
        counts = self.tags.sum(0)
        for what, classes in (
            ("no image has the tag", counts == 0),
            (
                f"all {len(self)} images have the tag, and none is left to tell it from: bring images without",
                counts == len(self),
            ),
        ):
            if classes.any():
                raise ValueError(f"{what} {some([self.classes[c] for c in np.flatnonzero(classes)])}")
        if len(untagged := np.flatnonzero(~self.tags.any(1))):
            warnings.warn(
                f"{len(untagged)} of {len(self)} images have no tag and only show what the classes are not: "
                + some([self.names[index] for index in untagged]),
                stacklevel=2,
            )


def check_class(name: str) -> None:
    """Whether ``name`` can be a class: it is a file's and a folder's name too.

    Raises:
        ValueError: it is empty, a dot or two, too long, or has blanks around it.
    """
    if name in ("", ".", "..") or name != name.strip() or len(quote(name)) > 200:
        raise ValueError(
            "the name of a class must not be empty, '.' or '..', nor have blanks around it or more than 200 "
            f"characters (as in a URL), got {name!r}"
        )


def checked(data: TaggedImages, root: Path, *, skip_bad: bool = False) -> TaggedImages:
    """``data`` when every file of it can be read; all of them are, those known from an earlier call excepted.

    Args:
        skip_bad: leave out images whose file or mask cannot be read, with a warning.

    Raises:
        ValueError: files that cannot be read, masks of another size than their image or with unknown labels: all are
            named, with the reasons.
    """
    data = _without_bad(data, data._images, root, read_rgb, "pictures", skip_bad)
    data = _without_bad(data, data._masks, root, _mask_reader(data), f"masks ({ranges(data._numbers)})", skip_bad)
    if not len(data):
        raise ValueError(f"no image under {root} can be read")
    return data


def _without_bad(
    data: TaggedImages,
    given: Sequence[_Picture | None],
    root: Path,
    read: Callable[[str], object],
    what: str,
    skip_bad: bool,
) -> TaggedImages:
    files = [str(file) for file in given if file is not None]
    bad = unreadable(files, root, read, what=what)
    refuse_or_leave_out(bad, len(files), root, skip_bad=skip_bad, what=what.split()[0])
    return data.subset(index for index, file in enumerate(given) if str(file) not in bad) if bad else data


def _mask_reader(data: TaggedImages) -> Callable[[str], object]:
    images = {str(mask): image for image, mask in zip(data._images, data._masks, strict=True)}
    return lambda file: read_mask(file, data._numbers, size_of(images[file]))


def tagged_by_masks(data: TaggedImages, indices: Sequence[int] | None = None) -> TaggedImages:
    """``data`` where the tags of the images ``indices``, by default all, are the classes that their masks show.

    Raises:
        ValueError: one of them has no mask.
    """
    chosen = range(len(data)) if indices is None else indices
    if not len(chosen):
        return data
    tags = data.tags.copy()
    if without := [data.names[index] for index in chosen if data._masks[index] is None]:
        raise ValueError(f"{len(without)} of {len(chosen)} images have no mask to take tags from: {some(without)}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        shown = pool.map(lambda index: np.bincount(data.mask(index).ravel(), minlength=IGNORED + 1) > 0, chosen)
        for index, there in tqdm(
            zip(chosen, shown, strict=True), total=len(chosen), desc="tags of masks", unit="mask", disable=None
        ):
            tags[index] = there[1 : len(data.classes) + 1]
    return data.with_tags(tags)


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"every {what} must have a name of its own; more than once: {some(twice)}")
