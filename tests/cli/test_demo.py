import re

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.cli import demo as command
from moe_kernels.models.gmoe.protocol import Table


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(monkeypatch, run, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(command.demo, "run", run)
    result = CliRunner().invoke(command.app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_it_runs_the_plan_and_shows_the_table(tmp_path, monkeypatch):
    asked = []

    def run(out, plan):
        asked.append((out, plan))
        cells = {
            (model, "plain", trial): value for trial in (0, 1) for model, value in (("dense ViT", 0.5), ("GMoE", 0.25))
        }
        return Table("digits", ("dense ViT", "GMoE"), ("plain",), cells)

    code, output = call(monkeypatch, run, "--out", str(tmp_path), "--seeds", "2", "--quick")
    assert code == 0
    assert asked == [(tmp_path, command.demo.plan(2, quick=True))]
    assert "mean ± standard error, trials: 2" in output
    assert "25.0 ± 0.0" in output
    assert "GMoE is ahead in 0, dense ViT in 2, equal in 0" in output
    assert str(tmp_path / "report.html") in output
    assert torch.get_num_threads() <= command.THREADS


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("of another configuration"), 1, "error: of another configuration"),
        (RuntimeError("another process is writing"), 1, "error: another process is writing"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_what_stops_it_is_one_sentence(monkeypatch, error, code, message):
    def run(out, plan):
        raise error

    assert call(monkeypatch, run) == (code, message + " ")


def test_at_least_one_trial(monkeypatch):
    code, output = call(monkeypatch, lambda out, plan: pytest.fail("ran"), "--seeds", "0")
    assert code == 2
    assert "--seeds" in output
