"""Files that are either the old one or the new one, whatever happens while they are written.

Every result, picture and checkpoint of the models layer goes through :func:`replacing`: the new content is
written to a temporary file in the same folder, flushed to the disk and renamed over the old file. A process
killed at any instant, inside a write too, leaves a complete file and at most one leftover whose name ends in
``.tmp`` (:func:`remove_leftovers` clears those).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

_SUFFIX = ".tmp"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file whose content replaces ``path`` when the block ends, and not at all when it raises.

    The folder is made if it is missing; a symbolic link is followed, so that its target is replaced and not
    the link.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # the rename itself is only on the disk once the folder is
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` as UTF-8 to ``path`` atomically."""
    write_bytes(path, content.encode())


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON to ``path`` atomically.

    Floats keep every bit. A NaN or an infinity, which JSON has no word for, raises ``ValueError``.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_torch(path: str | os.PathLike[str], content: Any) -> None:
    """``torch.save(content)`` to ``path`` atomically."""
    with replacing(path) as file:
        torch.save(content, file)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; ``ValueError`` names the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a JSON file: {error}") from error


def read_torch(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> Any:
    """``torch.load`` that unpickles tensors and plain Python data only; ``ValueError`` names a file it cannot read."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for files that are not its own
        # torch puts many lines of advice around what is wrong
        why = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
        why = f"{type(error).__name__}: {why}"
        raise ValueError(
            f"{os.fspath(path)} cannot be read as a torch file of tensors and plain data ({why})"
        ) from error


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files under ``folder`` that killed processes left. Hold :func:`lock` while calling."""
    for leftover in Path(folder).rglob(f".*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)


@contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep ``folder`` to this process for the length of the block; ``RuntimeError`` if another process has
    it.

    The lock belongs to the process, so it ends with it, also with ``kill -9``, and worker processes do not
    inherit it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another process is writing to {os.fspath(folder)}; wait for it or choose another"
            ) from error
        yield
