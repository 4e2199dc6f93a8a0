"""Which kernel runs where: one predicate a backend, which both filters and explains.

The backends of an operator are tried in order (``cpp``, then ``reference``) and the first that can run on the
device is used. ``MOE_KERNELS_BACKEND`` in the environment, or :func:`force`, names one; a named backend that cannot
run raises instead of falling back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

OPERATORS = ("routing", "dispatch", "expert_ffn")
BACKENDS = ("cpp", "reference")


def _load_extension() -> str:
    """Import ``moe_kernels._C``, whose kernels register themselves; return why that is not possible, or ``""``."""
    if importlib.util.find_spec("moe_kernels._C") is None:
        return (
            "moe_kernels._C was not built; with a C++17 compiler at hand run "
            "`MOE_KERNELS_REQUIRE_EXT=1 pip install --no-build-isolation --no-deps --force-reinstall .` in its source"
        )
    try:
        importlib.import_module("moe_kernels._C")
    except ImportError as error:
        return f"moe_kernels._C does not load into Python with torch {torch.__version__}: {error}"
    return ""


_extension_problem = _load_extension()
if _extension_problem:
    if os.environ.get("MOE_KERNELS_REQUIRE_EXT") == "1":
        raise ImportError(f"MOE_KERNELS_REQUIRE_EXT=1, but {_extension_problem}")
    warnings.warn(f"moe_kernels runs on its plain PyTorch reference: {_extension_problem}", stacklevel=2)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_environment = os.environ.get("MOE_KERNELS_BACKEND")
_forced: str | None = _checked(_environment, "MOE_KERNELS_BACKEND") if _environment else None


def refusal(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run on a device of this type; ``""`` when it can."""
    if backend == "reference":
        return ""
    if device_type == "meta":  # shapes only, which need no kernel
        return ""
    if device_type != "cpu":
        return f"the C++ kernels run on cpu tensors, got {device_type}"
    return _extension_problem


def choose(device_type: str) -> str:
    """The name of the backend that runs on this device; raises when a forced one cannot."""
    if _forced is not None:
        problem = refusal(_forced, device_type)
        if problem:
            raise RuntimeError(f"backend {_forced!r} was forced and cannot run: {problem}")
        return _forced
    for backend in BACKENDS[:-1]:
        if not refusal(backend, device_type):
            return backend
    return BACKENDS[-1]


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Within the context every operator runs on ``backend`` (``"cpp"`` or ``"reference"``), or raises."""
    global _forced
    previous, _forced = _forced, _checked(backend, "backend")
    try:
        yield
    finally:
        _forced = previous


class Choice(NamedTuple):
    """One line of :func:`report`."""

    operator: str
    device: str
    backend: str
    reason: str


def report() -> list[Choice]:
    """The backend of every operator on every kind of device that is here, and why."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        refused = [f"{name}: {problem}" for name in BACKENDS if (problem := refusal(name, device))]
        reason = "forced" if _forced is not None else "; ".join(refused) or "the fastest that is here"
        rows += [Choice(operator, device, choose(device), reason) for operator in OPERATORS]
    return rows
