import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy_domains import NAMES, ToyNet, dense_net, sparse_net, toy_domains, train_dense_as_rank

from moe_kernels.models import distributed, files, runs
from moe_kernels.models.data.splits import split
from moe_kernels.models.evaluation import accuracy
from moe_kernels.models.gmoe import trainer
from moe_kernels.models.gmoe.trainer import SELECTED, StepBatches, TrainConfig, train
from moe_kernels.models.runs import CHECKPOINT, RESULT

CONFIG = TrainConfig(
    held_out=("neon",),
    steps=12,
    eval_every=5,
    batch_per_domain=8,
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
)


class Interrupted(Exception):
    pass


def interrupt_after(last: int):
    def on_step(step: int) -> None:
        if step == last:
            raise Interrupted

    return on_step


def test_it_learns_and_reports_what_it_did(tmp_path):
    config = replace(CONFIG, steps=60, eval_every=20, learning_rate=3e-2)
    steps = []
    result = train(dense_net, toy_domains(), config, tmp_path, description={"model": "net"}, on_step=steps.append)
    history = result["history"]
    assert [entry["step"] for entry in history] == [0, 20, 40, 59]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["validation"] > 0.9
    assert result["selected"] == max(history, key=lambda entry: entry["validation"])
    assert set(history[0]["accuracy"]["neon"]) == {"in", "out"}
    assert set(history[0]["accuracy"]["chalk"]) == {"out"}
    for entry in history:
        parts = entry["accuracy"]
        assert entry["validation"] == (parts["chalk"]["out"] + parts["ink"]["out"]) / 2
        assert entry["test"] == parts["neon"]["in"]
        assert entry["auxiliary"] == 0
    assert result["run"]["model"] == "net"
    assert result["run"]["images"] == dict.fromkeys(NAMES, 30)
    assert steps == [*range(61), 60]
    assert files.read_json(tmp_path / RESULT) == result
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_selected_weights_have_the_accuracies_that_are_reported(tmp_path):
    data = toy_domains()
    result = train(sparse_net, data, CONFIG, tmp_path)
    saved = files.read_torch(tmp_path / SELECTED)
    assert saved["step"] == result["selected"]["step"]
    assert saved["run"] == result["run"]
    model = sparse_net()
    model.load_state_dict(saved["model"])
    kept, out = split(30, CONFIG.trial, 2)
    assert accuracy(model, data.evaluation[2], kept) == result["selected"]["accuracy"]["neon"]["in"]
    assert accuracy(model, data.evaluation[2], out) == result["selected"]["accuracy"]["neon"]["out"]


def test_the_earliest_of_equal_validation_accuracies_is_selected(tmp_path, monkeypatch):
    validation = iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(
        trainer._Training, "_accuracies", lambda self: {"accuracy": {}, "validation": next(validation), "test": 0.0}
    )
    result = train(dense_net, toy_domains(), CONFIG, tmp_path)
    assert result["selected"]["step"] == 5
    assert files.read_torch(tmp_path / SELECTED)["step"] == 5


