"""The SQuAD table as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DENSE, _SPARSE = "#9aa5b1", "#1f6fb2"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG with time, peak memory and F1 of every row, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["rows"]
    names = [_name(row) for row in rows]
    colors = [_SPARSE if row["attention"] == "sparse" else _DENSE for row in rows]
    panels = (
        ("seconds, whole set", [row["seconds"] for row in rows], "{:.3g}"),
        ("peak memory, GB", [row["peak_memory_bytes"] / 1e9 for row in rows], "{:.2f}"),
        ("F1", [row["f1"] for row in rows], "{:.1f}"),
    )
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values, form) in zip(axes, panels):
        bars = axis.barh(range(len(rows)), values, color=colors, height=0.62)
        axis.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlim(0, max([*values, 1e-9]) * 1.22)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False, bottom=False, labelbottom=False)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    data, dtype = results["data"], results["arguments"]["dtype"]
    figure.suptitle(
        f"{results['model']}, {data['name']} ({data['questions']} questions), {dtype}\n{results['device']}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _name(row: dict[str, Any]) -> str:
    details = []
    if row["attention"] == "sparse":
        details.append(f"{row['sparsity']:.0%} pruned")
    if row["bits"] is not None:
        details.append(f"{row['bits']} bit{'s' if row['bits'] > 1 else ''}")
    return "\n".join([row["variant"], ", ".join(details)]) if details else row["variant"]
