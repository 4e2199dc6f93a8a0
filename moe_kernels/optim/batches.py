"""What one call of the operator steps: tensors of one device, those with a reference first."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels.parallel.sharding import copy_like, is_dtensor, local

State = dict[str, Any]


class Batch:
    """T parameters with a gradient each, and R ≤ T references, those of the first R.

    ``params``, ``grads`` and ``references`` are what the operator takes: local tensors, dense in memory, the i-th of
    each list with the same strides. Whatever is not like that goes through a temporary.
    """

    def __init__(
        self,
        owners: list[Tensor],
        grads: list[Tensor],
        references: list[Tensor],
        states: list[State],
        rows: list[int],
        state_key: str | None,
        first_step: bool,
    ) -> None:
        """``rows``: the place of each parameter in its group; ``state_key``: a state that has the parameter's shape."""
        self.owners, self.states, self.rows, self.first_step = owners, states, rows, first_step
        self.params, self.grads, self.references = owners, grads, references
        self._params_back: list[tuple[Tensor, Tensor]] = []
        self._grads_back: list[tuple[Tensor, Tensor]] = []
        self._plain = {torch.nn.Parameter, Tensor}.issuperset(map(type, owners))
        if not self._plain:
            self._localize()
        self._strides = _strides(self.params)
        if state_key is None:
            dense = all([param.is_contiguous() or _dense_strides(param) == param.stride() for param in self.params])
        else:  # states are dense
            dense = _strides(self.state(state_key)) == self._strides
        laid_out = (
            dense
            and _strides(self.grads) == self._strides
            and _strides(self.references) == self._strides[: len(self.references)]
        )
        if not laid_out:
            self._lay_out()
        self.renewable = self._plain and laid_out and state_key is not None
        """Whether nothing of it is a temporary, and states are there whose sizes the operator compares."""

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def state(self, key: str) -> list[Tensor]:
        """The local tensors ``key`` of the states."""
        found = [state[key] for state in self.states]
        return found if self._plain else [local(tensor) for tensor in found]

    def finish(self, *, grads: bool) -> None:
        """Copy results out of temporaries, of gradients where those were written; ``zero_grad`` may free these then."""
        for target, temporary in self._params_back + (self._grads_back if grads else []):
            target.copy_(temporary)
        self.grads = []

    def renew(self, grads: Sequence[Tensor | None], states: Sequence[State]) -> bool:
        """Take those of the whole group for another step; False where something needs a temporary by now."""
        self.states = [states[i] for i in self.rows]
        self.grads = [grads[i] for i in self.rows]  # type: ignore[misc]
        return _strides(self.grads) == self._strides == _strides(self.params)

    def _localize(self) -> None:
        for i, (owner, grad) in enumerate(zip(self.owners, self.grads, strict=True)):
            if is_dtensor(owner) and is_dtensor(grad) and grad.placements != owner.placements:
                owner.grad = self.grads[i] = grad.redistribute(placements=owner.placements)
        self.params, self.grads, self.references = (
            [local(tensor) for tensor in tensors] for tensors in (self.owners, self.grads, self.references)
        )

    def _lay_out(self) -> None:
        self.params, self.grads, self.references = list(self.params), list(self.grads), list(self.references)
        for i, param in enumerate(self.params):
            strides = _dense_strides(param)
            self.params[i] = _relaid(param, strides, self._params_back)
            self.grads[i] = _relaid(self.grads[i], strides, self._grads_back)
            if i < len(self.references):
                if self.references[i].shape != param.shape:
                    raise RuntimeError(
                        f"reference of parameter {self.rows[i]} of its group: expected the shape that the parameter "
                        f"has by now, {tuple(param.shape)}, got {tuple(self.references[i].shape)}"
                    )
                self.references[i] = _relaid(self.references[i], strides, [])
        for owner, state in zip(self.owners, self.states, strict=True):
            lay_out_state(owner, state)


