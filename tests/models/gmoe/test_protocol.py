from dataclasses import replace

import pytest
from toy_domains import dense_net, sparse_net, toy_domains

from moe_kernels.models import files
from moe_kernels.models.gmoe.protocol import (
    Entrant,
    Table,
    collect,
    finished,
    leave_one_out,
    mean_and_error,
    paper_config,
    perform,
)
from moe_kernels.models.gmoe.trainer import StepBatches, TrainConfig

CONFIG = TrainConfig(steps=3, eval_every=2, batch_per_domain=6, learning_rate=1e-2)
ENTRANTS = [Entrant("dense ViT", dense_net, {"experts": 1}), Entrant("GMoE", sparse_net, {"experts": 3})]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("PACS", TrainConfig(learning_rate=3e-5, weight_decay=1e-6, steps=5001, eval_every=300)),
        ("VLCS", TrainConfig(learning_rate=3e-5, weight_decay=1e-6, steps=5001, eval_every=300)),
        ("office_home", TrainConfig(learning_rate=1e-5, weight_decay=1e-6, steps=5001, eval_every=300)),
        ("TerraIncognita", TrainConfig(learning_rate=5e-5, weight_decay=1e-4, steps=5001, eval_every=300)),
        ("DomainNet", TrainConfig(learning_rate=5e-5, weight_decay=0.0, steps=15001, eval_every=500)),
        ("my own", TrainConfig(learning_rate=3e-5, weight_decay=1e-6, steps=5001, eval_every=300)),
    ],
)
def test_the_paper_s_settings(dataset, expected):
    assert paper_config(dataset) == expected
    assert expected.batch_per_domain == 32
    assert (expected.optimizer, expected.schedule, expected.auxiliary_weight) == ("adam", "constant", 0.01)


def test_changes_replace_the_paper_s_settings_and_none_does_not():
    config = paper_config("DomainNet", steps=7, learning_rate=None, trial=2)
    assert config == replace(paper_config("DomainNet"), steps=7, trial=2)


def test_every_domain_is_held_out_in_every_trial_for_every_model(tmp_path):
    runs = list(leave_one_out(ENTRANTS, toy_domains(), CONFIG, tmp_path, trials=(0, 5)))
    assert [(run.config.trial, run.config.held_out, run.entrant.name) for run in runs] == [
        (trial, (domain,), model)
        for trial in (0, 5)
        for domain in ("chalk", "ink", "neon")
        for model in ("dense ViT", "GMoE")
    ]
    assert len({run.folder for run in runs}) == 12
    assert runs[0].folder == tmp_path / "runs" / "dense_ViT" / "chalk" / "trial0"
    assert str(runs[-1]) == "GMoE, neon held out, trial 5"


def test_domains_may_be_chosen_by_any_of_their_names(tmp_path):
    runs = list(leave_one_out(ENTRANTS[:1], toy_domains(), CONFIG, tmp_path, held_out=["NEON"], trials=(0,)))
    assert [run.config.held_out for run in runs] == [("neon",)]
    with pytest.raises(ValueError, match="no domain 'coal'; its domains are 0: chalk, 1: ink, 2: neon"):
        list(leave_one_out(ENTRANTS, toy_domains(), CONFIG, tmp_path, held_out=["coal"]))


def test_models_see_the_same_batches(tmp_path, monkeypatch):
    seen: dict[str, list[list[float]]] = {}
    take = StepBatches.__getitem__

    def spy(self, step):
        images, labels = take(self, step)
        seen[name].append([images.sum().item(), *labels.tolist()])
        return images, labels

    monkeypatch.setattr(StepBatches, "__getitem__", spy)
    for run in leave_one_out(ENTRANTS, toy_domains(), CONFIG, tmp_path, held_out=["ink"], trials=(1,)):
        name = run.entrant.name
        seen[name] = []
        perform(run, toy_domains())
    assert len(seen["dense ViT"]) == 3
    assert seen["dense ViT"] == seen["GMoE"]


def test_results_are_collected_from_the_folder(tmp_path):
    data = toy_domains()
    runs = leave_one_out(ENTRANTS, data, CONFIG, tmp_path, held_out=["neon", "chalk"], trials=(0, 1))
    results = {run.folder: perform(run, data) for run in runs}
    found = finished(tmp_path)
    assert len(found) == len(results) == 8
    assert all(files.read_json(folder / "result.json") == result for folder, result in results.items())
    table = collect(found)
    assert set(table.models) == {"dense ViT", "GMoE"}
    assert table.domains == ("chalk", "neon")
    assert table.dataset == "toy"
    assert len(table.cells) == 8
    for result in found:
        run = result["run"]
        assert table.cells[run["model"], run["held_out"][0], run["trial"]] == result["selected"]["test"]
    assert {result["run"]["experts"] for result in found if result["run"]["model"] == "GMoE"} == {3}


def test_collecting_nothing_or_different_data_is_refused():
    with pytest.raises(ValueError, match="at least one finished run, got none"):
        collect([])
    runs = [{"run": {"data": name}} for name in ("VLCS", "PACS")]
    with pytest.raises(ValueError, match="of one data set, got PACS, VLCS"):
        collect(runs)


def test_arithmetic_of_the_table():
    cells = {
        ("a", "x", 0): 0.5,
        ("a", "x", 1): 0.7,
        ("a", "y", 0): 0.1,
        ("b", "x", 1): 0.6,
        ("b", "y", 0): 0.4,
    }
    table = Table("toy", ("a", "b"), ("x", "y"), cells)
    assert table.values("a", "x") == [0.5, 0.7]
    assert table.values("b", "x") == [0.6]
    # trial 1 lacks a domain
    assert table.averages("a") == [0.3]
    assert table.averages("b") == []
    assert table.paired("a", "b") == pytest.approx([0.1, -0.3])
    assert table.paired("b", "a") == pytest.approx([-0.1, 0.3])


def test_the_error_is_that_of_the_mean():
    assert mean_and_error([0.25]) == (0.25, 0.0)
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3.0
    # population variance (4 + 1 + 9) / 3, over √3
    assert error == pytest.approx((14 / 3) ** 0.5 / 3**0.5)
