"""The harness on candidates whose results and times are made up."""

import math

import pytest
import torch

from moe_kernels import backend
from moe_kernels.benchmarks import candidates, harness
from moe_kernels.benchmarks.candidates import OURS, Problem
from moe_kernels.benchmarks.harness import Case
from moe_kernels.benchmarks.limits import Probes, Rates, Work
from moe_kernels.benchmarks.workloads import Tokens

WORKLOAD = Tokens(4, 1, "balanced")
EXACT = {"y": torch.ones(100, dtype=torch.float64), "gradient of x": torch.ones(100, dtype=torch.float64)}


def off_by(forward: float, gradient: float = 0.0):
    """A candidate with these relative errors."""
    return lambda: {"y": EXACT["y"] * (1 + forward), "gradient of x": EXACT["gradient of x"] * (1 + gradient)}


def case(bare=None, work=None, restore=lambda: None, **others):
    runs = {OURS: off_by(0), "plain": off_by(0), **others}
    work = work or Work(flops=100, bytes=100)
    return Case(
        "toy", WORKLOAD, candidates.BOTH, runs, lambda: EXACT, plain="plain", work=work, bare=bare, restore=restore
    )


PROBES = Probes(product=lambda: {}, copy=lambda: {}, work=Work(flops=1000, bytes=50))


class Times:
    """A stopwatch that reads off what it is told: a time, or a list of them of which the first is the calibration."""

    def __init__(self, case, **times):
        runs = {**case.candidates, "product": PROBES.product, "copy": PROBES.copy}
        self.times = {runs[name]: iter(t if isinstance(t, list) else [t] * 1000) for name, t in times.items()}
        self.names = {run: name for name, run in case.candidates.items()}
        self.log = []

    def __call__(self, run, calls):
        if run in self.names:
            self.log.append((self.names[run], calls))
        found = next(self.times[run])
        if isinstance(found, Exception):
            raise found
        return found


def measured(case, rounds=3, sample_seconds=0.0, **times):
    times = {name: 1.0 for name in case.candidates} | {"product": 1.0, "copy": 1.0} | times
    stopwatch = Times(case, **times)
    return harness.measure(case, stopwatch, PROBES, rounds=rounds, sample_seconds=sample_seconds), stopwatch.log


def test_ratio_is_the_median_of_the_ratios_within_a_round():
    result, _ = measured(case(peer=off_by(0)), ours=[9.0, 1.0, 2.0, 4.0], peer=[9.0, 2.0, 2.0, 40.0])
    assert result.row("peer").ratio_to_ours == 2.0  # of 2, 1 and 10; the ratio of the medians would be 1
    assert result.row("peer").median == 2.0
    assert result.row(OURS).ratio_to_ours == 1.0


def test_ratio_to_the_bare_one():
    result, _ = measured(case(bare="bare copies", **{"bare copies": lambda: {}}), ours=[9.0, 3.0, 4.0, 6.0],
                         **{"bare copies": [9.0, 2.0, 2.0, 2.0]})  # fmt: skip
    assert result.row(OURS).ratio_to_bare == 2.0
    assert result.row("bare copies").ratio_to_bare == 1.0
    assert result.row("bare copies").forward_error is None
    assert result.row("bare copies").gradient_error is None


def test_nothing_bare_no_ratio_to_it():
    result, _ = measured(case())
    assert result.row(OURS).ratio_to_bare is None


def test_limit_follows_the_rates_of_each_round():
    # The probes do 1000 FLOP and 50 bytes; the case has 100 of each.
    result, _ = measured(case(), ours=[9.0, 1.0, 8.0, 3.0], product=[1.0, 50.0, 1.0], copy=[0.5, 0.5, 1.0])
    assert result.limit_seconds == 2.0  # of 1 (copy), 5 (product) and 2 (copy)
    assert result.row(OURS).ratio_to_limit == 1.5  # of 1, 1.6 and 1.5
    assert result.rates == Rates(flops=1000.0, bytes=100.0)


def test_work_of_nothing_has_no_ratio_to_the_limit():
    result, _ = measured(case(work=Work(0, 0)))
    assert result.row(OURS).ratio_to_limit is None


def test_slow_candidate_sits_out_all_but_the_first_rounds():
    result, log = measured(case(peer=off_by(0)), rounds=5, ours=[1.0, 1.0, 2.0, 4.0, 4.0, 4.0], peer=11.0)
    row = result.row("peer")
    assert len(row.seconds) == harness.SLOW_ROUNDS
    assert row.remarks == ["3 rounds, since a call takes about 11 times as long as ours"]
    assert row.ratio_to_ours == 5.5  # of 11, 5.5 and 2.75
    assert len(result.row(OURS).seconds) == 5
    assert [name for name, _ in log].count("peer") == 1 + harness.SLOW_ROUNDS


