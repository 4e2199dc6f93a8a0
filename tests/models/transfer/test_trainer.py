import math
import socket
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy_transfer import (
    CLASSES,
    CONFIG,
    FELT,
    Interrupted,
    ToyNet,
    batch_norm_net,
    config,
    interrupt_after,
    pretrained,
    toy_target,
    tune_and_die,
    tune_as_rank,
)

from moe_kernels.models import distributed, files
from moe_kernels.models.evaluation import accuracy_and_loss
from moe_kernels.models.runs import CHECKPOINT, RESULT
from moe_kernels.models.transfer import from_tensors, trainer
from moe_kernels.models.transfer.configuration import METHODS
from moe_kernels.models.transfer.regularizers import KnowledgeDistillation
from moe_kernels.models.transfer.trainer import FINAL, Diverged, StepBatches, finetune

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = [("fine-tuning", False), *((method, dtnh) for method in METHODS[1:] for dtnh in (False, True))]


@pytest.mark.parametrize(("method", "dtnh"), COLUMNS)
def test_every_method_learns_and_reports_what_it_did(tmp_path, method, dtnh):
    asked, steps = config(method, dtnh, steps=30, eval_every=12), []
    result = finetune(
        batch_norm_net, toy_target(), asked, tmp_path, description={"source": "noise"}, on_step=steps.append
    )
    history = result["history"]
    assert [entry["step"] for entry in history] == [12, 24, 30]
    assert history[-1]["empirical_loss"] < 0.5 * history[0]["empirical_loss"]
    assert history[-1]["test_accuracy"] > 0.8
    assert result["final"] == history[-1]
    assert steps == [*range(31), 30]
    run = result["run"]
    assert (run["method"], run["dtnh"], run["coefficient"]) == (method, dtnh, FELT.get(method, 0.0))
    assert (run["data"], run["classes"], run["train"], run["test"]) == ("toy", list(CLASSES), 30, 30)
    assert run["source"] == "noise"
    assert files.read_json(tmp_path / RESULT) == result
    assert not (tmp_path / CHECKPOINT).exists()
    # what is measured of what
    assert (history[-1]["regularizer"] is None) == (method == "fine-tuning")
    measured = dtnh or method in ("l2", "l2-sp")
    for fact in ("angle_to_loss", "angle_to_regularizer", "conflict_rate", "cosine", "scale"):
        assert (history[-1][fact] is None) == (not measured)
    if measured:
        # d·g ≥ ‖g‖² > 0 with dtnh: the direction never climbs the empirical loss; and the scale tells of a conflict
        assert history[-1]["angle_to_loss"] < 90
        assert (history[-1]["scale"] > 1) == (dtnh and history[-1]["conflict_rate"] > 0)


