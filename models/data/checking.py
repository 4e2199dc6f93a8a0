"""Decoding all images on disk before training starts.

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
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from tqdm import tqdm

from ..files import replacing
from .rgb import read_rgb

T = TypeVar("T")

_CHUNK = 64
# Another number when read_rgb takes other files than before: what was found sound is then forgotten.
_ACCEPTED = 2


def unreadable(
    files: Sequence[str], root: Path, read: Callable[[str], object] | None = None, *, what: str = "images"
) -> dict[str, str]:
    """Decode ``files`` in threads, under a progress bar; returns those that cannot be, with the reasons.

    Files under ``root`` that an earlier call found sound and that have not changed are not decoded again.

    Args:
        read: decodes one, by default :func:`read_rgb`.
        what: the files are; names the bar and what is remembered, so every ``read`` has its own.
    """
    memory = _memory_file(root, what)
    sound = _recall(memory)
    marks = [_mark(file) for file in files]
    todo = [file for file, mark in zip(files, marks, strict=True) if mark not in sound]
    bad: dict[str, str] = {}
    if todo:
        for found in _in_threads(todo, partial(_decode_all, read=read or read_rgb), f"checking {what} of {root.name}"):
            bad.update(found)
        _remember(memory, sound | {mark for file, mark in zip(files, marks, strict=True) if mark and file not in bad})
    return {file: bad[file] for file in files if file in bad}


def digests(files: Sequence[str], root: Path) -> dict[str, str]:
    """A hash of the bytes of each of ``files``, read in threads under a progress bar.

    Raises:
        OSError: one cannot be read.
    """
    found: dict[str, str] = {}
    for some in _in_threads(files, _hash_all, f"hashing images of {root.name}"):
        found.update(some)
    return found


def _in_threads(files: Sequence[str], work: Callable[[Sequence[str]], T], what: str) -> Iterator[T]:
    """What ``work`` gives for each chunk of ``files``, as they end, under a progress bar."""
    threads = len(os.sched_getaffinity(0))
    chunks = iter([files[first : first + _CHUNK] for first in range(0, len(files), _CHUNK)])
    pool = ThreadPoolExecutor(threads)
    with tqdm(total=len(files), desc=what, unit="file", disable=None) as bar:
        try:
            running: dict[Future[T], int] = {}
            while True:
                # Few at a time: millions of waiting futures would fill the memory, and would have to be
                # waited for when the user interrupts.
                while len(running) < 2 * threads and (chunk := next(chunks, None)) is not None:
                    running[pool.submit(work, chunk)] = len(chunk)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    bar.update(running.pop(future))
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_all(files: Sequence[str], read: Callable[[str], object]) -> dict[str, str]:
    """Those that cannot be decoded, with the reasons."""
    bad = {}
    for file in files:
        try:
            read(file)
        except Exception as error:  # PIL's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
            bad[file] = reason(error)
    return bad


def _hash_all(files: Sequence[str]) -> dict[str, str]:
    return {file: hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest() for file in files}


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
    facts = f"{_ACCEPTED}\0{PIL.__version__}\0{os.path.abspath(file)}\0{status.st_size}\0{status.st_mtime_ns}"
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
