"""The installed package: its metadata, its command, what importing it may touch, and the facts of its build.

What takes a build (sdist, wheel, another torch, no compiler) is tested by .ci/packaging.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import moe_kernels
from moe_kernels import backend

ROOT = Path(__file__).resolve().parents[1]
NOT_CORE = {"matplotlib", "safetensors", "sklearn", "timm", "torchvision", "tqdm", "transformers", "triton"}


def run_python(code: str) -> str:
    """Output of ``code`` in a fresh process, outside the source tree."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def requirements(extra: str = "") -> set[str]:
    """Names that the distribution requires for an extra; for the core where none is named."""
    parsed = [Requirement(line) for line in importlib.metadata.requires("moe-kernels") or []]
    core = {entry.name for entry in parsed if not entry.marker or entry.marker.evaluate({"extra": ""})}
    if not extra:
        return core
    return {entry.name for entry in parsed if entry.marker and entry.marker.evaluate({"extra": extra})} - core


def test_version_is_stated_once():
    citation = (ROOT / "CITATION.cff").read_text()
    assert importlib.metadata.version("moe-kernels") == moe_kernels.__version__
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == moe_kernels.__version__
    assert f"## {moe_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_core_needs_three_packages_only():
    assert requirements() == {"torch", "numpy", "typer"}
    assert {"timm", "torchvision", "scikit-learn", "matplotlib"} <= requirements("models")


def test_metadata_has_lower_bounds_only():
    operators = {
        specifier.operator
        for line in importlib.metadata.requires("moe-kernels") or []
        for specifier in Requirement(line).specifier
    }
    assert operators == {">="}


def test_oldest_torch_is_stated_alike():
    bound = next(
        entry.specifier
        for entry in map(Requirement, importlib.metadata.requires("moe-kernels") or [])
        if entry.name == "torch"
    )
    oldest = re.search(r"^OLDEST_TORCH = \((\d+), (\d+)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert str(bound) == f">={oldest[1]}.{oldest[2]}"


def test_command_is_an_entry_point():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="moe-kernels")
    assert callable(entry.load())


def test_typing_marker_is_installed():
    assert (Path(moe_kernels.__file__).parent / "py.typed").exists()


def test_models_and_benchmarks_are_inside_the_package():
    names = ["moe_kernels.models", "moe_kernels.benchmarks", "models", "benchmarks"]
    code = f"from importlib.util import find_spec\nprint(*(find_spec(name) is not None for name in {names}))"
    assert run_python(code).split() == ["True", "True", "False", "False"]


@pytest.mark.parametrize("module", ["moe_kernels", "moe_kernels.nn", "moe_kernels.cli", "moe_kernels.cli.doctor"])
def test_import_is_lean(module):
    """No extra, no Triton and no CUDA context comes with the core, beside what torch itself imports."""
    code = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps([sorted(new), torch.cuda.is_initialized()]))"
    )
    imported, cuda_initialized = json.loads(run_python(code))
    assert not NOT_CORE & set(imported)
    assert not cuda_initialized


def test_core_imports_where_extras_and_triton_are_not_installed():
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(NOT_CORE)}))\n"
        "import moe_kernels.nn, moe_kernels.cli.doctor\n"
        "print('imported')"
    )
    assert run_python(code) == "imported\n"


def test_build_info():
    build = pytest.importorskip("moe_kernels._C", reason="the C++ extension is not built").build_info()
    assert all(isinstance(value, str) for value in build.values())
    assert build["isa"] in {"avx512", "avx2", "baseline"}
    assert build["torch_target"] == "2.10"
    assert int(build["cxx_standard"]) >= 17
    assert re.match(r"(gcc|clang) \d+", build["compiler"])
    assert re.match(r"2\.\d+\.\d+", build["built_torch"])


def test_build_info_of_the_cuda_extension():
    if backend.cuda_extension_problem:
        pytest.skip(backend.cuda_extension_problem)
    build = backend.cuda_extension()
    assert build["torch_target"] == "2.10"
    assert re.match(r"2\.\d+\.\d+", build["built_torch"])
    assert build["cuda"].partition(".")[0] == torch.version.cuda.partition(".")[0]
    assert re.match(r"\d+\.\d", build["cuda_arch"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_detected_isa_is_the_processors():
    build = pytest.importorskip("moe_kernels._C", reason="the C++ extension is not built").build_info()
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    expected = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "baseline"
    assert build["isa"] == expected