def test_the_final_weights_are_those_that_were_tested(tmp_path):
    data = toy_target()
    result = finetune(batch_norm_net, data, config("l2-sp"), tmp_path)
    saved = files.read_torch(tmp_path / FINAL)
    assert (saved["step"], saved["run"]) == (10, result["run"])
    model = batch_norm_net().eval()
    model.load_state_dict(saved["model"])
    images, labels = next(iter(torch.utils.data.DataLoader(data.test, 30)))
    logits = model(images).detach()
    assert result["final"]["test_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert result["final"]["test_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_omega_is_the_squared_distance_from_the_source(tmp_path):
    result = finetune(pretrained, toy_target(), config("l2-sp", parameters="all"), tmp_path)
    after, before = files.read_torch(tmp_path / FINAL)["model"], pretrained().state_dict()
    distance = sum((after[name] - before[name]).square().sum().item() for name in before if not name.startswith("fc."))
    assert result["final"]["regularizer"] == pytest.approx(distance, rel=1e-5)


@pytest.mark.parametrize("method", ["know-dist", "l2-sp"])
def test_the_step_is_the_sum_and_dtnhs_loses_the_conflict(tmp_path, method):
    """One step after the first, against the formulas of the paper in plain PyTorch."""
    data = toy_target()

    def twice(dtnh: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        weights = []
        for steps in (1, 2):
            folder = tmp_path / f"{dtnh}{steps}"
            finetune(
                pretrained,
                data,
                config(
                    method, dtnh, steps=steps, eval_every=1, momentum=0.0, drop_at=1.0, head_decay=0.0, head=("fc",)
                ),
                folder,
            )
            weights.append(files.read_torch(folder / FINAL)["model"])
        return weights[0], weights[1]

    images, labels = StepBatches(data.train, 8, 2, trainer._seed(data, CONFIG))[1]
    for dtnh in (False, True):
        before, after = twice(dtnh)
        model = pretrained()
        regularizer = KnowledgeDistillation(FELT["know-dist"]).bind(model)
        source = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before)
        loss = cross_entropy(model(images), labels)
        named = dict(model.named_parameters())
        g = dict(zip(named, torch.autograd.grad(loss, named.values(), retain_graph=True), strict=True))
        if method == "know-dist":
            found = torch.autograd.grad(regularizer.penalty(), named.values(), allow_unused=True)
            r = {
                name: torch.zeros_like(g[name]) if value is None else value
                for name, value in zip(g, found, strict=True)
            }
        else:
            kernels = {name for name in g if name.endswith("weight") and name != "fc.weight"}
            r = {name: 2 * (before[name] - source[name]) * (name in kernels) for name in g}
        dot = sum((g[name] * r[name]).sum().item() for name in g)
        assert dot < 0
        scale = 1 - FELT[method] * dot / sum(value.square().sum().item() for value in g.values()) if dtnh else 1
        for name in g:
            step = -0.01 * (scale * g[name] + FELT[method] * r[name])
            torch.testing.assert_close(after[name] - before[name], step, rtol=1e-3, atol=1e-6)


def test_measuring_takes_two_backwards_to_the_same_end(tmp_path):
    plain = finetune(batch_norm_net, toy_target(), config("know-dist"), tmp_path / "a")
    measured = finetune(batch_norm_net, toy_target(), config("know-dist", measure=True), tmp_path / "b")
    assert plain["final"]["angle_to_loss"] is None
    assert 0 < measured["final"]["angle_to_loss"] < 180
    one, other = (files.read_torch(tmp_path / name / FINAL)["model"] for name in "ab")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_methods_start_from_one_head_and_see_the_same_batches(tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}

    class Spy(ToyNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen[current].append(torch.cat([images.flatten(), self.fc.weight.detach().flatten()]))
            return super().forward(images)

    def build() -> nn.Module:
        net = pretrained()
        net.__class__ = Spy
        return net

    for current in ("fine-tuning", "l2-sp", "know-dist", "delta"):
        seen[current] = []
        finetune(build, toy_target(), config(current, steps=1), tmp_path / current)
    for current in ("l2-sp", "know-dist", "delta"):
        assert torch.equal(seen[current][0], seen["fine-tuning"][0])
    seen["other"], current = [], "other"
    finetune(build, toy_target(), config("fine-tuning", steps=1, seed=1), tmp_path / "other")
    assert not torch.equal(seen["other"][0], seen["fine-tuning"][0])


@pytest.mark.parametrize(("method", "dtnh"), [("l2-sp", True), ("know-dist", True), ("delta", False)])
@pytest.mark.parametrize("stops", [[1], [4], [2, 3, 9]])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, method, dtnh, stops):
    asked = config(method, dtnh, coefficient_decay=0.5)
    whole = finetune(batch_norm_net, toy_target(), asked, tmp_path / "whole")
    for last in stops:
        with pytest.raises(Interrupted):
            # a share of 1e9 lets it write after every step
            finetune(
                batch_norm_net,
                toy_target(),
                asked,
                tmp_path / "parts",
                checkpoint_share=1e9,
                on_step=interrupt_after(last),
            )
        assert (tmp_path / "parts" / CHECKPOINT).exists()
    reached: list[int] = []
    resumed = finetune(batch_norm_net, toy_target(), asked, tmp_path / "parts", on_step=reached.append)
    assert reached[0] == stops[-1]
    assert resumed == whole
    assert (tmp_path / "parts" / RESULT).read_bytes() == (tmp_path / "whole" / RESULT).read_bytes()
    one, other = (files.read_torch(tmp_path / name / FINAL)["model"] for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_killed_while_it_writes_ends_with_the_same_bits(tmp_path):
    asked = config("know-dist", True)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(tune_and_die, (asked, str(tmp_path / "parts"), 3))
    assert list((tmp_path / "parts").glob(".*.tmp"))
    assert files.read_torch(tmp_path / "parts" / CHECKPOINT)["step"] == 2
    resumed = finetune(batch_norm_net, toy_target(), asked, tmp_path / "parts")
    assert resumed == finetune(batch_norm_net, toy_target(), asked, tmp_path / "whole")
    one, other = (files.read_torch(tmp_path / name / FINAL)["model"] for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "parts").glob(".*.tmp"))


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    first = finetune(pretrained, toy_target(), CONFIG, tmp_path)

    def build() -> nn.Module:
        raise AssertionError("built again")

    assert finetune(build, toy_target(), CONFIG, tmp_path) == first
    with pytest.raises(ValueError, match=r"(?s)result\.json is of another configuration.*dtnh: False there, True here"):
        finetune(build, toy_target(), config("l2-sp", True), tmp_path)


def other_crop():
    """The target of the same name, classes and counts, cut out differently."""
    data = toy_target()
    parts = [(part.images, part.labels) for part in (data.train, data.test)]
    return from_tensors(data.name, data.classes, *parts, crop=9)


@pytest.mark.parametrize("last", [3, None])
def test_a_folder_of_another_target_of_that_name_is_refused(tmp_path, last):
    """Finished or begun: its result is none of the other's."""
    data, other = toy_target(), other_crop()
    assert (data.name, data.classes, len(data.train)) == (other.name, other.classes, len(other.train))
    if last is None:
        finetune(pretrained, data, CONFIG, tmp_path)
    else:
        with pytest.raises(Interrupted):
            finetune(pretrained, data, CONFIG, tmp_path, checkpoint_share=1e9, on_step=interrupt_after(last))
    with pytest.raises(ValueError, match=r"(?s)is of another configuration:.*target\.crop: 8 there, 9 here"):
        finetune(pretrained, other, CONFIG, tmp_path)
    with torch.no_grad():
        brighter = toy_target()
        images, labels = brighter.train.images.clone(), brighter.train.labels
        images[0, 0, 0, 0] += 1
    changed = from_tensors("toy", CLASSES, (images, labels), (data.test.images, data.test.labels), crop=8)
    with pytest.raises(ValueError, match=r"configuration:\n  target\.content: '\w+' there, '\w+' here\n"):
        finetune(pretrained, changed, CONFIG, tmp_path)


def test_loader_workers_change_nothing(tmp_path):
    one = finetune(pretrained, toy_target(), CONFIG, tmp_path / "a", workers=0)
    assert finetune(pretrained, toy_target(), CONFIG, tmp_path / "b", workers=2) == one


def test_an_epoch_shows_every_image_once_in_a_new_order():
    data = toy_target()

    class Index(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(1), index

        def __len__(self) -> int:
            return 30

    batches = StepBatches(Index(), 12, 10, seed=3)
    drawn = [index for step in range(5) for index in batches[step][1].tolist()]
    assert sorted(drawn[:30]) == sorted(drawn[30:]) == list(range(30))
    assert drawn[:30] != drawn[30:]
    assert len(data.train) == 30
    noise = torch.cat([batches[step][0] for step in range(5)])
    assert len(noise.unique()) == 60


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_a_step(monkeypatch, world):
    data = toy_target()
    whole = StepBatches(data.train, 8, 5, seed=3)[4]
    monkeypatch.setattr(distributed, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(StepBatches(data.train, 8, 5, seed=3)[4])
    for ours, theirs in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.stack(ours, 1).flatten(0, 1), theirs)
    with pytest.raises(ValueError, match=f"batch must be a multiple of the {world} ranks, got 7"):
        StepBatches(data.train, 7, 5, seed=3)


RANKS = {
    "one backward": config("l2-sp", True),
    "two backwards": config("know-dist", True),
    "channels": config("delta", steps=3),
    "batch norm": config("know-dist", True, steps=3),
}


def test_two_ranks_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(tune_as_rank, (port, RANKS, str(tmp_path)), nprocs=2)
    for name, asked in RANKS.items():
        two = [files.read_json(tmp_path / f"{name} rank{rank}.json") for rank in range(2)]
        assert two[0] == two[1] == files.read_json(tmp_path / name / RESULT)
        assert math.isfinite(two[0]["final"]["empirical_loss"])
        with pytest.raises(ValueError, match="ranks: 2 there, 1 here"):
            finetune(pretrained, toy_target(), asked, tmp_path / name)
        if name == "batch norm":
            # normalizes each rank's images by themselves; what was tested is what was saved
            model = batch_norm_net()
            model.load_state_dict(files.read_torch(tmp_path / name / FINAL)["model"])
            found = accuracy_and_loss(model, toy_target().test)
            assert found == pytest.approx((two[0]["final"]["test_accuracy"], two[0]["final"]["test_loss"]), rel=1e-6)
            continue
        one = finetune(pretrained, toy_target(), asked, tmp_path / f"{name} alone")
        for ours, theirs in zip(two[0]["history"], one["history"], strict=True):
            assert ours.keys() == theirs.keys()
            for fact, value in theirs.items():
                assert ours[fact] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), fact
        weights = [files.read_torch(tmp_path / which / FINAL)["model"] for which in (name, f"{name} alone")]
        for key in weights[0]:
            torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=1e-6)


