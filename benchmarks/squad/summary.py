"""The short form of SQuAD results that the README shows: the baseline, the fastest peer, and this package's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..pages import ABSENT, table_lines
from .table import COLUMNS, cells

Row = dict[str, Any]
_SHOWN = ("variant", "mask", "bits", "EM", "F1", "seconds", "peak memory", "speed-up")


def is_own(row: Row) -> bool:
    """Whether it is this package's attention."""
    return row["attention"] == "sparse"


def fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row["seconds"], default=None)


def fastest_peer(results: dict[str, Any]) -> Row | None:
    """The fastest row that is not this package's."""
    return fastest([row for row in results["rows"] if not is_own(row)])


def heading(results: dict[str, Any]) -> str:
    """Model, data and dtype, and where probabilities are rounded to other levels than the published ones, to which."""
    tables = dict.fromkeys(row.get("table") for row in results["rows"])
    levels = [f"{table} levels" for table in tables if table not in (None, "published")]
    return ", ".join([results["model"], results["data"]["name"], results["arguments"]["dtype"], *levels])


def has_baseline(results: dict[str, Any]) -> bool:
    """Whether the published baseline is among the rows, which the README's short tables begin with."""
    return any(row["variant"] == "eager-padded" for row in results["rows"])


def summary_lines(results: dict[str, Any]) -> list[str]:
    """A table in Markdown, with how many times as fast as the fastest peer a row is."""
    peer = fastest_peer(results)
    places = [COLUMNS.index(name) for name in _SHOWN]
    lines = []
    for index, row in enumerate(results["rows"]):
        if index == 0 or row is peer or is_own(row):
            against = ABSENT if peer is None else f"{peer['seconds'] / row['seconds']:.2f}x"
            texts = cells(row)
            lines.append([*(texts[place] for place in places), against])
    return table_lines([*_SHOWN, "against the fastest peer"], lines)