def test_ten_times_is_not_slow():
    result, _ = measured(case(peer=off_by(0)), rounds=5, peer=10.0)
    assert len(result.row("peer").seconds) == 5
    assert result.row("peer").remarks == []


def test_medians_of_the_halves_that_disagree_are_marked():
    result, _ = measured(case(), rounds=5, ours=[9.0, 1.0, 1.0, 1.2, 1.2, 1.2], plain=[9.0, 1.0, 9.0, 1.0, 9.0, 5.4])
    assert result.row(OURS).unsteady
    assert result.row(OURS).remarks == ["unsteady: the medians of the halves differ by 20%"]
    assert not result.row("plain").unsteady
    assert harness.disagreement([1.0]) == 0.0
    assert harness.disagreement([2.0, 1.0]) == 1.0


def test_candidate_that_the_stopwatch_refuses_says_so():
    failure = RuntimeError("stream is capturing\nmore")
    result, _ = measured(case(peer=off_by(0)), peer=[failure])
    assert result.row("peer").note == "cannot be timed so: stream is capturing"
    assert result.row("peer").median is None
    result, _ = measured(case(), ours=[failure])
    assert result.row(OURS).note
    assert result.row("plain").median == 1.0


def test_every_candidate_once_a_round_in_rotated_order():
    _, log = measured(case(peer=off_by(0)), rounds=4)
    names = [name for name, _ in log]
    assert names[:3] == [OURS, "plain", "peer"]  # calibration
    assert [names[i : i + 3] for i in range(3, len(names), 3)] == [
        [OURS, "plain", "peer"],
        ["plain", "peer", OURS],
        ["peer", OURS, "plain"],
        [OURS, "plain", "peer"],
    ]


def test_short_calls_are_repeated_until_the_sample_is_filled():
    _, log = measured(case(), rounds=1, sample_seconds=1.0, ours=0.3, plain=2.0)
    assert log == [(OURS, 1), ("plain", 1), (OURS, 4), ("plain", 1)]


def test_quartiles():
    result, _ = measured(case(), rounds=5, ours=[9.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    assert result.row(OURS).quartiles == (2.0, 4.0)
    assert result.row(OURS).seconds == [5.0, 1.0, 4.0, 2.0, 3.0]


def test_one_round_is_its_own_quartiles():
    result, _ = measured(case(), rounds=1)
    assert result.row(OURS).quartiles == (1.0, 1.0)


@pytest.mark.parametrize(
    ("candidate", "kind"),
    [
        (off_by(1e-3), "forward"),
        (off_by(0, 1e-3), "gradient"),
        (off_by(math.nan), "forward"),
        (off_by(0, math.inf), "gradient"),
    ],
)
def test_inaccurate_candidate_has_no_speed(candidate, kind):
    result, log = measured(case(peer=candidate))
    row = result.row("peer")
    assert row.note.startswith(f"{kind} error")
    assert "out of the budget of 1.2e-07" in row.note
    assert row.seconds == []
    assert {row.median, row.quartiles, row.ratio_to_ours, row.ratio_to_bare, row.ratio_to_limit} == {None}
    assert "peer" not in {name for name, _ in log}
    assert result.fastest_peer().candidate == "plain"


def test_ours_is_judged_like_anyone():
    result, _ = measured(case(peer=off_by(0), ours=off_by(1e-3)))
    assert "forward error 1.0e-03" in result.row(OURS).note
    assert result.row(OURS).median is None
    assert result.row("peer").median == 1.0
    assert result.row("peer").ratio_to_ours is None


def test_budget_is_ten_times_the_error_of_plain():
    result, _ = measured(case(plain=off_by(1e-3), near=off_by(9e-3), far=off_by(11e-3)))
    assert result.row("near").note == ""
    assert result.row("near").forward_error == pytest.approx(9e-3)
    assert "1.1e-02 is out of the budget of 1.0e-02" in result.row("far").note


def test_plain_that_is_not_finite_excuses_nobody():
    result, _ = measured(case(plain=off_by(math.nan), peer=off_by(1e-3)))
    assert result.row("plain").note
    assert result.row("peer").note
    assert result.row(OURS).note == ""
    assert result.fastest_peer() is None


def test_tensors_that_candidates_change_are_put_back_before_each_is_judged():
    total = torch.zeros(100, dtype=torch.float64)

    def adding():
        return {"y": total.add_(1)}

    result, _ = measured(case(ours=adding, plain=adding, restore=total.zero_))
    assert [row.forward_error for row in result.rows] == [0.0, 0.0]


def test_error_of_a_list_is_that_of_the_worst_tensor():
    right = {"w": [torch.tensor([1000.0]), torch.tensor([1.0, 2.0]), torch.zeros(())]}
    assert harness.errors({"w": [torch.tensor([1001.0]), torch.tensor([1.0, 2.0]), torch.zeros(())]}, right)[0] == 1e-3
    nan = {"w": [torch.tensor([math.nan]), torch.tensor([9.0, 2.0]), torch.zeros(())]}
    assert math.isinf(harness.errors(nan, right)[0])
    with pytest.raises(ValueError, match="longer"):
        harness.errors({"w": right["w"][:2]}, right)


def raising(error):
    def run():
        raise error

    return run


def test_peer_that_does_not_run_says_why():
    result, log = measured(case(peer=raising(RuntimeError("only bfloat16\nsecond line"))))
    assert result.row("peer").note == "does not run here: only bfloat16"
    assert "peer" not in {name for name, _ in log}


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ModuleNotFoundError("No module named 'x'"), "not installed: No module named 'x'"),
        (AssertionError("E % 4"), "does not run here: AssertionError: E % 4"),
        (AssertionError(), "does not run here: AssertionError"),
        (torch.OutOfMemoryError("out of memory"), "does not run here: out of memory"),
        (NotImplementedError(), "does not run here: NotImplementedError"),
    ],
)
def test_however_a_peer_fails_its_row_says_so(error, note):
    result, _ = measured(case(peer=raising(error)))
    assert result.row("peer").note == note
    assert result.row(OURS).median == 1.0


