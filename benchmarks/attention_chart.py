"""The attention benchmark's results as pictures: times side by side, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attention_results import Row, find_rows, flops_per_byte, groups, useful_flops_per_second
from .attention_table import milliseconds
from .attention_variants import OWN_NAMES
from .attention_workloads import FORWARD, PASSES
from .pages import rate, row_name, save_svg

_COLORS = {"ours": "#1f6fb2", "peer, masked": "#c9852b", "peer, dense": "#9aa5b1"}
_MARKERS = "osD^vPX*"
_INK = "#33414e"


def draw_times(results: dict[str, Any], path: Path) -> None:
    """Writes an SVG with the median time of every row: a panel for each workload and pass, on a logarithmic axis."""
    from matplotlib.lines import Line2D

    workloads = list(dict.fromkeys(workload for workload, _ in groups(results)))
    passes = [direction for direction in PASSES if any(direction == one for _, one in groups(results))]
    panels = {(one, direction): find_rows(results, one, direction) for one in workloads for direction in passes}
    most_bars = [max(len(panels[one, direction]) for direction in passes) for one in workloads]
    figure = _figure(5.6 * len(passes), 1.0 + 0.21 * sum(bars + 2.2 for bars in most_bars))
    axes = figure.subplots(len(workloads), len(passes), squeeze=False, height_ratios=[n + 0.6 for n in most_bars])
    for line, workload, bars in zip(axes, workloads, most_bars, strict=True):
        for axis, direction in zip(line, passes, strict=True):
            _draw_panel(axis, panels[workload, direction], f"{workload}, {direction}", bars)
    handles = [Line2D([], [], color=color, linewidth=6, label=label) for label, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    _title(figure, results, "median ms of one call, each axis logarithmic")
    save_svg(figure, path)


def draw_roofline(results: dict[str, Any], path: Path) -> None:
    """Writes an SVG with the useful work of every row against what the machine can do.

    x: useful operations per byte that has to be moved; y: useful operations a second, both on logarithmic axes. The
    roof is the measured bandwidth and the measured matrix rate.
    """
    from matplotlib.lines import Line2D

    bandwidth = results["ceilings"]["copy_bytes_per_second"]
    peak = results["ceilings"]["matrix_flops_per_second"]
    workloads = list(dict.fromkeys(workload for workload, _ in groups(results)))
    figure = _figure(9.5, 5.6)
    axis = figure.subplots()
    points = [(row, flops_per_byte(results, row), useful_flops_per_second(results, row)) for row in results["rows"]]
    for row, intensity, speed in points:
        color = _COLORS[_family(row)]
        axis.scatter(
            intensity, speed, s=46, marker=_MARKERS[workloads.index(row["workload"]) % len(_MARKERS)],
            facecolor=color if row["pass"] == FORWARD else "white", edgecolor=color, linewidth=1.3, alpha=0.9,
            zorder=4 if _family(row) == "ours" else 3,
        )  # fmt: skip
    ridge = peak / bandwidth
    left = min([ridge, *(intensity for _, intensity, _ in points)]) / 2
    right = max([ridge, *(intensity for _, intensity, _ in points)]) * 2
    axis.plot([left, ridge, right], [left * bandwidth, peak, peak], color=_INK, linewidth=1.6, zorder=2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(top=peak * 3)
    axis.text(right / 1.1, peak * 1.12, f"matrix rate, {rate(peak, 'FLOP/s')}", ha="right", va="bottom", fontsize=9)
    slope_x = (left * ridge) ** 0.5
    axis.annotate(
        f"bandwidth, {rate(bandwidth, 'B/s')}", (slope_x, slope_x * bandwidth), (6, -6),
        textcoords="offset points", ha="left", va="top", fontsize=9,
    )  # fmt: skip
    axis.set_xlabel("useful operations per byte that has to be moved")
    axis.set_ylabel("useful operations per second")
    axis.grid(True, which="major", color="#e4e8ec", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        *(Line2D([], [], color=color, marker="o", linestyle="", label=label) for label, color in _COLORS.items()),
        *(
            Line2D([], [], color=_INK, marker=_MARKERS[index % len(_MARKERS)], linestyle="", label=workload)
            for index, workload in enumerate(workloads)
        ),
        Line2D([], [], color=_INK, marker="o", markerfacecolor="white", linestyle="", label=PASSES[1]),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    _title(figure, results, "roofline: work on kept positions alone")
    save_svg(figure, path)


def _draw_panel(axis, rows: list[Row], title: str, most_bars: int) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=_INK)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False, which="both")
    if not rows:
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        return
    rows = sorted(rows, key=lambda row: row["p50_ms"])
    times = [row["p50_ms"] for row in rows]
    start = min(times) / 3
    bars = axis.barh(
        range(len(rows)), [time - start for time in times], left=start, height=0.7,
        color=[_COLORS[_family(row)] for row in rows],
    )  # fmt: skip
    axis.bar_label(bars, [milliseconds(time) for time in times], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(start, max(times) * 2)
    axis.set_ylim(most_bars - 0.4, -0.6)  # bars are as thick as those beside them


def _family(row: Row) -> str:
    if row["variant"] in OWN_NAMES:
        return "ours"
    return "peer, dense" if row["mask"] == "dense" else "peer, masked"


def _name(row: Row) -> str:
    return row_name(row["variant"], row["mask"], bits=row["bits"])


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _title(figure, results: dict[str, Any], what: str) -> None:
    text = f"{results['device']}, {results['dtype']}: {what}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=_INK)
