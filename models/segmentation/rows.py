"""Arrays on disk that grow row by row, larger than memory, and survive a kill at any instant.

Each array is a raw file that is only appended to. ``rows.json``, which is replaced atomically, says how much of each
counts; what a killed process wrote beyond that is cut off when the writing goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import files

_STATE = "rows.json"
Layout = Mapping[str, tuple[str, int]]
"""Name of an array → dtype and length of a row."""


class Writer:
    """Appends rows to the arrays of ``folder``, or goes on where it was. A context manager.

    Args:
        run: what identifies the content, plain JSON; a folder of another is begun anew.
        share: largest share of the time that committing may take.

    Attributes:
        done: how many items were committed.
        finished: whether all were.
    """

    def __init__(
        self, folder: str | os.PathLike[str], layout: Layout, run: Mapping[str, Any], share: float = 0.015
    ) -> None:
        self.folder, self.run, self.share = Path(folder), dict(run), share
        self.layout = {name: [np.dtype(dtype).name, width] for name, (dtype, width) in layout.items()}
        path = self.folder / _STATE
        state = files.read_json(path) if path.exists() else {}
        if (state.get("run"), state.get("layout")) != (self.run, self.layout):
            state = {"rows": dict.fromkeys(layout, 0), "done": 0, "finished": False}
            path.unlink(missing_ok=True)
        self.done, self.finished = state["done"], state["finished"]
        self._rows, self._due = state["rows"], time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name, (dtype, width) in self.layout.items():
            file = open(_file(self.folder, name), "ab")  # noqa: SIM115
            file.truncate(self._rows[name] * width * np.dtype(dtype).itemsize)
            self._files[name] = file

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, **arrays: np.ndarray) -> None:
        """Rows (n, width) for each array."""
        for name, array in arrays.items():
            dtype, width = self.layout[name]
            assert (array.dtype, array.shape[1:]) == (dtype, (width,)), name
            self._files[name].write(np.ascontiguousarray(array).data)
            self._rows[name] += len(array)

    def offer(self, done: int) -> None:
        """``done`` items are written: commit them if it is time."""
        if time.monotonic() >= self._due:
            begun = time.monotonic()
            self._commit(done, False)
            now = time.monotonic()
            self._due = now + (now - begun) / self.share

    def finish(self, done: int) -> None:
        """All are written."""
        self._commit(done, True)
        self.done, self.finished = done, True

    def _commit(self, done: int, finished: bool) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {"run": self.run, "layout": self.layout, "rows": self._rows, "done": done, "finished": finished}
        files.write_json(self.folder / _STATE, state)


def read(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The finished arrays of ``folder``, memory-mapped.

    Raises:
        ValueError: they are not finished, or shorter than they should be.
    """
    folder = Path(folder)
    state = files.read_json(folder / _STATE) if (folder / _STATE).exists() else {"finished": False}
    if not state["finished"]:
        raise ValueError(f"{folder} is not finished; the command that began it goes on with it")
    arrays = {}
    for name, (dtype, width) in state["layout"].items():
        shape, path = (state["rows"][name], width), _file(folder, name)
        if path.stat().st_size != np.dtype(dtype).itemsize * shape[0] * width:
            raise ValueError(f"{path} must have {shape[0]} rows of {width} {dtype}, it has {path.stat().st_size} bytes")
        # an empty file cannot be mapped
        arrays[name] = np.memmap(path, dtype, "r", shape=shape) if 0 not in shape else np.empty(shape, dtype)
    return arrays


def read_ahead(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Ask the system to load the arrays of ``folders`` into memory now, in one go, where they take at most half of it.

    Rows that are read at random would each wait for the disk.
    """
    paths = [path for folder in folders for path in Path(folder).glob("*.bin")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(path.stat().st_size for path in paths) <= memory / 2:
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"
