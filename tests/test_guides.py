"""The Python examples of a guide run, one after the other in one session."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return [(page[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(page)]


def run(page, name):
    """Run the blocks of ``page``; lines in a traceback are those of the page."""
    session = {"__name__": name}
    for line, block in blocks(page):
        exec(compile("\n" * line + block, name, "exec"), session)


@pytest.mark.parametrize(("name", "module"), [("docs/transfer.md", "torchjd"), ("docs/segmentation.md", "torchvision")])
def test_examples_run(name, module):
    pytest.importorskip(module)
    page = (ROOT / name).read_text()
    assert len(blocks(page)) == page.count("```python")
    run(page, name)


def test_example_that_fails_is_found_on_its_line():
    page = "text\n\n```python\nx = 1\n```\n\n```python\nx += 1\nassert x == 3\n```\n"
    assert [line for line, _ in blocks(page)] == [3, 7]
    with pytest.raises(AssertionError) as error:
        run(page, "page.md")
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == ("page.md", 9)
