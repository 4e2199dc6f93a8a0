import base64

from moe_kernels.models import report
from moe_kernels.models.report import Section


def test_markdown():
    text = report.markdown(
        "Title",
        [Section("First", ["One.", "Two."], [["model", "x|y"], ["a", "1"]]), Section("Second", picture="b.png")],
    )
    assert text == (
        "# Title\n\n## First\n\nOne.\n\nTwo.\n\n| model | x\\|y |\n| --- | ---: |\n| a | 1 |\n\n"
        "## Second\n\n![Second](b.png)\n"
    )


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path):
    picture = b"\x89PNG picture"
    (tmp_path / "b.png").write_bytes(picture)
    sections = [Section("<b>", ["5 < 6 & 7"], [["model"], ["<i>"]]), Section("Picture", picture="b.png")]
    report.write(tmp_path, "A & B", sections)
    page = (tmp_path / "report.html").read_text()
    assert "<title>A &amp; B</title>" in page
    assert "<h2>&lt;b&gt;</h2>" in page
    assert "<p>5 &lt; 6 &amp; 7</p>" in page
    assert "<th>model</th>" in page
    assert "<td>&lt;i&gt;</td>" in page
    encoded = base64.b64encode(picture).decode()
    assert f'src="data:image/png;base64,{encoded}"' in page
    assert "http" not in page
    assert (tmp_path / "report.md").read_text().startswith("# A & B\n")


def test_a_cell_between_stars_is_bold_in_both():
    sections = [Section("Best", table=[["model", "x"], ["a", "**1 < 2**"], ["b", "****"]])]
    assert "| a | **1 < 2** |" in report.markdown("T", sections)
    assert "<td><b>1 &lt; 2</b></td>" in report.page("T", sections, None)
    assert "<td>****</td>" in report.page("T", sections, None)
