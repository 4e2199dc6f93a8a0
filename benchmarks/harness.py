"""How a benchmark is measured.

A case is one operator on one workload in one direction, done by several candidates: ours, its peers, and where there
is one the physical limit. Before anything is timed every candidate's result is compared with a float64 computation
from the same rounded inputs. A candidate that is further off than ten times plain PyTorch plus one eps gets no speed.

The candidates are timed in interleaved rounds: each once a round, the order rotated from round to round, so that what
else the machine does, and how warm it is, meets all of them alike. Ratios are taken within a round, and the median over
rounds is reported. A sample is one call, or as many as fill ``sample_seconds``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_kernels import backend
from moe_kernels.benchmarks.workloads import Workload

FORWARD = "forward"
BOTH = "forward+backward"
OURS = "ours"
ERROR_FACTOR = 10.0
GRADIENT = "gradient of "

Value = Tensor | Sequence[Tensor]
"""One tensor, or one for each expert."""
Outputs = Mapping[str, Value]
Candidate = Callable[[], Outputs]
Function = Callable[..., Mapping[str, Tensor]]
Product = tuple[Tensor, Tensor, Tensor]
"""The two factors and the tensor that the product is written to."""
Stopwatch = Callable[[Candidate, int], float]
"""Seconds a call, of a candidate that is called so many times."""


@dataclass(frozen=True)
class Case:
    """One operator on one workload in one direction."""

    operator: str
    workload: Workload
    direction: str
    candidates: Mapping[str, Candidate]
    """By name; ``OURS`` and ``plain`` are among them."""
    exact: Candidate
    """The same in float64."""
    plain: str
    """The candidate whose error sets the budget."""
    limit: str | None = None
    """The candidate that does only what cannot be avoided; it has no outputs."""


@dataclass(frozen=True)
class Benchmark:
    """An operator in the registry."""

    build: Callable[[Workload, str, torch.device], Case]
    directions: tuple[str, ...] = (FORWARD, BOTH)
    routings: tuple[str, ...] = ("balanced", "zipf")
    """The routings of a workload that make a difference."""


@dataclass
class Row:
    """What was found out about one candidate; None where there is nothing to tell."""

    candidate: str
    note: str = ""
    """Why there is no speed."""
    forward_error: float | None = None
    """Relative Frobenius error against float64, of the worst output."""
    gradient_error: float | None = None
    """The same of the worst gradient."""
    calls: int = 0
    """Calls a sample."""
    seconds: list[float] = field(default_factory=list)
    """A call, in every round."""
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio_to_ours: float | None = None
    ratio_to_limit: float | None = None


@dataclass(frozen=True)
class Result:
    """A measured case."""

    operator: str
    workload: Workload
    direction: str
    plain: str
    limit: str | None
    rows: list[Row]

    def row(self, candidate: str) -> Row:
        return next(row for row in self.rows if row.candidate == candidate)

    def fastest_peer(self) -> Row | None:
        """The fastest candidate that is neither ours nor the limit, None where none has a speed."""
        peers = [row for row in self.rows if row.candidate not in (OURS, self.limit) and row.median is not None]
        return min(peers, key=lambda row: row.median or math.inf, default=None)


def _tensors(values: Mapping[str, Value]) -> list[Tensor]:
    return [tensor for value in values.values() for tensor in ([value] if isinstance(value, Tensor) else value)]


@dataclass(frozen=True)
class Problem:
    """What the functions of a case are called with, and differentiated by."""

    leaves: Mapping[str, Tensor]
    """Arguments by name; made to require a gradient."""
    cotangent: Tensor | None = None
    """Where there is one, gradients are computed: of the product of this with a function's first output."""
    others: Mapping[str, object] = field(default_factory=dict)
    """Further arguments by name."""

    def __post_init__(self) -> None:
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def candidate(self, function: Function, leaves: Mapping[str, Value] | None = None) -> Candidate:
        """A call of ``function``, whose result has its outputs and the gradient of each leaf as "gradient of <leaf>".

        Without a cotangent it runs under ``no_grad``. ``leaves`` replaces those of the problem by the same in another
        form.
        """
        given: Mapping[str, Value] = self.leaves if leaves is None else leaves

        def forward() -> Outputs:
            with torch.no_grad():
                return function(**given, **self.others)

        def both() -> Outputs:
            outputs = function(**given, **self.others)
            gradients = iter(torch.autograd.grad(next(iter(outputs.values())), _tensors(given), self.cotangent))
            result: dict[str, Value] = {name: output.detach() for name, output in outputs.items()}
            for name, leaf in given.items():
                result[GRADIENT + name] = (
                    next(gradients) if isinstance(leaf, Tensor) else [next(gradients) for _ in leaf]
                )
            return result

        return forward if self.cotangent is None else both

    def exact(self, function: Function) -> Candidate:
        """The same call in float64, our operators in it on the reference backend."""
        leaves = {name: leaf.detach().double() for name, leaf in self.leaves.items()}
        cotangent = None if self.cotangent is None else self.cotangent.double()
        run = Problem(leaves, cotangent, self.others).candidate(function)

        def on_reference() -> Outputs:
            with backend.force("reference"):
                return run()

        return on_reference


