"""The paper's claims on made-up numbers: each comes out both ways."""

import operator

import pytest

from moe_kernels.models.transfer import claims
from moe_kernels.models.transfer.protocol import Table


def table(source: str = "dogs", **columns: tuple[float, ...]) -> Table:
    """One target; of each column the accuracies of its seeds."""
    names = {"plain": "Fine-tuning", "base": "L2-SP", "dtnh": "DTNH(L2-SP)"}
    cells = {
        ("indoors", names[key], seed): value for key, values in columns.items() for seed, value in enumerate(values)
    }
    return Table(source, ("indoors",), tuple(names.values()), cells)


HURT = {"plain": (0.80, 0.81), "base": (0.70, 0.71)}


def test_never_hurts():
    saved = claims.never_hurts("text", [table(**HURT, dtnh=(0.80, 0.82))], "l2-sp")
    assert saved.holds is True
    assert saved.text == "text"
    assert "hurts in 1 pairs, DTNH(L2-SP) not in 1 of them" in saved.numbers
    assert "dogs → indoors: Fine-tuning 80.5, L2-SP 70.5, DTNH(L2-SP) 81.0" in saved.numbers

    one_is_not = [table(**HURT, dtnh=(0.80, 0.82)), table("cats", **HURT, dtnh=(0.75, 0.76))]
    lost = claims.never_hurts("text", one_is_not, "l2-sp")
    assert lost.holds is False
    assert "hurts in 2 pairs, DTNH(L2-SP) not in 1 of them" in lost.numbers

    # DTNH below fine-tuning where L2-SP is not is no case of this claim
    fine = table(plain=(0.80, 0.81), base=(0.80, 0.82), dtnh=(0.1, 0.1))
    assert claims.never_hurts("text", [fine], "l2-sp").holds is None


def test_not_below_base():
    above = claims.not_below_base(
        "text", [table(**HURT, dtnh=(0.70, 0.71)), table("cats", **HURT, dtnh=(0.74, 0.75))], ["l2-sp"]
    )
    assert above.holds is True
    assert above.numbers == "not below in 2 of 2 cells; on average +2.00 points, +0.00 to +4.00"

    below = claims.not_below_base(
        "text", [table(**HURT, dtnh=(0.70, 0.70)), table("cats", **HURT, dtnh=(0.74, 0.75))], ["l2-sp"]
    )
    assert below.holds is False
    assert "not below in 1 of 2 cells" in below.numbers
    assert "Below: DTNH(L2-SP), dogs → indoors: -0.50" in below.numbers


def runs(dtnh: bool, *seeds: tuple[float | None, ...], source: str = "dogs", method: str = "l2-sp"):
    """A run for each of ``seeds``, which are the values of "angle" after 10, 20, … steps."""
    return [
        {
            "run": {"source": source, "data": "indoors", "method": method, "dtnh": dtnh, "seed": seed},
            "history": [{"step": 10 * (stage + 1), "angle": value} for stage, value in enumerate(values)],
        }
        for seed, values in enumerate(seeds)
    ]


def test_throughout():
    plain = runs(False, (30.0, 40.0), (32.0, 44.0))
    # below by the means over seeds, not by each seed
    dtnh = runs(True, (31.0, 30.0), (29.0, 30.0))
    holds = claims.throughout("text", plain + dtnh, "l2-sp", "angle", operator.lt, "°")
    assert holds.holds is True
    assert holds.numbers == "on average DTNH(L2-SP) 30°, L2-SP 36.5°"
    assert claims.throughout(
        "text", plain + dtnh, "l2-sp", "angle", lambda ours, theirs: abs(ours - theirs) <= 12
    ).holds
    assert not claims.throughout(
        "text", plain + dtnh, "l2-sp", "angle", lambda ours, theirs: abs(ours - theirs) < 12
    ).holds

    other = runs(False, (30.0, 40.0), source="cats") + runs(True, (20.0, 41.0), source="cats")
    fails = claims.throughout("text", plain + dtnh + other, "l2-sp", "angle", operator.lt, "°")
    assert fails.holds is False
    assert "Not so in cats → indoors: 1 of 2 (after 20 steps)" in fails.numbers
    assert "dogs" not in fails.numbers

    # a stage that was not measured does not count, nor do other methods
    unmeasured = runs(False, (None, 40.0)) + runs(True, (None, 30.0)) + runs(True, (99.0, 99.0), method="know-dist")
    assert claims.throughout("text", unmeasured, "l2-sp", "angle", operator.lt).holds is True


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"runs of L2-SP with and without DTNH, with angle"):
        claims.throughout("text", runs(True, (1.0,), method="know-dist"), "l2-sp", "angle", operator.lt)
    with pytest.raises(ValueError, match="dogs → indoors must be of the same steps with and without DTNH"):
        claims.throughout("text", runs(False, (1.0, 2.0)) + runs(True, (1.0,)), "l2-sp", "angle", operator.lt)


def test_rows():
    found = [claims.Claim("a", True, "1"), claims.Claim("b", False, "2"), claims.Claim("c", None, "3")]
    assert claims.rows(found) == [
        ["claim", "here", "numbers"],
        ["a", "holds", "1"],
        ["b", "does not hold here", "2"],
        ["c", "no such case here", "3"],
    ]
