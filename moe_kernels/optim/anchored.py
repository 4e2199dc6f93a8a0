"""What the anchored optimizers share: the anchors, and one projected step over all parameter groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import grad_projection
from moe_kernels.ops.grad_projection import NEEDS_MOMENTS, SCOPES
from moe_kernels.optim.alignment import Given, aligned, anchor_copies, with_anchors
from moe_kernels.optim.arguments import check_number, check_rule
from moe_kernels.optim.batches import Batch, Batches, State, batches, lay_out_state, refuse_sparse
from moe_kernels.optim.facts import Facts, facts
from moe_kernels.optim.moments import Summand, gather_moments_
from moe_kernels.parallel.sharding import ShardedSum, local, shard_like

_OF_ALL_GROUPS = frozenset(("rule", "scope", "anchored_only", "omega", "target_cosine", "measure"))


class Call(NamedTuple):
    """One call of the operator."""

    batch: Batch
    group: dict[str, Any]
    rows: slice
    """The rows of the record that its parameter group has a part in."""
    segments: list[int]
    """Of each tensor, counted from the first of ``rows``, or −1."""
    options: dict[str, Any]
    """What the operator takes besides, of which the moments depend on all but ``found_inf``."""


class Anchored(torch.optim.Optimizer):
    """Base of the optimizers; :class:`~moe_kernels.optim.AnchoredSGD` tells what the arguments are."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        anchor: Given | None,
        rule: str,
        scope: str,
        anchored_only: bool,
        omega: float,
        target_cosine: float,
        measure: bool,
    ) -> None:
        self._parameter = check_rule(rule, omega, target_cosine)
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        self.rule, self.scope, self.anchored_only, self.measure = rule, scope, anchored_only, measure
        self._record: Tensor | None = None
        self._batches: defaultdict[int, Batches] = defaultdict(Batches)
        super().__init__(with_anchors(params, anchor), defaults)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Add to the state of ``param`` what a step needs and it lacks."""
        raise NotImplementedError

    def _state_key(self, group: dict[str, Any]) -> str | None:
        """The state of a parameter's shape that a step keeps; None where it keeps none."""
        raise NotImplementedError

    def _starts_from_zero(self, group: dict[str, Any]) -> bool:
        """Whether a state of zeros is as good as none, so that it can be there from the beginning."""
        return True

    def _first_steps(self, group: dict[str, Any], states: list[State]) -> list[bool] | None:
        """Which parameters need a call of their own because their first step is another; None where none does."""
        return None

    def _update(self, batch: Batch, group: dict[str, Any], **projection: Any) -> None:
        """Call the operator."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless the options of ``group`` make sense."""
        for label, param in zip(self._labels(group), group["params"], strict=True):
            if not param.is_floating_point():
                raise TypeError(f"params: expected floating-point tensors, got {param.dtype} for {label}")
        if len(set(group["params"])) != len(group["params"]):
            raise ValueError("params: expected every parameter once, got one twice in a group")
        for name in ("coefficient", "lr", "weight_decay"):
            check_number(name, group[name])
        if group["fused"] and group["foreach"]:
            raise RuntimeError("fused, foreach: expected one of them to be True at most, got both")
        if group["fused"]:
            for device_type, dtype in {(param.device.type, param.dtype) for param in group["params"]}:
                _check_fused(device_type, dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have an ``anchor``, a sequence or a mapping, for its own parameters."""
        for name in _OF_ALL_GROUPS & param_group.keys():
            raise ValueError(f"{name}: expected as an argument, the same for all groups, got one in a group")
        given = param_group.get("anchor")
        super().add_param_group({key: value for key, value in param_group.items() if key != "anchor"})
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if given is not None:
                copies = anchor_copies(given, group["params"], self._labels(group), named="param_names" in group)
                for param, copy in zip(group["params"], copies, strict=True):
                    if copy is not None:
                        self.state[param]["anchor"] = copy
        except Exception:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            # From the beginning: torch.distributed.checkpoint takes a state with anchors alone for all that there is.
            if param.requires_grad and self._starts_from_zero(group):
                self._init_state(param, group)
        self._sums = ShardedSum(self._params())

    @torch._disable_dynamo  # type: ignore[attr-defined]  # a compiled training loop breaks its graph here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, regularizer_grads: Given | None = None) -> Any:
        """One step along d.

        Args:
            closure: computes the loss again and returns it.
            regularizer_grads: r, a tensor or None (r = 0) for every parameter in order, or by name; in the place of
                anchors. A gradient scaler takes them to be scaled as the gradients are.

        Raises:
            ValueError: both anchors and ``regularizer_grads``, or neither where the rule needs r.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        anchored = regularizer_grads is None
        calls = self._calls(regularizer_grads)
        record = self._current_record()
        measured = self.measure or self.rule in NEEDS_MOMENTS
        # Rows of the record that one call has for itself it reduces; else the parts are measured and summed before.
        alone = not self._sums and len({call.rows.start for call in calls}) == len(calls)
        if not measured:  # nothing is left of steps that were
            record[:, :3] = torch.nan
        elif not alone:
            self._measure(calls, record, anchored)
        counted: set[int] = set()
        for call in calls:
            # A call counts a step in every row that it gets, so of calls that share rows only the first gets them.
            rows, first = record[call.rows], call.rows.start not in counted
            here = rows.to(call.batch.device, copy=not first)
            self._update(
                call.batch,
                call.group,
                record=here,
                segments=call.segments,
                anchored=anchored,
                coefficient=call.group["coefficient"],
                rule=self.rule,
                parameter=self._parameter,
                reduce=measured and alone,
                **call.options,
            )
            if first and here is not rows:
                rows.copy_(here)
            counted.add(call.rows.start)
            call.batch.finish(grads=call.options["grad_scale"] is not None)
        return loss

    def facts(self) -> Facts:
        """What the last step did and how often there was a conflict; see :class:`~moe_kernels.optim.Facts`.

        Rules that need no moments (none, l2sp) have cosines and angles only with ``measure=True``. Counts begin with
        the optimizer, they are no part of its ``state_dict``.
        """
        return facts(self._current_record(), self.rule, self._parameter)

    def _calls(self, regularizer_grads: Given | None) -> list[Call]:
        given = None if regularizer_grads is None else self._given(regularizer_grads)
        calls: list[Call] = []
        start = 0
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            check_number("coefficient", group["coefficient"])
            states = [self.state[param] for param in params]
            references = given[start : start + len(params)] if given else [state.get("anchor") for state in states]
            first_steps, key = self._first_steps(group, states), self._state_key(group)
            if key is not None:
                for i in [i for i, state in enumerate(states) if state.get(key) is None]:
                    if params[i].grad is not None:
                        self._init_state(params[i], group)
            try:
                make = self._batches[index].of_step if given is None else batches
                found = make(params, references, states, state_key=key, first_steps=first_steps)
            except RuntimeError:  # sparse tensors have no strides
                refuse_sparse(params, self._labels(group))
                raise
            rows = {"global": slice(0, 1), "group": slice(index, index + 1)}.get(
                self.scope, slice(start, start + len(params))
            )
            for batch in found:
                segments = batch.rows if self.scope == "tensor" else [0] * len(batch.rows)
                if self.anchored_only:
                    alone = len(batch.rows) - len(batch.references)
                    segments = segments[: len(batch.references)] + [-1] * alone
                calls.append(Call(batch, group, rows, segments, self._options(group, batch.device)))
            start += len(params)
        referenced = given is not None or any(call.batch.references for call in calls)
        lacking = self.rule != "none" and calls and not referenced and not self._anchored()
        # torch.distributed.checkpoint makes a step of lr 0 to see the states there are.
        if lacking and any(group["lr"] != 0 for group in self.param_groups):
            raise ValueError(
                f"regularizer_grads: rule {self.rule!r} needs the regularizer's gradient, from anchors or given to "
                "step; got neither"
            )
        return calls

    def _given(self, regularizer_grads: Given) -> list[Tensor | None]:
        if self._anchored():
            raise ValueError("regularizer_grads: expected None where there are anchors, got both")
        params = self._params()
        labels = list(chain.from_iterable(map(self._labels, self.param_groups)))
        named = "param_names" in self.param_groups[0]
        values = aligned("regularizer_grads", regularizer_grads, params, labels, named=named)
        return [
            None if value is None else shard_like(value.detach(), param)
            for param, value in zip(params, values, strict=True)
        ]

    def _options(self, group: dict[str, Any], device: torch.device) -> dict[str, Any]:
        scaler = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {
            "maximize": group["maximize"],
            "reference": bool(group["foreach"]) or group["fused"] is False,
            **{name: None if value is None else value.to(device, non_blocking=True) for name, value in scaler.items()},
        }

    def _measure(self, calls: list[Call], record: Tensor, anchored: bool) -> None:
        summands = []
        for batch, group, rows, segments, options in calls:
            moments = grad_projection.moments(
                batch.grads,
                batch.references,
                params=batch.params if anchored else (),
                **{name: value for name, value in options.items() if name != "found_inf"},
            )
            of_record = [rows.start + segment if segment >= 0 else -1 for segment in segments]
            summands.append(Summand(batch, of_record, moments, group["coefficient"]))
        gather_moments_(record, summands, self._sums)

    def _current_record(self) -> Tensor:
        """The record, with rows for groups that were added since."""
        params = self._params()
        rows = {"global": 1, "group": len(self.param_groups), "tensor": len(params)}[self.scope]
        old = 0 if self._record is None else len(self._record)
        if old < rows:
            added = grad_projection.new_record(rows - old, params[0].device if params else "cpu")
            self._record = added if self._record is None else torch.cat((self._record, added))
        assert self._record is not None
        return self._record

    def _anchored(self) -> bool:
        return any("anchor" in state for state in self.state.values())

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _labels(self, group: dict[str, Any]) -> list[str]:
        """What a message calls the parameters of ``group``."""
        if "param_names" in group:
            return list(group["param_names"])
        start = 0
        for other in self.param_groups:
            if other is group:
                break
            start += len(other["params"])
        return [f"parameter {start + i}" for i in range(len(group["params"]))]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; takes a state of the torch optimizer of the same name too, whose options it lacks stay.

        Raises:
            ValueError: the state belongs to other anchors; says of which parameters.
        """
        self._check_anchors(state_dict)
        anchors = {param: state["anchor"] for param, state in self.state.items() if "anchor" in state}
        states = {
            key: {name: value for name, value in state.items() if name != "anchor" and value is not None}
            for key, state in state_dict["state"].items()
        }
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group, mine in zip(groups, self.param_groups, strict=False):  # torch refuses other numbers of groups
            group.update((name, value) for name, value in mine.items() if name not in group)
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})
        # torch casts a state to the dtype of its parameter; the anchors keep their own.
        for param, anchor in anchors.items():
            self.state[param]["anchor"] = anchor
        for param in self._params():
            lay_out_state(param, self.state[param])

    def _check_anchors(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["state"]
        if not any("anchor" in state for state in saved.values()):
            return
        wrong = []
        for group, other in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for label, param, key in zip(self._labels(group), group["params"], other["params"], strict=False):
                # torch.distributed.checkpoint leaves out the states of frozen parameters.
                known = key in saved or param.requires_grad
                if known and not _same(self.state[param].get("anchor"), saved.get(key, {}).get("anchor")):
                    wrong.append(label)
        if wrong:
            raise ValueError(f"state_dict: expected the anchors of this optimizer, got others for {', '.join(wrong)}")

    def __getstate__(self) -> dict[str, Any]:
        names = ("rule", "scope", "anchored_only", "measure", "_parameter", "_record")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches = defaultdict(Batches)
        self._sums = ShardedSum(self._params())


def _check_fused(device_type: str, dtype: torch.dtype) -> None:
    if backend.choose("grad_projection", device_type, dtype) != "reference":
        return
    reasons = [
        f"{name}: {problem}"
        for name in backend.OPERATORS["grad_projection"]
        if (problem := backend.refusal(name, device_type, dtype, "grad_projection"))
    ]
    reason = "; ".join(reasons) or "the reference is forced"
    raise RuntimeError(f"fused: expected None or False, as there is no kernel for {dtype} on {device_type}: {reason}")


def _same(anchor: Tensor | None, saved: Tensor | None) -> bool:
    if anchor is None or saved is None:
        return anchor is saved
    anchor, saved = local(anchor), local(saved)
    return anchor.dtype == saved.dtype and torch.equal(anchor, saved.to(anchor.device))
