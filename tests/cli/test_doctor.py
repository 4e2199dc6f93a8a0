"""moe-kernels doctor: what it reports and what it advises, from the real machine and from made-up ones."""

import json

import pytest
from typer.testing import CliRunner

from moe_kernels import backend
from moe_kernels.cli import app, doctor

COMPLETE = {
    "versions": dict.fromkeys((*doctor.CORE, *doctor.EXTRA, *doctor.OPTIONAL), "1.0"),
    "devices": [],
    "extension": {"status": "loaded"},
    "cuda_extension": {"status": "loaded"},
    "operators": [],
}


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_every_section():
    report = json.loads(invoke("doctor", "--json"))
    assert set(report) == {"versions", "devices", "extension", "cuda_extension", "operators", "advice"}
    assert report["versions"]["torch"] is not None
    assert {row["operator"] for row in report["operators"]} == set(backend.OPERATORS)
    assert report["devices"][0]["device"] == "cpu"


def test_text_names_operators_backends_and_isa():
    text = invoke("doctor")
    for name in (*backend.OPERATORS, "What to do", "same bits"):
        assert name in text
    state = doctor.extension()
    assert state.get("isa", "not built") in text


def test_forced_backend_is_reported_with_its_determinism():
    with backend.force("reference"):
        rows = doctor.operators()
    assert {row["backend"] for row in rows} == {"reference"}
    assert {row["determinism"] for row in rows if row["device"] == "cpu"} == {doctor.SAME_THREADS}


def test_our_own_sums_are_said_not_to_depend_on_threads():
    pytest.importorskip("moe_kernels._C", reason="the C++ extension is not built")
    with backend.force("cpp"):
        rows = doctor.operators()
    assert {row["operator"] for row in rows if row["determinism"] == doctor.ANY_THREADS} == set(backend.OPERATORS)


def test_backend_that_cannot_run_is_a_line_and_not_a_crash():
    with backend.force("cuda"):
        report = doctor.examine()
    assert {row["backend"] for row in report["operators"] if row["device"] == "cpu"} == {"none"}
    assert report["advice"][0].startswith("routing on cpu, ")
    assert "MOE_KERNELS_BACKEND" in report["advice"][0]
    text = doctor.render(report)
    assert "forced: the CUDA kernels run on cuda tensors, got cpu" in text
    assert "forced: routing has no kernel there; it has cpp, triton, reference" in text


def test_complete_installation_needs_nothing():
    assert doctor.advice(COMPLETE) == []


def test_missing_extra_is_named_with_the_command():
    report = {**COMPLETE, "versions": {**COMPLETE["versions"], "timm": None}}
    (step,) = doctor.advice(report)
    assert "timm" in step
    assert 'pip install "moe-kernels[models]"' in step


def test_missing_triton_and_transformers_are_nobodys_loss():
    versions = {**COMPLETE["versions"], **dict.fromkeys(doctor.OPTIONAL)}
    assert doctor.advice({**COMPLETE, "versions": versions}) == []


@pytest.mark.parametrize(("compiler", "steps"), [("sh", 1), ("no-such-compiler", 2)])
def test_missing_extension_tells_how_to_build_it(monkeypatch, compiler, steps):
    monkeypatch.setenv("CXX", compiler)
    advice = doctor.advice({**COMPLETE, "extension": {"status": "absent"}})
    assert len(advice) == steps
    assert "MOE_KERNELS_REQUIRE_EXT=1 pip install" in advice[-1]


def test_extension_that_does_not_load_shows_its_error():
    broken = {"status": "broken", "error": "undefined symbol"}
    text = doctor.render({**COMPLETE, "extension": broken, "cuda_extension": doctor.cuda_extension(), "advice": []})
    assert "undefined symbol" in text


def test_cuda_extension_says_what_it_was_built_for_or_why_it_is_not_there(monkeypatch):
    monkeypatch.setattr(backend, "cuda_extension_problem", "")
    built = {"cuda": "13.0", "cuda_arch": "8.0;9.0+PTX", "built_torch": "2.11.0", "torch_target": "2.10"}
    monkeypatch.setattr(backend, "cuda_extension", lambda: built)
    line = "built for 8.0;9.0+PTX by CUDA 13.0 with torch 2.11.0, for any torch >= 2.10 for CUDA 13"
    assert line in doctor.render(doctor.examine())
    monkeypatch.setattr(backend, "cuda_extension_problem", "it was not built")
    assert "it was not built" in doctor.render(doctor.examine())


def test_gpu_on_the_reference_is_said_with_the_reason():
    row = {"operator": "routing", "device": "cuda", "backend": "reference", "determinism": ""}
    (step,) = doctor.advice({**COMPLETE, "operators": [{**row, "reason": "triton: triton is not installed"}]})
    assert "GPU routing runs as plain PyTorch" in step
    assert "triton is not installed" in step


@pytest.mark.parametrize(
    ("device", "kernel", "determinism"),
    [
        ("cpu", "triton", doctor.SAME_DEVICE),
        ("cuda", "cuda", doctor.ANY_DEVICE),
        ("cuda", "reference", doctor.SAME_DEVICE),
    ],
)
def test_determinism_of_what_is_not_here(monkeypatch, device, kernel, determinism):
    monkeypatch.setattr(backend, "report", lambda: [backend.Choice("routing", device, kernel, "forced")])
    (row,) = doctor.operators()
    assert (row["backend"], row["determinism"]) == (kernel, determinism)