def test_delta_weighs_its_channels_with_a_trained_head_and_starts_from_the_new_one(tmp_path):
    seen = {}

    class Spy(trainer.DELTA):
        def estimate(self, model, batches, loss, progress=None):  # type: ignore[no-untyped-def]
            items = list(batches)
            with torch.no_grad():
                seen["trained"] = loss(model(items[0][0]), items[0][1]).item()
                fresh = pretrained().eval()
                fresh.load_state_dict(
                    {**model.state_dict(), "fc.weight": start["fc.weight"], "fc.bias": start["fc.bias"]}
                )
                seen["fresh"] = loss(fresh(items[0][0]), items[0][1]).item()
            seen["backbone"] = all(
                torch.equal(value, start[name])
                for name, value in model.state_dict().items()
                if not name.startswith("fc.")
            )
            seen["batches"] = len(items)
            super().estimate(model, items, loss, progress)

    asked = config("delta", head_epochs=20)
    torch.manual_seed(trainer._seed(toy_target(), asked))
    start = {name: value.clone() for name, value in pretrained().state_dict().items()}
    training = trainer._Training(pretrained(), toy_target(), asked, torch.device("cpu"), 0)
    training.model.load_state_dict(start)
    training.regularizer.__class__ = Spy
    training.prepare()
    assert seen["trained"] < 0.8 * seen["fresh"]
    assert seen["backbone"]
    assert seen["batches"] == 1
    assert all(torch.equal(value, start[name]) for name, value in training.model.state_dict().items())
    assert not training.regularizer.needs_estimate
    training.close()


