"""What was measured, written down: the JSON has everything, the tables say what is missing."""

import dataclasses
import json
import sys

import pytest

from moe_kernels.benchmarks import parameter_lists, picture, pyramids, report
from moe_kernels.benchmarks.candidates import OURS
from moe_kernels.benchmarks.harness import Result, Row
from moe_kernels.benchmarks.limits import Rates, Work
from moe_kernels.benchmarks.workloads import Tokens

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
    "stopwatch": "wall",
    "quick": False,
}
WORKLOAD = Tokens(197, 2, "zipf")


MEASURED = (Work(2_000_000_000, 30_000_000), Rates(230e9, 12.3e9), 0.00125)


def timed(name, median, to_ours, to_bare, to_limit, **more):
    return Row(
        name,
        forward_error=1e-7,
        calls=1,
        rounds=1,
        seconds=[median],
        median=median,
        quartiles=(median / 2, median * 2),
        ratio_to_ours=to_ours,
        ratio_to_bare=to_bare,
        ratio_to_limit=to_limit,
        **more,
    )


FAST = Result(
    "toy",
    WORKLOAD,
    "forward",
    "plain",
    "bare",
    *MEASURED,
    [
        timed(OURS, 0.002, 1.0, 1.25, 1.6, peak_bytes=81_200_000),
        timed("plain", 0.003, 1.5, 1.9, 2.4, remarks=["unsteady: by 20%"], unsteady=True),
        Row("peer", "does not run here: no | such kernel"),
        timed("bare", 0.0016, 0.8, 1.0, 1.3),
    ],
)
SLOW = Result(
    "toy",
    WORKLOAD,
    "forward+backward",
    "plain",
    None,
    *MEASURED,
    [timed(OURS, 1.0, 1.0, None, 2.0), timed("plain", 0.5, 0.5, None, 1.0)],
)
INACCURATE = Result(
    "toy",
    WORKLOAD,
    "forward",
    "plain",
    None,
    *MEASURED,
    [Row(OURS, "forward error"), timed("plain", 1.0, None, None, None)],
)
SIZES = "T=197 d=384 h=1536 E=6 k=2 zipf float32"


def test_case_table_has_a_line_for_each_candidate_and_the_notes():
    assert report.case_rows(FAST) == [
        ["", "ms", "quartiles", "× ours", "× bare", "× limit", "MB", "error", "note"],
        ["ours", "2.00", "1.00–4.00", "1.00", "1.25", "1.60", "81.2", "1.0e-07", ""],
        ["plain", "3.00", "1.50–6.00", "1.50", "1.90", "2.40", "–", "1.0e-07", "unsteady: by 20%"],
        ["peer", "–", "–", "–", "–", "–", "–", "–", "does not run here: no | such kernel"],
        ["bare", "1.60", "0.800–3.20", "0.80", "1.00", "1.30", "–", "1.0e-07", ""],
    ]


def test_case_table_has_no_column_without_an_entry():
    assert report.case_rows(SLOW)[0] == ["", "ms", "quartiles", "× ours", "× limit", "error"]


def test_limit_says_what_it_is_made_of():
    assert report.limit(FAST) == "Limit 1.25 ms: 2 GFLOP at 230 GFLOP/s, 30 MB at 12.3 GB/s."


def test_summary_names_the_fastest_peer_and_not_the_bare_one():
    assert report.summary_rows([FAST, SLOW, INACCURATE])[1:] == [
        [f"{SIZES}, forward", "2.00", "1.25", "1.60", "plain", "1.50", "1"],
        [f"{SIZES}, forward+backward", "1000", "–", "2.00", "plain", "0.50", "0"],
        [f"{SIZES}, forward", "–", "–", "–", "plain", "–", "0"],
    ]


def test_conclusion_counts_wins_and_losses():
    assert report.conclusion([FAST, SLOW, INACCURATE]) == (
        "Ours was ahead of the fastest peer in 1 of 2 cases; that peer took 0.50 to 1.50 times as long, median 1.00. "
        "Unsteady: 1 of 6 times."
    )
    assert report.conclusion([SLOW]).endswith("All times were steady.")
    assert report.conclusion([INACCURATE]) == "No case could be compared."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23456, "1235"), (0.123456, "123"), (0.0123456, "12.3"), (1.23456e-5, "0.0123"), (None, "–")],
)
def test_times_have_three_digits(seconds, text):
    assert report._milliseconds(seconds) == text


