"""Weights from files, and checkpoints of the official GMoE code in both directions.

The official code (github.com/Luodian/Generalizable-Mixture-of-Experts) names its dense parameters as timm
does, and those of the mixtures, under ``blocks.{i}.mlp.``, as Tutel does:

    experts.batched_fc1_w (E, h, d)          w1
    experts.batched_fc1_bias (E, 1, h)       b1; newer Tutel has (E, h)
    experts.batched_fc2_w (E, h, d)          w2, transposed
    experts.batched_fc2_bias (E, 1, d)       b2; newer Tutel has (E, d)
    gates.0.cosine_projector.{weight,bias}   router.projection.{weight,bias}
    gates.0.sim_matrix (p, E)                router.expert_embedding, transposed
    gates.0.temperature (1,)                 router.log_scale
    gates.0.wg.weight (E, d)                 router.weight, of a linear router
    _num_global_experts ()                   E; older Tutel has none
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.nn import CosineRouter, LinearRouter, MoE

from ..weights import read_state_dict, state_of, without_prefixes

_HEADS = ("head.", "head_dist.", "classifier.", "heads.head.")
_COUNT = "_num_global_experts"


def has_experts(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is of a model with mixtures, this package's or the official code's."""
    return _is_official(state) or any(key.endswith(".mlp.w1") for key in state)


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Load weights into ``model`` in place, from a file (:func:`read_state_dict`) or from a state dict.

    A GMoE takes its own state dict or the official code's, a dense ViT its own. Names may have the prefixes
    that wrappers add, and the state dict may stand under ``model``, ``state_dict`` or ``model_dict``. A head
    of another number of classes, or of none, is left as initialized, with a warning.

    Raises:
        ValueError: anything else differs: all missing keys, unknown keys and wrong shapes are listed, and
            nothing is loaded.
    """
    if isinstance(source, str | os.PathLike):
        load_state(model, read_state_dict(source), os.fspath(source))
    else:
        load_state(model, state_of(source, "source"), "source")


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """:func:`load_weights` from a plain state dict; ``where`` is what messages call it."""
    layout = _official_layout(model) if _is_official(state) else _own_layout(model)
    state = without_prefixes(state, layout)
    head = {key for key in {*state, *layout} if key.startswith(_HEADS)}
    drop_head = any(_misfit(key, state, layout) for key in head)
    if drop_head:
        state = {key: tensor for key, tensor in state.items() if key not in head}
        layout = {key: entry for key, entry in layout.items() if key not in head}
    model.load_state_dict(_translated(state, layout, where, model), strict=False)
    if drop_head:
        warnings.warn(
            f"{where}: its head is for another number of classes; the model keeps its own, as initialized",
            stacklevel=3,
        )


def from_official_state_dict(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``model``, a GMoE of this package, loads strictly, from one of the official code.

    Accepts what ``torch.load`` gives for a DomainBed checkpoint (``model_dict``) as well, and names with the
    prefixes that wrappers add. Values and dtypes are kept bit for bit.

    Raises:
        ValueError: all missing keys, unknown keys and wrong shapes (expected and got) in one message.
    """
    layout = _official_layout(model)
    return _translated(without_prefixes(state_of(state, "state"), layout), layout, "state", model)


def to_official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, a GMoE of this package, as the official code and any Tutel load it.

    The inverse of :func:`from_official_state_dict`, bit for bit. DomainBed's scripts want it as
    ``{"model_dict": {"model." + key: tensor, …}}``.

    Raises:
        ValueError: a mixture has a router that Tutel does not have.
    """
    state = model.state_dict()
    official = {key: entry.write(state[entry.ours]) for key, entry in _official_layout(model).items()}
    counts = {f"{name}.{_COUNT}": torch.tensor(layer.num_experts) for name, layer in _mixtures(model)}
    return official | counts


class _Entry(NamedTuple):
    """One tensor of a checkpoint and the one of the model that it belongs to."""

    ours: str
    shapes: tuple[tuple[int, ...], ...]  # what is accepted
    read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    write: Callable[[Tensor], Tensor] = lambda tensor: tensor


_Layout = dict[str, _Entry]


def _own_layout(model: nn.Module) -> _Layout:
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {key: _same(key, tuple(tensor.shape)) for key, tensor in tensors.items()}


def _official_layout(model: nn.Module) -> _Layout:
    layout = _own_layout(model)
    for name, layer in _mixtures(model):
        pairs = [
            ("experts.batched_fc1_w", "w1", _same),
            ("experts.batched_fc1_bias", "b1", _bias),
            ("experts.batched_fc2_w", "w2", _transposed),
            ("experts.batched_fc2_bias", "b2", _bias),
        ]
        if isinstance(layer.router, CosineRouter):
            pairs += [
                ("gates.0.cosine_projector.weight", "router.projection.weight", _same),
                ("gates.0.cosine_projector.bias", "router.projection.bias", _same),
                ("gates.0.sim_matrix", "router.expert_embedding", _transposed),
                ("gates.0.temperature", "router.log_scale", _same),
            ]
        elif isinstance(layer.router, LinearRouter):
            pairs += [("gates.0.wg.weight", "router.weight", _same)]
        else:
            kind = type(layer.router).__name__
            raise ValueError(f"{name}.router: expected a router that Tutel has, cosine or linear, got {kind}")
        for theirs, ours, entry in pairs:
            shape = layout.pop(f"{name}.{ours}").shapes[0]
            layout[f"{name}.{theirs}"] = entry(f"{name}.{ours}", shape)
    return layout


def _same(ours: str, shape: tuple[int, ...]) -> _Entry:
    return _Entry(ours, (shape,))


def _transposed(ours: str, shape: tuple[int, ...]) -> _Entry:
    def swap(tensor: Tensor) -> Tensor:
        return tensor.transpose(-2, -1).contiguous()

    return _Entry(ours, ((*shape[:-2], shape[-1], shape[-2]),), swap, swap)


def _bias(ours: str, shape: tuple[int, ...]) -> _Entry:
    experts, width = shape
    # written with the 1: old Tutel has only that, and new Tutel reshapes it
    return _Entry(ours, ((experts, 1, width), shape), lambda bias: bias.reshape(shape), lambda bias: bias.unsqueeze(1))


def _mixtures(model: nn.Module) -> list[tuple[str, MoE]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]


def _is_official(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(".experts.batched_fc1_w") for key in state)


def _misfit(key: str, state: Mapping[str, Tensor], layout: _Layout) -> bool:
    return key not in state or key not in layout or tuple(state[key].shape) not in layout[key].shapes


def _translated(state: Mapping[str, Tensor], layout: _Layout, where: str, model: nn.Module) -> dict[str, Tensor]:
    """``state`` under the model's names; one error that lists everything that does not fit."""
    counts = {f"{name}.{_COUNT}" for name, _ in _mixtures(model)}
    problems = {
        "missing": [key for key in layout if key not in state],
        "unknown": [key for key in state if key not in layout and key not in counts],
        "wrong shape": [
            f"{key} (expected {' or '.join(map(str, layout[key].shapes))}, got {tuple(state[key].shape)})"
            for key in state
            if key in layout and _misfit(key, state, layout)
        ],
    }
    if any(problems.values()):
        listed = "".join(f"\n  {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        if counts and not has_experts(state):
            listed += "\n  (dense weights are loaded before convert, or with create(pretrained=path))"
        raise ValueError(f"{where} does not fit {type(model).__name__}:{listed}")
    return {entry.ours: entry.read(state[key]) for key, entry in layout.items()}
