import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import interrupted_transfer_demo
import pytest
import torch
from interrupted_transfer_demo import PLAN
from PIL import Image

from moe_kernels.models import files
from moe_kernels.models.transfer import demo, demo_report, protocol
from moe_kernels.models.transfer.trainer import FINAL
from moe_kernels.optim import AnchoredSGD

SMALL = replace(
    PLAN,
    training=replace(PLAN.training, batch=8, steps=2),
    coefficients={"l2-sp": (0.05, 0.5), "know-dist": (2e-3,)},
    sources=("letters", "textures"),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_everything_is_written_and_a_second_call_repeats_nothing(tmp_path, monkeypatch):
    step, done, lines = AnchoredSGD.step, [], []
    monkeypatch.setattr(AnchoredSGD, "step", lambda self, **options: done.append(self) or step(self, **options))
    found = demo.run(tmp_path, SMALL, say=lines.append, progress=False)
    # what the progress bar counts to
    assert len(done) == SMALL.steps()
    assert [table.source for table in found] == ["letters", "textures"]
    for table in found:
        assert table.targets == ("sketch",)
        assert table.columns == protocol.COLUMNS
        assert all(len(table.values("sketch", column)) == 1 for column in protocol.COLUMNS)
    assert any(line.startswith("textures → sketch, DTNH(L2-SP), λ = 0.5: ") for line in lines)

    content = files.read_json(tmp_path / "results.json")
    assert {name: len(runs) for name, runs in content["runs"].items()} == {"scratch": 1, "chosen": 10, "strong": 6}
    assert {run["run"]["coefficient"] for run in content["runs"]["strong"]} == {0.0, 0.5}
    for run in content["runs"]["chosen"]:
        assert run["run"]["coefficient"] in (*SMALL.coefficients.get(run["run"]["method"], ()), 0.0)
    assert len(content["claims"]) == 7

    report = (tmp_path / "report.md").read_text()
    assert all(f"from {name}" in report for name in ("random weights", "letters", "textures"))
    for claim in content["claims"]:
        assert f"| {claim['text']} |" in report
    shown = sorted(path.name for path in tmp_path.glob("*.png"))
    assert shown == [*(f"figure{number}-textures-sketch.png" for number in (3, 4, 5)), "tasks.png"]
    for name in shown:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
        assert f"({name})" in report
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == len(shown)

    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(AnchoredSGD, "step", lambda self, **options: pytest.fail("trained again"))
    for place, name in ((demo_report, "plot_tasks"), (demo_report, "_curves")):
        monkeypatch.setattr(place, name, lambda *arguments: [])
    (tmp_path / "tasks.png").touch()
    assert demo.run(tmp_path, SMALL, say=lines.append, progress=False) == found
    assert (tmp_path / "results.json").read_bytes() == before

    other = replace(SMALL, training=replace(SMALL.training, learning_rate=0.5))
    with pytest.raises(
        ValueError, match=r"(?s)those of Fine-tuning, random weights → sketch, are not:.*learning_rate: 0.02 there, 0.5"
    ):
        demo.run(tmp_path, other, say=lines.append, progress=False)


def test_killed_at_any_instant_it_ends_with_the_same_numbers(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the instants:", seed)
    draw = random.Random(seed)
    instants = [draw.randint(1, PLAN.steps() // 3 - 1) for _ in range(3)]
    script = [sys.executable, interrupted_transfer_demo.__file__, str(tmp_path), *map(str, instants)]
    # one thread: a process that forks must not have started others
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    whole, *killed, last = map(json.loads, done.stdout.splitlines())
    assert whole == {"ended": 0, "steps": PLAN.steps()}
    assert killed == [{"ended": -9, "steps": step} for step in instants]
    # of each killed one, the step in which it died is lost and no other
    assert last == {"ended": 0, "steps": PLAN.steps() - sum(instants) + len(instants)}
    assert (tmp_path / "parts" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    one, other = (
        {path.relative_to(tmp_path / name): files.read_torch(path)["model"] for path in (tmp_path / name).rglob(FINAL)}
        for name in ("whole", "parts")
    )
    assert len(one) == 17  # source, random weights, five columns, two with a strong λ, four methods on two folds
    assert one.keys() == other.keys()
    for path, weights in one.items():
        assert all(torch.equal(tensor, other[path][name]) for name, tensor in weights.items())
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "checkpoint.pt"]


def test_a_pair_starts_from_the_sources_weights_and_a_new_head():
    target = demo.sources.target("weaves", 1, 1)
    source = demo.network(26).state_dict()
    model = demo._builder(target, source)()
    for name, tensor in model.state_dict().items():
        if name.startswith("fc."):
            assert tensor.shape[0] == 10
        else:
            assert torch.equal(tensor, source[name])


def test_the_claims_are_read_from_the_right_runs():
    """The first and the third from cross-validated tables, the second from strong ones, the others from runs."""

    def table(hurts: bool, gain: float) -> protocol.Table:
        means = {"Fine-tuning": 0.8, "L2-SP": 0.5 if hurts else 0.8, "KnowDist": 0.6, "DTNH(KnowDist)": 0.6 + gain}
        means["DTNH(L2-SP)"] = means["L2-SP"] + gain
        cells = {("t", name, seed): mean + 0.001 * seed for name, mean in means.items() for seed in (0, 1)}
        return protocol.Table("s", ("t",), protocol.COLUMNS, cells)

    def results(dtnh: bool, loss: float, angle: float, pull: float):
        entry = {"step": 1, "empirical_loss": loss, "test_loss": -loss, "angle_to_loss": angle}
        entry["angle_to_regularizer"] = pull
        return [{"run": {"source": "s", "data": "t", "method": "l2-sp", "dtnh": dtnh}, "history": [entry]}]

    good = demo_report.check(
        [table(True, 0.4)], [table(False, -0.1)], results(False, 2.0, 30.0, 80.0) + results(True, 1.0, 30.0, 90.0)
    )
    assert [claim.holds for claim in good] == [True, None, True, True, False, True, True]
    bad = demo_report.check(
        [table(False, -0.1)], [table(True, 0.1)], results(False, 1.0, 30.0, 80.0) + results(True, 2.0, 30.1, 91.0)
    )
    assert [claim.holds for claim in bad] == [None, False, False, False, True, False, False]


def test_plans():
    full, quick = demo.plan(), demo.plan(2, quick=True)
    assert (full.repeats, quick.repeats) == (5, 2)
    assert (full.sources, full.targets) == (demo.sources.SOURCES, demo.sources.TARGETS)
    assert quick.steps() < full.steps() / 50
    # the paper's recipe
    assert (full.training.batch, full.training.momentum, full.training.drop_at) == (48, 0.9, 0.75)
    assert full.strong() == 0.5
    # the largest coefficient, with which L2-SP hurts, is one of those that are chosen from
    assert full.strong() in full.coefficients["l2-sp"]
