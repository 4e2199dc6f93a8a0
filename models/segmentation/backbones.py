"""Frozen networks whose layers are the features: VGG-16 as the paper has it, any of timm's by name, any module.

The features of an image are a pyramid of its maps (``moe_kernels.ops.hypercolumn``) and, where the network has them,
global features. Every image is resized to one size, whatever its own, as section 4.1 of the paper does (arXiv
1612.01991): 256 × 336 with hypercolumns on a grid of a quarter of that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

from moe_kernels.ops import hypercolumn
from moe_kernels.ops.hypercolumn import Pyramid

from ..data.images import IMAGENET_MEAN, IMAGENET_STD, some, to_tensor
from ..transfer import backbones as pretrained
from ..transfer.architectures import check_layers
from ..transfer.features import Features as Collected
from ..weights import digest, read_state_dict, without_prefixes

IMAGE_SIZE, GRID = (256, 336), (64, 84)
CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)
"""Of the weights of VGG's authors: subtracted from BGR values in 0 … 255, which are not divided by anything."""
PREPROCESSING: dict[str, dict[str, Any]] = {
    "torchvision": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "bgr": False},
    "caffe": {"mean": CAFFE_MEAN, "std": (1 / 255,) * 3, "bgr": True},
}
_FULL = {"fc6": 0, "fc7": 3}  # where torchvision has them in its classifier
_PARTS = ("weight", "bias")
_Size = tuple[int, int]


class Features(NamedTuple):
    """What a backbone says about B images.

    Attributes:
        pyramid: of its maps; B images, D channels.
        image: (B, G) global features, ``None`` where the backbone has none.
    """

    pyramid: Pyramid
    image: Tensor | None


