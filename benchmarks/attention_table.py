"""The attention benchmark's rows on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .attention_goals import Outcome, outcomes
from .attention_results import Row, fastest, fastest_dense, fastest_own, find_rows, groups
from .attention_workloads import FORWARD, FORWARD_BACKWARD
from .pages import ABSENT, Table, rate, table_lines

COLUMNS = (
    "variant", "mask", "bits", "p50 ms", "p20 to p80", "against dense", "of bandwidth", "of matrix rate", "error",
)  # fmt: skip
_SUMMARISED = (
    ("squad384", FORWARD), ("squad384", FORWARD_BACKWARD), ("packed-squad", FORWARD), ("long2048", FORWARD),
)  # fmt: skip
SUMMARY_COLUMNS = (
    "workload", "pass", "fastest dense peer", "flex, element", "ours, element", "ours, tile", "ours, tile, 3 bits",
)  # fmt: skip
_GOALS = (
    "workload", "pass", "mask", "bits", "against", "goal", "measured", "met", "ours", "compared with", "of bandwidth",
    "of matrix rate",
)  # fmt: skip


def milliseconds(value: float) -> str:
    """Three digits: "0.0213", "1.23", "123"."""
    decimals = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def cells(row: Row, dense: Row | None) -> list[str]:
    """A row's texts in the order of `COLUMNS`; `dense` is the fastest dense peer beside it."""
    return [
        row["variant"] + ("*" if row["timing"] == "stream" else ""),
        row["mask"],
        ABSENT if row["bits"] is None else str(row["bits"]),
        milliseconds(row["p50_ms"]),
        f"{milliseconds(row['p20_ms'])} to {milliseconds(row['p80_ms'])}",
        ABSENT if dense is None else f"{dense['p50_ms'] / row['p50_ms']:.2f}x",
        f"{row['memory_share']:.0%}",
        f"{row['arithmetic_share']:.0%}",
        f"{row['error']:.0e}",
    ]


def print_table(results: dict[str, Any]) -> None:
    """Prints all rows, and who is absent and why."""
    for workload, direction in groups(results):
        dense = fastest_dense(results, workload, direction)
        rows = [cells(row, dense) for row in find_rows(results, workload, direction)]
        title = f"{workload}, {direction}: {_shape(results['workloads'][workload])}"
        Table(title, COLUMNS, rows, text_columns=2).print()
    print(f"{results['device']}, {results['dtype']}", *notes(results), *absence_lines(results["absent"]), sep="\n")


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to read the rows."""
    ceilings = results["ceilings"]
    return [
        f"Bandwidth: {rate(ceilings['copy_bytes_per_second'], 'B/s')}, measured by a copy; "
        f"matrix rate: {rate(ceilings['matrix_flops_per_second'], 'FLOP/s')}, measured by a product",
        "Of bandwidth, of matrix rate: the least bytes that attention moves, and the products on kept positions, at "
        "these rates, as shares of p50",
        "Against dense: how many times as fast as the fastest dense variant of the workload and pass",
        "Error: relative, against float64. Times and shares are means over the layers of a real mask",
        *(["*: launched from Python, not a CUDA graph"] if _has_streams(results) else []),
    ]


def measured_lines(results: dict[str, Any]) -> list[str]:
    """Everything that was measured, in Markdown."""
    lines = [
        f"- Device: {results['device']}; {results['dtype']}; commit {results['commit'] or 'unknown'}; "
        f"{results['date']}; the run took {results['seconds']:.0f} s",
        f"- {', '.join(f'{name} {version}' for name, version in results['versions'].items() if version)}",
        *(f"- {note}" for note in notes(results)),
        "",
    ]
    for name, workload in results["workloads"].items():
        lines += [f"### {name}", "", ". ".join([_shape(workload), *_densities(results, name)]), ""]
        for direction in dict.fromkeys(row["pass"] for row in results["rows"] if row["workload"] == name):
            dense = fastest_dense(results, name, direction)
            rows = [cells(row, dense) for row in find_rows(results, name, direction)]
            lines += [f"{direction.capitalize()}:", "", *table_lines(COLUMNS, rows, text_columns=2), ""]
    if results["absent"]:
        lines += ["### Absent", "", *(f"- {line}" for line in absence_lines(results["absent"])), ""]
    return lines


def absence_lines(absent: Sequence[dict[str, Any]]) -> list[str]:
    """One line per variant and reason: who, where, why."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in absent:
        found.setdefault((one["variant"], one["reason"]), []).append(one)
    return [f"{variant}: {reason} ({_places(ones)})" for (variant, reason), ones in found.items()]