def test_a_head_that_delta_trains_alone_may_diverge_too(tmp_path):
    asked = config("delta", learning_rate=1e38)
    with pytest.raises(
        Diverged, match=r"with the head that delta trains alone, loss: it is not finite .*; a learning rate below 1e"
    ):
        finetune(pretrained, toy_target(), asked, tmp_path)
    assert files.read_json(tmp_path / RESULT)["final"] is None


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        (replace(CONFIG, learning_rate=1e30), r"a learning rate below 1e\+30 may help"),
        (
            config("know-dist", learning_rate=1e30),
            r"a learning rate below 1e\+30 or a coefficient below 0.1, such as cross-validation finds, may help",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_for_good(tmp_path, asked, advice):
    with pytest.raises(Diverged, match=rf"the loss is not finite by step 4 \(.*\); {advice}") as first:
        finetune(pretrained, toy_target(), asked, tmp_path, checkpoint_share=1e9)
    found = files.read_json(tmp_path / RESULT)
    assert (found["final"], found["history"], found["diverged"]) == (None, [], str(first.value))
    assert ("regularizer" in str(first.value)) == (asked.name == "know-dist")
    assert not (tmp_path / CHECKPOINT).exists()

    def build() -> nn.Module:
        raise AssertionError("built again")

    with pytest.raises(Diverged) as second:
        finetune(build, toy_target(), asked, tmp_path)
    assert str(second.value) == str(first.value)


def test_the_caller_keeps_its_random_numbers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(batch_norm_net, toy_target(), CONFIG, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_runs_the_model_under_autocast(tmp_path):
    result = finetune(pretrained, toy_target(), config("know-dist", True, precision="bfloat16"), tmp_path)
    exact = finetune(pretrained, toy_target(), config("know-dist", True), tmp_path / "exact")
    assert result["final"]["empirical_loss"] != exact["final"]["empirical_loss"]
    assert result["final"]["empirical_loss"] == pytest.approx(exact["final"]["empirical_loss"], rel=0.1)
