"""Data sets of several domains on disk: root/<domain>/<class>/<image>, as DomainBed's are.

PACS, VLCS, OfficeHome, TerraIncognita and DomainNet are recognized by their domains, under the names that
their mirrors use; any other tree of this form is a data set of its own. Domains are sorted by name,
classes by name and images as torchvision's ImageFolder sorts them, so that DomainBed's seeds give
DomainBed's splits.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torchvision.transforms import v2

from .checking import unreadable
from .domains import Domains, normalized_name
from .images import (
    EXTENSIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Folder,
    at_depth,
    images_in,
    refuse_or_leave_out,
    some,
    subfolders,
    to_tensor,
)

# Data set -> domain -> other names it has in mirrors and papers. Case, spaces and underscores are free.
KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "PACS": {"art_painting": ("art",), "cartoon": (), "photo": (), "sketch": ()},
    "VLCS": {
        "Caltech101": ("Caltech",),
        "LabelMe": (),
        "SUN09": ("SUN",),
        "VOC2007": ("VOC", "PASCAL", "PASCAL VOC"),
    },
    "OfficeHome": {"Art": (), "Clipart": (), "Product": (), "Real World": ("Real",)},
    "TerraIncognita": {f"location_{place}": (f"L{place}", f"loc{place}", str(place)) for place in (100, 38, 43, 46)},
    "DomainNet": {
        "clipart": ("clip",),
        "infograph": ("info",),
        "painting": ("paint",),
        "quickdraw": ("quick",),
        "real": (),
        "sketch": (),
    },
}
# The names that the data sets' own folders have.
FOLDERS: dict[str, tuple[str, ...]] = {
    "PACS": ("PACS", "kfold"),
    "VLCS": ("VLCS",),
    "OfficeHome": ("office_home", "OfficeHomeDataset", "OfficeHomeDataset_10072016"),
    "TerraIncognita": ("terra_incognita", "terra"),
    "DomainNet": ("domain_net",),
}


def train_transform(image_size: int = 224) -> v2.Compose:
    """DomainBed's augmentation: an RGB image to float32 (3, image_size, image_size), ImageNet-normalized."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(0.7, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.3),
            v2.RandomGrayscale(0.1),
            *to_tensor(),
        ]
    )


def eval_transform(image_size: int = 224) -> v2.Compose:
    """As ``train_transform`` without chance: the whole image, its aspect ratio not kept."""
    return v2.Compose([v2.Resize((image_size, image_size)), *to_tensor()])


def load(root: str | os.PathLike[str], *, image_size: int = 224, skip_bad: bool = False) -> Domains:
    """The data set under ``root``, every image of which can be decoded.

    A known data set has its usual name, domain names and order, whatever its folders are called
    (``Domains.aliases`` has those names, so either may be used). If ``root`` does not exist but its folder
    has another name of the same known data set (PACS is kfold in the original archive), that is taken.

    All images are decoded once before this returns, which takes minutes for DomainNet; later calls decode
    only files that are new or changed (``checking``). Hidden files and folders are ignored.

    Args:
        root: the folder that has one folder a domain.
        image_size: height and width of the images.
        skip_bad: leave out files that cannot be decoded, with a warning, instead of raising. They are in
            ``Domains.skipped``. The splits then differ from those of the whole data set.

    Raises:
        ValueError: ``root`` is missing, or a level too high or too deep (the message says which folder to
            pass); the domains differ in their classes; a domain has no image; files cannot be decoded (all
            are named).
    """
    if image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
    root = _existing(Path(os.path.abspath(root)))
    folders = _domain_folders(root)
    name, names = _recognize(root, folders)
    classes = _common_classes(folders)

    listed = {domain: list(images_in(names[domain], classes)) for domain in names}
    for domain, files in listed.items():
        if empty := set(range(len(classes))) - {label for _, label in files}:
            lacking = some([classes[label] for label in sorted(empty)])
            warnings.warn(f"domain {domain!r} has no image of {lacking}", stacklevel=2)
    bad = unreadable([file for files in listed.values() for file, _ in files], root)
    refuse_or_leave_out(bad, sum(map(len, listed.values())), root, skip_bad=skip_bad)

    train, evaluation = [], []
    for domain, files in listed.items():
        kept = [(file, label) for file, label in files if file not in bad]
        if not kept:
            raise ValueError(f"domain {domain!r} ({names[domain]}) has no image that can be read")
        paths, labels = [file for file, _ in kept], torch.tensor([label for _, label in kept])
        train.append(Folder(paths, labels, train_transform(image_size)))
        evaluation.append(Folder(paths, labels, eval_transform(image_size)))
    aliases = {alias: domain for domain, others in KNOWN.get(name, {}).items() for alias in others}
    return Domains(
        name,
        classes,
        tuple(names),
        tuple(train),
        tuple(evaluation),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        skipped=tuple(bad),
        aliases=aliases | {folder.name: domain for domain, folder in names.items() if folder.name != domain},
    )


