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


def test_the_grid_is_around_the_methods_own_coefficient():
    assert grid("l2-sp") == (0.0005, 0.005, 0.05, 0.5)


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
        "mean": 0.5,
        "standard_deviation": 0.0,
        "negative_transfer": True,
        "best": False,
    }
    files.json.dumps(found, allow_nan=False)
