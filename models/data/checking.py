"""Decoding images from disk, and decoding all of them before training starts.

A broken file then costs a minute at the start and not a run half-way through. What was found sound is
remembered, by path, size and time of change, in a file under the user's cache folder, so that the next
run (and the other processes of this one) look only at what is new.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from ..files import replacing

_CHUNK = 64


def decode(file: str) -> Image.Image:
    """The whole image in RGB.

    Raises:
        Exception: of many kinds, as PIL's decoders raise it, when the file is missing, truncated or no image.
    """
    with Image.open(file) as image:
        return image.convert("RGB")


def unreadable(
    files: Sequence[str], root: Path, read: Callable[[str], object] | None = None, *, what: str = "images"
) -> dict[str, str]:
    """Decode ``files`` in threads, under a progress bar; returns those that cannot be, with the reasons.

    Files under ``root`` that an earlier call found sound and that have not changed are not decoded again.

    Args:
        read: decodes one, by default :func:`decode`.
        what: the files are; names the bar and what is remembered, so every ``read`` has its own.
    """
    memory = _memory_file(root, what)
    sound = _recall(memory)
    marks = [_mark(file) for file in files]
    todo = [file for file, mark in zip(files, marks, strict=True) if mark not in sound]
    bad: dict[str, str] = {}
    if todo:
        with tqdm(total=len(todo), desc=f"checking {what} of {root.name}", unit="file", disable=None) as bar:
            for checked, found in _in_threads(todo, read or decode):
                bad.update(found)
                bar.update(checked)
        _remember(memory, sound | {mark for file, mark in zip(files, marks, strict=True) if mark and file not in bad})
    return {file: bad[file] for file in files if file in bad}


def _in_threads(files: Sequence[str], read: Callable[[str], object]) -> Iterator[tuple[int, dict[str, str]]]:
    """How many files were decoded and which of them could not be, a chunk at a time."""
    threads = len(os.sched_getaffinity(0))
    chunks = iter([files[first : first + _CHUNK] for first in range(0, len(files), _CHUNK)])
    pool = ThreadPoolExecutor(threads)
    try:
        running: set[Future[tuple[int, dict[str, str]]]] = set()
        while True:
            # Few at a time: millions of waiting futures would fill the memory, and would have to be
            # waited for when the user interrupts.
            while len(running) < 2 * threads and (chunk := next(chunks, None)) is not None:
                running.add(pool.submit(_decode_all, chunk, read))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_all(files: Sequence[str], read: Callable[[str], object]) -> tuple[int, dict[str, str]]:
    bad = {}
    for file in files:
        try:
            read(file)
        except Exception as error:  # PIL's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
            bad[file] = reason(error)
    return len(files), bad


def reason(error: Exception) -> str:
    """One line that says what was wrong with a file whose name stands beside it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # PIL repeats the name in its message.
    if isinstance(error, PIL.UnidentifiedImageError):
        text = text.split(" '/")[0]
    return text or type(error).__name__


def _mark(file: str) -> int:
    """64 bits that stand for a file as it is now; 0 for one that is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return 0
    facts = f"{PIL.__version__}\0{os.path.abspath(file)}\0{status.st_size}\0{status.st_mtime_ns}"
    return int.from_bytes(hashlib.blake2b(os.fsencode(facts), digest_size=8).digest(), "little")


def _memory_file(root: Path, what: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.blake2b(os.fsencode(f"{os.path.abspath(root)}\0{what}"), digest_size=8).hexdigest()
    return cache / "moe-kernels" / f"images-{name}.npy"


def _recall(memory: Path) -> set[int]:
    # A damaged or unreadable memory costs a check, nothing else.
    with suppress(OSError, ValueError, EOFError):
        return set(np.load(memory, allow_pickle=False).ravel().tolist())
    return set()


def _remember(memory: Path, marks: set[int]) -> None:
    # A home that cannot be written to must not stop the training.
    with suppress(OSError), replacing(memory) as file:
        np.save(file, np.asarray(sorted(marks), np.uint64))
