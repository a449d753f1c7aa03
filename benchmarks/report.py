"""Renders the committed results into the pages and pictures that show them: `python -m benchmarks.report [--check]`.

Results lie in benchmarks/results/<device>/: attention-*.json (of these, the newest of each device and dtype is shown),
squad-*.json, long-*.json, collect-*.json and counters-*.json, as the benchmarks of these names write them; missed.json
says why they miss goals; beside the folders lies what `kernel_report` recorded. Pages show them between markers, where
nothing is typed by hand. --check writes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import collect, counters, long
from .attention_chart import draw_roofline, draw_times
from .attention_goals import outcomes
from .attention_results import newest_results
from .attention_table import SUMMARY_COLUMNS, goal_lines, measured_lines, summary_rows
from .compiled_kernels import compiled_section
from .device import ROOT
from .missed_goals import missed_lines
from .pages import between_markers, save_svg, table_lines
from .pass_goals import collection_goals, long_goals, squad_goals
from .squad import summary as squad
from .squad.chart import sweep_figure
from .squad.table import measured_lines as squad_lines
from .squad.table import sweep_lines

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
SQUAD = ROOT / "docs" / "squad.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
ATTENTION = ROOT / "docs" / "attention-results.md"
IMAGES = ROOT / "docs" / "images"
NO_GPU = "No GPU has been measured yet."


def squad_summary(folder: Path) -> str:
    """Markdown of a table with a line for every SQuAD result below `folder` that has the baseline, and for the
    published figures."""
    found = [(path, results) for path, results in read_results(folder, "squad") if squad.has_baseline(results)]
    lines = [squad.published_cells(), *(squad.summary_cells(results, _name(path, folder)) for path, results in found)]
    return "\n".join([*table_lines(squad.SUMMARY_COLUMNS, lines, text_columns=2), ""])


def squad_section(folder: Path) -> str:
    """Markdown of every SQuAD result below `folder` with all that it says."""
    lines = []
    for path, results in read_results(folder, "squad"):
        lines += [f"### {results['device']}, {squad.heading(results)}", ""]
        lines += squad_lines(results)
        for sweep in results.get("sweeps", ()):
            name = sweep["name"]
            lines += [f"Sweep over {name}:", "", *sweep_lines(sweep)]
            lines += [f"![Sweep over {name}](images/{sweep_picture(path, name)})", ""]
        lines += _file_lines(path, folder)
    return "\n".join(lines)


def pass_section(folder: Path) -> str:
    """Markdown of the goals for whole passes, and of what was measured on long documents and of collections."""
    passes, long_documents, collections = (read_results(folder, kind) for kind in ("squad", "long", "collect"))
    goals = [
        *((path, f"{results['device']}, {squad.heading(results)}", squad_goals(results)) for path, results in passes),
        *((path, long.table(results).title, long_goals(results)) for path, results in long_documents),
        *((path, results["device"], collection_goals(results)) for path, results in collections),
    ]
    rows, missed = [], []
    for path, where, found in goals:
        reached = list(found)
        rows += [[where, one.what, one.goal, one.figure, "yes" if one.met else "no"] for one in reached]
        missed += _missed_lines(f"Missed, {where}:", path, [one.what for one in reached if not one.met])
    lines = [*table_lines(("where", "what", "goal", "measured", "met"), rows, text_columns=3), "", *missed]
    for name, benchmark, found in (("Long documents", long, long_documents), ("Averages", collect, collections)):
        for path, results in found:
            table = benchmark.table(results)
            lines += [f"### {name}: {table.title}", "", *table.lines(), "", *_file_lines(path, folder)]
    return "\n".join(lines)


def counter_section(folder: Path) -> str:
    """Markdown of every file of hardware counters below `folder`."""
    lines = []
    for path, results in read_results(folder, "counters"):
        table = counters.table(results)
        lines += [f"{table.title}:", "", *table.lines(), "", *_file_lines(path, folder)]
    return "\n".join(lines or ["No GPU's counters have been read yet.", ""])


def attention_summary(folder: Path) -> str:
    """Markdown of a table with some lines for the newest attention results of each device."""
    found = newest_results(folder)
    rows = []
    for path, results in found:
        link = f"[{_heading(results)}]({_name(path, folder)})"
        rows += [["" if index else link, *row] for index, row in enumerate(summary_rows(results))]
    lines = table_lines(("device", *SUMMARY_COLUMNS), rows, text_columns=3)
    return "\n".join([*([] if _on_gpu(found) else [NO_GPU, ""]), *lines, ""])


def attention_section(folder: Path) -> str:
    """Markdown of the newest attention results of each device: goals and pictures."""
    found = newest_results(folder)
    lines = [] if _on_gpu(found) else [NO_GPU, ""]
    for path, results in found:
        lines += [f"### {_heading(results)}", "", *goal_lines(results)]
        lines += _missed_lines("Missed:", path, [one.goal.name for one in outcomes(results) if one.met is False])
        lines += [f"![{kind}](images/{name})\n" for kind, name in pictures(path, results).items()]
    return "\n".join(lines)


def attention_rows(folder: Path) -> str:
    """Markdown of the newest attention results of each device: all rows."""
    lines = []
    for path, results in newest_results(folder):
        lines += [f"## {_heading(results)}", "", *measured_lines(results), *_file_lines(path, folder)]
    return "\n".join(lines)


def read_results(folder: Path, kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """The files `<kind>-*.json` below `folder`/<device>, in the order of their paths."""
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(f"*/{kind}-*.json"))]


@dataclass(frozen=True)
class Section:
    """What stands between the markers `<!-- NAME results: begin -->` and `... end -->` of a page."""

    page: Path
    name: str
    render: Callable[[Path], str]

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- {self.name} results: begin -->", f"<!-- {self.name} results: end -->"


SECTIONS = (
    Section(README, "squad", squad_summary),
    Section(README, "attention", attention_summary),
    Section(SQUAD, "squad", squad_section),
    Section(PERFORMANCE, "kernels", compiled_section),
    Section(PERFORMANCE, "counter", counter_section),
    Section(PERFORMANCE, "pass", pass_section),
    Section(PERFORMANCE, "attention", attention_section),
    Section(ATTENTION, "attention", attention_rows),
)


def rendered_pages(folder: Path) -> dict[Path, str]:
    """Every page with its sections up to date. Raises ValueError where a marker is missing."""
    pages: dict[Path, str] = {}
    for section in SECTIONS:
        page = pages.get(section.page) or section.page.read_text(encoding="utf-8")
        pages[section.page] = between_markers(page, *section.markers, section.render(folder))
    return pages


def draw_pictures(folder: Path, images: Path) -> None:
    """Writes the pictures that `attention_section` and `squad_section` show."""
    for path, results in newest_results(folder):
        times, roofline = pictures(path, results).values()
        draw_times(results, images / times)
        draw_roofline(results, images / roofline)
    for path, results in read_results(folder, "squad"):
        for sweep in results.get("sweeps", ()):
            save_svg(sweep_figure(results, sweep), images / sweep_picture(path, sweep["name"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    pages = rendered_pages(RESULTS)
    if check:
        return int(any(path.read_text(encoding="utf-8") != page for path, page in pages.items()))
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    draw_pictures(RESULTS, IMAGES)
    return 0


def sweep_picture(path: Path, name: str) -> str:
    """The file that shows a sweep of a results file."""
    return f"{path.stem}-{name}-{path.parent.name}.svg"


def _on_gpu(found: list[tuple[Path, dict[str, Any]]]) -> bool:
    return any(results["device_type"] == "cuda" for _, results in found)


def _missed_lines(title: str, path: Path, goals: list[str]) -> list[str]:
    return [title, "", *missed_lines(path, goals), ""] if goals else []


def _heading(results: dict[str, Any]) -> str:
    return f"{results['device']}, {results['dtype']}"


def _file_lines(path: Path, folder: Path) -> list[str]:
    """Where a file of results lies, for a page in docs."""
    return [f"File: [{_name(path, folder)}](../{_name(path, folder)})", ""]


def _name(path: Path, folder: Path) -> str:
    """The path of a results file from the repository's root."""
    return path.relative_to(folder.parent.parent).as_posix()


def pictures(path: Path, results: dict[str, Any]) -> dict[str, str]:
    """What the pictures of a results file show -> the names of their files."""
    device = path.parent.name
    usual = results["dtype"] == ("float16" if results["device_type"] == "cuda" else "float32")
    stem = device if usual else f"{device}-{results['dtype']}"
    return {"Times": f"attention-{stem}.svg", "Roofline": f"roofline-{stem}.svg"}


if __name__ == "__main__":
    sys.exit(main())
