import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import interrupted_demo
import pytest
import torch
from interrupted_demo import PLAN, shrink
from PIL import Image

from moe_kernels.models import files
from moe_kernels.models.gmoe import demo
from moe_kernels.models.gmoe.trainer import SELECTED
from moe_kernels.nn import MoE

PICTURES = ("curves.png", "domains.png", "routing.png")


@pytest.fixture
def small(monkeypatch):
    """Two domains of twenty digits."""
    data = shrink(demo.digits.load())
    monkeypatch.setattr(demo.digits, "load", lambda: data)
    return data


def test_everything_is_written_and_a_second_call_repeats_nothing(tmp_path, small, monkeypatch):
    lines = []
    table = demo.run(tmp_path, PLAN, say=lines.append, progress=False)
    assert table.models == ("dense ViT", "GMoE")
    assert table.domains == ("plain", "inverted")
    assert set(table.cells) == {(model, domain, 0) for model in table.models for domain in table.domains}
    assert len(lines) == 5
    assert "GMoE, inverted held out, trial 0" in lines[-1]

    found = files.read_json(tmp_path / "results.json")
    assert [(run["run"]["model"], run["run"]["held_out"]) for run in found["runs"]] == [
        ("dense ViT", ["plain"]),
        ("GMoE", ["plain"]),
        ("dense ViT", ["inverted"]),
        ("GMoE", ["inverted"]),
    ]
    assert found["table"]["accuracy"]["GMoE"]["plain"]["trials"] == table.values("GMoE", "plain")
    assert found["plan"]["training"]["steps"] == PLAN.training.steps
    assert all(run["history"][0]["auxiliary"] > 0 for run in found["runs"] if run["run"]["model"] == "GMoE")
    for name in PICTURES:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
        assert f"({name})" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == len(PICTURES)

    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("trained again"))
    for name in ("plot_curves", "plot_domains", "plot_routing"):
        monkeypatch.setattr(demo.pictures, name, lambda *args, **options: None)
    assert demo.run(tmp_path, PLAN, say=lines.append, progress=False) == table
    assert (tmp_path / "results.json").read_bytes() == before

    other = replace(PLAN, training=replace(PLAN.training, steps=6))
    with pytest.raises(ValueError, match=r"(?s)result\.json is of another configuration.*steps: 5 there, 6 here"):
        demo.run(tmp_path, other, say=lines.append, progress=False)


def test_killed_at_any_instant_it_ends_with_the_same_numbers(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the instants:", seed)
    script = [sys.executable, interrupted_demo.__file__, str(tmp_path), str(seed)]
    # one thread: a process that forks must not have started others
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    whole, inside_checkpoint, *at_random, last = map(json.loads, done.stdout.splitlines())
    assert whole["ended"] == last["ended"] == 0
    assert inside_checkpoint["ended"] == -9
    assert len(at_random) == 3
    # a kill may come after the end, where the machine was slow before and fast then
    assert [end["ended"] for end in at_random] == sorted(end["ended"] for end in at_random)
    assert at_random[0]["ended"] == -9
    assert (tmp_path / "parts" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    one, other = (
        {
            path.relative_to(tmp_path / name): files.read_torch(path)["model"]
            for path in (tmp_path / name).rglob(SELECTED)
        }
        for name in ("whole", "parts")
    )
    assert len(one) == 5
    assert one.keys() == other.keys()
    for path, weights in one.items():
        assert all(torch.equal(tensor, other[path][name]) for name, tensor in weights.items())
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "checkpoint.pt"]


def test_both_models_start_from_the_same_weights(tmp_path):
    pretrained = demo.create(demo.MODEL, 26, layers=[])
    files.write_torch(tmp_path / SELECTED, {"model": pretrained.state_dict()})
    dense, sparse = (torch.manual_seed(3) and entrant.build() for entrant in demo._entrants(tmp_path / SELECTED))
    layers = {name: module for name, module in sparse.named_modules() if isinstance(module, MoE)}
    assert len(layers) == 2
    assert not any(isinstance(module, MoE) for module in dense.modules())
    weights = sparse.state_dict()
    for name, tensor in dense.state_dict().items():
        block = name.rsplit(".", 2)[0]
        if block not in layers:
            assert torch.equal(tensor, weights[name])
        if not name.startswith("head."):
            assert torch.equal(tensor, pretrained.state_dict()[name])
    for name, layer in layers.items():
        for expert in layer.w1:
            assert torch.equal(expert, dense.get_submodule(name).fc1.weight)
        for expert in layer.b2:
            assert torch.equal(expert, dense.get_submodule(name).fc2.bias)


def test_other_pretrained_weights_are_another_configuration(tmp_path):
    descriptions = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        files.write_torch(tmp_path / SELECTED, {"model": demo.create(demo.MODEL, 26, layers=[]).state_dict()})
        descriptions.append([entrant.description for entrant in demo._entrants(tmp_path / SELECTED)])
    assert descriptions[0] == descriptions[1]
    assert descriptions[0] != descriptions[2]


def test_letters_are_shifted_and_stay_whole():
    image = torch.zeros(1, 3, 5, 5)
    image[0, :, 2, 2] = 1
    letters = demo.Shifted(image, torch.tensor([4]), margin=2)
    places = set()
    for _ in range(300):
        shifted, label = letters[0]
        assert label == 4
        assert shifted.shape == (3, 5, 5)
        assert shifted.sum() == 3
        places.add(tuple(shifted[0].nonzero()[0].tolist()))
    assert places == {(row, column) for row in range(5) for column in range(5)}
    assert torch.equal(demo.Shifted(torch.ones(1, 3, 4, 4), torch.tensor([0]), margin=3)[0][0], torch.ones(3, 4, 4))


def test_plans():
    full, quick = demo.plan(), demo.plan(seeds := 1, quick=True)
    assert (full.trials, quick.trials) == (3, seeds)
    assert quick.training.steps < full.training.steps
    assert full.training.batch_per_domain == 32
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        demo.plan(0)


def test_two_demos_do_not_share_a_folder(tmp_path):
    child = os.fork()
    if child == 0:
        with files.lock(tmp_path):
            (tmp_path / "locked").touch()
            while not (tmp_path / "enough").exists():
                pass
        os._exit(0)
    while not (tmp_path / "locked").exists():
        pass
    try:
        with pytest.raises(RuntimeError, match="another process is writing to"):
            demo.run(tmp_path, PLAN, progress=False)
    finally:
        (tmp_path / "enough").touch()
        os.waitpid(child, 0)
