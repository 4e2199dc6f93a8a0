"""What was measured, written down: the JSON has everything, the tables say what is missing."""

import json

import pytest

from moe_kernels.benchmarks import report
from moe_kernels.benchmarks.harness import OURS, Result, Row
from moe_kernels.benchmarks.workloads import Workload

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "moe-kernels bench toy",
    "commit": None,
    "versions": {"moe-kernels": "1", "python": "3", "torch": "2"},
    "backend": "cpp",
    "machine": {
        "device": "cpu",
        "processor": "Toy CPU",
        "cores": 2,
        "threads": 1,
        "isa": "avx2",
        "accelerator": None,
    },
    "rounds": 3,
    "quick": False,
}
WORKLOAD = Workload(197, 2, "zipf")


def timed(name, median, to_ours, to_limit, **more):
    return Row(name, "", 1e-7, None, 1, [median], median, (median / 2, median * 2), to_ours, to_limit, **more)


FAST = Result(
    "toy",
    WORKLOAD,
    "forward",
    "plain",
    "bare",
    [
        timed(OURS, 0.002, 1.0, 1.25),
        timed("plain", 0.003, 1.5, 1.9),
        Row("peer", "does not run here: no | such kernel"),
        timed("bare", 0.0016, 0.8, 1.0),
    ],
)
SLOW = Result(
    "toy", WORKLOAD, "forward+backward", "plain", None, [timed(OURS, 1.0, 1.0, None), timed("plain", 0.5, 0.5, None)]
)
INACCURATE = Result(
    "toy", WORKLOAD, "forward", "plain", None, [Row(OURS, "forward error"), timed("plain", 1.0, None, None)]
)


def test_case_table_has_a_line_for_each_candidate_and_the_notes():
    assert report.case_rows(FAST) == [
        ["", "ms", "quartiles", "× ours", "× limit", "error", "gradient", "note"],
        ["ours", "2.00", "1.00–4.00", "1.00", "1.25", "1.0e-07", "–", ""],
        ["plain", "3.00", "1.50–6.00", "1.50", "1.90", "1.0e-07", "–", ""],
        ["peer", "–", "–", "–", "–", "–", "–", "does not run here: no | such kernel"],
        ["bare", "1.60", "0.800–3.20", "0.80", "1.00", "1.0e-07", "–", ""],
    ]


def test_case_table_without_notes_has_no_column_for_them():
    assert "note" not in report.case_rows(SLOW)[0]


def test_summary_names_the_fastest_peer_and_not_the_limit():
    assert report.summary_rows([FAST, SLOW, INACCURATE])[1:] == [
        ["T=197 k=2 zipf, forward", "2.00", "1.25", "plain", "1.50"],
        ["T=197 k=2 zipf, forward+backward", "1000", "–", "plain", "0.50"],
        ["T=197 k=2 zipf, forward", "–", "–", "plain", "–"],
    ]


def test_conclusion_counts_wins_and_losses():
    assert report.conclusion([FAST, SLOW, INACCURATE]) == (
        "Ours was ahead of the fastest peer in 1 of 2 cases; that peer took 0.50 to 1.50 times as long, median 1.00."
    )
    assert report.conclusion([INACCURATE]) == "No case could be compared."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23456, "1235"), (0.123456, "123"), (0.0123456, "12.3"), (1.23456e-5, "0.0123"), (None, "–")],
)
def test_times_have_three_digits(seconds, text):
    assert report._milliseconds(seconds) == text


def test_markdown_states_machine_method_and_command():
    page = report.markdown("toy", [FAST, SLOW], ENVIRONMENT)
    assert page.startswith("# toy, d=384 h=1536 E=6 float32, cpu\n")
    for text in (
        "`moe-kernels bench toy`",
        "commit unknown",
        "Toy CPU, 1 threads of 2 cores",
        "avx2",
        "torch 2",
        "cpp backend",
        "3 interleaved rounds",
        "## T=197 k=2 zipf, forward+backward",
        "no \\| such kernel",
    ):
        assert text in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 2) + (2 + 4) + (2 + 2)


def test_json_has_everything(tmp_path):
    paths = report.save(tmp_path / "new", "toy", [FAST, SLOW], ENVIRONMENT)
    assert [path.name for path in paths] == ["toy-cpu-2026-01-02-030405.json", "toy-cpu-2026-01-02-030405.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    document = json.loads(paths[0].read_text())
    assert {key: document[key] for key in ENVIRONMENT} == ENVIRONMENT
    assert set(document) == {"schema", "operator", "cases", *ENVIRONMENT}
    assert (document["schema"], document["operator"]) == (1, "toy")
    case, other = document["cases"]
    assert set(case) == {"operator", "workload", "direction", "plain", "limit", "rows"}
    assert case["workload"] == {
        "tokens": 197,
        "top_k": 2,
        "routing": "zipf",
        "dim": 384,
        "hidden_dim": 1536,
        "num_experts": 6,
        "projection_dim": 256,
        "dtype": "float32",
    }
    assert other["limit"] is None
    assert case["rows"][0] == {
        "candidate": "ours",
        "note": "",
        "forward_error": 1e-7,
        "gradient_error": None,
        "calls": 1,
        "seconds": [0.002],
        "median": 0.002,
        "quartiles": [0.001, 0.004],
        "ratio_to_ours": 1.0,
        "ratio_to_limit": 1.25,
    }
    assert case["rows"][2]["note"] == "does not run here: no | such kernel"
    assert paths[1].read_text() == report.markdown("toy", [FAST, SLOW], ENVIRONMENT)


def test_quick_figures_are_marked_in_their_name(tmp_path):
    (path, _) = report.save(tmp_path, "toy", [FAST], {**ENVIRONMENT, "quick": True})
    assert path.name == "toy-cpu-quick-2026-01-02-030405.json"
