"""Which kernel runs where: one predicate a backend, which both filters and explains.

The backends of an operator are tried in order (``cpp``, ``triton``, ``reference``) and the first that can run on the
device is used. ``MOE_KERNELS_BACKEND`` in the environment, or :func:`force`, names one; a named backend that cannot
run raises instead of falling back.

Under ``TRITON_INTERPRET=1`` the Triton kernels can be forced on cpu tensors too, in Triton's slow interpreter: a tool
of tests, never chosen by itself.
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

from moe_kernels import triton

OPERATORS = ("routing", "dispatch", "expert_ffn")
BACKENDS = ("cpp", "triton", "reference")
MIN_CAPABILITY = (8, 0)


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


_triton_installed = importlib.util.find_spec("triton") is not None
_on_cuda = triton.register("CUDA")
_on_cpu: torch.library.Library | None = None  # while the interpreter stands in for the C++ kernels
_forced: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _use(name: str | None) -> None:
    """Force ``name``, or nothing; the CPU's kernels are Triton's exactly while that is forced and interpreting."""
    global _forced, _on_cpu
    _forced = name
    interpreted = name == "triton" and _interpreting()
    if interpreted and _on_cpu is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            _on_cpu = triton.register("CPU")
    elif not interpreted and _on_cpu is not None:
        _on_cpu._destroy()  # type: ignore[no-untyped-call]
        _on_cpu = None


_environment = os.environ.get("MOE_KERNELS_BACKEND")
_use(_checked(_environment, "MOE_KERNELS_BACKEND") if _environment else None)


def _triton_problem(device_type: str) -> str:
    """Why Triton cannot run on this kind of device, whatever the dtype; ``""`` when it can."""
    if not _triton_installed:
        return "triton is not installed"
    if device_type == "cpu":
        return "" if _interpreting() else "on cpu tensors Triton needs TRITON_INTERPRET=1, got no such environment"
    if device_type != "cuda":
        return f"the Triton kernels run on cuda tensors, got {device_type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    properties = torch.cuda.get_device_properties()  # which torch.compile can trace, unlike get_device_capability
    if (found := (properties.major, properties.minor)) < MIN_CAPABILITY:
        return "the Triton kernels need compute capability {}.{}, got {}.{}".format(*MIN_CAPABILITY, *found)
    return ""


def refusal(backend: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """Why ``backend`` cannot run on a device of this type with data of this dtype; ``""`` when it can."""
    if backend == "reference":
        return ""
    if device_type == "meta":  # shapes only, which need no kernel
        return ""
    if backend == "triton":
        if dtype == torch.float64 and device_type != "cpu":
            return "the Triton kernels run on float32, bfloat16 and float16 tensors, got torch.float64"
        return _triton_problem(device_type)
    if device_type != "cpu":
        return f"the C++ kernels run on cpu tensors, got {device_type}"
    return _extension_problem


def _candidates(device_type: str) -> tuple[str, ...]:
    """The backends to try, best first; the interpreter is for those who ask for it."""
    return tuple(name for name in BACKENDS if (name, device_type) != ("triton", "cpu"))


def choose(device_type: str, dtype: torch.dtype | None = None) -> str:
    """The name of the backend that runs on this device with this dtype; raises when a forced one cannot."""
    if _forced is not None:
        problem = refusal(_forced, device_type, dtype)
        if problem:
            raise RuntimeError(f"backend {_forced!r} was forced and cannot run: {problem}")
        return _forced
    return next(backend for backend in _candidates(device_type) if not refusal(backend, device_type, dtype))


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Within the context every operator runs on ``backend``, one of ``BACKENDS``, or raises."""
    previous = _forced
    _use(_checked(backend, "backend"))
    try:
        yield
    finally:
        _use(previous)


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
        refused = [f"{name}: {problem}" for name in _candidates(device) if (problem := refusal(name, device))]
        reason = "forced" if _forced is not None else "; ".join(refused) or "the fastest that is here"
        rows += [Choice(operator, device, choose(device), reason) for operator in OPERATORS]
    return rows
