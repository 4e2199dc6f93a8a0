import numpy as np
import pytest
from PIL import Image

from moe_kernels.models import figures, files
from moe_kernels.models.transfer import pictures, report


def result(dtnh: bool, seed: int = 0, method: str = "l2-sp", **changes):
    run = {"source": "s", "data": "t", "method": method, "dtnh": dtnh, "seed": seed, "coefficient": 0.1}
    history = [
        {
            "step": 10 * i,
            "empirical_loss": 2.0 - i / (3 + dtnh) + 0.1 * seed,
            "test_loss": 2.5 - i / (4 + dtnh),
            "test_accuracy": 0.1 * i,
            "angle_to_loss": 20.0 - 5 * dtnh + i,
            "angle_to_regularizer": 70.0 + 5 * dtnh - i,
            **changes,
        }
        for i in range(1, 5)
    ]
    return {"run": run, "history": history, "final": history[-1]}


def colored(path, color) -> int:
    """How many pixels have a color."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        picture = np.asarray(image.convert("RGB")).astype(float) / 255
    return int((np.abs(picture - np.array(color)).max(-1) < 0.01).sum())


PLOTS = [pictures.plot_losses, pictures.plot_angles_to_loss, pictures.plot_angles_to_regularizer]


@pytest.mark.parametrize("plot", PLOTS)
def test_both_methods_are_in_the_picture(tmp_path, plot):
    plot([result(False), result(False, 1)], [result(True), result(True, 1)], tmp_path / "x.png")
    for color in figures.colors(2):
        assert colored(tmp_path / "x.png", color) > 100
    assert not list(tmp_path.glob(".*"))


def test_the_angles_have_the_papers_numbers(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(
        figures,
        "save",
        lambda figure, path: texts.extend(t.get_text() for t in figure.axes[0].get_legend().get_texts()),
    )
    for plot in PLOTS[1:]:
        plot([result(False)], [result(True)], tmp_path / "x.png")
    assert texts == ["angle 3: L2-SP", "angle 1: DTNH(L2-SP)", "angle 4: L2-SP", "angle 2: DTNH(L2-SP)"]


def test_a_curve_is_the_mean_over_seeds(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(figures, "save", lambda figure, path: lines.extend(figure.axes[0].get_lines()))
    pictures.plot_losses([result(False), result(False, 1)], [result(True)], tmp_path / "x.png")
    assert lines[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert lines[0].get_ydata() == pytest.approx([2.05 - i / 3 for i in range(1, 5)])


def test_what_was_not_measured_is_told(tmp_path):
    with pytest.raises(ValueError, match="results of L2-SP have no angle_to_loss: run it with measure=True"):
        pictures.plot_angles_to_loss([result(False, angle_to_loss=None)], [result(True)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one finished run"):
        pictures.plot_losses([], [result(True)], tmp_path / "x.png")


def test_the_report_has_tables_coefficients_and_the_curves_of_every_pair(tmp_path):
    unmeasured = {"angle_to_loss": None, "angle_to_regularizer": None}
    results = [
        *(result(dtnh, seed) for dtnh in (False, True) for seed in (0, 1)),
        result(False, method="know-dist", **unmeasured),
        result(True, method="know-dist"),
        result(True, method="delta"),
        result(False, method="fine-tuning"),
    ]
    more = [report.report.Section("What is more", ["More."])]
    (table,) = report.write(tmp_path, "Title", results, more)
    assert table.columns == ("Fine-tuning", "L2-SP", "DTNH(L2-SP)", "KnowDist", "DTNH(KnowDist)", "DTNH(DELTA)")
    text = (tmp_path / "report.md").read_text()
    assert "| t | **40.00** |" in text
    assert "| s | t | DTNH(DELTA) | 0.1 |" in text
    assert text.index("## Coefficients") < text.index("## What is more") < text.index("losses.png")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "s-t-know-dist-losses.png",
        "s-t-l2-sp-angles-to-loss.png",
        "s-t-l2-sp-angles-to-regularizer.png",
        "s-t-l2-sp-losses.png",
    ]
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 4
    assert files.read_json(tmp_path / "results.json")["tables"][0]["source"] == "s"
    assert "λ is 0.1 of L2-SP and 0.1 of DTNH(L2-SP)." in text
    assert "other coefficient" not in text


def test_the_report_says_what_coefficients_it_compares_and_what_diverged(tmp_path):
    results = [result(dtnh, seed) for dtnh in (False, True) for seed in (0, 1)]
    for one in results[2:]:
        one["run"]["coefficient"] = 0.5
    results.insert(0, {**result(False, 2), "final": None, "history": []})
    report.write(tmp_path, "Title", results)
    text = (tmp_path / "report.md").read_text()
    note = "λ is 0.1 of L2-SP and 0.5 of DTNH(L2-SP): what is seen is the effect of both, the projection and the other"
    assert text.count(note) == 3
    assert "| 40.00 ± 0.00, 1 of 3 diverged | **40.00 ± 0.00** |" in text
