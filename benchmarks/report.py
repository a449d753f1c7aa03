"""Renders the committed results into the pages and pictures that show them: `python -m benchmarks.report [--check]`.

Results lie in benchmarks/results/<device>/: squad-*.json as `python -m benchmarks.squad` writes them, attention-*.json
as `python -m benchmarks.attention --json` does; of these, the newest of each device and dtype is shown. Pages show
them between markers; nothing there is typed by hand. --check writes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attention_chart import draw_roofline, draw_times
from .attention_results import newest_results
from .attention_table import goal_lines, measured_lines, summary_lines
from .device import ROOT
from .pages import between_markers
from .squad_table import measured_lines as squad_lines
from .squad_table import published_lines

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
NO_GPU = "No GPU has been measured yet."


def squad_section(folder: Path) -> str:
    """Markdown of every SQuAD result below `folder`, in the order of their paths, and of the published figures."""
    lines = []
    for path in sorted(folder.glob("*/squad-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        name = _name(path, folder)
        lines += [f"### {results['data']['name']}", "", *squad_lines(results), f"File: [{name}]({name})", ""]
    return "\n".join([*lines, *published_lines()])


def attention_summary(folder: Path) -> str:
    """Markdown of the newest attention results of each device: a short table each."""
    found = newest_results(folder)
    lines = [] if _on_gpu(found) else [NO_GPU, ""]
    for path, results in found:
        lines += [f"{_heading(results)}:", "", *summary_lines(results), ""]
        lines += [f"File: [{_name(path, folder)}]({_name(path, folder)})", ""]
    return "\n".join(lines)


def attention_section(folder: Path) -> str:
    """Markdown of the newest attention results of each device: goals, pictures and all rows."""
    found = newest_results(folder)
    lines = [] if _on_gpu(found) else [NO_GPU, ""]
    for path, results in found:
        lines += [f"### {_heading(results)}", "", *goal_lines(results)]
        lines += [f"![{kind}](images/{name})\n" for kind, name in pictures(path, results).items()]
        lines += [*measured_lines(results), f"File: [{_name(path, folder)}](../{_name(path, folder)})", ""]
    return "\n".join(lines)


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
    Section(README, "squad", squad_section),
    Section(README, "attention", attention_summary),
    Section(PERFORMANCE, "attention", attention_section),
)


def rendered_pages(folder: Path) -> dict[Path, str]:
    """Every page with its sections up to date. Raises ValueError where a marker is missing."""
    pages: dict[Path, str] = {}
    for section in SECTIONS:
        page = pages.get(section.page) or section.page.read_text(encoding="utf-8")
        pages[section.page] = between_markers(page, *section.markers, section.render(folder))
    return pages


def draw_pictures(folder: Path, images: Path) -> None:
    """Writes the pictures that `attention_section` shows."""
    for path, results in newest_results(folder):
        times, roofline = pictures(path, results).values()
        draw_times(results, images / times)
        draw_roofline(results, images / roofline)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    pages = rendered_pages(RESULTS)
    if check:
        return int(any(path.read_text(encoding="utf-8") != page for path, page in pages.items()))
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    draw_pictures(RESULTS, IMAGES)
    return 0


def _on_gpu(found: list[tuple[Path, dict[str, Any]]]) -> bool:
    return any(results["device_type"] == "cuda" for _, results in found)


def _heading(results: dict[str, Any]) -> str:
    return f"{results['device']}, {results['dtype']}"


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
