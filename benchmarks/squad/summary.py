"""The short form of SQuAD results that the README shows, a line for each file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..pages import ABSENT, row_name
from .table import COLUMNS, PUBLISHED, cells, is_own, sparse_training

Row = dict[str, Any]
SUMMARY_COLUMNS = (
    "model and data", "device", "eager-padded", "fastest peer", "sparse", "mask", "against eager-padded",
    "against the peer", "F1", "peak memory",
)  # fmt: skip


def fastest(rows: Iterable[Row]) -> Row | None:
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
    """Whether the rows begin with the published baseline, and this package's are among them."""
    return results["rows"][0]["variant"] == "eager-padded" and any(map(is_own, results["rows"]))


def summary_cells(results: dict[str, Any], link: str) -> list[str]:
    """One line for a file of results with the baseline: it, the fastest peer, and the fastest of this package's rows.
    F1 and memory are the baseline's and that row's. `link` leads to the file."""
    baseline, peer, own = results["rows"][0], fastest_peer(results), fastest(filter(is_own, results["rows"]))
    shown = {name: dict(zip(COLUMNS, cells(row))) for name, row in (("dense", baseline), ("sparse", own))}
    return [
        f"[{heading(results)}]({link})",
        results["device"],
        shown["dense"]["seconds"],
        f"{peer['variant']} {dict(zip(COLUMNS, cells(peer)))['seconds']}",
        f"{own['variant']} {shown['sparse']['seconds']}",
        row_name(shown["sparse"]["mask"], bits=own["bits"]) + (", trained with it" if sparse_training(results) else ""),
        f"{baseline['seconds'] / own['seconds']:.2f}x",
        f"{peer['seconds'] / own['seconds']:.2f}x",
        *_changes(shown["dense"], shown["sparse"]),
    ]


def published_cells() -> list[str]:
    """The published figures as a line like these."""
    dense, sparse = (dict(zip(COLUMNS, cells(row))) for row in PUBLISHED)
    return [
        "published", "another machine", dense["seconds"], ABSENT, sparse["seconds"], sparse["mask"],
        f"{PUBLISHED[0]['seconds'] / PUBLISHED[1]['seconds']:.2f}x", ABSENT, *_changes(dense, sparse),
    ]  # fmt: skip


def _changes(dense: dict[str, str], sparse: dict[str, str]) -> list[str]:
    """F1 and peak memory of two rows."""
    return [ABSENT if sparse[name] == ABSENT else f"{dense[name]} → {sparse[name]}" for name in ("F1", "peak memory")]
