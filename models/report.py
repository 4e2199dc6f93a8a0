"""What a study found, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import files


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then paragraphs, then a table (its first row the head), then a picture's file.

    A cell of the table that stands between two stars on each side is bold.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    picture: str | None = None


def write(folder: str | os.PathLike[str], title: str, sections: Iterable[Section]) -> None:
    """Write ``report.md`` and ``report.html`` into ``folder``; the HTML holds its pictures, the Markdown names them."""
    sections = list(sections)
    files.write_text(Path(folder) / "report.md", markdown(title, sections))
    files.write_text(Path(folder) / "report.html", page(title, sections, Path(folder)))


def markdown(title: str, sections: Iterable[Section]) -> str:
    """The report as Markdown."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.heading}")
        blocks += section.paragraphs
        if section.table:
            head, *body = (["" if cell is None else cell.replace("|", "\\|") for cell in row] for row in section.table)
            rule = ["---", *["---:"] * (len(head) - 1)]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body)))
        if section.picture:
            blocks.append(f"![{section.heading}]({section.picture})")
    return "\n\n".join(blocks) + "\n"


_STYLE = """ body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0
1rem; color: #222; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; } th:first-child,
td:first-child { text-align: left; } img { max-width: 100%; }
"""


def page(title: str, sections: Iterable[Section], folder: Path) -> str:
    """The report as one HTML page that needs no other file; pictures are read from ``folder``."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
        if section.table:
            rows = [
                "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in zip(["th", *["td"] * len(section.table)], section.table, strict=False)
            ]
            parts.append("<table>\n" + "\n".join(rows) + "\n</table>")
        if section.picture:
            data = base64.b64encode((folder / section.picture).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    bold = len(text) > 4 and text.startswith("**") and text.endswith("**")
    return f"<b>{html.escape(text[2:-2])}</b>" if bold else html.escape(text)
