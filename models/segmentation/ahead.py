"""Work done a little before it is wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], depth: int = 2) -> Iterator[R]:
    """``map(function, items)``, up to ``depth`` results early, in one thread: files are read while others compute."""
    remaining = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[R]] = deque(thread.submit(function, item) for item in islice(remaining, depth))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(thread.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