def _existing(root: Path) -> Path:
    if root.is_dir():
        return root
    if root.exists():
        raise ValueError(f"root must be a folder, {root} is a file")
    beside = subfolders(root.parent) if root.parent.is_dir() else []
    for known, others in FOLDERS.items():
        same = {normalized_name(other) for other in (known, *others)}
        found = [folder for folder in beside if normalized_name(folder.name) in same]
        if normalized_name(root.name) in same and len(found) == 1:
            return found[0]
    there = f"; {root.parent} has: {some([folder.name for folder in beside])}" if beside else ""
    raise ValueError(f"root {root} does not exist{there}")


def _domain_folders(root: Path) -> list[Path]:
    """The folders of the domains, sorted; an error if another folder may have been meant for one."""
    if next(at_depth(root, 2), None) is None:
        raise ValueError(_wrong_level(root))
    domains: list[Path] = []
    without: list[Path] = []
    for folder in subfolders(root):
        (domains if next(at_depth(folder, 1), None) else without).append(folder)
    for folder in without:
        # A folder of lists or documents beside the domains is no harm; a domain that was not unpacked is.
        if next(at_depth(folder, 0), None) or subfolders(folder) or not any(folder.iterdir()):
            raise ValueError(
                f"{folder} has no <class>/<image> in it, as the domains beside it have "
                f"({some([domain.name for domain in domains])}): complete it, or move it away"
            )
        warnings.warn(f"{folder} has no images and is not taken for a domain", stacklevel=3)
    return domains


def _wrong_level(root: Path) -> str:
    expected = f"expected {root}/<domain>/<class>/<image>, but "
    for below in (1, 2):
        if (image := next(at_depth(root, 2 + below), None)) is not None:
            folders = [root]
            for _ in range(below):
                folders = [inner for folder in folders for inner in subfolders(folder)]
            candidates = [str(folder) for folder in folders if next(at_depth(folder, 2), None)]
            return (
                f"{expected}there is {image.relative_to(root)} in it, so it seems to be a folder above: pass "
                f"{some(candidates, ' or ')}"
            )
    for above, what, whole in ((1, "one domain", root.parent), (0, "one class", root.parent.parent)):
        if (image := next(at_depth(root, above), None)) is not None:
            return (
                f"{expected}there is {image.relative_to(root)} in it, so it seems to be the folder of {what}"
                f": pass the folder of all domains, {whole}"
            )
    return f"{expected}it has no image ({', '.join(EXTENSIONS)}); it has: {some(sorted(os.listdir(root)))}"


def _recognize(root: Path, folders: list[Path]) -> tuple[str, dict[str, Path]]:
    """The name of the data set and, in order, its domains with their folders."""
    for name, domains in KNOWN.items():
        canonical = {
            normalized_name(alias): domain for domain, others in domains.items() for alias in (domain, *others)
        }
        found = {canonical.get(normalized_name(folder.name), ""): folder for folder in folders}
        if len(folders) == len(domains) and set(found) == set(domains):
            return name, {domain: found[domain] for domain in domains}
    return root.name, {folder.name: folder for folder in folders}


def _common_classes(folders: list[Path]) -> tuple[str, ...]:
    classes = {folder: {inner.name for inner in subfolders(folder)} for folder in folders}
    everything = set().union(*classes.values())
    missing = {folder: sorted(everything - own) for folder, own in classes.items() if own != everything}
    if missing:
        lines = "".join(f"\n  {folder.name} lacks {some(names)}" for folder, names in missing.items())
        raise ValueError(
            f"every domain must have the same classes; of {len(everything)} in {folders[0].parent}{lines}\n"
            "A domain that has no image of a class needs an empty folder for it"
        )
    return tuple(sorted(everything))
