"""What `.ci/compile_cuda.py` reports, and that its file knows every kernel (no compiling here)."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "compile_cuda.py"
KERNEL = "update_kernel<2> (grad_projection, sm_90)"
GOOD = {"registers": 96, "spilled": 0, "shared": 240}
LOG = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN11moe_kernels4cuda56_GLOBAL__N__9b_868113update_kernelILNS1_6UpdateE3EEEvS5_' for 'sm_90'
ptxas info    : Function properties for _ZN11moe_kernels4cuda56_GLOBAL__N__9b_868113update_kernelILNS1_6UpdateE3EEEvS5_
    48 bytes stack frame, 40 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size, 180 bytes smem, 512 bytes cmem[0]
ptxas info    : Function properties for __internal_accurate_pow
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN11moe_kernels56_GLOBAL__N__9b_868113settle_kernelENS1_6RangesE' for 'sm_90'
ptxas info    : Function properties for _ZN11moe_kernels56_GLOBAL__N__9b_868113settle_kernelENS1_6RangesE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""  # noqa: E501


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("compile_cuda", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_facts_are_what_the_assembler_says(gate):
    assert gate.facts_of(LOG, "op, sm_90") == {
        "update_kernel<3> (op, sm_90)": {"registers": 128, "spilled": 104, "shared": 180},
        "settle_kernel (op, sm_90)": {"registers": 40, "spilled": 0, "shared": 0},
    }


@pytest.mark.parametrize("registers", [80, 96])
def test_no_change_for_the_worse_is_no_problem(gate, registers):
    assert gate.problems({KERNEL: {**GOOD, "registers": registers}}, {KERNEL: GOOD}) == []
    assert gate.problems({KERNEL: GOOD}, {}) == []


def test_change_for_the_worse_names_the_kernel(gate):
    assert gate.problems({KERNEL: {**GOOD, "spilled": 24}}, {KERNEL: GOOD}) == [
        f"{KERNEL} spills 24 bytes of registers"
    ]
    assert gate.problems({KERNEL: {**GOOD, "registers": 136}}, {KERNEL: GOOD}) == [
        f"{KERNEL} needs 136 registers, before 96: fewer threads at once"
    ]
    (gone,) = gate.problems({}, {KERNEL: GOOD})
    assert gone.startswith(f"{KERNEL} is gone")


def test_file_knows_every_kernel():
    facts = json.loads(SCRIPT.with_name("compiled_cuda.json").read_text())
    kernels = {
        (name, source.stem, arch)
        for source in (ROOT / "csrc/cuda").glob("*.cu")
        for name in re.findall(r"\b(\w+_kernel)\(", source.read_text())
        for arch in ("80", "90")
    }
    assert kernels == {re.fullmatch(r"(\w+)(?:<\d>)? \((\w+), sm_(\d+)\)", name).groups() for name in facts}
    assert not any(found["spilled"] for found in facts.values())
