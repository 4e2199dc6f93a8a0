import json

import pytest

from moe_kernels.models.gmoe import tables
from moe_kernels.models.gmoe.protocol import Table

CELLS = {("a", "x", 0): 0.5, ("a", "x", 1): 0.7, ("a", "y", 0): 0.25, ("a", "y", 1): 0.35, ("b", "x", 0): 0.125}
TABLE = Table("toy", ("a", "b"), ("x", "y"), CELLS)


def test_accuracies_are_percent_with_the_error_of_the_mean():
    assert tables.accuracy_rows(TABLE) == [
        ["model", "x", "y", "average"],
        ["a", "60.0 ± 7.1", "30.0 ± 3.5", "45.0 ± 5.3"],
        ["b", "12.5", "–", "–"],
    ]


def test_every_trial_has_its_row():
    assert tables.trial_rows(TABLE) == [
        ["model", "trial", "x", "y"],
        ["a", "0", "50.0", "25.0"],
        ["a", "1", "70.0", "35.0"],
        ["b", "0", "12.5", "–"],
        ["b", "1", "–", "–"],
    ]


def test_the_comparison_says_the_same_from_both_sides():
    cells = {(model, domain, 0): value for domain, pair in {"x": (0.5, 0.6), "y": (0.3, 0.3), "z": (0.4, 0.6)}.items()
             for model, value in zip("ab", pair, strict=True)}  # fmt: skip
    table = Table("toy", ("a", "b"), ("x", "y", "z"), cells)
    one, other = tables.comparison(table, "a", "b"), tables.comparison(table, "b", "a")
    assert one == (
        "a minus b, paired by held-out domain and trial: -10.0 ± 4.7 points over 3 pairs; "
        "a is ahead in 0, b in 2, equal in 1. The difference is at least two standard errors from zero."
    )
    assert other == (
        "b minus a, paired by held-out domain and trial: +10.0 ± 4.7 points over 3 pairs; "
        "b is ahead in 2, a in 0, equal in 1. The difference is at least two standard errors from zero."
    )


def test_a_difference_within_the_noise_is_called_that():
    cells = {("a", "x", 0): 0.5, ("b", "x", 0): 0.6, ("a", "x", 1): 0.6, ("b", "x", 1): 0.5}
    assert tables.comparison(Table("toy", ("a", "b"), ("x",), cells), "a", "b").endswith(
        "The difference is less than two standard errors from zero."
    )
    assert "no counterpart" not in tables.comparison(TABLE, "a", "b")
    assert tables.comparison(Table("toy", ("a",), ("x",), {("a", "x", 0): 1.0}), "a", "b") == (
        "No run of a has a counterpart of b yet."
    )


def test_the_table_for_machines_keeps_every_bit():
    found = json.loads(json.dumps(tables.table_json(TABLE)))
    assert found["dataset"] == "toy"
    assert found["accuracy"]["a"]["x"]["trials"] == [0.5, 0.7]
    assert found["accuracy"]["a"]["x"]["mean"] == pytest.approx(0.6)
    assert found["accuracy"]["a"]["average"]["trials"] == pytest.approx([0.375, 0.525])
    assert found["accuracy"]["b"]["y"] is None
    assert found["accuracy"]["b"]["average"] is None
