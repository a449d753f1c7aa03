"""The SQuAD table as rows, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .pages import ABSENT, table_lines

COLUMNS = (
    "variant",
    "sparsity",
    "granularity",
    "bits",
    "EM",
    "F1",
    "seconds",
    "tokens/s",
    "peak memory",
    "speed-up",
)
PUBLISHED_LABEL = "published figures (another model, on another machine)"
PUBLISHED = (
    {
        "variant": "published, dense",
        "sparsity": 0.0,
        "em": 81.02,
        "f1": 88.63,
        "seconds": 95.41,
        "peak_memory_bytes": 6.85e9,
    },
    {
        "variant": "published, pruned",
        "sparsity": 0.9,
        "em": 79.62,
        "f1": 87.32,
        "seconds": 86.44,
        "peak_memory_bytes": 5.00e9,
    },
)
_TABLE_WIDTH = 120


def with_speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `speedup`: how many times as fast as the first row they are."""
    return [{**row, "speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]


def cells(row: dict[str, Any]) -> list[str]:
    """A row's texts, in the order of `COLUMNS`; a dash for what it does not have."""

    def text(field: str, form: str) -> str:
        value = row.get(field)
        return ABSENT if value is None else form.format(value)

    memory = row.get("peak_memory_bytes")
    return [
        row["variant"],
        text("sparsity", "{:.0%}"),
        text("granularity", "{}"),
        text("bits", "{}"),
        text("em", "{:.2f}"),
        text("f1", "{:.2f}"),
        text("seconds", "{:.2f}" if row["seconds"] >= 1 else "{:.3f}"),
        text("tokens_per_second", "{:,.0f}"),
        ABSENT if memory is None else f"{memory / 1e9:.2f} GB",
        text("speedup", "{:.2f}x"),
    ]


def print_table(results: dict[str, Any]) -> None:
    """Prints the rows, and the published ones under them."""
    from rich.console import Console
    from rich.table import Table

    title = f"SQuAD: {results['model']}, {results['data']['name']}, {results['device']}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = " ".join([f"The last two rows: {PUBLISHED_LABEL}.", *_notes(results)])
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(*cells(row))
    table.add_section()
    for row in with_speedups(PUBLISHED):
        table.add_row(*cells(row), style="dim")
    Console(width=max(Console().width, _TABLE_WIDTH)).print(table)  # a narrow terminal wraps, and no cell is cut


def markdown(results: dict[str, Any]) -> str:
    """The results as a page of Markdown, the published figures under them."""
    return "\n".join(["# SQuAD", "", *measured_lines(results), *published_lines()])


def published_lines() -> list[str]:
    """The published figures in Markdown."""
    return [f"The {PUBLISHED_LABEL}:", "", *_lines(with_speedups(PUBLISHED)), ""]


def measured_lines(results: dict[str, Any]) -> list[str]:
    """What was measured, where and how, in Markdown."""
    data, arguments = results["data"], results["arguments"]
    return [
        f"- Device: {results['device']}; commit {results['commit'] or 'unknown'}; {results['date']}",
        f"- Model: {results['model']}; data: {data['name']}, {data['questions']} questions in "
        f"{data['windows']} windows of {data['tokens']:,} tokens",
        f"- {arguments['dtype']}, batches of {arguments['batch_size']}, sorted by length",
        f"- Seconds: the model's pass over all windows, median of {arguments['repeats']} after one to warm up",
        f"- Peak memory: {results['peak_memory']}",
        f"- Averages from: {results['averages_from']}",
        *(f"- {note}" for note in _notes(results)),
        "",
        *_lines(results["rows"]),
        "",
    ]


def _notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to compare the rows."""
    if results["checkpoints"]["sparse"] == results["checkpoints"]["dense"]:
        return []
    epochs = len(results["checkpoints"]["sparse"]["losses"])
    more = f"{epochs} more epoch{'s' if epochs > 1 else ''}"
    return [f"Sparse rows: the dense rows' weights, trained for {more} with the mask applied."]


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    return table_lines(COLUMNS, [cells(row) for row in rows])
