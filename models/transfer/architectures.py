"""Where a backbone keeps what transfer learning asks for: its new head, and the layers whose features are compared.

Read from names and classes of timm's, torchvision's and transformers' models, without importing any of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from moe_kernels.nn import MoE

from ..gmoe.feedforward import find_blocks

Head = str | Sequence[str] | None

_HEADS = ("fc", "classifier", "head", "heads", "score")
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_CONVOLUTIONS = nn.modules.conv._ConvNd
_KERNELS = (nn.Linear, _CONVOLUTIONS)


class Stage(NamedTuple):
    """A stage of a backbone, by module names.

    Attributes:
        output: what gives the stage's output.
        kernel: its last convolution, in a transformer block its last linear layer.
    """

    output: str
    kernel: str


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` and ``torch.compile``, to any depth.

    Raises:
        TypeError: ``nn.DataParallel``, whose replicas live for one forward only.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError("model: nn.DataParallel is not supported; use DistributedDataParallel")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's parameters.

    The classifier is what timm's ``get_classifier()`` gives; otherwise the last linear layer or convolution of a child
    named ``fc``, ``classifier``, ``head``, ``heads`` or ``score``, as torchvision and transformers have it.

    Raises:
        ValueError: there is none, or several such children.
    """
    model = unwrap(model)
    names = {module: name for name, module in model.named_modules()}
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        given = get_classifier()
        found = [module for module in (given if isinstance(given, tuple | list) else [given]) if module in names]
    else:
        children = [child for name, child in model.named_children() if name in _HEADS]
        kernels = [[module for module in child.modules() if isinstance(module, _KERNELS)] for child in children]
        found = [layers[-1] for layers in kernels if layers]
        found = found if len(found) == 1 else []
    parameters = tuple(name for module in found for name in _prefixed(model, names[module]))
    if not parameters:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"model: no classifier found in {type(model).__name__}; pass head='the name of its module', or head=() "
            f"if there is no new head (linear layers: {_some(linear)})"
        )
    return parameters


def head_parameters(model: nn.Module, head: Head = None) -> tuple[str, ...]:
    """Names of the parameters that are new, in the model's order.

    Args:
        model: the model to be fine-tuned.
        head: names of modules or parameters; ``()`` for none. By default :func:`find_head`.

    Raises:
        ValueError: a name that fits no parameter, or no head is found.
    """
    model = unwrap(model)
    if head is None:
        return find_head(model)
    given = (head,) if isinstance(head, str) else tuple(head)
    found = {name: _prefixed(model, name) for name in given}
    for name, parameters in found.items():
        if not parameters:
            raise ValueError(f"head: no parameter of {type(model).__name__} starts with {name!r}{_near(name, model)}")
    new = {name for parameters in found.values() for name in parameters}
    return tuple(name for name, _ in model.named_parameters() if name in new)


def find_stages(model: nn.Module) -> tuple[Stage, ...]:
    """The stages of a backbone, from the input to the output.

    - ResNets of timm and torchvision: ``layer1``, ``layer2``, …; the kernel is the last block's ``conv3``, or
      ``conv2`` in basic blocks, before its normalization and the residual sum.
    - VGG and AlexNet: everything up to each pooling layer of ``features``; the kernel is the convolution before it.
    - Vision transformers: blocks at each quarter of the depth; the kernel is the last linear layer of the block's
      FFN, or the whole block where the FFN is a mixture of experts.

    Raises:
        ValueError: another architecture; some names to choose from.
    """
    model = unwrap(model)
    stages = tuple(_resnet(model) or _vgg(model) or _transformer(model))
    if not stages:
        kernels = [name for name, module in model.named_modules() if isinstance(module, _KERNELS)]
        raise ValueError(
            f"layers: none are known for {type(model).__name__}; pass their names (its layers: {_some(kernels)})"
        )
    return stages


def check_layers(model: nn.Module, layers: Sequence[str], what: str = "layers") -> None:
    """Refuse names that ``model`` has no module for.

    Raises:
        ValueError: which names, and the nearest that there are.
        TypeError: one string instead of several.
    """
    if isinstance(layers, str):
        raise TypeError(f"{what}: expected a sequence of module names, got the string {layers!r}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"{what}: expected different module names, at least one, got {list(layers)}")
    names = {name for name, _ in model.named_modules()} - {""}
    for name in layers:
        if name not in names:
            raise ValueError(f"{what}: {type(model).__name__} has no module {name!r}{_near(name, model)}")


def _resnet(model: nn.Module) -> list[Stage]:
    stages: list[Stage] = []
    while isinstance(blocks := getattr(model, f"layer{len(stages) + 1}", None), nn.Sequential) and len(blocks):
        *_, (last, block) = blocks.named_children()
        kernel = next((name for name in ("conv3", "conv2") if isinstance(getattr(block, name, None), nn.Module)), None)
        if kernel is None:
            return []
        output = f"layer{len(stages) + 1}"
        stages.append(Stage(output, f"{output}.{last}.{kernel}"))
    # HRNet has a layer1 too, and then goes on otherwise
    return stages if len(stages) > 1 else []


def _vgg(model: nn.Module) -> list[Stage]:
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential) or any(len(list(layer.children())) for layer in features):
        return []
    stages: list[Stage] = []
    kernel = None
    for name, layer in features.named_children():
        if isinstance(layer, _CONVOLUTIONS):
            kernel = f"features.{name}"
        elif isinstance(layer, _POOLS) and kernel:
            stages.append(Stage(f"features.{name}", kernel))
            kernel = None
    return stages


def _transformer(model: nn.Module) -> list[Stage]:
    try:
        path, _ = find_blocks(model)
    except ValueError:
        return []
    prefix = f"{path}." if path else ""
    blocks = [(f"{prefix}{name}", block) for name, block in model.get_submodule(path).named_children()]
    quarters = sorted({math.ceil(len(blocks) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    stages = []
    for name, block in (blocks[i] for i in quarters):
        linears = [part for part, module in block.named_modules() if isinstance(module, nn.Linear)]
        sparse = any(isinstance(module, MoE) for module in block.modules())
        stages.append(Stage(name, name if sparse or not linears else f"{name}.{linears[-1]}"))
    return stages


def _prefixed(model: nn.Module, prefix: str) -> list[str]:
    """Names of the parameters of the module or parameter called ``prefix``."""
    return [name for name, _ in model.named_parameters() if name == prefix or name.startswith(f"{prefix}.")]


def _near(name: str, model: nn.Module) -> str:
    """The end of a message: what may have been meant by ``name``."""
    names = [module for module, _ in model.named_modules() if module]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"; near it: {', '.join(near)}" if near else f"; it has {_some(names)}"


def _some(names: Collection[str], most: int = 12) -> str:
    """At most ``most`` of ``names``, evenly spread, and how many there are."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names) or "none"
    chosen = [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
    return f"{', '.join(chosen)}, … ({len(names)} in all)"
