"""``grad_projection``: regularizer gradients that do not hurt the empirical loss (DTNH, Algorithm 1), and relatives.

Over a list of T tensors, g_i is the gradient of the empirical loss J and r_i that of the regularizer Ω: given, or
2 (w_i − w⁰_i), which is that of Ω = ‖w − w⁰‖² (L2-SP, Eq. 2) and needs neither a backward nor memory. The *references*,
r_i or w⁰_i, belong to the first R ≤ T tensors; the others have r = 0.

Every tensor belongs to a segment, one row of the record: all to one (the paper's notation), each to its own, or −1,
which leaves it alone (d = g). Two phases:

1. The moments of a segment, M = (Σ λ⟨g_i, r_i⟩, Σ ‖g_i‖², Σ λ²‖r_i‖²), λ the coefficient.
2. d = a g + b λ r, with c = min(0, M₀):

   ======== ==================== =============== =====================================================
   rule     a                    b
   ======== ==================== =============== =====================================================
   none     1                    0               the plain gradient
   l2sp     1                    1               the plain sum
   dtnh     1 − c / M₁           1               r loses its component against g: ⟨d, g⟩ = ‖g‖² if c < 0
   pcgrad   1 − c / M₁           1 − c / M₂      both lose theirs (Yu et al., 2020)
   agem     1                    −c / M₂         g loses its component against r (A-GEM, Chaudhry et al., 2019)
   digrap   1                    −ω c / M₂       a share ω of it (DiGraP, Huang et al., 2025, with ω fixed)
   gradvac  1 + √(M₂/M₁) s       1               where cos < ρ, r is turned until its cosine with g is ρ
   ======== ==================== =============== =====================================================

   with cos = M₀ / √(M₁ M₂) and s = (ρ √(1 − cos²) − cos √(1 − ρ²)) / √(1 − ρ²) where cos < ρ, else 0 (GradVac, Wang et
   al., 2021, with ρ fixed). There is no epsilon: without a conflict, and so where g = 0, a is 1. Sums that are not
   finite are no conflict: what is not finite in g stays in its elements, as in torch's optimizers. d has the rounding
   of its dtype: where λ r is 10⁶ times as long as g, ⟨d, g⟩ is exact to a percent only.

d is written over g, or is what SGD or AdamW steps along. The record (S, 6) float64 holds per segment the moments of
the last step and counts of steps, conflicts (M₀ < 0) and skipped steps. All of its rows belong to the call.

Products and sums are float64, in an order that only the shapes decide: the same bits for any number of threads or
blocks. Nothing waits for the device: the scalars stay on it, so do ``grad_scale`` and ``found_inf``, which torch's
GradScaler gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import _library
from moe_kernels.reference import grad_projection as reference_kernels

RULES = reference_kernels.RULES
SCOPES = ("global", "tensor", "group")
NEEDS_MOMENTS = frozenset(RULES) - {"none", "l2sp"}
"""The rules whose a and b depend on the moments."""
COLUMNS = 6
"""Of a record: three moments, then steps, conflicts and skipped steps."""

Tensors = Sequence[Tensor]

_MOMENTS = _library.define(
    "grad_projection_moments",
    "(Tensor[] grads, Tensor[] references, Tensor[] params, bool maximize, Tensor? grad_scale) -> Tensor",
    lambda grads, references, params, maximize, grad_scale: grads[0].new_empty(len(grads), 3, dtype=torch.float64),
)


def _nothing(*arguments: Any) -> None:
    return None


_PROJECTION = "int[] segments, {anchored}Tensor coefficient, int rule, float parameter, bool reduce"
_STEP = _PROJECTION.format(anchored="bool anchored, ") + ", Tensor lr"
_SCALER = "bool maximize, {first_step}Tensor? grad_scale, Tensor? found_inf"
_COMBINE = _library.define(
    "grad_projection",
    f"(Tensor(a!)[] grads, Tensor[] references, Tensor[] params, Tensor(b!) record, {_PROJECTION.format(anchored='')})"
    " -> ()",
    _nothing,
)
_SGD = _library.define(
    "grad_projection_sgd",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor[] references, Tensor(c!)[] momentum_buffers, Tensor(d!) record, "
    f"{_STEP}, float momentum, float dampening, float weight_decay, bool nesterov, "
    f"{_SCALER.format(first_step='bool first_step, ')}) -> ()",
    _nothing,
)
_ADAMW = _library.define(
    "grad_projection_adamw",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor[] references, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    f"Tensor[] steps, Tensor(e!) record, {_STEP}, float beta1, float beta2, float eps, float weight_decay, "
    f"{_SCALER.format(first_step='')}) -> ()",
    _nothing,
)


def new_record(segments: int, device: torch.device | str = "cpu") -> Tensor:
    """A record (segments, 6) float64 before any step: moments NaN, counts 0."""
    record = torch.zeros(segments, COLUMNS, dtype=torch.float64, device=device)
    record[:, :3] = torch.nan
    return record


def weights(rule: str, record: Tensor, parameter: float = 0.0) -> tuple[Tensor, Tensor]:
    """(a, b), (S,) float64 each, that ``rule`` gives for the moments of ``record``."""
    return reference_kernels.weights(_index(rule), record[:, :3], parameter)


@torch.no_grad()
def moments(
    grads: Tensors,
    references: Tensors,
    *,
    params: Tensors = (),
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    reference: bool = False,
) -> Tensor:
    """Phase 1 by itself: ⟨g, r⟩, ‖g‖² and ‖r‖² of every tensor, (T, 3) float64, for sums over ranks or devices.

    Arguments as of :func:`sgd_`. r is not weighted by the coefficient.
    """
    if not grads:
        return torch.zeros(0, 3, dtype=torch.float64)
    _check_lists(grads, references=references, params=params)
    kernel: Callable[..., Tensor] = _kernel(_MOMENTS, reference_kernels.moments, grads[0], reference)
    return kernel(grads, references, params, maximize, grad_scale)


@torch.no_grad()
def project_gradients_(
    grads: Tensors,
    references: Tensors,
    *,
    params: Tensors = (),
    record: Tensor,
    segments: Sequence[int],
    coefficient: float | Tensor,
    rule: str,
    parameter: float = 0.0,
    reduce: bool = True,
    reference: bool = False,
) -> None:
    """Write d over every g.

    Args:
        params: where they are given, the references are w⁰ and r = 2 (w − w⁰); else the references are r.
        Others as of :func:`sgd_`.
    """
    _check_lists(grads, references=references, params=params, segments=segments)
    _touch(grads)
    kernel = _kernel(_COMBINE, reference_kernels.grad_projection, record, reference)
    kernel(grads, references, params, record, segments, _scalar(coefficient), _index(rule), float(parameter), reduce)


@torch.no_grad()
def sgd_(
    params: Tensors,
    grads: Tensors,
    references: Tensors,
    momentum_buffers: Tensors,
    *,
    record: Tensor,
    segments: Sequence[int],
    anchored: bool,
    coefficient: float | Tensor,
    rule: str,
    parameter: float = 0.0,
    reduce: bool = True,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    reference: bool = False,
) -> None:
    """A step of ``torch.optim.SGD`` along d, which is computed on the way.

    Args:
        params: T tensors of one device, each dense in memory; float32, bfloat16, float16 or float64, also mixed.
        grads: T, of the same dtypes and strides.
        references: R ≤ T, of the first R tensors, with the same strides and any of these dtypes.
        momentum_buffers: T, of the dtypes and strides of ``params``; none where ``momentum`` is 0.
        record: (S, 6) of :func:`new_record`, on the device.
        segments: T rows of the record, or −1.
        anchored: whether the references are w⁰ (r = 2 (w − w⁰)) or r itself.
        coefficient: λ ≥ 0, a number or a tensor of one element. Several calls with several λ may share a segment.
        rule: of ``RULES``.
        parameter: ω of ``digrap``, ρ of ``gradvac``.
        reduce: compute the moments; else they stand in the record, where the rule needs any.
        lr: a number or a tensor of one element; the other hyper-parameters as torch's. Weight decay is added to d.
        maximize: climb J; g is negated, r is not.
        first_step: the buffers hold nothing yet and become d.
        grad_scale: float32, one element; g, and r where it is given, are divided by it, and the quotient is kept in g.
        found_inf: float32, one element; where it is not 0 nothing changes but the count of skipped steps.
        reference: run the plain PyTorch reference.

    Raises:
        ValueError: lists that do not belong together, or an unknown rule.
        RuntimeError: sizes or dtypes that do not.
    """
    expected = params if momentum else ()
    if len(momentum_buffers) != len(expected):
        raise ValueError(f"momentum_buffers: expected {len(expected)} tensors, got {len(momentum_buffers)}")
    _check_lists(params, grads=grads, references=references, segments=segments)
    _touch(params)
    kernel = _kernel(_SGD, reference_kernels.sgd, record, reference)
    kernel(
        params,
        grads,
        references,
        momentum_buffers,
        record,
        segments,
        anchored,
        _scalar(coefficient),
        _index(rule),
        float(parameter),
        reduce,
        _scalar(lr),
        float(momentum),
        float(dampening),
        float(weight_decay),
        nesterov,
        maximize,
        first_step,
        grad_scale,
        found_inf,
    )


@torch.no_grad()
def adamw_(
    params: Tensors,
    grads: Tensors,
    references: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    record: Tensor,
    segments: Sequence[int],
    anchored: bool,
    coefficient: float | Tensor,
    rule: str,
    parameter: float = 0.0,
    reduce: bool = True,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    reference: bool = False,
) -> None:
    """A step of ``torch.optim.AdamW`` along d, which is computed on the way.

    Args:
        exp_avgs, exp_avg_sqs: T each, of the dtypes and strides of ``params``.
        steps: T float32 tensors of one element on the device of ``params``, which count this step already.
        Others as of :func:`sgd_`, and as torch's.
    """
    _check_lists(
        params,
        grads=grads,
        references=references,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        segments=segments,
    )
    _touch(params)
    kernel = _kernel(_ADAMW, reference_kernels.adamw, record, reference)
    kernel(
        params,
        grads,
        references,
        exp_avgs,
        exp_avg_sqs,
        steps,
        record,
        segments,
        anchored,
        _scalar(coefficient),
        _index(rule),
        float(parameter),
        reduce,
        _scalar(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
        maximize,
        grad_scale,
        found_inf,
    )


def _kernel(
    operator: Callable[..., Any], meaning: Callable[..., Any], like: Tensor, reference: bool
) -> Callable[..., Any]:
    plain = reference or backend.choose("grad_projection", like.device.type) == "reference"
    return meaning if plain else operator


def _touch(tensors: Tensors) -> None:
    """Tell autograd of a change in place, as the dispatcher does for torch's own operators."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _scalar(value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    return value.reshape(()) if value.is_floating_point() else value.reshape(()).double()


def _index(rule: str) -> int:
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    return RULES.index(rule)


def _check_lists(tensors: Tensors, *, references: Tensors, **aligned: Sequence[Any]) -> None:
    """Raise unless every list has an element a tensor, the references at most that."""
    if len(references) > len(tensors):
        raise ValueError(f"references: expected at most {len(tensors)}, one a tensor, got {len(references)}")
    for name, others in aligned.items():
        if len(others) != len(tensors) and not (name == "params" and not others):
            raise ValueError(f"{name}: expected {len(tensors)}, one a tensor, got {len(others)}")
