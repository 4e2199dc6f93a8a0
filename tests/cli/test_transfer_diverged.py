"""One run that diverges costs the command no other."""

import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from moe_kernels.cli import transfer
from moe_kernels.models import files
from moe_kernels.models.transfer import backbones, trainer


@pytest.fixture
def train(monkeypatch, tmp_path):
    torch.save(Net(4).state_dict(), tmp_path / "letters.pth")
    monkeypatch.setattr(backbones, "_architecture", lambda name, num_classes: Net(num_classes))
    options = ["--source", tmp_path / "letters.pth", "--train-per-class", 2, "--test-per-class", 1, "--crop", 32]
    options += ["--steps", 6, "--batch", 4, "--lr", 1e-3, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out"]

    def run(*arguments: object) -> tuple[int, str, str]:
        given = ["train", "embedded:sketch", *options, *arguments]
        result = CliRunner().invoke(transfer.app, [str(argument) for argument in given], env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, re.sub(r"\s+", " ", result.stderr)

    return run


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv1(images).relu().mean((2, 3)))


def test_the_other_runs_are_done_and_the_cell_is_marked(train, tmp_path, monkeypatch):
    methods = ["--repeats", 2, "--layers", "conv1", "--coefficient", 1e30]
    methods += ["--method", "know-dist", "--method", "fine-tuning"]
    for _ in range(2):
        code, output, error = train(*methods)
        assert code == 1
        last = error[error.rindex("error: ") :]
        assert "KnowDist, letters → sketch, seed 0: the loss" in last
        assert "a coefficient below 1e+30, such as cross-validation finds," in last
        assert "; and 1 more. Runs that diverged are not repeated" in last
        assert output.count("Weights: ") == 2
        found = files.read_json(tmp_path / "out" / "results.json")
        (table,) = found["tables"]
        cells = table["accuracy"]["sketch"]
        assert (cells["KnowDist"]["diverged"], cells["Fine-tuning"]["diverged"]) == (2, 0)
        assert len(cells["Fine-tuning"]["repeats"]) == 2
        assert "| diverged |" in (tmp_path / "out" / "report.md").read_text()
        # the second time nothing is trained
        monkeypatch.setattr(trainer, "_train", lambda *arguments: pytest.fail("trained again"))


def test_a_method_that_no_coefficient_suits_is_told_and_the_others_are_done(train, tmp_path):
    options = ["--repeats", 1, "--layers", "conv1", "--cross-validate", "--grid", "1e30", "--folds", 2]
    code, output, error = train("--method", "know-dist", "--method", "fine-tuning", *options)
    assert code == 1
    assert "error: KnowDist: the loss is not finite with any of the coefficients 1e+30; smaller ones may help" in error
    assert output.count("Weights: ") == 1
    (table,) = files.read_json(tmp_path / "out" / "results.json")["tables"]
    assert list(table["accuracy"]["sketch"]) == ["Fine-tuning"]
