"""State dicts: out of files and of what training scripts wrap them in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_torch

# Under what training scripts wrap a state dict, DomainBed's model_dict among them.
_NESTED = ("model_dict", "state_dict", "model")
# What wrapping a model in DataParallel, DDP, a DomainBed algorithm or torch.compile puts before its names.
_PREFIXES = ("module.", "model.", "network.", "_orig_mod.")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in one of ``torch.save`` (tensors and plain data only).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no state dict.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return state_of(read_torch(path), f"{path}")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs safetensors: pip install 'moe-kernels[models]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def state_of(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what a file or a caller gave."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a state dict, got {type(content).__name__}")
    if other := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where}: expected names with tensors, got something else under {', '.join(other)}")
    return dict(content)


def without_prefixes(state: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """``state`` with the prefixes of wrappers taken off the names that are not in ``names``."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        while name not in names and (prefix := next((p for p in _PREFIXES if name.startswith(p)), None)):
            name = name.removeprefix(prefix)
        if name in renamed:
            raise ValueError(f"{key}: {name} is there more than once, with and without a prefix")
        renamed[name] = tensor
    return renamed


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values: ties what was trained to what it was trained from."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
