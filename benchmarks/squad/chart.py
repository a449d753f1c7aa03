"""The SQuAD table as a picture, and the curves of its sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .table import is_own, mask_text

_DENSE, _SPARSE, _SECOND = "#9aa5b1", "#1f6fb2", "#d9822b"
_STYLES = {"element": (_SPARSE, "o"), "tile": (_SECOND, "s")}
Row = dict[str, Any]


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG with time, peak memory and, where there is any, F1 of every row, side by side."""
    rows = results["rows"]
    colors = [_SPARSE if is_own(row) else _DENSE for row in rows]
    panels = [
        ("seconds, whole set", [row["seconds"] for row in rows], "{:.3g}"),
        ("peak memory, GB", [row["peak_memory_bytes"] / 1e9 for row in rows], "{:.2f}"),
    ]
    if all(row["f1"] is not None for row in rows):
        panels.append(("F1", [row["f1"] for row in rows], "{:.1f}"))
    figure = _figure((11, 1.6 + 0.55 * len(rows)), results)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values, form) in zip(axes, panels):
        bars = axis.barh(range(len(rows)), values, color=colors, height=0.62)
        axis.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlim(0, max([*values, 1e-9]) * 1.22)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False, bottom=False, labelbottom=False)
    axes[0].set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_sweep(results: dict[str, Any], sweep: dict[str, Any], path: Path) -> None:
    """Writes `sweep_figure` as a PNG."""
    sweep_figure(results, sweep).savefig(path, dpi=150)


def sweep_figure(results: dict[str, Any], sweep: dict[str, Any]):
    """A figure with F1 (where there is any), speed-up and peak memory over the swept values, a curve for each
    granularity; the broken line is the table's first row."""
    name, rows, first = sweep["name"], sweep["rows"], results["rows"][0]
    panels = [
        ("speed-up over " + first["variant"], lambda row: row["speedup"], 1.0),
        ("peak memory, GB", lambda row: row["peak_memory_bytes"] / 1e9, first["peak_memory_bytes"] / 1e9),
    ]
    if all(row["f1"] is not None for row in rows):
        panels.insert(0, ("F1", lambda row: row["f1"], first["f1"]))
    values = sorted({_swept(name, row) for row in rows}, reverse=name == "bits")
    figure = _figure((11, 4.2), results, f"sweep over {name}")
    axes = figure.subplots(1, len(panels))
    for axis, (title, value_of, baseline) in zip(axes, panels):
        for granularity in dict.fromkeys(row["granularity"] for row in rows):
            points = [(_swept(name, row), value_of(row)) for row in rows if row["granularity"] == granularity]
            points.sort(key=lambda point: values.index(point[0]))
            color, marker = _STYLES.get(granularity, (_SPARSE, "o"))
            places = [values.index(value) for value, _ in points]
            axis.plot(places, [height for _, height in points], color=color, marker=marker, label=granularity)
        if baseline is not None:
            axis.axhline(baseline, color=_DENSE, linestyle="--", label=first["variant"])
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xticks(range(len(values)), _ticks(name, values))
        axis.set_xlabel("share of positions pruned" if name == "sparsity" else "bits")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9)
    return figure


def _figure(size: tuple[float, float], results: dict[str, Any], subject: str | None = None):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    data, dtype = results["data"], results["arguments"]["dtype"]
    facts = [results["model"], f"{data['name']} ({data['questions']} questions)", dtype, subject]
    figure.suptitle(f"{', '.join(filter(None, facts))}\n{results['device']}", x=0.01, ha="left", fontsize=11)
    return figure


def _swept(name: str, row: Row) -> float:
    """The row's value; not rounded at all counts as more than any number of bits."""
    value = row[name]
    return float("inf") if value is None else value


def _ticks(name: str, values: Sequence[float]) -> list[str]:
    if name == "sparsity":
        return [f"{100 * value:.3g}%" for value in values]
    return ["none" if value == float("inf") else str(value) for value in values]


def _name(row: Row) -> str:
    details = [mask_text(row)] if row.get("granularity") else []
    if row["bits"] is not None:
        details.append(f"{row['bits']} bit{'s' if row['bits'] > 1 else ''}")
    return "\n".join([row["variant"], ", ".join(details)]) if details else row["variant"]
