"""The meaning of ``grad_projection`` in plain PyTorch, on lists by ``torch._foreach_*``; arguments as of the operators.

It is also what runs on a GPU where the CUDA kernels were not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

List = list[Tensor] | tuple[Tensor, ...]

RULES = ("none", "l2sp", "dtnh", "pcgrad", "agem", "digrap", "gradvac")


def weights(rule: int, moments: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """(a, b), (S,) each, from ``moments`` (S, 3): ⟨g, λr⟩, ‖g‖² and ‖λr‖² of every segment."""
    dot, loss, regularizer = moments.unbind(1)
    zero, one = torch.zeros_like(dot), torch.ones_like(dot)
    against = torch.where((dot < 0) & dot.isfinite(), dot, zero)
    loss_share = torch.where(loss > 0, against / loss, zero)
    regularizer_share = torch.where(regularizer > 0, against / regularizer, zero)
    name = RULES[rule]
    if name == "none":
        return one, zero
    if name == "l2sp":
        return one, one
    if name == "dtnh":
        return 1 - loss_share, one
    if name == "pcgrad":
        return 1 - loss_share, 1 - regularizer_share
    if name == "agem":
        return one, -regularizer_share
    if name == "digrap":
        return one, -parameter * regularizer_share
    norms = loss.sqrt() * regularizer.sqrt()
    cosine = torch.where((norms > 0) & norms.isfinite(), dot / norms, parameter).clamp(min=-1)
    sine, target_sine = (1 - cosine**2).sqrt(), (1 - parameter**2) ** 0.5
    added = (regularizer.sqrt() / loss.sqrt()) * (parameter * sine - cosine * target_sine) / target_sine
    return torch.where(cosine < parameter, 1 + added, one), one


def moments(
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    params: Sequence[Tensor],
    maximize: bool,
    grad_scale: Tensor | None,
) -> Tensor:
    """(T, 3) float64: ⟨g, r⟩, ‖g‖² and ‖r‖² of every tensor."""
    gradients = _gradients(grads, maximize, grad_scale)
    pulls = _pulls(references, params, grad_scale)
    result = torch.zeros(len(grads), 3, dtype=torch.float64, device=grads[0].device)
    for i, gradient in enumerate(gradients):
        gradient = gradient.double()  # the square of a small float is 0
        result[i, 1] = torch.sum(gradient * gradient)
        if i < len(pulls):
            pull = pulls[i].double()
            result[i, 0] = torch.sum(gradient * pull)
            result[i, 2] = torch.sum(pull * pull)
    return result


def grad_projection(
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    params: Sequence[Tensor],
    record: Tensor,
    segments: Sequence[int],
    coefficient: Tensor,
    rule: int,
    parameter: float,
    reduce: bool,
) -> None:
    """Write d over every g."""
    if reduce:
        _reduce(grads, references, params, record, segments, coefficient, False, None, None)
    _count(record, None)
    directions = _directions(grads, references, params, record, segments, coefficient, rule, parameter, False, None)
    for grad, direction in zip(grads, directions, strict=True):
        grad.copy_(direction)


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    record: Tensor,
    segments: Sequence[int],
    anchored: bool,
    coefficient: Tensor,
    rule: int,
    parameter: float,
    reduce: bool,
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step of ``torch.optim.SGD`` along d."""
    anchors = params if anchored else ()
    if reduce:
        _reduce(grads, references, anchors, record, segments, coefficient, maximize, grad_scale, found_inf)
    _count(record, found_inf)
    weight = _wide(params)
    step: List = _directions(
        grads, references, anchors, record, segments, coefficient, rule, parameter, maximize, grad_scale
    )
    if weight_decay:
        step = torch._foreach_add(step, weight, alpha=weight_decay)
    if momentum:
        buffers: List = step
        if not first_step:
            buffers = torch._foreach_mul(_wide(momentum_buffers), momentum)
            buffers = torch._foreach_add(buffers, step, alpha=1 - dampening)
        step = torch._foreach_add(step, buffers, alpha=momentum) if nesterov else buffers
        _write(momentum_buffers, buffers, found_inf)
    _unscale(grads, grad_scale, found_inf)
    _write(params, torch._foreach_sub(weight, [change * lr.to(change) for change in step]), found_inf)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    record: Tensor,
    segments: Sequence[int],
    anchored: bool,
    coefficient: Tensor,
    rule: int,
    parameter: float,
    reduce: bool,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step of ``torch.optim.AdamW`` along d."""
    anchors = params if anchored else ()
    if reduce:
        _reduce(grads, references, anchors, record, segments, coefficient, maximize, grad_scale, found_inf)
    _count(record, found_inf)
    directions = _directions(
        grads, references, anchors, record, segments, coefficient, rule, parameter, maximize, grad_scale
    )
    average = torch._foreach_lerp(_wide(exp_avgs), directions, 1 - beta1)
    square = torch._foreach_mul(_wide(exp_avg_sqs), beta2)
    square = torch._foreach_addcmul(square, directions, directions, 1 - beta2)
    _unscale(grads, grad_scale, found_inf)
    for i, weight in enumerate(_wide(params)):
        step, rate = steps[i].double(), lr.double().to(weight.device)
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        change = (rate / bias1) * average[i] / (square[i].sqrt() / bias2.sqrt() + eps)
        _write(params[i : i + 1], [(weight * (1 - rate * weight_decay) - change).to(weight.dtype)], found_inf)
    _write(exp_avgs, average, found_inf)
    _write(exp_avg_sqs, square, found_inf)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def _gradients(grads: Sequence[Tensor], maximize: bool, grad_scale: Tensor | None) -> list[Tensor]:
    wide = _wide(grads)
    if grad_scale is not None:
        wide = [grad / grad_scale.to(grad.dtype) for grad in wide]
    return list(torch._foreach_neg(wide)) if maximize else wide


def _pulls(references: Sequence[Tensor], params: Sequence[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """r of the tensors that have one: 2 (w − w₀), or what is given."""
    wide = _wide(references)
    if not wide:
        return []
    if params:
        return list(torch._foreach_mul(torch._foreach_sub(_wide(params[: len(wide)]), wide), 2))
    return wide if grad_scale is None else [pull / grad_scale.to(pull.dtype) for pull in wide]


def _reduce(
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    params: Sequence[Tensor],
    record: Tensor,
    segments: Sequence[int],
    coefficient: Tensor,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The moments of every segment, r weighted by the coefficient, into the record."""
    found = torch.zeros_like(record[:, :3])
    factor = coefficient.double().to(record.device).reshape(())
    weight = torch.stack((factor, torch.ones_like(factor), factor * factor))
    of_tensors = weight * moments(grads, references, params, maximize, grad_scale) if grads else ()
    for segment, row in zip(segments, of_tensors, strict=True):
        if segment >= 0:
            found[segment] += row
    _write([record[:, :3]], [found], found_inf)


