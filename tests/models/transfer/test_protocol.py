from dataclasses import replace

import pytest
from toy_transfer import pretrained, toy_target

from moe_kernels.models import files
from moe_kernels.models.transfer import protocol, tables
from moe_kernels.models.transfer.configuration import METHODS, FineTuneConfig
from moe_kernels.models.transfer.protocol import (
    COLUMNS,
    Pair,
    Table,
    collect,
    cross_validate,
    folds,
    grid,
    label,
    repeats,
)
from moe_kernels.models.transfer.regularizers import AttentionTransfer
from moe_kernels.models.transfer.trainer import Diverged

CONFIG = FineTuneConfig("l2-sp", steps=3, batch=6, eval_every=2)


@pytest.fixture
def pair():
    return Pair("noise", pretrained, toy_target(12), {"model": "toy"})


def result(column=("fine-tuning", False), accuracy=0.5, seed=0, data="t", source="s", coefficient=0.1):
    run = {
        "source": source,
        "data": data,
        "method": column[0],
        "dtnh": column[1],
        "seed": seed,
        "coefficient": coefficient,
    }
    return {"run": run, "final": {"test_accuracy": accuracy}}


def test_the_columns_are_the_papers():
    assert COLUMNS == ("Fine-tuning", "L2-SP", "DTNH(L2-SP)", "KnowDist", "DTNH(KnowDist)")
    assert set(protocol.LABELS) == set(METHODS)
    assert label("delta", True) == "DTNH(DELTA)"


def test_repeats_have_other_seeds_and_their_own_folders(pair, tmp_path):
    runs = repeats(pair, CONFIG, tmp_path, 3)
    assert [run.config.seed for run in runs] == [0, 1, 2]
    assert [run.folder for run in runs] == [
        tmp_path / "runs" / "noise" / "toy" / "L2-SP" / f"seed{i}" for i in range(3)
    ]
    assert str(runs[1]) == "L2-SP, noise → toy, seed 1"
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        repeats(pair, CONFIG, tmp_path, 0)


def test_runs_are_done_once_and_found_again(pair, tmp_path):
    done = [protocol.perform(run) for run in repeats(pair, CONFIG, tmp_path, 2)]
    assert protocol.finished(tmp_path) == done
    assert (done[0]["run"]["source"], done[0]["run"]["model"]) == ("noise", "toy")
    assert [run["final"] for run in done[:1]] != [run["final"] for run in done[1:]]
    (table,) = collect(protocol.finished(tmp_path))
    assert table.values("toy", "L2-SP") == [one["final"]["test_accuracy"] for one in done]


def test_unlike_runs_are_refused_before_they_are_trained(pair, tmp_path):
    other = replace(pair, data=toy_target(15))
    for run in repeats(pair, CONFIG, tmp_path, 1):
        protocol.perform(run)
    # the columns of a row
    plain = FineTuneConfig(steps=5, batch=6, eval_every=2)
    with pytest.raises(ValueError, match=r"L2-SP and Fine-tuning, noise → toy, are not:\n  steps: 3 there, 5 here\n"):
        repeats(pair, plain, tmp_path, 1)
    assert len(repeats(pair, replace(plain, steps=3), tmp_path, 1)) == 1
    with pytest.raises(ValueError, match=r"(?s)model: 'toy' there, 'boy' here"):
        repeats(replace(pair, description={"model": "boy"}), replace(plain, steps=3), tmp_path, 1)
    # the seeds of a cell: another split, another coefficient
    seed1 = replace(CONFIG, seed=1)
    for asked in (lambda: repeats(other, seed1, tmp_path, 1), lambda: folds(other, seed1, tmp_path, [0.5], 3)):
        with pytest.raises(ValueError, match=r"(?s)of L2-SP, noise → toy, are not:.*target\.train: 12 there, 15 here"):
            asked()
    with pytest.raises(ValueError, match=r"are not:\n  coefficient: 0.05 there, 0.5 here\n"):
        repeats(pair, replace(seed1, coefficient=0.5), tmp_path, 1)
    with pytest.raises(ValueError, match=r"coefficients: expected 0.05 among them, .*of L2-SP in .*, got 0.5, 1;"):
        folds(pair, CONFIG, tmp_path, [0.5, 1.0], 3)
    # what does not matter: how often one looks, the coefficient of another column, another target
    assert repeats(pair, replace(seed1, eval_every=1, measure=True), tmp_path, 1)
    assert repeats(pair, replace(seed1, dtnh=True, coefficient=0.5, head_decay=0.0), tmp_path, 1)
    assert folds(pair, CONFIG, tmp_path, [0.05, 0.5], 3)
    assert repeats(replace(pair, data=toy_target(15, "more")), plain, tmp_path, 1)


