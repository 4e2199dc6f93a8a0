"""benchmarks/on_gpu.sh without a GPU: its parts, what it refuses, and that one part's failure is told and kept."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from moe_kernels.benchmarks import registry, stopwatches

SCRIPT = Path(__file__).parents[2] / "benchmarks/on_gpu.sh"


def on_gpu(*arguments, **environment):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_every_operator_is_measured_on_every_suite_by_every_stopwatch():
    parts = on_gpu("--list").stdout.split()
    assert parts[:4] == ["environment", "build", "tests", "sanitizer"]
    assert set(parts[4:]) == {
        f"bench-{operator}-{suite}-{stopwatch}"
        for operator, benchmark in registry.BENCHMARKS.items()
        for suite in benchmark.suites_on(torch.device("cuda"))
        for stopwatch in stopwatches.STOPWATCHES
    }


@pytest.mark.parametrize("arguments", [(), ("--nonsense", "out"), ("--part", "nonsense", "out")])
def test_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = on_gpu(*arguments)
    assert result.returncode == 2
    assert result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("python", "status"), [("true", 0), ("false", 1)])
def test_status_and_output_of_a_part_are_kept(python, status, tmp_path):
    result = on_gpu("--part", "bench-routing-image-wall", tmp_path, PYTHON=python)
    assert result.returncode == status
    assert (tmp_path / "status").read_text().startswith(f"bench-routing-image-wall: status {status}, ")
    assert (tmp_path / "bench-routing-image-wall.log").exists()


def test_part_that_hangs_is_ended(tmp_path):
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    result = on_gpu("--part", "tests", tmp_path, PYTHON=str(hanging), PART_SECONDS="1")
    assert result.returncode == 1
    assert "tests: status 124" in (tmp_path / "status").read_text()
