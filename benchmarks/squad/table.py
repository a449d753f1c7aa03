"""The SQuAD table as rows, on the terminal and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..pages import ABSENT, print_uncut, table_lines
from .command import command_line

COLUMNS = (
    "variant",
    "mask",
    "bits",
    "EM",
    "F1",
    "seconds",
    "windows/s",
    "tokens/s",
    "padded tokens",
    "of matrix rate",
    "peak memory",
    "energy",
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
_SAME_DENSITY = 0.002
_ROW_WIDTHS = (21, 12, 4, 6, 6, 8, 9, 9, 13, 14, 11, 9, 8)  # of printed rows, before the widest of all is known


def with_speedups(rows: Sequence[dict[str, Any]], baseline: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows with `speedup`: how many times as fast as `baseline`, or else the first row, they are."""
    return [{**row, "speedup": (baseline or rows[0])["seconds"] / row["seconds"]} for row in rows]


def is_own(row: dict[str, Any]) -> bool:
    """Whether a row is this package's attention, not a peer's."""
    return row.get("attention") == "sparse"


def cells(row: dict[str, Any]) -> list[str]:
    """A row's texts, in the order of `COLUMNS`; a dash for what it does not have."""

    def text(field: str, form: str) -> str:
        value = row.get(field)
        return ABSENT if value is None else form.format(value)

    memory, padded = row.get("peak_memory_bytes"), row.get("padded_tokens")
    return [
        row["variant"],
        mask_text(row),
        text("bits", "{}"),
        text("em", "{:.2f}") + _deviation(row, "em"),
        text("f1", "{:.2f}") + _deviation(row, "f1"),
        text("seconds", "{:.2f}" if row.get("seconds", 1) >= 1 else "{:.3f}"),
        text("windows_per_second", "{:,.1f}"),
        text("tokens_per_second", "{:,.0f}"),
        ABSENT if padded in (None, row.get("tokens")) else f"{padded:,}",
        text("matrix_share", "{:.0%}"),
        ABSENT if memory is None else f"{memory / 1e9:.2f} GB",
        text("energy_joules", "{:,.0f} J" if (row.get("energy_joules") or 100) >= 100 else "{:.3g} J"),
        text("speedup", "{:.2f}x"),
    ]


def _deviation(row: dict[str, Any], field: str) -> str:
    """The deviation over seeds, where there were several."""
    spread = row.get(f"{field}_spread")
    return "" if spread is None else f" ± {spread['deviation']:.2f}"


def mask_text(row: dict[str, Any]) -> str:
    """For example "90% element"; a dash for a row without a mask."""
    granularity, sparsity = row.get("granularity"), row.get("sparsity")
    if granularity is None and not sparsity:
        return ABSENT
    if row.get("density", 0.0) > 1 - sparsity + _SAME_DENSITY:  # tiles of a short mask, say, cannot be pruned so far
        sparsity = 1 - row["density"]
    return " ".join(filter(None, [f"{100 * sparsity:.3g}%", granularity]))


def print_row(row: dict[str, Any], instead: str | None = None) -> None:
    """Prints a row as soon as it is there, or what became of it `instead` of its figures."""
    texts = cells(row)
    if instead is not None:
        texts = [*texts[:3], instead]
    aligned = [
        text.ljust(width) if index == 0 or (instead and index == 3) else text.rjust(width)
        for index, (text, width) in enumerate(zip(texts, _ROW_WIDTHS, strict=instead is None))
    ]
    print("  ".join(aligned).rstrip(), flush=True)


def print_header() -> None:
    """Prints what stands above the rows of `print_row`."""
    aligned = [name.ljust(width) if index == 0 else name.rjust(width) for index, (name, width) in _headed()]
    print("  ".join(aligned), flush=True)


def _headed():
    return enumerate(zip(COLUMNS, _ROW_WIDTHS, strict=True))


