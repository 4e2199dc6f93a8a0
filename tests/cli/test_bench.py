"""moe-kernels bench: what it writes, and what it refuses."""

import functools
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.benchmarks import memory, registry
from moe_kernels.benchmarks.candidates import FORWARD, OURS
from moe_kernels.benchmarks.harness import Case
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.workloads import QUICK
from moe_kernels.cli import app, bench


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling every candidate takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


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
        assert document["command"] == (
            "moe-kernels bench --rounds=3 --stopwatch=wall --quick --threads=1 --dtype=float32"
        )
        assert {"moe-kernels", "python", "torch"} <= set(document["versions"])
        assert None not in document["versions"].values()
        assert document["machine"]["threads"] == 1
        assert document["machine"]["cores"] >= 1
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", document["commit"] or "0" * 40)
        for case in document["cases"]:
            assert case["rates"]["flops"] > 0 < case["rates"]["bytes"]
            for row in case["rows"]:
                assert len(row["seconds"]) == (0 if row["note"] else bench.QUICK_ROUNDS)
                assert row["candidate"] in result.output
        assert f"{operator}, {registry.BENCHMARKS[operator].quick[0]}, " in result.output
    assert "these figures mean nothing" in result.output


def test_chosen_operator_rounds_and_dtype(tmp_path):
    result = invoke("dispatch", "--quick", "--rounds", 2, "--dtype", "bfloat16", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["rounds"] == 2
    assert {case["workload"]["dtype"] for case in document["cases"]} == {"bfloat16"}
    assert document["command"] == "moe-kernels bench dispatch --rounds=2 --stopwatch=wall --quick --dtype=bfloat16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], [*registry.BENCHMARKS, "'nonsense'"]),
        (["routing", "nonsense"], [*registry.BENCHMARKS, "'nonsense'"]),
        (["--dtype", "int8"], ["float32", "bfloat16", "float16", "'int8'"]),
        (["--suite", "tiny"], ["batch", "image", "large", "resnet18", "'tiny'"]),
        (["grad_projection", "--suite", "batch"], ["resnet18", "vit_small", "many", "'batch'"]),
        (["routing", "grad_projection", "--suite", "batch"], ["grad_projection has the suites resnet18", "batch"]),
        (["--stopwatch", "sun"], ["wall", "graph", "'sun'"]),
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


ON_TOKENS = {"routing", "dispatch", "expert_ffn", "moe_layer"}
ON_MAPS = set(registry.BENCHMARKS) - ON_TOKENS - {"grad_projection"}


@pytest.mark.parametrize(
    ("suites", "operators"),
    [
        ([], set(registry.BENCHMARKS)),
        (["image"], ON_TOKENS),
        (["many"], {"grad_projection"}),
        (["image", "many"], {*ON_TOKENS, "grad_projection"}),
        (["vgg16"], {"hypercolumn"}),
        (["pyramid"], {"diverse_sampling"}),
    ],
)
def test_suites_are_of_the_operators_that_have_them(suites, operators):
    cpu = torch.device("cpu")
    chosen = bench._chosen(cpu, [], suites, None, False)
    assert set(chosen) == operators
    for operator, workloads in chosen.items():
        of_operator = registry.BENCHMARKS[operator].suites["cpu"]
        assert workloads == [w for name in suites or of_operator for w in of_operator.get(name, ())]


def test_a_gpu_has_dtypes_and_suites_of_its_own():
    gpu = torch.device("cuda")
    usual = bench._chosen(gpu, [], [], None, False)
    assert {operator: workloads[0].dtype for operator, workloads in usual.items()} == {
        **dict.fromkeys(registry.BENCHMARKS, "bfloat16"),
        "grad_projection": "float32",
        **dict.fromkeys(ON_MAPS, "float16"),
    }
    assert bench._chosen(gpu, [], ["vit_base"], "float16", False)["grad_projection"][0].dtype == "float16"


def test_ours_out_of_budget_is_written_and_fails(tmp_path, monkeypatch):
    def cases(operator, workloads, device):
        right = {"y": torch.ones(5)}
        candidates = {OURS: lambda: {"y": torch.zeros(5)}, "plain": lambda: right}
        yield Case(operator, QUICK[0], FORWARD, candidates, lambda: right, plain="plain", work=Work(1, 1))

    monkeypatch.setattr(registry, "cases", cases)
    result = invoke("routing", "--quick", "--out", tmp_path)
    assert result.exit_code == 1
    case = "routing, T=40 d=16 h=32 E=4 k=1 balanced float32, forward"
    assert f"ours has no speed: {case}: forward error 1.0e+00" in result.stderr
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graphs_need_a_cuda_device(tmp_path):
    result = invoke("routing", "--stopwatch", "graph", "--quick", "--out", tmp_path)
    assert result.exit_code == 2
    assert "needs a CUDA device, got cpu" in result.output


def test_suite_and_memory(tmp_path, monkeypatch):
    built, weighed = [], []

    def cases(operator, workloads, device):
        built.extend(workloads)
        right = {"y": torch.ones(5)}
        yield Case(
            operator, workloads[0], "forward+backward", {OURS: lambda: right, "plain": lambda: right}, lambda: right,
            plain="plain", work=Work(1, 1),
        )  # fmt: skip

    monkeypatch.setattr(registry, "cases", cases)
    monkeypatch.setattr(bench.limits, "probes", functools.partial(lambda original, *a, quick: original(*a, quick=True),
                                                                  bench.limits.probes))  # fmt: skip
    monkeypatch.setattr(memory, "weigh_rows", lambda case, result, device: weighed.append(case.operator))
    assert invoke("moe_layer", "--suite", "image", "--rounds", 1, "--out", tmp_path).exit_code == 0
    assert [workload.tokens for workload in built] == [197, 197]
    assert weighed == ["moe_layer"]
    assert invoke("moe_layer", "--suite", "image", "--rounds", 1, "--no-memory", "--out", tmp_path).exit_code == 0
    assert invoke("routing", "--suite", "image", "--rounds", 1, "--out", tmp_path).exit_code == 0
    assert weighed == ["moe_layer"]
