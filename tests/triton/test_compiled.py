"""What `.ci/compile_kernels.py` reports, and that its file knows every launch of every operator (no compiling here)."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_kernels.triton import MODULES

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / ".ci" / "compile_kernels.py"
RECORD = """
import json, runpy
gate = runpy.run_path({script!r}, run_name="gate")
print(json.dumps({{case: sorted({{launch.kernel.__name__ for launch in launches}})
                  for case, launches in gate["record_all"]().items()}}))
"""
COMPARE = """
import runpy, torch
gate = runpy.run_path({script!r}, run_name="gate")
for case in gate["CASES"][:2]:
    for operator, run in gate["run_operators"](case, torch.bfloat16).items():
        other = gate["run_operators"](case._replace(tokens=case.tokens - 1), torch.bfloat16)[operator]
        with gate["recorded"](90) as launches:
            run()
        with gate["recorded"](90) as others:
            other()
        for one, other in zip(launches, others, strict=True):
            assert one.key == other.key, (one.key, other.key)
"""
CASE = "routing: gmoe, bfloat16, sm_90"
GOOD = {"registers": 128, "spilled": 0, "shared": 65536, "tensor_cores": ["wgmma bf16"]}


@pytest.fixture(scope="module")
def gate():
    """The script as a module, without what it does for itself: it defines kernels to be compiled, not interpreted."""
    for module in set(MODULES.values()):
        importlib.import_module(f"moe_kernels.triton.{module}")
    environment = dict(os.environ)
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ.update(environment)
    return module


def run_compiling(program):
    """What ``program`` prints in a process whose kernels are to be compiled."""
    return subprocess.run(
        [sys.executable, "-c", program.format(script=str(SCRIPT))],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_no_change_is_no_problem(gate):
    assert gate.problems({CASE: {"kernel": GOOD}}, {CASE: {"kernel": GOOD}}) == []
    assert gate.problems({CASE: {"kernel": GOOD}}, {}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 24}, "kernel (routing: gmoe, bfloat16, sm_90) spills 24 bytes of registers"),
        (
            {"shared": 240000},
            "kernel (routing: gmoe, bfloat16, sm_90): 240000 bytes of shared memory, sm_90 has 232448",
        ),
        (
            {"tensor_cores": []},
            "kernel (routing: gmoe, bfloat16, sm_90) lost tensor-core instructions: none, before wgmma bf16 too",
        ),
    ],
)
def test_change_for_the_worse_names_kernel_case_before_and_after(gate, change, message):
    assert gate.problems({CASE: {"kernel": {**GOOD, **change}}}, {CASE: {"kernel": GOOD}}) == [message]


def test_kernel_that_is_gone_or_does_not_compile_is_named(gate):
    (gone,) = gate.problems({CASE: {}}, {CASE: {"kernel": GOOD}})
    assert gone.startswith("kernel (routing: gmoe, bfloat16, sm_90) is gone")
    (failed,) = gate.problems({CASE: {"kernel": {"error": "CompilationError: at 3:4"}}}, {})
    assert failed == "kernel (routing: gmoe, bfloat16, sm_90) does not compile: CompilationError: at 3:4"


def test_change_for_the_better_is_no_problem(gate):
    worse = {**GOOD, "registers": 255, "tensor_cores": []}
    assert gate.problems({CASE: {"kernel": GOOD}}, {CASE: {"kernel": worse}}) == []


RECORDING = pytest.mark.skipif(
    torch.cuda.is_available(), reason="recording replaces the driver of the GPU that is here"
)


@RECORDING
def test_another_number_of_tokens_compiles_nothing():
    run_compiling(COMPARE)


@RECORDING
def test_file_knows_every_launch_of_every_case():
    launched = json.loads(run_compiling(RECORD))
    facts = json.loads(SCRIPT.with_name("compiled_kernels.json").read_text())
    assert facts.keys() == launched.keys(), "run: python .ci/compile_kernels.py --write"
    for case, kernels in launched.items():
        assert {name.partition(" #")[0] for name in facts[case]} == set(kernels), f"{case}: run it with --write"
        for name, found in facts[case].items():
            assert found["spilled"] == 0, f"{name} ({case}) spills"
