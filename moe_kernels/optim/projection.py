"""The projection by itself, for regularizers whose gradient takes a backward of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_kernels.ops import grad_projection
from moe_kernels.optim.alignment import aligned
from moe_kernels.optim.arguments import check_number, check_rule
from moe_kernels.optim.batches import batches, refuse_sparse
from moe_kernels.optim.facts import Facts, facts
from moe_kernels.optim.moments import Summand, gather_moments_
from moe_kernels.parallel.sharding import ShardedSum, shard_like

SCOPES = ("global", "tensor")


@torch.no_grad()
def project_gradients_(
    params: Iterable[Tensor],
    regularizer_grads: Iterable[Tensor | None],
    *,
    coefficient: float | Tensor,
    rule: str = "dtnh",
    scope: str = "global",
    omega: float = 1.0,
    target_cosine: float = 0.0,
) -> Facts:
    """Write d = a g + b λ r over the gradients g of ``params``, for any optimizer to step along.

    After two backwards of one forward, of the loss and of the regularizer::

        regularizer_grads = torch.autograd.grad(penalty, params, retain_graph=True, allow_unused=True)
        loss.backward()
        project_gradients_(params, regularizer_grads, coefficient=0.01)
        optimizer.step()

    With gradient accumulation sum both over the micro-batches and project once. Under DDP r has to be averaged over
    ranks as g is, before this. Clip g before it.

    Args:
        params: parameters. One whose gradient is None is left alone and takes no part.
        regularizer_grads: r, a tensor of the parameter's shape or None (r = 0) for every one, in order. DTensors and
            full tensors are taken as :class:`~moe_kernels.optim.AnchoredSGD` takes anchors.
        coefficient: λ ≥ 0, a number or a tensor of one element.
        rule, omega, target_cosine: as of :class:`~moe_kernels.optim.AnchoredSGD`.
        scope: ``"global"`` or ``"tensor"``.

    Returns:
        What was found, without waiting for the device.

    Raises:
        ValueError, TypeError: an argument that is not possible, and which tensors do not belong together.
        RuntimeError: a gradient is sparse.
    """
    parameter = check_rule(rule, omega, target_cosine)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    check_number("coefficient", coefficient)
    params = list(params)
    if not all(isinstance(param, Tensor) for param in params):
        wrong = next(type(param).__name__ for param in params if not isinstance(param, Tensor))
        raise TypeError(f"params: expected tensors, without names, got {wrong}")
    if len(set(params)) != len(params):
        raise ValueError("params: expected every parameter once, got one twice, which would be projected twice")
    labels = [f"parameter {i}" for i in range(len(params))]
    values = aligned("regularizer_grads", regularizer_grads, params, labels, named=False)
    references = [None if r is None else shard_like(r, p) for p, r in zip(params, values, strict=True)]
    refuse_sparse(params, labels)
    found = batches(params, references)
    sums = ShardedSum(params)
    device = params[0].device if params else "cpu"
    record = grad_projection.new_record(1 if scope == "global" else len(params), device)
    segments = [batch.rows if scope == "tensor" else [0] * len(batch.rows) for batch in found]
    alone = not sums and len(found) <= 1
    if not alone:
        summands = [
            Summand(batch, rows, grad_projection.moments(batch.grads, batch.references), coefficient)
            for batch, rows in zip(found, segments, strict=True)
        ]
        gather_moments_(record, summands, sums)
    for i, (batch, rows) in enumerate(zip(found, segments, strict=True)):
        here = record.to(batch.device, copy=i > 0)  # each call counts a step, of which only the first is to stay
        grad_projection.project_gradients_(
            batch.grads,
            batch.references,
            record=here,
            segments=rows,
            coefficient=coefficient,
            rule=rule,
            parameter=parameter,
            reduce=alone,
        )
        if i == 0 and here is not record:
            record.copy_(here)
        batch.finish(grads=True)
    return facts(record, rule, parameter)
