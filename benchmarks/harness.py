"""How a benchmark is measured.

A case is one operator on one workload in one direction, done by several candidates: ours, its peers, and where there
are any its bare matrix products or copies. Before anything is timed every candidate's result is compared with a float64
computation from the same rounded inputs. A candidate that is further off than ten times plain PyTorch plus one eps gets
no speed; nor does one that is absent or fails, and its row says why.

The candidates are timed in interleaved rounds: each once a round, the order rotated from round to round, so that what
else the machine does, and how warm it is, meets all of them alike, and the probes of the machine's rates too. Ratios
are taken within a round, and the median over rounds is reported. A sample is one call, or as many as fill
``sample_seconds``. A candidate that takes more than ten times as long as ours sits out all but the first rounds. Where
the medians of the first and the second half of the rounds differ by more than a tenth, the row is marked as unsteady.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from moe_kernels.benchmarks.candidates import BOTH, FORWARD, GRADIENT, OURS, Candidate, Outputs, Value
from moe_kernels.benchmarks.limits import Probes, Rates, Work
from moe_kernels.benchmarks.stopwatches import Stopwatch
from moe_kernels.benchmarks.workloads import W, Workload

ERROR_FACTOR = 10.0
SLOW_FACTOR = 10.0
SLOW_ROUNDS = 3
UNSTEADY = 0.1


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
    work: Work
    bare: str | None = None
    """The candidate that does the matrix products, the copies or the step without projection; it has no outputs."""
    restore: Callable[[], object] = lambda: None
    """Gives the tensors that the candidates change the values that they had at first."""


@dataclass(frozen=True)
class Benchmark(Generic[W]):
    """An operator in the registry."""

    build: Callable[[W, str, torch.device], Case]
    suites: Mapping[str, Mapping[str, tuple[W, ...]]]
    """Kind of device → name of the suite → its workloads."""
    quick: tuple[W, ...]
    """Tiny workloads."""
    directions: tuple[str, ...] = (FORWARD, BOTH)
    representatives: bool = False
    """Whether the representative workloads say everything."""
    weigh: str | None = None
    """The direction whose peak memory is measured."""
    gpu_dtype: str = "bfloat16"
    """What is usual on a GPU."""

    def suites_on(self, device: torch.device) -> Mapping[str, tuple[W, ...]]:
        """Name of the suite → its workloads, on this kind of device."""
        return self.suites.get(device.type, self.suites["cpu"])


@dataclass
class Row:
    """What was found out about one candidate; None where there is nothing to tell."""

    candidate: str
    note: str = ""
    """Why there is no speed."""
    remarks: list[str] = field(default_factory=list)
    """What to know about the speed."""
    forward_error: float | None = None
    """Relative Frobenius error against float64, of the worst output."""
    gradient_error: float | None = None
    """The same of the worst gradient."""
    calls: int = 0
    """Calls a sample."""
    rounds: int = 0
    """In how many rounds it takes part, from the first one on."""
    seconds: list[float] = field(default_factory=list)
    """A call, in every round."""
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    unsteady: bool = False
    """Whether the medians of the two halves of the rounds disagree."""
    ratio_to_ours: float | None = None
    ratio_to_bare: float | None = None
    ratio_to_limit: float | None = None
    peak_bytes: int | None = None
    """Peak memory of a call beyond inputs, parameters and gradients."""


@dataclass(frozen=True)
class Result:
    """A measured case."""

    operator: str
    workload: Workload
    direction: str
    plain: str
    bare: str | None
    work: Work
    rates: Rates
    """The medians of what the probes gave."""
    limit_seconds: float
    """The median over the rounds of the least time that the rates of the round allow."""
    rows: list[Row]

    def row(self, candidate: str) -> Row:
        return next(row for row in self.rows if row.candidate == candidate)

    def fastest_peer(self) -> Row | None:
        """The fastest candidate that is neither ours nor the bare one, None where none has a speed."""
        peers = [row for row in self.rows if row.candidate not in (OURS, self.bare) and row.median is not None]
        return min(peers, key=lambda row: row.median or math.inf, default=None)


def _relative_error(value: Value, right: Value) -> float:
    """Of two lists, that of the tensor with the largest."""
    if not isinstance(value, Tensor) and not isinstance(right, Tensor):
        found = [_relative_error(*pair) for pair in zip(value, right, strict=True)]
        return max(found, key=lambda error: math.inf if math.isnan(error) else error)
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


def _reason(error: Exception) -> str:
    """The first line of what an exception says, with its kind where that tells something."""
    line = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, RuntimeError) and line else type(error).__name__
    return ": ".join(filter(None, (kind, line)))


def _judge(case: Case) -> list[Row]:
    """A row for each candidate with its errors, and with a note where it does not run or is out of budget."""
    case.restore()
    right = case.exact()
    eps = torch.finfo(case.workload.torch_dtype).eps
    plain = errors(case.candidates[case.plain](), right)
    rows = []
    for name, run in case.candidates.items():
        row = Row(name)
        rows.append(row)
        case.restore()
        try:
            outputs = run()
        except Exception as error:  # whatever a peer fails by, the table goes on without it
            if name in (OURS, case.plain):
                raise
            absent = isinstance(error, ImportError)
            row.note = f"not installed: {error}" if absent else f"does not run here: {_reason(error)}"
            continue
        found = errors(outputs, right)
        notes = [_verdict(*which, eps) for which in zip(("forward", "gradient"), found, plain, strict=True)]
        row.note = "; ".join(filter(None, notes))
        # JSON has no infinity; the note tells it.
        row.forward_error, row.gradient_error = (None if e is None or math.isinf(e) else e for e in found)
    return rows


def _calibrate(case: Case, rows: list[Row], seconds: Stopwatch, rounds: int, sample_seconds: float) -> list[Row]:
    """Those of ``rows`` that can be timed, with the number of their calls and rounds."""
    once: dict[str, float] = {}
    for row in rows:
        if not row.note:
            try:
                once[row.candidate] = seconds(case.candidates[row.candidate], 1)
            except RuntimeError as error:  # no CUDA graph can hold it
                row.note = f"cannot be timed so: {_reason(error)}"
    timed = [row for row in rows if not row.note]
    for row in timed:
        row.calls, row.rounds = max(1, math.ceil(sample_seconds / max(once[row.candidate], 1e-9))), rounds
        times = once[row.candidate] / once.get(OURS, math.inf)
        if times > SLOW_FACTOR and rounds > SLOW_ROUNDS:
            row.rounds = SLOW_ROUNDS
            row.remarks.append(f"{SLOW_ROUNDS} rounds, since a call takes about {times:.0f} times as long as ours")
    return timed


def disagreement(values: list[float]) -> float:
    """By how much the medians of the first and the second half of ``values`` differ, relative to the smaller."""
    middle = len(values) // 2
    if not middle:
        return 0.0
    low, high = sorted((statistics.median(values[:middle]), statistics.median(values[middle:])))
    return high / low - 1


def _ratio(row: Row, others: list[float]) -> float | None:
    """The median of the ratios within the rounds that both took part in."""
    ratios = [a / b for a, b in zip(row.seconds, others, strict=False)]
    return statistics.median(ratios) if ratios else None


def measure(case: Case, seconds: Stopwatch, probes: Probes, *, rounds: int, sample_seconds: float) -> Result:
    """Judge the candidates of ``case``, time with ``seconds`` those that may be timed."""
    rows = _judge(case)
    timed = _calibrate(case, rows, seconds, rounds, sample_seconds)
    rates: list[Rates] = []
    for turn in range(rounds):
        rates.append(probes.rates(seconds(probes.product, 1), seconds(probes.copy, 1)))
        first = turn % len(timed) if timed else 0
        for row in timed[first:] + timed[:first]:
            if turn < row.rounds:
                row.seconds.append(seconds(case.candidates[row.candidate], row.calls))

    limits = [rate.seconds(case.work) for rate in rates]
    median_rates = Rates(
        *(statistics.median(values) for values in zip(*((r.flops, r.bytes) for r in rates), strict=True))
    )
    limit = statistics.median(limits)
    result = Result(
        case.operator, case.workload, case.direction, case.plain, case.bare, case.work, median_rates, limit, rows
    )
    for row in timed:
        row.median = statistics.median(row.seconds)
        row.quartiles = _quartiles(row.seconds)
        row.ratio_to_ours = _ratio(row, result.row(OURS).seconds)
        row.ratio_to_bare = None if case.bare is None else _ratio(row, result.row(case.bare).seconds)
        row.ratio_to_limit = _ratio(row, limits) if limit else None
        difference = disagreement(row.seconds)
        row.unsteady = difference > UNSTEADY
        if row.unsteady:
            row.remarks.append(f"unsteady: the medians of the halves differ by {difference:.0%}")
    return result


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