def test_unlike_results_are_in_no_table():
    results = [result(), result(("l2-sp", False))]
    results[0]["run"]["steps"], results[1]["run"]["steps"] = 2, 5
    with pytest.raises(ValueError, match="must be alike, those of Fine-tuning and L2-SP, s → t, are not"):
        collect(results)
    with pytest.raises(ValueError, match=r"coefficient: 0\.1 there, 0\.2 here"):
        collect([result(("l2-sp", False)), result(("l2-sp", False), seed=1, coefficient=0.2)])


def test_a_file_that_is_no_result_is_named(pair, tmp_path):
    path = tmp_path / "runs" / "noise" / "toy" / "L2-SP" / "seed0" / "result.json"
    for content in ({}, [], {"run": {}}, {"run": {}, "history": [], "final": None}):
        files.write_json(path, content)
        with pytest.raises(ValueError, match=r"seed0/result\.json holds no result of a run"):
            protocol.finished(tmp_path)


def test_a_diverged_run_is_marked_and_the_others_stay(pair, tmp_path):
    """Of two seeds one, then both: no mean, not the best, and nothing to average."""
    good, bad = result(("l2-sp", False), 0.75), result(("l2-sp", False), seed=1)
    bad["final"] = None
    (found,) = collect([result(accuracy=0.5), result(accuracy=0.5, seed=1), good, bad])
    assert (found.values("t", "L2-SP"), found.diverged("t", "L2-SP")) == ([0.75], 1)
    assert tables.rows(found)[1] == ["t", "**50.00 ± 0.00**", "75.00, 1 of 2 diverged"]
    assert tables.to_json(found)["accuracy"]["t"]["L2-SP"]["diverged"] == 1
    (lost,) = collect([bad])
    assert tables.rows(lost)[1] == ["t", "diverged"]
    assert tables.to_json(lost)["accuracy"]["t"]["L2-SP"]["mean"] is None

    run, _ = repeats(pair, replace(CONFIG, learning_rate=1e30), tmp_path, 2)
    with pytest.raises(Diverged):
        protocol.perform(run)
    (kept,) = protocol.finished(tmp_path)
    assert kept["final"] is None


def test_a_regularizer_object_has_a_column_of_its_own_name(pair, tmp_path):
    class Own(AttentionTransfer):
        name = "own"

    config = replace(CONFIG, method=Own(0.5))
    (run,) = repeats(pair, config, tmp_path, 1)
    assert run.folder == tmp_path / "runs" / "noise" / "toy" / "own" / "seed0"
    tried = [fold.config.initial_coefficient for fold in folds(pair, config, tmp_path, count=2)]
    assert tried[::2] == [0.005, 0.05, 0.5, 5.0]
    (table,) = collect([result(("own", True)), result(("own", False)), result(("l2", False))])
    assert table.columns == ("L2", "own", "DTNH(own)")


def test_coefficients_that_are_nearly_equal_have_their_own_folders(pair, tmp_path):
    runs = folds(pair, CONFIG, tmp_path, [0.1234567, 0.12345671, 100, 2e-4], 2)
    names = [run.folder.parent.name for run in runs[::2]]
    assert names == ["0.1234567", "0.12345671", "100", "0.0002"]


def test_the_grid_is_around_the_methods_own_coefficient():
    assert grid(0.05) == (0.0005, 0.005, 0.05, 0.5)


def test_folds_train_on_the_rest_and_never_see_the_test_images(pair, tmp_path):
    runs = folds(pair, CONFIG, tmp_path, [0.1, 1.0], 3)
    assert [(run.config.coefficient, len(run.pair.data.train), len(run.pair.data.test)) for run in runs] == [
        (coefficient, 8, 4) for coefficient in (0.1, 1.0) for _ in range(3)
    ]
    assert len({run.folder for run in runs}) == 6
    first = protocol.perform(runs[0])
    assert first["run"]["fold"] == [0, 3]
    assert not protocol.finished(tmp_path)
    whole = {float(image.sum()) for image, _ in (pair.data.test[i] for i in range(12))}
    seen = {float(image.sum()) for image, _ in (runs[0].pair.data.test[i] for i in range(4))}
    assert not whole & seen