def test_the_first_step_is_cross_entropy_plus_a_hundredth_of_the_auxiliary_loss(tmp_path):
    config = replace(CONFIG, steps=1, optimizer="adamw", learning_rate=0.0)
    data, seen = toy_domains(), []

    class Spy(ToyNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((images, torch.get_rng_state(), self.training))
            return super().forward(images)

    def build() -> nn.Module:
        net = sparse_net()
        net.__class__ = Spy
        return net

    result = train(build, data, config, tmp_path)
    images, state, training = seen[0]
    assert training
    assert len(images) == 16
    assert not any(training for *_, training in seen[1:])

    torch.manual_seed(trainer._seed(data, config))
    net = sparse_net()
    torch.set_rng_state(state)
    logits = net(images)
    labels = StepBatches(
        [(data.train[i], np.array(split(30, 0, i)[0])) for i in (0, 1)], 8, 1, trainer._seed(data, config)
    )[0][1]
    (entry,) = result["history"]
    assert entry["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)
    assert entry["auxiliary"] == pytest.approx(trainer.auxiliary_loss(net).item(), rel=1e-6)
    assert entry["auxiliary"] > 0


def test_the_auxiliary_loss_is_weighed_into_the_gradient(tmp_path):
    def log_scale(weight: float) -> float:
        config = replace(CONFIG, steps=1, optimizer="adamw", weight_decay=0.0, auxiliary_weight=weight)
        train(sparse_net, toy_domains(), config, tmp_path / str(weight))
        return files.read_torch(tmp_path / str(weight) / SELECTED)["model"]["layer.router.expert_embedding"]

    assert not torch.equal(log_scale(0.0), log_scale(10.0))


@pytest.mark.parametrize("steps_before", [[1], [6], [11], [2, 3, 9], [12]])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, steps_before):
    whole = train(sparse_net, toy_domains(), CONFIG, tmp_path / "whole")
    for last in steps_before:
        with pytest.raises(Interrupted):
            # a share of 1e9 lets it write after every step
            train(
                sparse_net,
                toy_domains(),
                CONFIG,
                tmp_path / "parts",
                checkpoint_share=1e9,
                on_step=interrupt_after(last),
            )
        assert (tmp_path / "parts" / CHECKPOINT).exists()
    reached = []
    resumed = train(sparse_net, toy_domains(), CONFIG, tmp_path / "parts", on_step=reached.append)
    assert reached[0] == min(steps_before[-1], CONFIG.steps - 1)
    assert resumed == whole
    assert (tmp_path / "parts" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    one, other = (files.read_torch(tmp_path / name / SELECTED)["model"] for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    first = train(dense_net, toy_domains(), CONFIG, tmp_path)

    def build() -> nn.Module:
        raise AssertionError("built again")

    assert train(build, toy_domains(), CONFIG, tmp_path) == first


def test_the_numbers_are_those_of_the_configuration(tmp_path):
    def losses(name: str, **changes: Any) -> list[float]:
        data = toy_domains()
        return [
            entry["loss"] for entry in train(sparse_net, data, replace(CONFIG, **changes), tmp_path / name)["history"]
        ]

    torch.manual_seed(99)
    first = losses("a")
    torch.manual_seed(3)
    assert losses("b") == first
    assert losses("c", trial=1) != first
    assert losses("d", held_out=("ink",)) != first


def test_loader_workers_change_nothing(tmp_path):
    one = train(sparse_net, toy_domains(), CONFIG, tmp_path / "a", workers=0)
    assert train(sparse_net, toy_domains(), CONFIG, tmp_path / "b", workers=2) == one


def test_the_caller_keeps_its_random_numbers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(sparse_net, toy_domains(), CONFIG, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    data = toy_domains()
    with pytest.raises(Interrupted):
        train(dense_net, data, CONFIG, tmp_path, description={"model": "a"}, on_step=interrupt_after(3))
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another configuration") as error:
        train(dense_net, data, replace(CONFIG, steps=13, held_out=("ink",)), tmp_path, description={"weights": "b"})
    lines = str(error.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == [
        "held_out: ['neon'] there, ['ink'] here",
        "model: 'a' there, nothing here",
        "steps: 12 there, 13 here",
        "weights: nothing there, 'b' here",
    ]
    train(dense_net, data, CONFIG, tmp_path, description={"model": "a"})
    with pytest.raises(ValueError, match=r"(?s)result\.json is of another configuration.*trial: 0 there, 1 here"):
        train(dense_net, data, replace(CONFIG, trial=1), tmp_path, description={"model": "a"})


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (("coal",), "toy has no domain 'coal'; its domains are 0: chalk, 1: ink, 2: neon"),
        (("ink", "Ink"), "held_out must not name a domain twice, got ink, ink"),
        (NAMES, "held_out must leave a domain to train on, got all of chalk, ink, neon"),
    ],
)
def test_bad_domains_are_refused(tmp_path, held_out, message):
    with pytest.raises(ValueError, match=message):
        train(dense_net, toy_domains(), replace(CONFIG, held_out=held_out), tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_per_domain", -1),
        ("eval_every", 0),
        ("learning_rate", math.inf),
        ("weight_decay", -1e-3),
        ("holdout", 1.0),
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("precision", "float16"),
    ],
)
def test_a_bad_configuration_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*, got {value!r}"):
        TrainConfig(**{field: value})


def test_a_domain_that_is_too_small_to_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="domain chalk has 3 images, too few to split off 20%"):
        train(dense_net, toy_domains(3), CONFIG, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="the loss is not finite by step 5"):
        train(
            dense_net, toy_domains(), replace(CONFIG, learning_rate=1e38, schedule="constant", warmup_steps=0), tmp_path
        )


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, schedule="cosine")
    assert [config.learning_rate_at(step) for step in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert config.learning_rate_at(60) == pytest.approx(1.0)
    assert 0 < config.learning_rate_at(109) < 0.01
    assert {TrainConfig().learning_rate_at(step) for step in (0, 1, 5000)} == {3e-5}


def test_checkpoints_take_their_share_of_the_time_and_no_more(tmp_path, monkeypatch):
    clock, spent = [0.0], []
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    update, write = trainer._Training.update, files.write_torch

    def slow_update(self: Any, *args: Any) -> None:
        clock[0] += 1
        update(self, *args)

    def slow_write(path: Path, content: Any) -> None:
        if path.name == CHECKPOINT:
            clock[0] += 0.5
            spent.append(0.5)
        write(path, content)

    monkeypatch.setattr(trainer._Training, "update", slow_update)
    monkeypatch.setattr(files, "write_torch", slow_write)
    train(dense_net, toy_domains(), replace(CONFIG, steps=200, eval_every=100), tmp_path, checkpoint_share=0.02)
    # one at the start, then one every 25 seconds
    assert len(spent) == 8
    assert sum(spent[1:]) <= 0.02 * clock[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_batch_of_a_step(monkeypatch, world):
    data = toy_domains()
    parts = [(part, np.arange(3, 30)) for part in data.train]
    whole_images, whole_labels = StepBatches(parts, 8, 5, seed=3)[4]
    monkeypatch.setattr(distributed, "world", lambda: world)
    images, labels = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares = StepBatches(parts, 8, 5, seed=3)[4]
        assert len(shares[0]) == len(shares[1]) == 24 // world
        images.append(shares[0].unflatten(0, (3, -1)))
        labels.append(shares[1].unflatten(0, (3, -1)))
    assert torch.equal(torch.stack(images, 2).flatten(0, 2), whole_images)
    assert torch.equal(torch.stack(labels, 2).flatten(0, 2), whole_labels)


def test_a_batch_holds_only_kept_images_of_each_domain_in_equal_number():
    class Index(torch.utils.data.Dataset):
        def __init__(self, base: int) -> None:
            self.base = base

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(3, 1, 1), self.base + index

    batches = StepBatches([(Index(0), np.array([1, 5])), (Index(100), np.array([7]))], 16, 3, seed=0)
    steps = [batches[step][1].tolist() for step in range(3)]
    for labels in steps:
        assert set(labels[:16]) == {1, 5}
        assert set(labels[16:]) == {107}
    assert steps[0] != steps[1] != steps[2]


def test_a_batch_that_ranks_cannot_share_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch_per_domain must be a multiple of the 3 ranks, got 8"):
        StepBatches([], 8, 1, seed=0)


def test_two_ranks_train_as_one_does(tmp_path):
    one = train(dense_net, toy_domains(), CONFIG, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_dense_as_rank, (port, CONFIG, str(tmp_path)), nprocs=2)
    two, other = (files.read_json(tmp_path / f"rank{rank}.json") for rank in range(2))
    assert two == other == files.read_json(tmp_path / "two" / RESULT)
    assert [entry["accuracy"] for entry in two["history"]] == [entry["accuracy"] for entry in one["history"]]
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    weights = [files.read_torch(tmp_path / name / SELECTED)["model"] for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-6)


def test_bfloat16_runs_the_model_under_autocast(tmp_path):
    seen = []

    class Spy(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return tokens

    result = train(lambda: ToyNet(Spy()), toy_domains(), replace(CONFIG, precision="bfloat16"), tmp_path)
    assert all(seen)
    assert math.isfinite(result["history"][-1]["loss"])
