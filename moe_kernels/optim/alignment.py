"""Which of the tensors that a user gives belongs to which parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels.parallel.sharding import copy_like, local, shard_like

Given = Iterable[Tensor | None] | Mapping[str, Tensor | None]
"""A tensor or None for every parameter, in order; or by name."""


def aligned(
    name: str, given: Given, params: Sequence[Tensor], labels: Sequence[str], *, named: bool
) -> list[Tensor | None]:
    """``given``, the argument ``name``, as a list along ``params``, which messages call ``labels``.

    Args:
        named: whether the labels are the parameters' names, by which a mapping goes.

    Raises:
        ValueError: counts, names or shapes that differ, each of them listed.
        TypeError: something else than floating-point tensors.
    """
    values = _listed(name, given, len(params), labels if named else None)
    wrong = []
    for label, param, value in zip(labels, params, values, strict=True):
        if value is None:
            continue
        problem = _problem(value)
        if problem:
            raise TypeError(f"{name}: expected dense floating-point tensors or None, got {problem} for {label}")
        if value.shape != param.shape:
            wrong.append(f"{label} has {tuple(param.shape)}, got {tuple(value.shape)}")
    if wrong:
        raise ValueError(f"{name}: expected the shapes of the parameters: {'; '.join(wrong)}")
    return values


def _problem(value: object) -> str:
    """What a message says of a value that is no dense floating-point tensor; empty where it is one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.layout != torch.strided:
        return str(value.layout)
    if value.is_meta:
        return "a meta tensor"
    return "" if value.is_floating_point() else str(value.dtype)


def with_anchors(params: Any, anchor: Given | None) -> Any:
    """``params`` as torch.optim takes them, as groups of which each has its own part of ``anchor``."""
    if anchor is None or isinstance(params, Tensor):  # the latter torch refuses
        return params
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    if any("anchor" in group for group in groups):
        raise ValueError("anchor: expected the argument or one in the groups, got both")
    members: list[list[Any]] = [
        [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"]) for group in groups
    ]
    flat = [member for group in members for member in group]
    names = [member[0] for member in flat if isinstance(member, tuple)]
    if isinstance(anchor, Mapping) and names:
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice or len(names) < len(flat):
            found = f"{', '.join(twice)} twice" if twice else f"{len(flat) - len(names)} of {len(flat)} without"
            raise ValueError(f"anchor: a mapping needs a name of its own for every parameter, got {found}")
    values = iter(_listed("anchor", anchor, len(flat), names or None))
    return [
        # A set of parameters stays one, for torch to refuse.
        {**group, "params": group["params"] if isinstance(group["params"], set) else tensors}
        | {"anchor": [next(values) for _ in tensors]}
        for group, tensors in zip(groups, members, strict=True)
    ]


def anchor_copies(given: Given, params: Sequence[Tensor], labels: Sequence[str], *, named: bool) -> list[Tensor | None]:
    """Copies of the anchors in their own dtypes, on the devices, in the layouts and the placements of ``params``.

    Raises:
        ValueError, TypeError: as :func:`aligned`; an anchor is not finite.
    """
    values = aligned("anchor", given, params, labels, named=named)
    copies: list[Tensor | None] = []
    for label, param, value in zip(labels, params, values, strict=True):
        if value is None:
            copies.append(None)
            continue
        try:
            copies.append(copy_like(shard_like(value.detach(), param), param))
        except ValueError as error:
            raise ValueError(f"anchor: {error}, for {label}") from None
    checks = [torch.zeros(()) if copy is None else local(copy).isfinite().logical_not().any() for copy in copies]
    broken = [label for label, check in zip(labels, checks, strict=True) if check]
    if broken:
        raise ValueError(f"anchor: expected finite values, got others for {', '.join(broken)}")
    return copies


def _listed(name: str, given: Given, count: int, names: Sequence[str] | None) -> list[Tensor | None]:
    """``given`` as a list of ``count``, by ``names`` where it is a mapping."""
    if isinstance(given, Mapping):
        if names is None:
            raise ValueError(f"{name}: a mapping needs names, pass model.named_parameters(); got parameters without")
        unknown = [key for key in given if key not in set(names)]
        if unknown:
            raise ValueError(
                f"{name}: expected names of parameters, got {', '.join(map(repr, unknown))}; pass the "
                "named_parameters() of the pretrained model; a state_dict() has buffers and all names of what is tied"
            )
        return [given.get(key) for key in names]
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a sequence or a mapping of tensors, got {type(given).__name__}")
    values = list(given)
    if len(values) != count:
        raise ValueError(f"{name}: expected {count}, a tensor or None for every parameter, got {len(values)}")
    return values