def test_markdown_states_machine_method_and_command():
    page = report.markdown("toy", [FAST, SLOW], ENVIRONMENT, "toy.png")
    assert page.startswith("# toy, cpu\n")
    assert "![Times by candidate](toy.png)" in page
    assert "![" not in report.markdown("toy", [FAST, SLOW], ENVIRONMENT, None)
    for text in (
        "`moe-kernels bench toy`",
        "commit unknown",
        "Toy CPU, 1 threads of 2 cores",
        "avx2",
        "torch 2",
        "cpp backend",
        "3 interleaved rounds by wall time",
        f"## {SIZES}, forward+backward",
        "Limit 1.25 ms: 2 GFLOP",
        "no \\| such kernel",
    ):
        assert text in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 2) + (2 + 4) + (2 + 2)


def test_json_has_everything(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.save(tmp_path / "new", "toy", [FAST, SLOW], ENVIRONMENT)
    stem = "toy-cpu-2026-01-02-030405"
    assert [path.name for path in paths] == [f"{stem}.json", f"{stem}.md", f"{stem}.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    document = json.loads(paths[0].read_text())
    assert {key: document[key] for key in ENVIRONMENT} == ENVIRONMENT
    assert set(document) == {"schema", "operator", "cases", *ENVIRONMENT}
    assert (document["schema"], document["operator"]) == (2, "toy")
    case, other = document["cases"]
    assert set(case) == {
        "operator", "workload", "direction", "plain", "bare", "work", "rates", "limit_seconds", "rows"
    }  # fmt: skip
    assert (case["work"], case["rates"]) == (
        {"flops": 2_000_000_000, "bytes": 30_000_000},
        {"flops": 230e9, "bytes": 12.3e9},
    )
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
    assert other["bare"] is None
    assert case["rows"][0] == {
        "candidate": "ours",
        "note": "",
        "remarks": [],
        "forward_error": 1e-7,
        "gradient_error": None,
        "calls": 1,
        "rounds": 1,
        "seconds": [0.002],
        "median": 0.002,
        "quartiles": [0.001, 0.004],
        "unsteady": False,
        "ratio_to_ours": 1.0,
        "ratio_to_bare": 1.25,
        "ratio_to_limit": 1.6,
        "peak_bytes": 81_200_000,
    }
    assert case["rows"][2]["note"] == "does not run here: no | such kernel"
    assert paths[1].read_text() == report.markdown("toy", [FAST, SLOW], ENVIRONMENT, paths[2].name)


def test_quick_figures_are_marked_in_their_name(tmp_path):
    path, *_ = report.save(tmp_path, "toy", [FAST], {**ENVIRONMENT, "quick": True})
    assert path.name == "toy-cpu-quick-2026-01-02-030405.json"


def test_picture_is_drawn_from_the_json_alone(tmp_path):
    pytest.importorskip("matplotlib")
    document = json.loads(json.dumps(report.document("toy", [FAST, SLOW, INACCURATE], ENVIRONMENT)))
    assert picture.draw(document, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_parameter_lists(tmp_path):
    pytest.importorskip("matplotlib")
    lists = [dataclasses.replace(FAST, workload=parameter_lists.ParameterList(name)) for name in ("few", "many")]
    document = json.loads(json.dumps(report.document("toy", lists, ENVIRONMENT)))
    assert document["cases"][0]["workload"] == {"model": "few", "dtype": "float32"}
    assert picture.draw(document, tmp_path / "toy.png")


def test_picture_of_feature_maps(tmp_path):
    pytest.importorskip("matplotlib")
    few = dataclasses.replace(FAST, workload=pyramids.FeatureMaps("few"))
    document = json.loads(json.dumps(report.document("toy", [few], ENVIRONMENT)))
    assert document["cases"][0]["workload"]["layout"] == "pyramid"
    assert picture.draw(document, tmp_path / "toy.png")


def test_picture_of_a_run_that_is_not_finished(tmp_path):
    pytest.importorskip("matplotlib")
    other = dataclasses.replace(FAST, workload=Tokens(40, 1, "balanced"))
    document = json.loads(json.dumps(report.document("toy", [FAST, SLOW, other], ENVIRONMENT)))
    assert picture.draw(document, tmp_path / "toy.png")


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths = report.save(tmp_path, "toy", [FAST, SLOW], ENVIRONMENT)
    assert [path.suffix for path in paths] == [".json", ".md"]
    assert "![" not in paths[1].read_text()
