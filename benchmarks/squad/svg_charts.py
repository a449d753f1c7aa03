"""Bar charts and curves as inline SVG of one width: text stays text, and the page's style sheet gives the colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360  # user units: about the pixels of a phone, so that text has its size there
_ROW, _BAR, _LONGEST_BAR = 38, 13, 270
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 250, 44, 338, 12, 206  # of the curves' plot
_LETTER, _LINE = 6.8, 13  # about the size of a character
_LONGEST_LABEL = 54


@dataclass(frozen=True)
class Bar:
    """One bar. `text` stands for its value, or for its absence (None); `style` is a class of the style sheet."""

    label: str
    value: float | None
    text: str
    style: str


@dataclass(frozen=True)
class Curve:
    """Points (x, y, label) joined in their order; `style` is a class of the style sheet."""

    name: str
    points: Sequence[tuple[float, float, str]]
    style: str


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def svg(parts: Sequence[str], height: int, description: str) -> str:
    """A picture `WIDTH` wide that a screen reader reads as `description`."""
    head = f'<svg role="img" viewBox="0 0 {WIDTH} {height}" aria-label="{escape(description)}">'
    return "\n".join([head, *parts, "</svg>"])


def bar_chart(bars: Sequence[Bar], description: str) -> str:
    """Horizontal bars from zero, each below its label."""
    largest = max([bar.value for bar in bars if bar.value is not None], default=0.0)
    parts = []
    for index, bar in enumerate(bars):
        top = index * _ROW
        length = 0.0 if bar.value is None or largest <= 0 else _LONGEST_BAR * bar.value / largest
        parts.append(text(0, top + 13, _shortened(bar.label), "label"))
        if length > 0:
            parts.append(
                f'<rect class="{bar.style}" x="0" y="{top + 18}" width="{length:.1f}" height="{_BAR}" rx="2"/>'
            )
        parts.append(text(length + 6, top + 18 + _BAR - 2, bar.text, "value"))
    return svg(parts, len(bars) * _ROW, description)


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str, description: str) -> str:
    """Curves of values that are not negative, over two linear axes that show the points' range."""
    points = [point for curve in curves for point in curve.points]
    x_ticks, y_ticks = _ticks([x for x, _, _ in points]), _ticks([y for _, y, _ in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(_LEFT - 6, y + 4, f"{tick:g}", "tick", "end"))
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        parts.append(text(x, _BOTTOM + 16, f"{tick:g}", "tick", "middle"))
    parts.append(text(_RIGHT, _HEIGHT - 8, x_label, "label", "end"))
    parts.append(text(0, _HEIGHT - 8, f"↑ {y_label}", "label"))
    places = [[place(x, y) for x, y, _ in curve.points] for curve in curves]
    for curve, spots in zip(curves, places):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="curve {curve.style}" points="{path}"/>')
        parts += [f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in spots]
    labels = [
        (*spot, label) for curve, spots in zip(curves, places) for spot, (_, _, label) in zip(spots, curve.points)
    ]
    parts += [text(x, y, label, "value", "middle") for x, y, label in _spread(labels)]
    return svg(parts, _HEIGHT, description)


def _spread(labels: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Where each label stands: around its point, where it covers other labels and points least."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y, _ in labels]
    placed = []
    for x, y, label in labels:
        half = len(label) * _LETTER / 2
        aside = half + 9
        around = [(0, -9), (0, 18), *((sign * aside, down) for down in (4, -9, 18, -22, 31) for sign in (1, -1))]
        choices = []
        for across, down in around:
            center = min(max(x + across, _LEFT + half), WIDTH - half)
            choices.append((center, y + down, (center - half, y + down - _LINE + 3, center + half, y + down + 2)))
        center, base, box = min(choices, key=lambda choice: sum(_overlap(choice[2], other) for other in taken))
        taken.append(box)
        placed.append((center, base, label))
    return placed


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(down, 0.0)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around all values, which are not negative; at least two."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    return [float(tick) for tick in locator.tick_values(max(low - room, 0.0), high + room)]


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
