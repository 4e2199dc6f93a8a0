"""moe-kernels bench: what it writes, and what it refuses."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.benchmarks import registry
from moe_kernels.benchmarks.harness import FORWARD, OURS, Case
from moe_kernels.benchmarks.workloads import QUICK
from moe_kernels.cli import app, bench


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_all_operators_in_quick_mode(tmp_path):
    result = invoke("--quick", "--threads", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    documents = {path.name.partition("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(documents) == set(registry.BENCHMARKS)
    assert {path.stem for path in tmp_path.glob("*.json")} == {path.stem for path in tmp_path.glob("*.md")}
    for operator, document in documents.items():
        assert document["operator"] == operator
        assert (document["quick"], document["rounds"]) == (True, bench.QUICK_ROUNDS)
        assert document["command"] == "moe-kernels bench --rounds=3 --dtype=float32 --quick --threads=1"
        assert set(document["versions"]) == {"moe-kernels", "python", "torch"}
        assert document["machine"]["threads"] == 1
        assert document["machine"]["cores"] >= 1
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", document["commit"] or "0" * 40)
        for case in document["cases"]:
            assert [len(row["seconds"]) for row in case["rows"]] == [bench.QUICK_ROUNDS] * len(case["rows"])
        assert f"{operator}, d=16 h=32 E=4 float32" in result.output
    assert "these figures mean nothing" in result.output


def test_chosen_operator_rounds_and_dtype(tmp_path):
    result = invoke("dispatch", "--quick", "--rounds", 2, "--dtype", "bfloat16", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["rounds"] == 2
    assert {case["workload"]["dtype"] for case in document["cases"]} == {"bfloat16"}
    assert document["command"] == "moe-kernels bench dispatch --rounds=2 --dtype=bfloat16 --quick"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], [*registry.BENCHMARKS, "'nonsense'"]),
        (["routing", "nonsense"], [*registry.BENCHMARKS, "'nonsense'"]),
        (["--dtype", "int8"], ["float32", "bfloat16", "float16", "'int8'"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--threads", "0"], ["--threads"]),
    ],
)
def test_bad_input_names_what_is_valid(tmp_path, arguments, words):
    result = invoke(*arguments, "--quick", "--out", tmp_path)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output
    assert list(tmp_path.iterdir()) == []


def test_ours_out_of_budget_is_written_and_fails(tmp_path, monkeypatch):
    def cases(operator, workloads, device):
        right = {"y": torch.ones(5)}
        candidates = {OURS: lambda: {"y": torch.zeros(5)}, "plain": lambda: right}
        yield Case(operator, QUICK[0], FORWARD, candidates, lambda: right, plain="plain")

    monkeypatch.setattr(registry, "cases", cases)
    result = invoke("routing", "--quick", "--out", tmp_path)
    assert result.exit_code == 1
    assert "ours is inaccurate: routing, T=40 k=1 balanced, forward: forward error 1.0e+00" in result.stderr
    (path,) = tmp_path.glob("*.json")
    row = json.loads(path.read_text())["cases"][0]["rows"][0]
    assert (row["median"], row["seconds"]) == (None, [])


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.default_folder().resolve() == tmp_path
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/harness.py").touch()
    assert bench.default_folder().resolve() == tmp_path / "benchmarks/results"


def test_commit_of_a_repository_that_is_not_the_packages_own_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.benchmarks, "__path__", [str(tmp_path)])
    assert bench.commit() is None


def test_commit_without_git_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.commit() is None