def print_table(results: dict[str, Any]) -> None:
    """Prints the rows, and the published ones under them; then each sweep, and what was not measured."""
    from rich.table import Table

    title = f"SQuAD: {results['model']}, {results['data']['name']}, {results['device']}"
    published = with_speedups(PUBLISHED)
    tables = [(title, [*results["rows"], *published])]
    tables += [(f"Sweep over {sweep['name']}", sweep["rows"]) for sweep in results.get("sweeps", ())]
    for title, rows in tables:
        table = Table(title=title, title_justify="left", caption_justify="left")
        if rows[-1] in published:
            table.caption = " ".join([f"The last two rows: {PUBLISHED_LABEL}.", *_notes(results)])
        shown = shown_columns(rows)
        for index in shown:
            table.add_column(COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            if row is published[0]:
                table.add_section()
            table.add_row(*(cells(row)[index] for index in shown), style="dim" if row in published else None)
        print_uncut(table)
    for line in _unmeasured(results):
        print(line)


def shown_columns(rows: Sequence[dict[str, Any]]) -> list[int]:
    """The columns that any row has something for; EM and F1 always."""
    found = [cells(row) for row in rows]
    always = ("EM", "F1")
    return [
        index
        for index, column in enumerate(COLUMNS)
        if column in always or any(texts[index] != ABSENT for texts in found)
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as a page of Markdown: what was measured, its sweeps, and the published figures under them."""
    lines = ["# SQuAD", "", *measured_lines(results)]
    for sweep in results.get("sweeps", ()):
        lines += [f"## Sweep over {sweep['name']}", "", *sweep_lines(sweep)]
    return "\n".join([*lines, *published_lines()])


def sweep_lines(sweep: dict[str, Any]) -> list[str]:
    """The rows of a sweep in Markdown."""
    return [*_lines(sweep["rows"]), ""]


def published_lines() -> list[str]:
    """The published figures in Markdown."""
    return [f"The {PUBLISHED_LABEL}:", "", *_lines(with_speedups(PUBLISHED)), ""]


def measured_lines(results: dict[str, Any]) -> list[str]:
    """What was measured, where and how, in Markdown."""
    unmeasured = [f"- {line}" for line in _unmeasured(results)]
    facts = [f"- {fact}" for fact in measured_facts(results)]
    return [*facts, "", *_lines(results["rows"]), "", *([*unmeasured, ""] if unmeasured else [])]


def measured_facts(results: dict[str, Any]) -> list[str]:
    """What the rows were measured on, where and how."""
    data, arguments = results["data"], results["arguments"]
    return [
        f"Device: {results['device']}; commit {results['commit'] or 'unknown'}; {results['date']}",
        f"Model: {results['model']}; data: {data['name']}, {data['questions']} questions in "
        f"{data['windows']} windows of {data['tokens']:,} tokens",
        f"Command: `{command_line(arguments)}`",
        f"{arguments['dtype']}, {_batches(arguments)}, sorted by length",
        f"Seconds: the model's pass over all windows, median of {arguments['repeats']} after one to warm up",
        *_apart(results),
        f"Peak memory: {results['peak_memory']}",
        f"Averages from: {results['averages_from']}",
        *_notes(results),
    ]


def _apart(results: dict[str, Any]) -> list[str]:
    """How long what is not in the rows' seconds takes."""
    decoding = [row["decoding_seconds"] for row in results["rows"] if row.get("decoding_seconds") is not None]
    tokenisation = results.get("seconds", {}).get("tokenisation")
    if tokenisation is None or not decoding:
        return []
    answers = statistics.median(decoding)
    return [f"Apart from them: {tokenisation:.2f} s to cut texts into tokens, {answers:.2f} s to find the answers"]


def _batches(arguments: dict[str, Any]) -> str:
    if arguments.get("tokens_per_batch") is not None:
        return f"batches of at most {arguments['tokens_per_batch']:,} tokens, padding included"
    return f"batches of {arguments['batch_size']}"


def _unmeasured(results: dict[str, Any]) -> list[str]:
    """Which rows are not there, and why."""
    return [
        f"{', '.join(text for text in cells(row)[:3] if text != ABSENT)}: {kind}: {row['reason']}"
        for kind, rows in (("absent", results.get("absent", ())), ("failed", results.get("failed", ())))
        for row in rows
    ]


def sparse_training(results: dict[str, Any]) -> str:
    """How the sparse rows got other weights than the dense ones, or ""."""
    how = _training(results, "sparse")
    if not how:
        return ""
    further = _training(results, "rounded")
    rounded = f" Those with bits: these weights, {further} through rounding." if further else ""
    return f"Sparse rows: the dense rows' weights, {how} with the mask applied.{rounded}"


def _training(results: dict[str, Any], kind: str) -> str:
    """How the checkpoints of a kind were made, and in how many epochs; "" where there are none but the dense one."""
    checkpoints = results["checkpoints"]
    trained = [made for name, made in checkpoints.items() if name.startswith(kind) and made != checkpoints["dense"]]
    if not trained:
        return ""
    epochs = len(trained[0]["losses"])
    return f"{trained[0].get('how') or 'trained'} for {epochs} epoch{'s' if epochs > 1 else ''}"


def _notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to compare the rows."""
    notes = []
    if results.get("random_weights"):
        notes.append("Random weights: EM and F1 are absent, and only time and memory mean anything.")
    training = sparse_training(results)
    if training:
        notes.append(training)
        if any(sweep["name"] == "sparsity" for sweep in results.get("sweeps", ())):
            notes.append("Sweep over sparsity: the dense rows' weights, pruned without any training.")
    misplaced = results["data"].get("misplaced_answers")
    if misplaced:
        notes.append(
            f"{misplaced:,} answer{'s' if misplaced > 1 else ''} of the data not where the record says: scored, "
            "but not trained on."
        )
    if results.get("processes", 1) > 1:
        notes.append(
            f"{results['processes']} processes share the batches: seconds of the slowest, memory of the largest, "
            "tokens and windows of all."
        )
    if results.get("energy"):
        notes.append(f"Energy: {results['energy']}, of one pass.")
    return notes


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = shown_columns(rows)
    return table_lines([COLUMNS[index] for index in shown], [[cells(row)[index] for index in shown] for row in rows])