def bare_products(products: Sequence[Product]) -> Candidate:
    """The matrix products alone, into memory that is already there."""

    def run() -> Outputs:
        for left, right, out in products:
            torch.mm(left, right, out=out)
        return {}

    return run


def _relative_error(value: Value, right: Value) -> float:
    value, right = (v if isinstance(v, Tensor) else torch.stack(list(v)) for v in (value, right))
    if value.shape != right.shape:
        raise ValueError(f"a candidate's result has shape {tuple(value.shape)}, expected {tuple(right.shape)}")
    right = right.double()
    norm = torch.linalg.vector_norm(right).clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.linalg.vector_norm(value.double() - right) / norm)


def errors(outputs: Outputs, right: Outputs) -> tuple[float | None, float | None]:
    """The worst relative error of the outputs and of the gradients, None where there are none; NaN is infinite."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for name, value in outputs.items():
        found[name.startswith(GRADIENT)].append(_relative_error(value, right[name]))
    forward, gradient = (
        max((math.inf if math.isnan(error) else error for error in kind), default=None) for kind in found.values()
    )
    return forward, gradient


def _verdict(kind: str, error: float | None, plain: float | None, eps: float) -> str:
    """Why ``error`` is out of budget, or ``""``. A plain PyTorch that is not finite earns nobody a budget."""
    budget = eps if plain is None or math.isinf(plain) else ERROR_FACTOR * plain + eps
    if error is None or error <= budget:
        return ""
    return f"{kind} error {error:.1e} is out of the budget of {budget:.1e}"


def _judge(case: Case) -> list[Row]:
    """A row for each candidate with its errors, and with a note where it does not run or is out of budget."""
    right = case.exact()
    eps = torch.finfo(case.workload.torch_dtype).eps
    plain = errors(case.candidates[case.plain](), right)
    rows = []
    for name, run in case.candidates.items():
        row = Row(name)
        rows.append(row)
        try:
            found = errors(run(), right)
        except RuntimeError as error:  # what torch raises for a peer that this device, dtype or shape does not have
            if name in (OURS, case.plain):
                raise
            row.note = f"does not run here: {str(error).strip().splitlines()[0]}"
            continue
        notes = [_verdict(*which, eps) for which in zip(("forward", "gradient"), found, plain, strict=True)]
        row.note = "; ".join(filter(None, notes))
        # JSON has no infinity; the note tells it.
        row.forward_error, row.gradient_error = (None if e is None or math.isinf(e) else e for e in found)
    return rows


def stopwatch(
    device: torch.device, timer: Callable[[], float] = time.perf_counter
) -> Callable[[Candidate, int], float]:
    """A function of a candidate and a number of calls that gives the seconds a call, the device's work included."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def seconds(run: Candidate, calls: int) -> float:
        wait()
        begun = timer()
        for _ in range(calls):
            run()
        wait()
        return (timer() - begun) / calls

    return seconds


def _ratio(row: Row, other: Row | None) -> float | None:
    if other is None or not row.seconds or not other.seconds:
        return None
    return statistics.median(a / b for a, b in zip(row.seconds, other.seconds, strict=True))


def measure(case: Case, seconds: Stopwatch, *, rounds: int, sample_seconds: float) -> Result:
    """Judge the candidates of ``case``, time with ``seconds`` those that may be timed."""
    rows = _judge(case)
    timed = [row for row in rows if not row.note]
    for row in timed:
        once = seconds(case.candidates[row.candidate], 1)
        row.calls = max(1, math.ceil(sample_seconds / max(once, 1e-9)))
    for turn in range(rounds):
        first = turn % len(timed) if timed else 0
        for row in timed[first:] + timed[:first]:
            row.seconds.append(seconds(case.candidates[row.candidate], row.calls))

    result = Result(case.operator, case.workload, case.direction, case.plain, case.limit, rows)
    for row in timed:
        row.median = statistics.median(row.seconds)
        row.quartiles = _quartiles(row.seconds)
        row.ratio_to_ours = _ratio(row, result.row(OURS))
        row.ratio_to_limit = None if case.limit is None else _ratio(row, result.row(case.limit))
    return result


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