@pytest.mark.parametrize("name", [OURS, "plain"])
def test_ours_and_plain_must_run(name):
    with pytest.raises(RuntimeError, match="broken"):
        measured(case(**{name: raising(RuntimeError("broken"))}))


def test_result_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(100,\)"):
        measured(case(peer=lambda: {"y": torch.ones(1)}))


def test_errors_are_relative_and_of_the_worst():
    right = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0]), "gradient of x": torch.zeros(2, 2)}
    outputs = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([101.0]), "gradient of x": [torch.zeros(2)] * 2}
    forward, gradient = harness.errors(outputs, right)
    assert forward == pytest.approx(0.2)
    assert gradient == 0.0
    assert harness.errors({}, right) == (None, None)


def scaled(x, w, *, power):
    return {"y": (x**power) * (torch.stack(w) if isinstance(w, list) else w), "power": torch.tensor(power)}


LEAVES = {"x": torch.tensor([2.0, 3.0]), "w": torch.tensor([5.0, 7.0])}


def test_candidate_has_outputs_and_gradients():
    problem = Problem({name: leaf.clone() for name, leaf in LEAVES.items()}, torch.tensor([1.0, 10.0]), {"power": 2})
    result = problem.candidate(scaled)()
    assert result["y"].tolist() == [20.0, 63.0]
    assert result["power"].item() == 2
    assert result["gradient of x"].tolist() == [20.0, 420.0]
    assert result["gradient of w"].tolist() == [4.0, 90.0]
    assert not result["y"].requires_grad


def test_candidate_with_a_leaf_for_each_expert():
    problem = Problem({name: leaf.clone() for name, leaf in LEAVES.items()}, torch.tensor([1.0, 10.0]), {"power": 2})
    apart = {"x": problem.leaves["x"], "w": [part.detach().requires_grad_() for part in problem.leaves["w"]]}
    result = problem.candidate(scaled, apart)()
    assert [part.item() for part in result["gradient of w"]] == [4.0, 90.0]
    assert harness.errors(result, problem.exact(scaled)()) == (0.0, 0.0)


def test_forward_candidate_records_no_gradient():
    seen = []

    def function(x):
        seen.append(torch.is_grad_enabled())
        return {"y": x * 2}

    result = Problem({"x": torch.ones(3)}).candidate(function)()
    assert seen == [False]
    assert set(result) == {"y"}


def test_exact_is_float64_on_the_reference():
    seen = []

    def function(x):
        seen.append((x.dtype, backend.choose("routing", "cpu")))
        return {"y": x * 2}

    result = Problem({"x": torch.ones(3)}, torch.ones(3)).exact(function)()
    assert seen == [(torch.float64, "reference")]
    assert result["gradient of x"].dtype == torch.float64


def test_bare_products_write_where_they_are_told():
    left, right, out = torch.rand(3, 4), torch.rand(4, 5), torch.empty(3, 5)
    assert candidates.bare_products([(left, right, out)])() == {}
    torch.testing.assert_close(out, left @ right)