class Backbone(nn.Module):
    """A frozen network as a source of features, always in evaluation mode.

    Args:
        extractor: a module, images float (B, 3, H, W) → (maps, each (B, C_l, h_l, w_l), global features (B, G) or
            ``None``).
        name, layers: to be told by.
        mean, std: a value a channel, of RGB in [0, 1].
        image_size, grid: height and width, of the images and of the hypercolumns.
        bgr: the channels are reversed before ``extractor`` sees them.
        choices: what else decides the features, plain JSON.

    Attributes:
        channels: D.
        image_channels: G, 0 where there are no global features.
        values: how many numbers the features of one image are.

    Raises:
        ValueError: ``extractor`` fails at ``image_size``, a layer gives no map, or a weight is not finite.
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        name: str,
        layers: Sequence[str | int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: _Size = IMAGE_SIZE,
        grid: _Size = GRID,
        bgr: bool = False,
        **choices: Any,
    ) -> None:
        super().__init__()
        for what, size in (("image_size", image_size), ("grid", grid)):
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"{what} must be (height, width), both positive, got {size}")
        self.extractor = extractor.requires_grad_(False).to(memory_format=torch.channels_last).eval()
        self.name, self.layers = name, tuple(layers)
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size, self.grid = (int(image_size[0]), int(image_size[1])), (int(grid[0]), int(grid[1]))
        self.bgr, self.choices = bgr, choices
        self._transform = v2.Compose(to_tensor(self.mean, self.std))
        self.channels, self.image_channels, self.values = self._probe()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image of any size to float32 (3, H, W): resized (bilinear, its aspect ratio not kept), normalized."""
        height, width = self.image_size
        pixels: Tensor = self._transform(image.resize((width, height), Image.Resampling.BILINEAR))
        return pixels.flip(0) if self.bgr else pixels

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W), prepared, to their features.

        Raises:
            ValueError: images of another size.
        """
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"images must be (B, 3, {self.image_size[0]}, {self.image_size[1]}), got {tuple(images.shape)}"
            )
        maps, image = self.extractor(images.contiguous(memory_format=torch.channels_last))
        return Features(hypercolumn.pyramid(maps, self.grid), image)

    def features(self, image: Image.Image) -> Features:
        """The features of one RGB image of any size, as a batch of one."""
        return self(self.prepare(image)[None].to(self.device))

    def description(self) -> dict[str, Any]:
        """What decides the features, plain JSON."""
        return {
            "backbone": self.name,
            "weights": self._digest,
            "layers": list(self.layers),
            "mean": list(self.mean),
            "std": list(self.std),
            "bgr": self.bgr,
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            **self.choices,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`description`."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def _digest(self) -> str:
        return digest({name: tensor.cpu() for name, tensor in self.extractor.state_dict().items()})

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, int]:
        """D, G and how many numbers an image is, from an empty one; what does not work is found here."""
        for key, value in self.extractor.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{self.name}: its weights hold NaN or infinity, in {key}")
        images = torch.zeros(1, 3, *self.image_size, device=self.device)
        try:
            maps, image = self.extractor(images)
        except Exception as error:  # a module of anybody's
            raise ValueError(
                f"{self.name} does not work on images of {self.image_size[0]} × {self.image_size[1]}: {error}"
            ) from error
        for layer, found in zip(self.layers, maps, strict=True):
            if found.ndim != 4 or len(found) != 1:
                raise ValueError(
                    f"layer {layer!r} of {self.name} must give maps (B, C, h, w), for one image it gave "
                    f"{tuple(found.shape)}"
                )
        pyramid, image_channels = hypercolumn.pyramid(maps, self.grid), 0 if image is None else image.shape[1]
        return pyramid.channels, image_channels, sum(found.numel() for found in pyramid.maps) + image_channels


class VGG16(nn.Module):
    """The 13 maps of VGG-16 (Simonyan and Zisserman, 2015), after ReLU, and fc7 averaged over the image.

    The last convolution of each of the five blocks is taken behind the pooling that follows it, as section 4.1 has it:
    64 × 2, 128 × 2, 256 × 3 and 512 × 6 channels, 4,224 in all. fc6 runs as a convolution of 7 × 7 and fc7 of 1 × 1 on
    the last map (4,096 channels).

    Args:
        layers: which of the maps, by name, in that order.
        ceil_mode: a pooling that does not divide its input keeps the rest, as Caffe and Torch7 do: at 256 × 336 the
            last map is 8 × 11 and not 8 × 10.
        fc7: the width of the fully connected layers; 0 for none.
    """

    LAYERS = (
        *("conv1_1", "pool1", "conv2_1", "pool2", "conv3_1", "conv3_2", "pool3"),
        *("conv4_1", "conv4_2", "pool4", "conv5_1", "conv5_2", "pool5"),
    )

    def __init__(self, layers: Sequence[str] = LAYERS, *, ceil_mode: bool = False, fc7: int = 4096) -> None:
        super().__init__()
        if (unknown := [layer for layer in layers if layer not in self.LAYERS]) or not layers:
            raise ValueError(f"layers of VGG-16 are {', '.join(self.LAYERS)}; got {some([*map(str, unknown)])}")
        self.layers = tuple(layers)
        # torchvision's names and order, so that its files fit
        self.features = make_layers(cfgs["D"])
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = ceil_mode
        self.fc6, self.fc7 = (nn.Conv2d(512, fc7, 7), nn.Conv2d(fc7, fc7, 1)) if fc7 else (None, None)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        maps: list[Tensor] = []
        x = images
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                maps[-1] = x
            elif isinstance(layer, nn.ReLU):
                maps.append(x)
        chosen = [maps[self.LAYERS.index(layer)] for layer in self.layers]
        if self.fc6 is None or self.fc7 is None:
            return chosen, None
        return chosen, self.fc7(self.fc6(x).relu()).relu().mean((2, 3))

    @staticmethod
    def from_state(
        state: Mapping[str, Tensor], where: str, layers: Sequence[str] = LAYERS, *, ceil_mode: bool = False
    ) -> VGG16:
        """From torchvision's names of its weights; without fc7 where ``state`` has no fully connected layers.

        Raises:
            ValueError: what is missing, unknown or of the wrong shape is listed.
        """
        renamed = {f"{ours}.{what}": f"classifier.{at}.{what}" for ours, at in _FULL.items() for what in _PARTS}
        first = next((tensor for name, tensor in state.items() if name.endswith("classifier.0.weight")), ())
        with torch.device("meta"):
            model = VGG16(layers, ceil_mode=ceil_mode, fc7=len(first))
        own = {renamed.get(name, name): tensor.shape for name, tensor in model.state_dict().items()}
        given = without_prefixes(state, own)
        problems = [f"{name} is missing" for name in own if name not in given]
        for name, tensor in given.items():
            if name not in own and not name.startswith("classifier.6."):
                problems.append(f"{name} is unknown")
            elif name in own and (tensor.numel(), tensor.shape[:1]) != (own[name].numel(), own[name][:1]):
                problems.append(f"{name} is {tuple(tensor.shape)}")
        if problems:
            raise ValueError(f"{where} does not fit VGG-16: {some(problems, '; ')}")
        fitting = {
            name: given[renamed.get(name, name)].float().reshape(tensor.shape)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(fitting, assign=True)
        return model


class Hooked(nn.Module):
    """Any module with the outputs of some of its layers as maps, and that of ``head`` as global features.

    A ``head`` that gives (B, G, h, w) is averaged over h and w.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], head: str | None) -> None:
        super().__init__()
        check_layers(module, layers)
        self.module, self.layers, self.head = module, tuple(layers), head
        self.collected = tuple(dict.fromkeys(self.layers if head is None else (*self.layers, head)))
        check_layers(module, self.collected)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        with Collected(self.module, self.collected, needs_grad=False) as collected:
            self.module(images)
            outputs = collected.take().outputs
        return [outputs[layer] for layer in self.layers], None if self.head is None else self._pooled(
            outputs[self.head]
        )

    def _pooled(self, output: Tensor) -> Tensor:
        if output.ndim not in (2, 4):
            raise ValueError(f"head {self.head!r} must give (B, G) or (B, G, h, w), got {tuple(output.shape)}")
        return output if output.ndim == 2 else output.mean((2, 3))


