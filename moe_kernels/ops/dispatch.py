"""``dispatch``: expert ids to a stable expert-major order; gather to the experts and weighted combine back.

T tokens, k choices, A = T·k assignments (assignment t·k + j is the j-th choice of token t), E experts, d features.
A counting sort: no host synchronization, and every shape follows from the shapes of the inputs.

Capacity: each expert keeps at most ``capacity`` assignments. All first choices are served before any second choice,
and within a choice the tokens in order, or by descending ``priority`` (V-MoE's batch-prioritized routing, ties to the
lower token; NaN counts as the highest). Capacity decides only who is kept, never the order: the kept assignments
stand expert by expert in ascending order, the dropped ones behind them all.

Everything is deterministic, bit for bit for any number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.reference import dispatch as reference


class Dispatch(NamedTuple):
    """What :func:`dispatch` returns."""

    order: Tensor
    """(A,) int64: the assignment at each position, a permutation."""
    offsets: Tensor
    """(E+1,) int64: expert e has the positions offsets[e] to offsets[e+1]; from offsets[E] on stand the dropped."""
    inverse: Tensor
    """(T, k) int64: the position of each assignment."""
    kept: Tensor
    """(T, k) bool: false where capacity dropped the assignment."""


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float, *, alignment: int = 1) -> int:
    """Tutel's capacity, k · int(factor · ceil(T / E)), rounded up to a multiple of ``alignment``."""
    if not factor > 0:
        raise ValueError(f"factor: expected a capacity factor > 0, got {factor}")
    if alignment < 1:
        raise ValueError(f"alignment: expected at least 1, got {alignment}")
    capacity = top_k * math.floor(factor * ((num_tokens + num_experts - 1) // num_experts))
    return (capacity + alignment - 1) // alignment * alignment


def _fake_dispatch(
    experts: Tensor, num_experts: int, capacity: int | None, priority: Tensor | None
) -> tuple[Tensor, ...]:
    return (
        experts.new_empty(experts.numel()),
        experts.new_empty(num_experts + 1),
        experts.new_empty(experts.shape),
        experts.new_empty(experts.shape, dtype=torch.bool),
    )


def _fake_gather(x: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _fake_combine(y: Tensor, gates: Tensor, order: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    return y.new_empty(inverse.shape[0], y.shape[1])


_PLAN = "Tensor order, Tensor offsets, Tensor inverse"
_dispatch = _library.define(
    "dispatch",
    "(Tensor experts, int num_experts, SymInt? capacity, Tensor? priority) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_dispatch,
)
_gather = _library.define("gather", f"(Tensor x, {_PLAN}) -> Tensor", _fake_gather)
_gather_backward = _library.define(
    "gather_backward",
    f"(Tensor grad, {_PLAN}) -> Tensor",
    lambda grad, order, offsets, inverse: grad.new_empty(inverse.shape[0], grad.shape[1]),
)
_combine = _library.define("combine", f"(Tensor y, Tensor gates, {_PLAN}) -> Tensor", _fake_combine)
_combine_backward = _library.define(
    "combine_backward",
    f"(Tensor grad, Tensor y, Tensor gates, {_PLAN}) -> (Tensor, Tensor)",
    lambda grad, y, gates, *plan: (y.new_empty(y.shape), gates.new_empty(gates.shape)),
)


OPERATORS = (_dispatch,)
"""What a selective checkpoint policy keeps."""


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_gradient(ctx: Any, grad: Tensor) -> Any:
    return _gather_backward(grad, *ctx.saved_tensors), None, None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradient(ctx: Any, grad: Tensor) -> Any:
    return (*_combine_backward(grad, *ctx.saved_tensors), None, None, None)


_library.differentiate("gather", _gather_setup, _gather_gradient)
_library.differentiate("combine", _combine_setup, _combine_gradient)
_library.refuse_second_derivative("gather_backward")
_library.refuse_second_derivative("combine_backward")


def check_plan(plan: Dispatch, tokens: int | str, num_experts: int | str, like: Tensor) -> None:
    """Raise unless ``plan`` is one of ``tokens`` and ``num_experts`` (a string is any) on the device of ``like``."""
    _library.check_tensor("dispatch.inverse", plan.inverse, (tokens, "k"), floating=False, like=like)
    _library.check_tensor("dispatch.order", plan.order, (plan.inverse.numel(),), floating=False, like=like)
    offsets = num_experts if isinstance(num_experts, str) else num_experts + 1
    _library.check_tensor("dispatch.offsets", plan.offsets, (offsets,), floating=False, like=like)


def dispatch(
    experts: Tensor, num_experts: int, *, capacity: int | None = None, priority: Tensor | None = None
) -> Dispatch:
    """Sort assignments by expert, as specified at the top of this module.

    Args:
        experts: (T, k) int64 in [0, num_experts).
        num_experts: E ≥ 1.
        capacity: assignments that an expert keeps at most; None keeps all. See :func:`expert_capacity`.
        priority: (T,) floating; who is kept first. Only with ``capacity``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: an expert id is out of range (checked where that needs no host synchronization).
    """
    _library.check_tensor("experts", experts, ("T", "k"), floating=False, like=experts)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: expected at least 0 or None, got {capacity}")
    if priority is not None:
        if capacity is None:
            raise ValueError("priority: has a meaning only with a capacity, got capacity=None")
        _library.check_tensor("priority", priority, (experts.shape[0],), floating=True, like=experts)
        priority = _library.cast(priority.detach(), _library.wide_dtype(priority.dtype))
    if backend.choose("dispatch", experts.device.type) != "reference":
        return Dispatch(*_dispatch(experts, num_experts, capacity, priority))
    if experts.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = experts[(experts < 0) | (experts >= num_experts)]
        if wrong.numel():
            raise RuntimeError(f"experts: expected ids in [0, {num_experts}), got {int(wrong[0])}")
    return Dispatch(*reference.dispatch(experts, num_experts, capacity, priority))


def gather(x: Tensor, plan: Dispatch) -> Tensor:
    """Rows of ``x`` (T, d) in expert-major order, (A, d); the rows of dropped assignments are zero."""
    check_plan(plan, "T", "E+1", x)
    _library.check_tensor("x", x, (plan.inverse.shape[0], "d"), floating=True, like=x)
    kernel = reference.gather if backend.choose("dispatch", x.device.type, x.dtype) == "reference" else _gather
    result: Tensor = kernel(x, plan.order, plan.offsets, plan.inverse)
    return result


def combine(y: Tensor, gates: Tensor, plan: Dispatch) -> Tensor:
    """Σ_j gates[t, j] · y[inverse[t, j]] over the kept assignments: ``y`` (A, d), ``gates`` (T, k) → (T, d).

    Summed in float32 (float64 where ``y`` is float64), returned in the dtype of ``y``.
    """
    check_plan(plan, "T", "E+1", y)
    _library.check_tensor("y", y, (plan.order.shape[0], "d"), floating=True, like=y)
    _library.check_tensor("gates", gates, tuple(plan.inverse.shape), floating=True, like=y)
    gates = _library.cast(gates, _library.wide_dtype(y.dtype))
    kernel = reference.combine if backend.choose("dispatch", y.device.type, y.dtype) == "reference" else _combine
    result: Tensor = kernel(y, gates, plan.order, plan.offsets, plan.inverse)
    return result