class Batches:
    """The batches of one parameter group, kept from step to step as long as the same tensors are in them."""

    def __init__(self) -> None:
        self._tensors: list[object] = []
        self._kept: list[Batch] = []

    def of_step(
        self,
        params: Sequence[Tensor],
        references: Sequence[Tensor | None],
        states: Sequence[State],
        *,
        state_key: str | None,
        first_steps: Sequence[bool] | None,
    ) -> list[Batch]:
        """As :func:`batches`, for the price of a look at every tensor where nothing changed."""
        grads = [param.grad for param in params]
        tensors: list[object] = [*params, *references, *(grad is None for grad in grads), *(first_steps or ())]
        if state_key is not None:
            tensors += [state.get(state_key) for state in states]
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        if same and all([batch.renew(grads, states) for batch in self._kept]):
            return self._kept
        found = batches(params, references, states, state_key=state_key, first_steps=first_steps)
        keep = all(batch.renewable for batch in found)
        self._tensors = tensors if keep else []
        self._kept = found if keep else []
        return found


def batches(
    params: Sequence[Tensor],
    references: Sequence[Tensor | None],
    states: Sequence[State] = (),
    *,
    state_key: str | None = None,
    first_steps: Sequence[bool] | None = None,
) -> list[Batch]:
    """The parameters that have a gradient, apart by device and by ``first_steps``; all lists are aligned.

    Gradients have to be dense: see :func:`refuse_sparse`.
    """
    grads = [param.grad for param in params]
    anchored = [i for i, reference in enumerate(references) if reference is not None and grads[i] is not None]
    rows = anchored
    if len(anchored) < len(params):
        rows = anchored + [i for i, reference in enumerate(references) if reference is None and grads[i] is not None]
    kinds = [(rows, len(anchored), False)]
    if first_steps is not None or len({param.device for param in params}) > 1:
        kinds = _kinds(params, rows, len(anchored), first_steps)
    return [
        Batch(
            [params[i] for i in members],
            [grads[i] for i in members],  # type: ignore[misc]
            [references[i] for i in members[:referenced]],  # type: ignore[misc]
            [states[i] for i in members] if states else [{} for _ in members],
            members,
            state_key,
            first_step,
        )
        for members, referenced, first_step in kinds
        if members
    ]


def _kinds(
    params: Sequence[Tensor], rows: list[int], referenced: int, first_steps: Sequence[bool] | None
) -> list[tuple[list[int], int, bool]]:
    """``rows``, of which the first have a reference, apart by device and first step, each with how many have one."""
    kinds: dict[tuple[torch.device, bool], list[int]] = {}
    for i in rows:
        kinds.setdefault((params[i].device, first_steps is not None and first_steps[i]), []).append(i)
    with_reference = set(rows[:referenced])
    return [(members, len(with_reference.intersection(members)), kind[1]) for kind, members in kinds.items()]


def refuse_sparse(params: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Raise a RuntimeError where a gradient is sparse."""
    sparse = [
        label
        for label, param in zip(labels, params, strict=True)
        if param.grad is not None and local(param.grad).layout != torch.strided
    ]
    if sparse:
        raise RuntimeError(f"grad: expected dense gradients, got sparse ones for {', '.join(sparse)}")


def lay_out_state(param: Tensor, state: State) -> None:
    """Bring what ``state`` has of the shape of ``param`` into its memory layout, dense."""
    strides = _dense_strides(local(param))
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and local(value).stride() != strides:
            state[key] = copy_like(value, param)


def _strides(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors]


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor like this one without gaps."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def _relaid(tensor: Tensor, strides: tuple[int, ...], back: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``tensor`` with these strides: itself or a view where its memory allows, else a copy, noted in ``back``."""
    if tensor.stride() == strides:
        return tensor
    dims = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(size == 1 or found == wanted for size, found, wanted in dims):
        return tensor.as_strided(tensor.shape, strides)
    copy = tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
    back.append((tensor, copy))
    return copy
