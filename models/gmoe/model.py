"""GMoE models by name: a ViT of timm with the published mixtures of experts in some of its blocks."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from moe_kernels.nn import CosineRouter
from moe_kernels.nn.moe import TUTEL

from ..weights import read_state_dict
from .checkpoints import has_experts, load_state
from .convert import Layers, upcycle

_PATCH16 = {
    "gmoe_tiny_patch16_224": "deit_tiny_patch16_224.fb_in1k",
    "gmoe_small_patch16_224": "deit_small_patch16_224.fb_in1k",
    "gmoe_base_patch16_224": "deit_base_patch16_224.fb_in1k",
}
_DIGITS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
_DROP_PATH = 0.1


def list_models() -> list[str]:
    """The names that :func:`create` knows."""
    return [*_PATCH16, "gmoe_digits"]


def create(
    name: str,
    num_classes: int,
    pretrained: bool | str | os.PathLike[str] = False,
    layers: Layers = "last_two",
    num_experts: int = 6,
    top_k: int = 1,
    router: str | nn.Module = "cosine",
    **moe: Any,
) -> nn.Module:
    """A GMoE (Li et al., ICLR 2023) on timm's ViT: (B, 3, H, W) images → (B, num_classes) logits.

    Every expert starts as the FFN of its block. The layers are the published ones: cosine router of width
    256 with noise 1, hidden dropout 0.1, capacity factor 1.5 in training and evaluation, batch priority,
    Tutel's load-importance loss, gates renormalized for ``top_k`` > 1 only, so that with ``top_k=1`` a fresh
    model scales the converted branches to about 1/E, as the published one does. Stochastic depth is 0.1.
    ``layers=[]`` gives the dense ViT, after the same ``torch.manual_seed`` with the same start.

    Args:
        name: one of :func:`list_models`. ``gmoe_{tiny,small,base}_patch16_224`` are DeiT's at 224×224;
            ``gmoe_digits`` is a small one for 32×32 images (patch 8, width 64, 4 blocks).
        num_classes: outputs of the head; 0 leaves it out.
        pretrained: True downloads DeiT's ImageNet-1k weights through timm. A path reads a ``.safetensors``,
            ``.pth`` or ``.pt`` file instead: of the dense ViT, of this model, or of the official GMoE code
            (:func:`load_weights`).
        layers: as in :func:`convert`.
        num_experts, top_k, router: as in :func:`convert`.
        **moe: further arguments of :class:`moe_kernels.nn.MoE`, replacing the published ones.

    Raises:
        ValueError: an unknown name, a bad argument, or weights that do not fit, with what differs.
        RuntimeError: timm could not get the pretrained weights.
        ModuleNotFoundError: timm is not installed.
    """
    if name not in list_models():
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
    state = None if isinstance(pretrained, bool) else read_state_dict(pretrained)
    model = _dense(name, num_classes, download=pretrained is True)
    if state is not None and not has_experts(state):
        load_state(model, state, where=str(pretrained))
    _make_sparse(model, layers, top_k, router, num_experts=num_experts, **moe)
    if state is not None and has_experts(state):
        load_state(model, state, where=str(pretrained))
    return model


def _dense(name: str, num_classes: int, download: bool) -> nn.Module:
    """The dense ViT under ``name``."""
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"timm is needed: pip install 'moe-kernels[models]' ({error})") from error
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": _DROP_PATH}
    if name not in _PATCH16:
        if download:
            raise ValueError(f"pretrained: {name} has no published weights; expected False or a path, got True")
        return VisionTransformer(**_DIGITS, **options)
    source = _PATCH16[name]
    try:
        return timm.create_model(source, pretrained=download, **options)
    except Exception as error:
        if not download:
            raise
        # timm, huggingface_hub and the HTTP client below them raise a dozen kinds for "no network"
        raise RuntimeError(
            f"pretrained: timm could not get the weights of {source} ({type(error).__name__}: {error}). "
            "Without a network, bring its model.safetensors and pass pretrained='/path/to/model.safetensors'"
        ) from error


def _make_sparse(model: nn.Module, layers: Layers, top_k: int, router: str | nn.Module, **moe: Any) -> None:
    """Upcycle ``model`` with the published layer, ``moe`` replacing parts of it."""
    settings: dict[str, Any] = TUTEL | {"renormalize": top_k > 1}
    if isinstance(router, nn.Module):
        # a router that is given brings its own
        del settings["noise"], settings["renormalize"]
    for layer in upcycle(model, layers, top_k=top_k, router=router, **(settings | moe)):
        if isinstance(layer.router, CosineRouter) and isinstance(router, str):
            # the published code initializes every linear layer as the ViT's, those in routers too
            nn.init.trunc_normal_(layer.router.projection.weight, std=0.02)
            nn.init.zeros_(layer.router.projection.bias)