def test_cross_validation_takes_the_best_mean_and_the_smallest_of_equals(pair, tmp_path):
    runs = folds(pair, CONFIG, tmp_path, [1.0, 0.1, 0.01], 2)
    accuracies = {1.0: [0.75, 0.75], 0.1: [1.0, 0.5], 0.01: [0.25, 1.0]}
    drawn = {coefficient: iter(values) for coefficient, values in accuracies.items()}
    assert cross_validate(runs, lambda run: result(accuracy=next(drawn[run.config.coefficient]))) == 0.1


def test_a_coefficient_that_diverges_is_not_chosen(pair, tmp_path):
    runs = folds(pair, CONFIG, tmp_path, [0.01, 100.0], 2)

    def do(run):
        if run.config.coefficient == 100 and run.folder.name.startswith("fold1"):
            raise Diverged("the loss is not finite")
        return result(accuracy=0.4 if run.config.coefficient == 0.01 else 1.0)

    assert cross_validate(runs, do) == 0.01
    with pytest.raises(Diverged, match="with any of the coefficients 100; smaller ones may help"):
        cross_validate([run for run in runs if run.config.coefficient == 100], do)


def test_what_cannot_be_cross_validated_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="method 'fine-tuning' has no coefficient"):
        folds(pair, FineTuneConfig(), tmp_path)
    for coefficients in ([], [0.1, 0.1]):
        with pytest.raises(ValueError, match="coefficients must be different, at least one"):
            folds(pair, CONFIG, tmp_path, coefficients)


def test_tables_are_one_a_source_with_columns_in_the_papers_order():
    results = [
        result(("know-dist", True), 0.9, source="b"),
        result(("l2-sp", True), 0.8, data="u"),
        result(("l2-sp", False), 0.7),
        result(("fine-tuning", False), 0.6),
    ]
    two, one = collect(results)
    assert (two.source, two.targets, two.columns) == ("b", ("t",), ("DTNH(KnowDist)",))
    assert (one.source, one.targets, one.columns) == ("s", ("u", "t"), ("Fine-tuning", "L2-SP", "DTNH(L2-SP)"))


def table(**columns: list[float]) -> Table:
    names = {"ft": "Fine-tuning", "sp": "L2-SP", "dtnh": "DTNH(L2-SP)"}
    cells = {("t", names[name], seed): value for name, values in columns.items() for seed, value in enumerate(values)}
    return Table("s", ("t",), tuple(names[name] for name in columns), cells)


def test_negative_transfer_is_below_fine_tuning_by_more_than_the_error_of_the_difference():
    # variances 0.0002 each: the error of the difference of two means of two is √(0.0001 + 0.0001) = 0.0141
    fine_tuning = [0.69, 0.71]
    assert not table(ft=fine_tuning, sp=[0.68, 0.70]).negative("t", "L2-SP")
    assert not table(ft=fine_tuning, sp=[0.676, 0.696]).negative("t", "L2-SP")
    assert table(ft=fine_tuning, sp=[0.675, 0.695]).negative("t", "L2-SP")
    assert not table(ft=fine_tuning, sp=[0.8, 0.9]).negative("t", "L2-SP")
    assert not table(ft=fine_tuning, sp=[0.1]).negative("t", "L2-SP")
    assert not table(ft=fine_tuning).negative("t", "Fine-tuning")


def test_rows_have_means_deviations_and_marks():
    rows = tables.rows(table(ft=[0.69, 0.71], sp=[0.5, 0.5], dtnh=[0.8]))
    assert rows == [
        ["target", "Fine-tuning", "L2-SP", "DTNH(L2-SP)"],
        ["t", "70.00 ± 1.41", "50.00 ± 0.00 ▼", "**80.00**"],
    ]
    assert tables.rows(Table("s", ("t",), ("L2-SP",), {}))[1] == ["t", "–"]
    assert tables.rows(table(ft=[0.5, 0.7], sp=[0.6]))[1] == ["t", "**60.00 ± 14.14**", "**60.00**"]


def test_the_table_for_machines():
    found = tables.to_json(table(ft=[0.69, 0.71], sp=[0.5, 0.5]))
    assert found["source"] == "s"
    assert found["accuracy"]["t"]["L2-SP"] == {
        "repeats": [0.5, 0.5],
        "diverged": 0,
        "mean": 0.5,
        "standard_deviation": 0.0,
        "negative_transfer": True,
        "best": False,
    }
    files.json.dumps(found, allow_nan=False)
