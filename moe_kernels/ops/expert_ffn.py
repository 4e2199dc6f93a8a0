"""``expert_ffn``: a grouped two-layer feed-forward network over an expert-major order.

T tokens, d features, h hidden features, E experts, k choices, A = T·k assignments:

    y_t = Σ_j gate_tj · (w2_e D(φ(w1_e x_t + b1_e)) + b2_e),  e the j-th expert of token t, dropped assignments left out

(GMoE, Eq. 2). φ is ``gelu`` (exact, by erf), ``gelu_tanh``, ``quick_gelu`` (z σ(1.702 z)), ``relu`` or ``silu``. D is
dropout on the hidden features, a pure function of ``seed``, token, expert and feature. The gate multiplies the
expert's whole output, its bias included.

Arithmetic and all sums in float32, storage in the dtype of ``x`` (float64 in float64). For the backward only ``x``, the
routing and the pre-activation w1 x + b1 in the dtype of ``x`` are kept (``save="preactivation"``), or not even that
(``save="input"``: one product more in the backward), or the one of them that costs less time (``save="auto"``: see
:func:`cheaper_to_save`). Gradients are exact for x, weights, biases and gates, once.
Deterministic, on a CPU bit for bit for any number of threads; without capacity a row of y does not depend on the other
rows, bit for bit on a CPU and a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.ops.dispatch import Dispatch, check_plan
from moe_kernels.reference import expert_ffn as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
SAVE = ("preactivation", "input", "auto")
RATES = {(8, 0): (312e12, 1.9e12), (9, 0): (790e12, 4.3e12)}
"""Compute capability → FLOP/s of a 16-bit product and bytes/s of memory, of an A100 and of an H200."""

_PARAMETERS = "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor gates"
_PLAN = "Tensor order, Tensor offsets, Tensor inverse, Tensor? seed, str activation, float dropout_p"


def _fake_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates: Tensor,
    order: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    rows = order.shape[0] if save_preactivation else 0
    return x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(rows, w1.shape[1])


def _fake_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gates: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, w1, b1, w2, b2, gates))


_forward = _library.define(
    "expert_ffn",
    f"(Tensor x, {_PARAMETERS}, {_PLAN}, bool save_preactivation) -> (Tensor y, Tensor preactivation)",
    _fake_forward,
)
_backward = _library.define(
    "expert_ffn_backward",
    f"(Tensor grad, Tensor x, {_PARAMETERS}, Tensor preactivation, {_PLAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, order, offsets, inverse, seed, activation, dropout_p, _ = inputs
    preactivation = output[1]
    ctx.mark_non_differentiable(preactivation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, preactivation, order, offsets, inverse, *(() if seed is None else (seed,)))
    ctx.has_seed, ctx.rest = seed is not None, (activation, dropout_p)


def _gradient(ctx: Any, grad: Tensor | None, _: Any) -> Any:
    if grad is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    grads = _backward(grad, *saved, *(() if ctx.has_seed else (None,)), *ctx.rest)
    return (*grads, *(None,) * 7)


_library.differentiate("expert_ffn", _setup, _gradient)
_library.refuse_second_derivative("expert_ffn_backward")


def cheaper_to_save(dim: int, element_size: int, capability: tuple[int, int] | None) -> str:
    """``"input"`` where the backward computes the pre-activation in no more time than it is written and read.

    2·d FLOP for each of its elements against 2·``element_size`` bytes: on a GPU of rates P and B up to
    d = element_size · P / B features, that is 328 on an A100 and 367 on an H200 in 16 bits. float32 products take six
    times as long (three of TF32 at half the rate). Elsewhere, as on a CPU (``capability`` None), never.
    """
    if capability not in RATES:
        return "preactivation"
    flops, bandwidth = RATES[capability]
    if element_size > 2:
        flops /= 6
    return "input" if dim <= element_size * flops / bandwidth else "preactivation"


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)  # which torch.compile can trace
    return properties.major, properties.minor


def expert_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gates: Tensor,
    dispatch: Dispatch,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    save: str = "auto",
) -> Tensor:
    """Apply to every token its experts, as specified at the top of this module.

    Args:
        x: (T, d) float32, bfloat16, float16 or float64. Under autocast it is cast to the autocast dtype.
        w1: (E, h, d). Parameters have the dtype of ``x`` or float32, whose gradients do not pass through 16 bits;
            another dtype is cast to that of ``x``. The kernels may round float32 parameters to the dtype of ``x``.
        b1: (E, h).
        w2: (E, d, h).
        b2: (E, d).
        gates: (T, k).
        dispatch: of the same T, k and E.
        activation: one of ``ACTIVATIONS``.
        dropout_p: probability of dropping a hidden feature, in [0, 1).
        seed: (1,) int64 on the device of ``x``; required with dropout.
        save: what the backward keeps, ``"preactivation"``, ``"input"`` or ``"auto"``.

    Returns:
        (T, d) in the dtype of ``x`` (or of autocast).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _library.check_tensor("x", x, ("T", "d"), floating=True, like=x)
    _library.check_tensor("w1", w1, ("E", "h", x.shape[1]), floating=True, like=x)
    num_experts, hidden_dim, dim = w1.shape
    _library.check_tensor("b1", b1, (num_experts, hidden_dim), floating=True, like=x)
    _library.check_tensor("w2", w2, (num_experts, dim, hidden_dim), floating=True, like=x)
    _library.check_tensor("b2", b2, (num_experts, dim), floating=True, like=x)
    check_plan(dispatch, x.shape[0], num_experts, x)
    _library.check_tensor("gates", gates, tuple(dispatch.inverse.shape), floating=True, like=x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if save not in SAVE:
        raise ValueError(f"save: expected one of {', '.join(SAVE)}, got {save!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if dropout_p == 0:
        seed = None
    elif seed is None:
        raise ValueError(f"seed: dropout_p={dropout_p} needs an int64 seed tensor of shape (1,), got None")
    else:
        _library.check_tensor("seed", seed, (1,), floating=False, like=x)

    device, dtype = x.device.type, x.dtype
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    x = _library.cast(x, dtype)
    gates = _library.cast(gates, _library.wide_dtype(dtype))
    if backend.choose("expert_ffn", device, dtype) == "reference":
        meaning: Callable[..., Tensor] = reference.expert_ffn
        parameters = [_library.cast(parameter, dtype) for parameter in (w1, b1, w2, b2)]
        with _library.without_autocast(device):
            return meaning(x, *parameters, gates, dispatch.offsets, dispatch.inverse, seed, activation, dropout_p)
    # The kernels take float32 parameters beside 16-bit rows, so that a gradient in float32 is never rounded to 16 bits.
    parameters = [
        parameter if parameter.dtype == _library.wide_dtype(dtype) else _library.cast(parameter, dtype)
        for parameter in (w1, b1, w2, b2)
    ]
    if save == "auto":
        save = cheaper_to_save(x.shape[1], x.element_size(), _capability(x.device))
    save_preactivation = (
        save == "preactivation"
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (x, *parameters, gates))
    )
    y: Tensor = _forward(x, *parameters, gates, *dispatch[:3], seed, activation, dropout_p, save_preactivation)[0]
    return y
