"""``torch.compile`` of plain forms.

The first call compiles, before anything is timed, for the shapes of its case alone and, where a form reads how many
tokens each expert has, for those counts.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_kernels.benchmarks.candidates import Function

PREFIX = "compiled "
"""Of the name of a candidate that is compiled."""


@functools.cache
def _check_compiler(command: str) -> None:
    if shutil.which(command) is None:
        raise RuntimeError(f"torch.compile needs a C++ compiler, and there is no {command!r}")


def compiled(function: Function) -> Function:
    """``function`` as inductor makes it."""
    fast = torch.compile(function, dynamic=False)

    def run(*args: object, **kwargs: object) -> Mapping[str, Tensor]:
        _check_compiler(os.environ.get("CXX", "g++"))
        result: Mapping[str, Tensor] = fast(*args, **kwargs)
        return result

    return run
