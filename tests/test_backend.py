"""Which backend runs where: the choice, what a forced one says that cannot run, and the interpreter's place."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import moe_kernels.ops.expert_ffn
import moe_kernels.ops.hypercolumn
import moe_kernels.ops.routing  # noqa: F401
from moe_kernels import backend, triton
from moe_kernels.ops.dispatch import dispatch, gather
from moe_kernels.reference import dispatch as reference

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
INTERPRETING = pytest.mark.skipif(
    bool(backend.refusal("triton", "cpu")), reason="needs triton and TRITON_INTERPRET=1, which is not set with a GPU"
)


class Properties:
    def __init__(self, major: int, minor: int) -> None:
        self.major, self.minor = major, minor


@pytest.fixture
def cuda_extension(monkeypatch):
    """The CUDA extension built for a list of architectures, as far as the choice looks."""

    def pretend(architectures: str) -> None:
        monkeypatch.setattr(backend, "cuda_extension_problem", "")
        monkeypatch.setattr(backend, "_cuda_architectures", architectures)

    return pretend


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability, as far as the choice looks."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: Properties(major, minor))

    return pretend


def test_the_interpreter_is_never_chosen_by_itself():
    assert backend.choose("routing", "cpu") in ("cpp", "reference")


def test_triton_is_chosen_on_a_gpu(gpu):
    gpu(9, 0)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        assert backend.choose("routing", "cuda", dtype) == "triton"
    chosen = {row.operator: row.backend for row in backend.report() if row.device == "cuda"}
    assert {chosen.pop(operator) for operator in ("routing", "dispatch", "expert_ffn", "hypercolumn")} == {"triton"}
    assert chosen.keys() == {"grad_projection", "diverse_sampling"}


def test_cuda_is_chosen_on_a_gpu_it_was_built_for(gpu, cuda_extension):
    gpu(9, 0)
    cuda_extension("8.0;9.0+PTX")
    for operator in ("grad_projection", "diverse_sampling"):
        for dtype in (None, torch.float32, torch.bfloat16):
            assert backend.choose(operator, "cuda", dtype) == "cuda"
    assert backend.choose("grad_projection", "cuda", torch.float64) == "cuda"
    gpu(7, 5)
    assert backend.choose("grad_projection", "cuda") == "reference"
    problem = r"the CUDA kernels were built for 8\.0;9\.0\+PTX, this device is of 7\.5"
    with backend.force("cuda"), pytest.raises(RuntimeError, match=problem):
        backend.choose("grad_projection", "cuda")


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("8.6+PTX", [(8, 6), (9, 0), (12, 0)], [(8, 0)]),
        ("8.0 9.0a", [(8, 6), (9, 0)], [(10, 0)]),
        ("10.0f", [(10, 0)], [(9, 0), (10, 3)]),
    ],
)
def test_machine_code_is_for_its_generation_and_ptx_for_all_later_ones(gpu, cuda_extension, built, runs, does_not):
    cuda_extension(built)
    for capability in runs:
        gpu(*capability)
        assert backend.refusal("cuda", "cuda") == ""
    for capability in does_not:
        gpu(*capability)
        assert built in backend.refusal("cuda", "cuda")


@pytest.mark.skipif(bool(backend.refusal("cpp", "cpu")), reason="the C++ kernels were not built")
def test_reason_is_why_no_faster_backend_was_chosen():
    assert {row.reason for row in backend.report() if row.device == "cpu"} == {"the fastest that is here"}


def test_missing_cuda_extension_is_the_references_and_said(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(backend, "cuda_extension_problem", "moe_kernels._C_cuda was not built")
    assert backend.choose("grad_projection", "cuda") == "reference"
    (row,) = [row for row in backend.report() if (row.operator, row.device) == ("grad_projection", "cuda")]
    assert "cuda: moe_kernels._C_cuda was not built" in row.reason


def test_torch_for_the_cpu_takes_no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backend._load_cuda().startswith("the CUDA kernels need a torch for CUDA, got torch ")


def test_backend_without_a_kernel_for_the_operator_is_said():
    for name, operator in (("triton", "grad_projection"), ("cuda", "routing")):
        others = ", ".join(backend.OPERATORS[operator])
        problem = f"'{name}' was forced and cannot run: {operator} has no kernel there; it has {others}"
        with backend.force(name), pytest.raises(RuntimeError, match=problem):
            backend.choose(operator, "cuda")


@pytest.mark.parametrize(("name", "operator"), [("triton", "routing"), ("cuda", "diverse_sampling")])
def test_float64_on_a_gpu_is_the_references(gpu, cuda_extension, name, operator):
    gpu(9, 0)
    cuda_extension("9.0")
    assert backend.choose(operator, "cuda", torch.float64) == "reference"
    with (
        backend.force(name),
        pytest.raises(RuntimeError, match=rf"'{name}' was forced .*float16 .*got torch\.float64"),
    ):
        backend.choose(operator, "cuda", torch.float64)


def test_old_gpu_is_the_references_and_said(gpu):
    gpu(7, 5)
    assert backend.choose("routing", "cuda", torch.float16) == "reference"
    with backend.force("triton"), pytest.raises(RuntimeError, match=r"need compute capability 8\.0, got 7\.5"):
        backend.choose("routing", "cuda", torch.float16)


def test_missing_triton_is_said(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(backend, "_triton_installed", False)
    assert backend.choose("routing", "cuda") == "reference"
    assert backend.refusal("triton", "cuda") == "triton is not installed"


@NO_GPU
def test_machine_without_a_gpu_is_said():
    assert backend.refusal("triton", "cuda") == "torch sees no CUDA device"
    assert backend.refusal("cuda", "cuda") == (backend.cuda_extension_problem or "torch sees no CUDA device")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend.force("triton"), pytest.raises(RuntimeError, match=r"forced and cannot run: .*TRITON_INTERPRET=1"):
        dispatch(torch.zeros(3, 1, dtype=torch.int64), 2)


def test_other_devices_are_named():
    assert "got xpu" in backend.refusal("triton", "xpu")
    assert "got xpu" in backend.refusal("cpp", "xpu")
    assert "got xpu" in backend.refusal("cuda", "xpu")


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_meta_tensors_need_no_kernel(name):
    with backend.force(name):
        plan = dispatch(torch.zeros(3, 2, dtype=torch.int64, device="meta"), 4)
    assert [tuple(t.shape) for t in plan] == [(6,), (5,), (3, 2), (3, 2)]


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="expected one of cpp, cuda, triton, reference, got 'c'"), backend.force("c"):
        pass


@INTERPRETING
def test_nested_force_restores_the_kernels(monkeypatch):
    """Which kernel ran is seen by what a replaced Triton function leaves behind."""
    from moe_kernels.triton import dispatch as kernels

    ran = []

    def spy(x, order, offsets, inverse):
        ran.append("triton")
        return reference.gather(x, order, offsets, inverse)

    monkeypatch.setattr(kernels, "gather", spy)
    x, plan = torch.randn(3, 4), dispatch(torch.tensor([[0], [1], [0]]), 2)
    other = "reference" if backend.refusal("cpp", "cpu") else "cpp"

    def count() -> int:
        ran.clear()
        gather(x, plan)
        return len(ran)

    with backend.force("triton"):
        assert count() == 1
        with backend.force(other):
            assert count() == 0
        with backend.force("triton"):
            assert count() == 1
        assert count() == 1
    assert count() == 0
    with pytest.raises(ZeroDivisionError), backend.force("triton"):
        raise ZeroDivisionError
    assert count() == 0


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MOE_KERNELS_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_does_not_import_triton():
    code = "import sys, moe_kernels.ops.dispatch, moe_kernels.ops.routing; print('triton' in sys.modules)"
    assert run_python(code) == "False"


@INTERPRETING
def test_environment_forces_the_interpreter():
    code = """
import sys, torch
from moe_kernels.ops.dispatch import dispatch
print(dispatch(torch.tensor([[1], [0]]), 2).order.tolist(), 'moe_kernels.triton.dispatch' in sys.modules)
"""
    assert run_python(code, MOE_KERNELS_BACKEND="triton", TRITON_INTERPRET="1") == "[1, 0] True"


def test_every_operator_is_registered_for_a_gpu():
    for operator, module in triton.MODULES.items():
        assert hasattr(torch.ops.moe_kernels, operator)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{operator}", "CUDA")
        if importlib.util.find_spec("triton") is not None:
            assert callable(getattr(importlib.import_module(f"moe_kernels.triton.{module}"), operator))


@pytest.mark.skipif(bool(backend.cuda_extension_problem), reason=backend.cuda_extension_problem or "loaded")
def test_cuda_extension_registers_its_operators():
    import moe_kernels.ops.diverse_sampling
    import moe_kernels.ops.grad_projection  # noqa: F401

    steps = ("grad_projection", "grad_projection_moments", "grad_projection_sgd", "grad_projection_adamw")
    for operator in (*steps, "diverse_sampling", "farthest_points"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{operator}", "CUDA")
