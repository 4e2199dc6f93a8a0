"""Tensors in safetensors files, with what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import files, runs


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``facts`` (plain JSON) to ``path``, atomically."""
    content = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    files.write_bytes(path, save(content, {"facts": json.dumps(facts)}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts that :func:`write` wrote; ``ValueError`` names a file that is not one."""
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as a safetensors file of a segmenter: {error}") from error


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], hashes: Iterable[str]) -> list[str]:
    """As :func:`.runs.differences`; of ``hashes`` only that they differ."""
    plain = ({key: value for key, value in side.items() if key not in set(hashes)} for side in (theirs, ours))
    return runs.differences(*plain) + [
        f"{name}: others there than here" for name in hashes if theirs.get(name) != ours.get(name)
    ]


def digest(names: Iterable[str]) -> str:
    """SHA-256 of a sequence of strings."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