class Intermediates(nn.Module):
    """A model of timm with the outputs of some of its blocks or stages as maps.

    Its global features are what its classifier would see: the class token or the pooled last map. Where all blocks have
    one resolution, as in a ViT, the final normalization is applied to each, which brings them to one scale.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None) -> None:
        super().__init__()
        self.model = model
        stages = len(model.feature_info)
        self.flat = len({stage["reduction"] for stage in model.feature_info}) == 1
        quarters = [stages * quarter // 4 - 1 for quarter in range(1, 5)]
        self.layers = tuple(layers if layers is not None else quarters if self.flat else range(stages))
        if not self.layers or not all(isinstance(layer, int) and 0 <= layer < stages for layer in self.layers):
            raise ValueError(f"layers must be numbers in 0 … {stages - 1}, got {self.layers}")

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        last, maps = self.model.forward_intermediates(images, indices=sorted(set(self.layers)), norm=self.flat)
        found = dict(zip(sorted(set(self.layers)), maps, strict=True))
        return [found[layer] for layer in self.layers], self.model.forward_head(last, pre_logits=True)


def create(
    name: str = "vgg16",
    weights: str | os.PathLike[str] = pretrained.HUB,
    *,
    image_size: _Size | None = None,
    grid: _Size | None = None,
    layers: Sequence[str] | Sequence[int] | None = None,
    ceil_mode: bool = False,
    preprocessing: str = "torchvision",
) -> Backbone:
    """A frozen network with pretrained weights.

    Args:
        name: ``"vgg16"``, the paper's; or any model of timm that gives intermediate features (CNNs, and ViTs such as
            DeiT, DINO and CLIP).
        weights: ``"hub"`` downloads the library's own; a path reads a ``.safetensors`` file or one of ``torch.save``,
            with torchvision's names for VGG-16 and timm's for the others.
        image_size: (height, width) that every image is resized to; by default 256 × 336, or what is next to it in whole
            patches.
        grid: (height, width) of the hypercolumns; by default a quarter of ``image_size``.
        layers: names in :attr:`VGG16.LAYERS`, or numbers of timm's stages or blocks from 0; by default all of a CNN
            and four of a ViT, evenly spaced.
        ceil_mode, preprocessing: of VGG-16; see :class:`VGG16` and ``PREPROCESSING``.

    Raises:
        ValueError: an unknown name, layers or sizes that do not suit it, or a file that cannot be read or does not fit.
        FileNotFoundError: there is no such file.
        RuntimeError: the weights could not be downloaded.
    """
    where = f"weights {os.fspath(weights)}"
    if weights != pretrained.HUB and not os.path.isfile(weights):
        raise FileNotFoundError(f"{where}: there is no such file; a segmenter needs those of its fit where they were")
    if name == "vgg16":
        if preprocessing not in PREPROCESSING:
            raise ValueError(f"preprocessing must be one of {', '.join(PREPROCESSING)}, got {preprocessing!r}")
        hub = weights == pretrained.HUB
        state = pretrained.load("torchvision/vgg16").weights if hub else read_state_dict(weights)
        vgg = VGG16.from_state(state or {}, where, VGG16.LAYERS if layers is None else layers, ceil_mode=ceil_mode)
        facts = PREPROCESSING[preprocessing] | {"ceil_mode": ceil_mode}
        extractor, size = vgg, image_size or IMAGE_SIZE
    else:
        if ceil_mode or preprocessing != "torchvision":
            raise ValueError(f"ceil_mode and preprocessing are choices for vgg16, not for {name}")
        name = name.removeprefix("timm/")
        source = pretrained.load(f"timm/{name}", weights)
        model, size = _of_timm(name, image_size)
        pretrained.load_backbone(model, source.weights or {}, where)
        model.reset_classifier(0)
        facts, extractor = {"mean": source.mean, "std": source.std}, Intermediates(model, layers)
    grid = grid or (max(1, size[0] // 4), max(1, size[1] // 4))
    return Backbone(extractor, name=name, layers=extractor.layers, image_size=size, grid=grid, **facts)


def wrap(
    module: nn.Module,
    layers: Sequence[str],
    *,
    name: str,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    image_size: _Size,
    grid: _Size,
    head: str | None = None,
) -> Backbone:
    """Any module, images (B, 3, H, W) → whatever, with the outputs of ``layers`` as maps. It is frozen.

    Args:
        layers: names of modules in it that give maps (B, C, h, w).
        head: the name of one whose output (B, G), or (B, G, h, w) averaged, is the global features.

    Raises:
        ValueError: a layer that it does not have, or that gives no map.
    """
    extractor = Hooked(module, layers, head)
    return Backbone(
        extractor, name=name, layers=layers, mean=mean, std=std, image_size=image_size, grid=grid, head=head
    )


def _of_timm(name: str, image_size: _Size | None) -> tuple[nn.Module, _Size]:
    """A model of timm and the size of the images that it takes."""
    with torch.device("meta"):
        plain = timm.create_model(name, num_classes=1)
    if not hasattr(plain, "forward_intermediates"):
        raise ValueError(f"timm's {name} gives no intermediate features; backbones.wrap takes any module")
    patch = getattr(getattr(plain, "patch_embed", None), "patch_size", 1)
    patches = patch if isinstance(patch, tuple) else (patch, patch)
    height, width = (round(side / step) * step for side, step in zip(IMAGE_SIZE, patches, strict=True))
    size = image_size or (height, width)
    # ViTs resample the positions' embedding in every forward; some transformers take one other size; CNNs take any
    for options in ({"dynamic_img_size": True}, {"img_size": size}, {}):
        with suppress(TypeError):
            return timm.create_model(name, num_classes=1, **options), size
    raise AssertionError("unreachable: the last was built above")
