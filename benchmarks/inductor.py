"""``torch.compile`` of plain forms.

The first call compiles, before anything is timed, for the shapes of its case alone and, where a form reads how many
tokens each expert has, for those counts.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch

PREFIX = "compiled "
"""Of the name of a candidate that is compiled."""
R = TypeVar("R")


@functools.cache
def _check_compiler(command: str) -> None:
    if shutil.which(command) is None:
        raise RuntimeError(f"torch.compile needs a C++ compiler, and there is no {command!r}")


def compiled(function: Callable[..., R]) -> Callable[..., R]:
    """``function`` as inductor makes it."""
    fast = torch.compile(function, dynamic=False)

    def run(*args: object, **kwargs: object) -> R:
        _check_compiler(os.environ.get("CXX", "g++"))
        result: R = fast(*args, **kwargs)
        return result

    return run
