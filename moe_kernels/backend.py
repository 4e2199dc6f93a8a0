"""Which kernel runs where: one predicate a backend, which both filters and explains.

The backends of an operator (``OPERATORS``) are tried in order and the first that can run on the device is used.
``MOE_KERNELS_BACKEND`` in the environment, or :func:`force`, names one; a named backend that cannot run, or has no
kernel for the operator, raises instead of falling back.

Under ``TRITON_INTERPRET=1`` the Triton kernels can be forced on cpu tensors too, in Triton's slow interpreter: a tool
of tests, never chosen by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe_kernels import triton

OPERATORS = {
    "routing": ("cpp", "triton", "reference"),
    "dispatch": ("cpp", "triton", "reference"),
    "expert_ffn": ("cpp", "triton", "reference"),
    "grad_projection": ("cpp", "cuda", "reference"),
    "hypercolumn": ("cpp", "triton", "reference"),
    "diverse_sampling": ("cpp", "cuda", "reference"),
}
"""Operator → the backends that have a kernel for it, best first."""
BACKENDS = ("cpp", "cuda", "triton", "reference")
MIN_CAPABILITY = (8, 0)


def _load(module: str, compiler: str, insist: str) -> str:
    """Import an extension, whose kernels register themselves; return why that is not possible, or ``""``."""
    if importlib.util.find_spec(module) is None:
        return (
            f"{module} was not built; with {compiler} at hand run "
            f"`{insist}=1 pip install --no-build-isolation --no-deps --force-reinstall .` in its source"
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not load into Python with torch {torch.__version__}: {error}"
    return ""


_extension_problem = _load("moe_kernels._C", "a C++17 compiler", "MOE_KERNELS_REQUIRE_EXT")
if _extension_problem:
    if os.environ.get("MOE_KERNELS_REQUIRE_EXT") == "1":
        raise ImportError(f"MOE_KERNELS_REQUIRE_EXT=1, but {_extension_problem}")
    warnings.warn(f"moe_kernels runs on its plain PyTorch reference: {_extension_problem}", stacklevel=2)


def _load_cuda() -> str:
    """Import ``moe_kernels._C_cuda``, which needs torch for CUDA; return why that is not possible, or ``""``."""
    if torch.version.cuda is None:
        return f"the CUDA kernels need a torch for CUDA, got torch {torch.__version__}"
    return _load("moe_kernels._C_cuda", "a C++17 compiler and nvcc", "MOE_KERNELS_CUDA")


cuda_extension_problem = _load_cuda()
"""Why ``moe_kernels._C_cuda`` is not loaded; ``""`` where it is."""

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


def cuda_extension() -> dict[str, str]:
    """How ``moe_kernels._C_cuda`` was built; empty where it is not loaded."""
    if cuda_extension_problem:
        return {}
    build: dict[str, str] = importlib.import_module("moe_kernels._C_cuda").build_info()
    return build


def _covered(built: str, found: tuple[int, int]) -> bool:
    """Whether code built for a list as in TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") runs on a device of this capability."""
    for entry in built.replace(" ", ";").split(";"):
        number, _, assembly = entry.partition("+")
        major, _, minor = number.partition(".")
        # Machine code is for later devices of its generation, PTX for all later ones, "9.0a" for its own only.
        if minor[-1:].isalpha():
            if found == (int(major), int(minor[:-1])):
                return True
        elif found >= (int(major), int(minor)) and (assembly == "PTX" or found[0] == int(major)):
            return True
    return False


_cuda_architectures = cuda_extension().get("cuda_arch", "")


def _cuda_problem(device_type: str) -> str:
    """Why the CUDA kernels cannot run on this kind of device; ``""`` when they can."""
    if device_type != "cuda":
        return f"the CUDA kernels run on cuda tensors, got {device_type}"
    if cuda_extension_problem:
        return cuda_extension_problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    properties = torch.cuda.get_device_properties()
    if not _covered(_cuda_architectures, found := (properties.major, properties.minor)):
        return "the CUDA kernels were built for {}, this device is of {}.{}".format(_cuda_architectures, *found)
    return ""


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


def refusal(backend: str, device_type: str, dtype: torch.dtype | None = None, operator: str | None = None) -> str:
    """Why ``backend`` cannot run on a device of this type with data of this dtype; ``""`` when it can.

    With an operator, also whether it has a kernel for that.
    """
    if device_type == "meta":  # shapes only, which need no kernel
        return ""
    if operator is not None and backend not in OPERATORS[operator]:
        return f"{operator} has no kernel there; it has {', '.join(OPERATORS[operator])}"
    if backend == "reference":
        return ""
    if backend == "triton":
        if dtype == torch.float64 and device_type != "cpu":
            return "the Triton kernels run on float32, bfloat16 and float16 tensors, got torch.float64"
        return _triton_problem(device_type)
    if backend == "cuda":
        if operator == "diverse_sampling" and dtype == torch.float64:
            return "the CUDA kernel runs on float32, bfloat16 and float16 tensors, got torch.float64"
        return _cuda_problem(device_type)
    if device_type != "cpu":
        return f"the C++ kernels run on cpu tensors, got {device_type}"
    return _extension_problem


def _candidates(operator: str, device_type: str) -> tuple[str, ...]:
    """The backends to try, best first; the interpreter is for those who ask for it."""
    return tuple(name for name in OPERATORS[operator] if (name, device_type) != ("triton", "cpu"))


def choose(operator: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The backend that runs this operator on this device with this dtype; raises when a forced one cannot."""
    if _forced is not None:
        problem = refusal(_forced, device_type, dtype, operator)
        if problem:
            raise RuntimeError(f"backend {_forced!r} was forced and cannot run: {problem}")
        return _forced
    return next(
        backend for backend in _candidates(operator, device_type) if not refusal(backend, device_type, dtype, operator)
    )


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
    """``"none"`` where a forced one cannot run."""
    reason: str


def _row(operator: str, device: str) -> Choice:
    if _forced is not None:
        problem = refusal(_forced, device, operator=operator)
        return Choice(operator, device, "none" if problem else _forced, f"forced: {problem}" if problem else "forced")
    chosen = choose(operator, device)
    better = itertools.takewhile(lambda name: name != chosen, _candidates(operator, device))
    reason = "; ".join(f"{name}: {refusal(name, device)}" for name in better)
    return Choice(operator, device, chosen, reason or "the fastest that is here")


def report() -> list[Choice]:
    """The backend of every operator on every kind of device that is here, and why."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [_row(operator, device) for device in devices for operator in OPERATORS]
