"""The SQuAD page's charts: a bar for each row, and curves of accuracy against time and memory for each sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle
from typing import Any

from ..pages import ABSENT
from .svg_charts import Bar, Curve, bar_chart, curve_chart
from .table import is_own, mask_text

Row = dict[str, Any]

_STYLES = ("own", "c1", "c2", "c3", "c4", "c5")
_F1_AGAINST = (
    ("F1 against seconds", "seconds", lambda row: row.get("seconds")),
    ("F1 against peak memory", "GB", lambda row: _gigabytes(row)),
)


def row_details(rows: Sequence[Row], without: str = "") -> list[str]:
    """What tells each row from others of its variant, as in "90% element, 3 bits".

    The field `without` is left out, and so are model and dtype where all rows share them.
    """
    differing = [field for field in ("model", "dtype") if len({row.get(field) for row in rows}) > 1]
    return [_details(row, differing, without) for row in rows]


def _details(row: Row, differing: Sequence[str], without: str) -> str:
    mask = (row.get("granularity") or "") if without == "sparsity" else mask_text(row)
    parts = [] if mask in ("", ABSENT) else [mask]
    if row.get("bits") is not None and without != "bits":
        parts.append(f"{row['bits']} bit{'s' if row['bits'] > 1 else ''}")
    return ", ".join([*parts, *(str(row[field]) for field in differing if row.get(field) is not None)])


def row_labels(rows: Sequence[Row], without: str = "") -> list[str]:
    """Variant and `row_details`."""
    return [", ".join(filter(None, pair)) for pair in zip([row["variant"] for row in rows], row_details(rows, without))]


def row_charts(rows: Sequence[Row], labels: Sequence[str] | None = None) -> dict[str, str]:
    """Title -> bar chart of seconds, peak memory and F1; a chart that no row has a value for is left out."""
    labels = row_labels(rows) if labels is None else labels
    panels: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
        ("Seconds (shorter is better)", lambda row: row.get("seconds"), _seconds),
        ("Peak memory, GB (shorter is better)", _gigabytes, "{:.2f}".format),
        ("F1 (longer is better)", lambda row: row.get("f1"), "{:.1f}".format),
    )
    charts = {}
    for title, value_of, shown in panels:
        values = [value_of(row) for row in rows]
        if all(value is None for value in values):
            continue
        bars = [
            Bar(label, value, ABSENT if value is None else shown(value), "own" if is_own(row) else "dense")
            for row, label, value in zip(rows, labels, values)
        ]
        charts[title] = bar_chart(bars, f"Bar chart, {title}: {_spoken(bars)}")
    return charts


def sweep_charts(sweep: dict[str, Any]) -> dict[str, str]:
    """Title -> curves of F1 against seconds and memory, a point for each value; bars where no row has an F1."""
    charts = {}
    for title, x_label, x_of in _F1_AGAINST:
        curves = _curves(sweep, x_of)
        if curves:
            spoken = "; ".join(f"{curve.name}: {_spoken_points(curve)}" for curve in curves)
            charts[title] = curve_chart(curves, x_label, "F1", f"{title}, sweep over {sweep['name']}. {spoken}")
    if charts:
        return charts
    values = [swept_value(sweep["name"], row) for row in sweep["rows"]]
    labels = [f"{value}: {label}" for value, label in zip(values, row_labels(sweep["rows"], sweep["name"]))]
    return row_charts(sweep["rows"], labels)


def sweep_key(sweep: dict[str, Any]) -> str:
    """Which curve of `sweep_charts` is which, in markup; nothing for a single one."""
    styles = {curve.name: curve.style for _, _, x_of in _F1_AGAINST for curve in _curves(sweep, x_of)}
    if len(styles) < 2:
        return ""
    items = [
        f'<li><svg viewBox="0 0 28 14" aria-hidden="true"><polyline class="curve {style}" points="0,7 28,7"/>'
        f'<circle class="{style}" cx="14" cy="7" r="4"/></svg>{escape(name)}</li>'
        for name, style in styles.items()
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def swept_value(name: str, row: Row) -> str:
    """A point's label: the value that the sweep called `name` gave this row."""
    value = row.get(name)
    if name == "sparsity" and value is not None:
        return f"{100 * value:.3g}%"
    if name == "bits":
        return "none" if value is None else str(value)
    return ABSENT if value is None else str(value)


def _curves(sweep: dict[str, Any], x_of: Callable[[Row], float | None]) -> list[Curve]:
    """A curve for rows that differ in nothing but the swept value, of those that have an F1 and an x."""
    groups: dict[str, list[Row]] = {}
    for label, row in zip(row_labels(sweep["rows"], sweep["name"]), sweep["rows"]):
        groups.setdefault(label, []).append(row)
    styles = cycle(_STYLES)
    curves = []
    for name, rows in groups.items():
        style = next(styles) if is_own(rows[0]) else "dense"
        points = [
            (x_of(row), row["f1"], swept_value(sweep["name"], row))
            for row in rows
            if row.get("f1") is not None and x_of(row) is not None
        ]
        if points:
            curves.append(Curve(name, points, style))
    return curves


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _gigabytes(row: Row) -> float | None:
    value = row.get("peak_memory_bytes")
    return None if value is None else value / 1e9


def _spoken(bars: Sequence[Bar]) -> str:
    return "; ".join(f"{bar.label}: {bar.text}" for bar in bars)


def _spoken_points(curve: Curve) -> str:
    return ", ".join(f"{label} {y:.1f} at {x:.4g}" for x, y, label in curve.points)
