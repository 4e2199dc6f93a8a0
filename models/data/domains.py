"""The common interface of a data set with several domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of one domain: an item is (image float32 (3, H, W), normalized, label int).

    ``labels``, int64 (N,), has the label of each item, so that classes can be counted without decoding
    an image.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def normalized_name(name: str) -> str:
    """``name`` in lower case, letters and digits only: "Real World", "Real_World" and "RealWorld" agree."""
    return "".join(character for character in name.casefold() if character.isalnum())


@dataclass(frozen=True)
class Domains:
    """The same classes in several domains, one data set a domain.

    Fields:
        name: of the whole, as reports show it.
        classes: names of the classes; a label is an index into them.
        domains: names of the domains, in DomainBed's order, on which the seeds of the splits depend.
        train, evaluation: one data set a domain, in the order of ``domains``, with the same items in the
            same order; ``train`` augments the image with randomness from torch's default generator only,
            ``evaluation`` does not.
        mean, std: what the images were normalized with, a value a channel: (pixel in [0, 1] - mean) / std.
        skipped: the files that could not be read and were left out.
        aliases: other names under which a domain may be asked for, each with its name in ``domains``.

    Raises:
        ValueError: the number of data sets is not that of the domains, ``train`` and ``evaluation`` differ
            in length, or two domains have one name.
    """

    name: str
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    train: tuple[ImageDataset, ...]
    evaluation: tuple[ImageDataset, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    skipped: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, datasets in (("train", self.train), ("evaluation", self.evaluation)):
            if len(datasets) != len(self.domains):
                raise ValueError(
                    f"{part} must have one data set a domain: {len(self.domains)} domains "
                    f"({', '.join(self.domains)}), got {len(datasets)} data sets"
                )
        if len({normalized_name(domain) for domain in self.domains}) != len(self.domains):
            raise ValueError(f"domains must have different names, got {', '.join(self.domains)}")
        for domain, train, evaluation in zip(self.domains, self.train, self.evaluation, strict=True):
            if len(train) != len(evaluation):
                raise ValueError(
                    f"train and evaluation must have the same items; in domain {domain!r} they have "
                    f"{len(train)} and {len(evaluation)}"
                )

    def index(self, domain: str | int) -> int:
        """The index of a domain, given by name (case, spaces, underscores are free) or index, also as text.

        Raises:
            ValueError: there is no such domain; the message lists those there are.
        """
        names = {normalized_name(alias): name for alias, name in self.aliases.items()}
        names |= {normalized_name(name): name for name in self.domains}
        if isinstance(domain, str) and (name := names.get(normalized_name(domain))) is not None:
            return self.domains.index(name)
        if str(domain).isdecimal() and int(domain) < len(self.domains):
            return int(domain)
        valid = ", ".join(f"{i}: {name}" for i, name in enumerate(self.domains))
        raise ValueError(f"{self.name} has no domain {domain!r}; its domains are {valid}")

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalized images (..., 3, H, W) as they look: uint8 (..., H, W, 3)."""
        values = images.detach().cpu().float().movedim(-3, -1).numpy()
        values = values * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