def _count(record: Tensor, found_inf: Tensor | None) -> None:
    done = torch.ones((), dtype=torch.float64, device=record.device)
    if found_inf is not None:
        done = done - (found_inf != 0).double().reshape(())
    record[:, 3] += done
    record[:, 4] += done * (record[:, 0] < 0)
    record[:, 5] += 1 - done


def _directions(
    grads: Sequence[Tensor],
    references: Sequence[Tensor],
    params: Sequence[Tensor],
    record: Tensor,
    segments: Sequence[int],
    coefficient: Tensor,
    rule: int,
    parameter: float,
    maximize: bool,
    grad_scale: Tensor | None,
) -> list[Tensor]:
    a, b = weights(rule, record[:, :3], parameter)
    b = b * coefficient.double().to(b.device)
    result = _gradients(grads, maximize, grad_scale)
    pulls = _pulls(references, params, grad_scale) if RULES[rule] != "none" else []
    for i, segment in enumerate(segments):
        if segment < 0:
            continue
        result[i] = result[i] * _factor(a[segment], result[i].dtype)
        if i < len(pulls):
            result[i] = result[i] + pulls[i].to(result[i].dtype) * _factor(b[segment], result[i].dtype)
    return result


def _factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight beside elements of ``dtype``, into which it may not fit where a gradient has the smallest numbers."""
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype)


def _unscale(grads: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if grad_scale is not None:
        _write(grads, _gradients(grads, False, grad_scale), found_inf)


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor], found_inf: Tensor | None) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, tensor.to(value), value))
