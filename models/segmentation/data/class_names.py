"""The file class_names.txt: what the numbers in masks stand for."""

from __future__ import annotations

from pathlib import Path

FILE = "class_names.txt"


def read(folder: Path) -> tuple[str, ...]:
    """The classes in the order of their numbers, from 1: a line each; empty where there is no such file.

    Lines with a leading _ do not count (``_background_``).

    Raises:
        ValueError: it is not UTF-8, or names no class.
    """
    file = folder / FILE
    if not file.is_file():
        return ()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    names = tuple(line for line in lines if line and not line.startswith("_"))
    if not names:
        raise ValueError(f"{file} must have a line for each class, got none")
    return names
