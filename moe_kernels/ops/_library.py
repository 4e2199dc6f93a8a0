"""The ``torch.library`` namespace: schemas are defined from Python, ``csrc`` registers implementations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moe_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``moe_kernels::<name>`` with its shape function; returns the handle to call."""
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    handle: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return handle


def differentiate(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``moe_kernels::<name>`` its gradient."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def refuse_second_derivative(name: str) -> None:
    """A backward operator says so when it is differentiated, instead of giving no gradient."""

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no second derivative; compute it under moe_kernels.backend.force('reference')"
        )

    differentiate(name, lambda ctx, inputs, output: None, backward)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which leaves no trace in an exported graph where nothing is to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; the meta device has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and gates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...], *, floating: bool, like: Tensor) -> None:
    """Raise unless ``tensor`` has this shape (a string is any size), kind of dtype and the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    sizes = tensor.shape
    agrees = len(sizes) == len(shape)
    if agrees:
        for wanted, size in zip(shape, sizes, strict=True):  # a plain loop: this runs for every tensor of every call
            if not isinstance(wanted, str) and wanted != size:
                agrees = False
    if not agrees:
        expected = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(sizes)}")
    if floating and not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if not floating and tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {tensor.dtype}")
    if tensor is not like and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {tensor.device}")
