import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_kernels.cli import gmoe
from moe_kernels.models import files

DOMAINS, CLASSES = ("day", "fog", "night"), ("cat", "dog")
TRAIN = ["--model", "gmoe_digits", "--no-pretrained", "--workers", "0", "--device", "cpu", "--batch", "4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "toy"
    draw = np.random.default_rng(0)
    for domain in DOMAINS:
        for label, name in enumerate(CLASSES):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(0, 128, (40, 36, 3), np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(gmoe.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_all_domains_in_turn_then_evaluation(root, tmp_path):
    command = ["train", root, "--test-domain", "all", *TRAIN, "--steps", "2", "--eval-every", "1", "--dense"]
    code, output = call(*command, "--trials", "2", "--out", tmp_path)
    assert code == 0, output
    assert output.count("there,") == 12
    found = files.read_json(tmp_path / "results.json")
    accuracies = found["table"]["accuracy"]
    assert list(accuracies) == ["gmoe_digits", "gmoe_digits dense"]
    assert list(accuracies["gmoe_digits"]) == [*DOMAINS, "average"]
    assert all(len(cell["trials"]) == 2 for row in accuracies.values() for cell in row.values())
    run = found["runs"][0]["run"]
    assert (run["learning_rate"], run["weight_decay"], run["optimizer"]) == (3e-5, 1e-6, "adam")
    assert "| gmoe_digits dense |" in (tmp_path / "report.md").read_text()

    before = (tmp_path / "results.json").read_bytes()
    assert call(*command, "--trials", "2", "--out", tmp_path)[0] == 0
    assert (tmp_path / "results.json").read_bytes() == before

    checkpoint = tmp_path / "runs" / "gmoe_digits" / "fog" / "trial1" / "selected.pt"
    code, output = call("evaluate", root, "--checkpoint", checkpoint, "--workers", "0", "--device", "cpu")
    assert code == 0, output
    measured = files.read_json(checkpoint.with_name("evaluation.json"))["domains"]
    assert {name: part["role"] for name, part in measured.items()} == {
        "day": "trained on",
        "fog": "held out",
        "night": "trained on",
    }
    assert all(part["images"] == 16 for part in measured.values())
    for name, part in measured.items():
        assert 0 <= part["accuracy"] <= 1
        assert f"{100 * part['accuracy']:.1f}" in output.split(name, 1)[1]
    # both halves of the held-out domain, weighed by their images: 16 · 0.2 rounds down to 3 and leaves 13
    (saved,) = (
        entry
        for entry in found["runs"]
        if entry["run"]["model"] == "gmoe_digits" and entry["run"]["held_out"] == ["fog"] and entry["run"]["trial"] == 1
    )
    halves = saved["selected"]["accuracy"]["fog"]
    assert measured["fog"]["accuracy"] == pytest.approx((13 * halves["in"] + 3 * halves["out"]) / 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test-domain", "dusk"], "toy has no domain 'dusk'; its domains are 0: day, 1: fog, 2: night"),
        (
            ["--test-domain", "fog", "--model", "gmoe_huge"],
            "gmoe_small_patch16_224, gmoe_base_patch16_224, gmoe_digits",
        ),
        (["--test-domain", "fog", "--layers", "1,99"], "0 … "),
        (["--test-domain", "fog", "--steps", "0"], "steps must be at least 1, got 0"),
        (["--test-domain", "fog", "--device", "tpu9"], "device must be auto, cpu, cuda or cuda:<index>, got 'tpu9'"),
        (["--test-domain", "fog", "--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(root, tmp_path, arguments, message):
    code, output = call("train", root, *TRAIN, "--steps", "1", "--out", tmp_path, *arguments)
    assert code == 1
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output


def test_a_run_of_other_settings_is_not_overwritten(root, tmp_path):
    command = ["train", root, "--test-domain", "fog", *TRAIN, "--out", tmp_path]
    assert call(*command, "--steps", "1")[0] == 0
    code, output = call(*command, "--steps", "2", "--top-k", "2")
    assert code == 1
    assert "result.json is of another configuration" in output
    assert "steps: 1 there, 2 here" in output


def test_only_own_checkpoints_of_the_same_classes_are_evaluated(root, tmp_path):
    files.write_torch(tmp_path / "other.pt", {"model": {}})
    code, output = call("evaluate", root, "--checkpoint", tmp_path / "other.pt")
    assert code == 1
    assert "other.pt must be a selected.pt" in output
    code, output = call("evaluate", root, "--checkpoint", tmp_path / "missing.pt")
    assert code == 1
    assert "missing.pt" in output

    assert call("train", root, "--test-domain", "fog", *TRAIN, "--steps", "1", "--out", tmp_path)[0] == 0
    (root.parent / "birds" / "day" / "bird").mkdir(parents=True)
    (root.parent / "birds" / "fog" / "bird").mkdir(parents=True)
    for domain in ("day", "fog"):
        Image.new("RGB", (8, 8)).save(root.parent / "birds" / domain / "bird" / "0.png")
    checkpoint = tmp_path / "runs" / "gmoe_digits" / "fog" / "trial0" / "selected.pt"
    code, output = call("evaluate", root.parent / "birds", "--checkpoint", checkpoint)
    assert code == 1
    assert "must have the classes" in output
    assert "cat, dog; it has bird" in output
