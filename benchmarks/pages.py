"""Pages of Markdown, and files that are complete or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ABSENT = "–"


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A Markdown table; its first `text_columns` are aligned to the left, numbers to the right."""
    alignment = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return [f"| {' | '.join(line)} |" for line in (columns, alignment, *rows)]


def between_markers(page: str, begin: str, end: str, section: str) -> str:
    """`page` with `section` between its two markers. Raises ValueError where a marker is missing."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page lacks {begin} or {end}")
    return f"{before}{begin}\n{section}{end}{after}"


def rate(value: float, unit: str) -> str:
    """For example "4.21 TB/s"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


@contextmanager
def complete_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into. They replace those of `folder` at the end, none of them after an error."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
    try:
        yield unfinished
        for path in unfinished.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
