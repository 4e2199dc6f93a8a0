"""Turning a dense vision transformer into a GMoE: some FFNs become mixtures of experts that start as copies.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055), as GMoE does it (Li et al. 2023,
arXiv 2206.04046).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.nn import MoE

from .feedforward import FeedForward, find_blocks, read_ffn

Layers = str | Sequence[int]
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    layers: Layers = "last_two",
    num_experts: int = 6,
    top_k: int = 1,
    router: str | nn.Module = "cosine",
    **moe: Any,
) -> Model:
    """Replace FFNs of a vision transformer by mixtures of experts, each expert a copy of the FFN. In place.

    For vision transformers of timm, torchvision and transformers, and any other of the same structure
    (:mod:`moe_kernels.models.gmoe.feedforward`). Activation, dropout, dtype, device, mode and
    ``requires_grad`` are the FFN's; the router is new and trainable. With one expert, or with gates that sum
    to one (``renormalize=True``, ``top_k`` ≥ 2), the converted model gives in eval mode what the dense one
    gave, to rounding. The paper's raw gates (Eq. 2) scale the converted branch to about
    ``top_k / num_experts`` of the FFN at first; a warning says so once.

    Args:
        model: the dense model, with its weights loaded.
        layers: ``"every_two"``: blocks 0, 2, 4, …; ``"last_two"``: the last two of those, 8 and 10 of 12; or
            block indices, from 0.
        num_experts, top_k: experts a layer has and experts a token is sent to.
        router: ``"cosine"``, ``"linear"`` or a module, of which every converted block gets its own copy.
        **moe: further arguments of :class:`moe_kernels.nn.MoE`, such as ``balance_loss``,
            ``capacity_factor``, or ``dropout`` in the place of the FFN's.

    Returns:
        ``model``.

    Raises:
        ValueError: no blocks are found, ``layers`` does not fit them, or an FFN is not plain (gated, a norm
            inside, unknown activation): the message names the block and the reason. The model is then
            unchanged.
    """
    made = upcycle(model, layers, num_experts=num_experts, top_k=top_k, router=router, **moe)
    if any(layer.num_experts > 1 and not getattr(layer.router, "renormalize", False) for layer in made):
        scale = f"{getattr(made[0].router, 'top_k', top_k)}/{num_experts}"
        warnings.warn(
            f"raw gates scale each converted branch to about {scale} of its FFN, so the model starts away "
            "from the dense one; renormalize=True with top_k of 2 or more starts on it",
            stacklevel=2,
        )
    return model


def upcycle(model: nn.Module, layers: Layers, **moe: Any) -> list[MoE]:
    """:func:`convert` without its warning; the layers that were put in."""
    if "activation" in moe:
        raise ValueError("activation: it is the FFN's, and cannot be chosen")
    name, blocks = find_blocks(model)
    prefix = f"{name}." if name else ""
    ffns = [read_ffn(blocks[i], f"{prefix}{i}") for i in select_blocks(layers, len(blocks))]
    # all are made before the first is put in place: an error leaves the model as it was
    made = [_experts(ffn, **moe) for ffn in ffns]
    for ffn, layer in zip(ffns, made, strict=True):
        ffn.replace(layer)
    return made


class _ThenDropout(MoE):
    """A MoE in the place of an FFN that has a dropout after its second layer. Same parameters and names."""

    output_dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.output_dropout, self.training)


def _experts(ffn: FeedForward, router: str | nn.Module, **moe: Any) -> MoE:
    """The mixture whose every expert is ``ffn``."""
    kind = _ThenDropout if ffn.output_dropout > 0 else MoE
    settings: dict[str, Any] = {"activation": ffn.activation, "dropout": ffn.dropout} | moe
    # a router module is a pattern: two blocks that share one would share its parameters
    layer = kind.from_ffn(ffn.fc1, ffn.fc2, router=copy.deepcopy(router), **settings)
    if isinstance(layer, _ThenDropout):
        layer.output_dropout = ffn.output_dropout
    for weight, bias, linear in ((layer.w1, layer.b1, ffn.fc1), (layer.w2, layer.b2, ffn.fc2)):
        weight.requires_grad_(linear.weight.requires_grad)
        bias.requires_grad_((linear.weight if linear.bias is None else linear.bias).requires_grad)
    return layer.train(ffn.training)


def select_blocks(layers: Layers, depth: int) -> list[int]:
    """The block indices that ``layers`` means in a model of ``depth`` blocks, ascending.

    Raises:
        ValueError: an unknown name, an index outside 0 … depth − 1, the same one twice, or too few blocks.
        TypeError: neither a string nor integers.
    """
    expected = f"'last_two', 'every_two' or different block indices in 0 … {depth - 1}"
    every_two = list(range(0, depth, 2))
    if isinstance(layers, str):
        if layers == "every_two":
            return every_two
        if layers == "last_two" and len(every_two) >= 2:
            return every_two[-2:]
        if layers == "last_two":
            raise ValueError(f"layers: 'last_two' needs at least 3 blocks, got {depth}; pass indices")
        raise ValueError(f"layers: expected {expected}, got {layers!r}")
    if any(not isinstance(i, int) or isinstance(i, bool) for i in layers):
        raise TypeError(f"layers: expected {expected}, got {layers!r}")
    if len(set(layers)) < len(layers) or any(not 0 <= i < depth for i in layers):
        raise ValueError(f"layers: expected {expected}, got {list(layers)}")
    return sorted(layers)
