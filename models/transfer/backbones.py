"""Pretrained backbones of timm and torchvision by name, with a new head.

Weights come from a file or from the hub of the library. Only the backbone's are taken: the head is always new, also
where the source has as many classes as the target.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from ..data.images import IMAGENET_MEAN, IMAGENET_STD
from ..weights import digest, read_state_dict, without_prefixes
from .architectures import Head, head_parameters

HUB = "hub"
LIBRARIES = ("timm", "torchvision")
# Classifiers in the middle of GoogLeNet and Inception, which only helped to train the source.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# They are built without those, and with the change of normalization that torchvision's weights were trained with.
_OPTIONS = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": True}
    for name in ("torchvision/googlenet", "torchvision/inception_v3")
}


@dataclass(frozen=True)
class Backbone:
    """An architecture and the source's weights.

    Fields:
        name: of the architecture with its library, ``"timm/resnet18"``.
        weights: the source's state dict, with any head or none; ``None``: random.
        size, mean, std: of the images that it was made for.
        head: names of the parameters of the new head.
    """

    name: str
    weights: Mapping[str, Tensor] | None
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: tuple[str, ...]

    def build(self, num_classes: int) -> nn.Module:
        """The model, (B, 3, H, W) → (B, num_classes), with the source's weights and a new head from torch's generator.

        Raises:
            ValueError: the weights do not fit; all missing and unknown names and wrong shapes are listed.
        """
        model = _architecture(self.name, num_classes=num_classes)
        if self.weights is not None:
            load_backbone(model, self.weights, self.name, self.head)
        return model

    def check_size(self, size: int) -> None:
        """Refuse images of ``size`` × ``size`` where the model takes only its own, as most transformers do.

        Raises:
            ValueError: it takes those of :attr:`size` and not these.
        """
        model = _skeleton(self.name).eval()
        failed = _failure(model, size)
        if failed is not None and _failure(model, self.size) is None:
            raise ValueError(
                f"crop (--crop): {self.name} was made for images of {self.size} × {self.size} and cannot take "
                f"{size} × {size} ({failed})"
            )

    def description(self) -> dict[str, Any]:
        """What identifies it, plain JSON."""
        return {
            "model": self.name,
            "weights": None if self.weights is None else digest(self.weights),
            "new_head": list(self.head),
        }


def load(name: str, source: str | os.PathLike[str] | None = HUB, *, head: tuple[str, ...] | None = None) -> Backbone:
    """The backbone ``name`` with the weights of ``source``.

    Args:
        name: as timm or torchvision call it; of a name that both have, timm's is taken unless it says
            ``torchvision/resnet18``.
        source: ``"hub"`` downloads the library's own weights; a path reads a ``.safetensors`` file or one of
            ``torch.save``; ``None`` leaves the weights random.
        head: names of the modules or parameters whose weights are not the source's; by default
            :func:`~.architectures.find_head`.

    Raises:
        ValueError: an unknown name (near ones are listed), a head that is not found, or a file that cannot be read or
            does not fit.
        FileNotFoundError: there is no such file.
        RuntimeError: the weights could not be downloaded.
    """
    name = _full_name(name)
    model = _skeleton(name)
    new = head_parameters(model, head)
    facts = getattr(model, "pretrained_cfg", None) or {}
    if source is None:
        weights = None
    elif source == HUB:
        weights = _from_hub(name)
    else:
        weights = read_state_dict(source)
    if weights is not None:
        _backbone_state(model, weights, os.fspath(source or HUB), new)
    size = facts.get("input_size", (3, 224, 224))[-1]
    mean, std = tuple(facts.get("mean", IMAGENET_MEAN)), tuple(facts.get("std", IMAGENET_STD))
    return Backbone(name, weights, size, mean, std, new)


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], where: str = "state", head: Head = None) -> None:
    """Load everything but the head into ``model`` in place.

    Names may have the prefixes that wrappers add. Auxiliary classifiers that only ``state`` has are left out.

    Args:
        head: names of its modules or parameters; by default :func:`~.architectures.find_head`.

    Raises:
        ValueError: all missing and unknown names and wrong shapes are listed, and nothing is loaded.
    """
    model.load_state_dict(_backbone_state(model, state, where, head), strict=False)


def _backbone_state(model: nn.Module, state: Mapping[str, Tensor], where: str, head: Head) -> dict[str, Tensor]:
    own, new = model.state_dict(), set(head_parameters(model, head))
    given = {
        name: tensor
        for name, tensor in without_prefixes(state, own).items()
        if name not in new and (name in own or not name.startswith(_AUXILIARY))
    }
    wanted = {name: tensor for name, tensor in own.items() if name not in new}
    problems = {
        # counted for the momentum only, and not in old files
        "missing": [name for name in wanted if name not in given and not name.endswith(".num_batches_tracked")],
        "unknown": [name for name in given if name not in wanted],
        "wrong shape": [
            f"{name} (expected {tuple(wanted[name].shape)}, got {tuple(tensor.shape)})"
            for name, tensor in given.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        listed = "".join(f"\n  {kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{where} does not fit {type(model).__name__}:{listed}")
    return given


def _full_name(name: str) -> str:
    library, _, rest = name.rpartition("/")
    names = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    if library not in ("", *LIBRARIES):
        raise ValueError(f"model must be a name of {' or '.join(LIBRARIES)}, got {name!r}")
    for candidate in [library] if library else LIBRARIES:
        # timm's names may end in the tag of some weights: resnet18.a1_in1k
        if rest in names[candidate] or (candidate == "timm" and timm.is_model(rest)):
            return f"{candidate}/{rest}"
    near = difflib.get_close_matches(rest, {model for known in names.values() for model in known}, n=6)
    raise ValueError(
        f"model must be a name of {library or ' or '.join(LIBRARIES)}, got {name!r}"
        + (f"; near it: {', '.join(near)}" if near else "")
    )


def _architecture(name: str, num_classes: int) -> nn.Module:
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest, num_classes=num_classes)
    options = _OPTIONS.get(name, {})
    model: nn.Module = torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **options)
    return model


def _skeleton(name: str) -> nn.Module:
    """The model for one class, to be looked at: where that is possible, without the cost of its weights."""
    try:
        with torch.device("meta"):
            return _architecture(name, num_classes=1)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return _architecture(name, num_classes=1)


@torch.no_grad()
def _failure(model: nn.Module, size: int) -> str | None:
    """Why ``model`` cannot take an image of ``size``, ``None`` where it can."""
    device = next(model.parameters()).device
    try:
        model(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # each library refuses in its own way, with assertions too
        return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return None


def _from_hub(name: str) -> dict[str, Tensor]:
    library, _, rest = name.partition("/")
    try:
        if library == "timm":
            return dict(timm.create_model(rest, pretrained=True).state_dict())
        return dict(torchvision.models.get_model(rest, weights="DEFAULT").state_dict())
    except Exception as error:
        # the libraries and the HTTP clients below them raise a dozen kinds for "no network"
        raise RuntimeError(
            f"source: {library} could not get the weights of {rest} ({type(error).__name__}: {error}). Without a "
            "network, bring a .safetensors or .pth file and pass its path"
        ) from error
