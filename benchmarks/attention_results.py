"""Results of the attention benchmark: looking rows up, files, and which files are the newest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .attention_variants import OWN_NAMES

Row = dict[str, Any]


def find_rows(results: dict[str, Any], workload: str, direction: str, **fields: Any) -> list[Row]:
    """Rows of a workload and pass with these values in other fields."""
    wanted = {"workload": workload, "pass": direction, **fields}
    return [row for row in results["rows"] if all(row[name] == value for name, value in wanted.items())]


def fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row["p50_ms"], default=None)


def fastest_dense(results: dict[str, Any], workload: str, direction: str) -> Row | None:
    """The fastest peer that computes dense attention: what sparse attention has to beat."""
    rows = find_rows(results, workload, direction, mask="dense")
    return fastest([row for row in rows if row["variant"] not in OWN_NAMES])


def fastest_own(results: dict[str, Any], workload: str, direction: str, mask: str, bits: int | None) -> Row | None:
    """The fastest of this package's backends."""
    rows = find_rows(results, workload, direction, mask=mask, bits=bits)
    return fastest([row for row in rows if row["variant"] in OWN_NAMES])


def groups(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Workloads and passes that have rows, in their order."""
    yield from dict.fromkeys((row["workload"], row["pass"]) for row in results["rows"])


def useful_flops_per_second(results: dict[str, Any], row: Row) -> float:
    """Operations on kept positions a second."""
    return row["arithmetic_share"] * results["ceilings"]["matrix_flops_per_second"]


def flops_per_byte(results: dict[str, Any], row: Row) -> float:
    """Operations on kept positions per byte that has to be moved."""
    return useful_flops_per_second(results, row) / (row["memory_share"] * results["ceilings"]["copy_bytes_per_second"])


def newest_results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The newest attention-*.json of each device and dtype below `folder`/<device>, GPUs first."""
    newest: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/attention-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        key = (path.parent.name, results["dtype"])
        if key not in newest or newest[key][1]["date"] <= results["date"]:
            newest[key] = (path, results)
    return sorted(newest.values(), key=lambda found: (found[1]["device_type"] != "cuda", found[0].as_posix()))