def _places(absent: Sequence[dict[str, Any]]) -> str:
    """Where a variant is absent: as lists of workloads, passes and masks if those say it all, or one by one."""
    fields = ("workload", "pass", "mask", "bits")
    values = [list(dict.fromkeys(one[field] for one in absent)) for field in fields]
    bits = [f"{width} bits" for width in values.pop() if width is not None]
    if math.prod(map(len, values)) * max(len(bits), 1) == len(absent) or absent[0]["reason"] == "not installed":
        return "; ".join(", ".join(part) for part in (*values, bits) if part)
    return "; ".join(" ".join(str(one[field]) for field in fields if one[field] is not None) for one in absent)


def summary_rows(results: dict[str, Any]) -> list[list[str]]:
    """Lines of the README's table, in the order of `SUMMARY_COLUMNS`: times in ms, and how many times as fast as the
    fastest dense peer."""
    rows = []
    for workload, direction in (kind for kind in groups(results) if kind in _SUMMARISED):
        dense = fastest_dense(results, workload, direction)
        flex = fastest(find_rows(results, workload, direction, variant="flex", mask="element"))
        own = [fastest_own(results, workload, direction, *kind) for kind in (("element", None), ("tile", None))]
        own.append(fastest_own(results, workload, direction, "tile", 3))
        peer = ABSENT if dense is None else f"{dense['variant']} {milliseconds(dense['p50_ms'])}"
        rows.append([workload, direction, peer, *(_against(row, dense) for row in (flex, *own))])
    return rows


def goal_lines(results: dict[str, Any]) -> list[str]:
    """The goals for this device and dtype in Markdown; none where there are none."""
    found = outcomes(results)
    return [*table_lines(_GOALS, [_goal_cells(one) for one in found], text_columns=3), ""] if found else []


def _goal_cells(outcome: Outcome) -> list[str]:
    goal, own, other = outcome.goal, outcome.own, outcome.other

    def named(row: Row | None) -> str:
        return ABSENT if row is None else f"{row['variant']} {milliseconds(row['p50_ms'])} ms"

    return [
        goal.workload,
        goal.direction,
        goal.mask,
        ABSENT if goal.bits is None else str(goal.bits),
        goal.against,
        goal.text,
        ABSENT if outcome.ratio is None else f"{_rounded_against(outcome):.2f}x",
        {True: "yes", False: "no", None: "not measured"}[outcome.met],
        named(own),
        named(other),
        ABSENT if own is None else f"{own['memory_share']:.0%}",
        ABSENT if own is None else f"{own['arithmetic_share']:.0%}",
    ]


def _rounded_against(outcome: Outcome) -> float:
    """The ratio with two decimals, rounded so that a goal just missed does not look met."""
    rounded = math.floor if outcome.goal.is_speed_up else math.ceil
    return rounded(round(outcome.ratio * 100, 6)) / 100


def _against(row: Row | None, dense: Row | None) -> str:
    if row is None:
        return ABSENT
    ratio = "" if dense is None else f" ({dense['p50_ms'] / row['p50_ms']:.2f}x)"
    return milliseconds(row["p50_ms"]) + ratio


def _shape(workload: dict[str, Any]) -> str:
    lengths = workload["lengths"]
    tokens = f"{workload['length']} tokens" if lengths is None else f"packed, {min(lengths)} to {max(lengths)} tokens"
    return (
        f"{workload['batch']} sequence{'s' if workload['batch'] > 1 else ''}, {workload['heads']} heads, {tokens}, "
        f"head_dim {workload['head_dim']}: {workload['tokens']:,} real tokens"
    )


def _densities(results: dict[str, Any], workload: str) -> list[str]:
    """What each mask keeps, and the share of dense work that groups of 16 queries see."""
    masked = {row["mask"]: row for row in results["rows"] if row["workload"] == workload and row["mask"] != "dense"}
    return [
        f"{mask.capitalize()} mask: {row['density']:.0%} of positions, {row['work']:.0%} of the work by 16 queries"
        for mask, row in masked.items()
    ]


def _has_streams(results: dict[str, Any]) -> bool:
    return any(row["timing"] == "stream" for row in results["rows"])
