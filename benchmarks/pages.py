"""Pages of Markdown, their pictures, and files that are complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

ABSENT = "–"
_WIDEST = 1000


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A Markdown table; its first `text_columns` are aligned to the left, numbers to the right."""
    alignment = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return [f"| {' | '.join(line)} |" for line in (columns, alignment, *rows)]


@dataclass(frozen=True)
class Table:
    """What is shown alike on the terminal and on pages: the first `text_columns` are aligned to the left."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    notes: Sequence[str] = ()

    def print(self) -> None:
        from rich.table import Table as Printed

        table = Printed(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.text_columns else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        print_uncut(table)
        for note in self.notes:
            print(note)

    def lines(self) -> list[str]:
        """In Markdown, with the notes above the table."""
        notes = [f"- {note}" for note in self.notes]
        return [*notes, *([""] if notes else []), *table_lines(self.columns, self.rows, self.text_columns)]


def print_uncut(table: rich.table.Table) -> None:
    """Prints a table as wide as its cells are; a narrow terminal wraps it."""
    from rich.console import Console

    wide = Console(width=_WIDEST).measure(table).maximum
    Console(width=max(Console().width, wide)).print(table)


def between_markers(page: str, begin: str, end: str, section: str) -> str:
    """`page` with `section` between its two markers. Raises ValueError where a marker is missing."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page lacks {begin} or {end}")
    return f"{before}{begin}\n{section}{end}{after}"


def save_svg(figure: Figure, path: Path) -> None:
    """Writes the figure so that the same results give the same file."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def row_name(*parts: str | None, bits: int | None) -> str:
    """For example "triton, tile, 3 bits". None stands for what a row does not have."""
    rounding = None if bits is None else f"{bits} bits"
    return ", ".join(part for part in (*parts, rounding) if part is not None)


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


def write_json(content: object, path: Path) -> None:
    """Writes a file that is complete or not there at all."""
    with complete_files(path.parent) as unfinished:
        (unfinished / path.name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
