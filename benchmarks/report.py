"""Renders the committed results into the pages that show them: `python -m benchmarks.report [--check]`.

Results lie in benchmarks/results/<device>/squad-*.json, as `python -m benchmarks.squad` writes them. README.md shows
them between its two markers; nothing there is typed by hand. --check writes nothing and fails if it is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .device import ROOT
from .squad_table import measured_lines, published_lines

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- squad results: begin -->", "<!-- squad results: end -->"


def squad_section(folder: Path) -> str:
    """Markdown of every SQuAD result below `folder`, in the order of their paths, and of the published figures."""
    lines = []
    for path in sorted(folder.glob("*/squad-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        name = path.relative_to(folder.parent.parent).as_posix()
        lines += [f"### {results['data']['name']}", "", *measured_lines(results), f"File: [{name}]({name})", ""]
    return "\n".join([*lines, *published_lines()])


def rendered(page: str, section: str) -> str:
    """`page` with `section` between its markers. Raises ValueError where a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{section}{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    current = README.read_text(encoding="utf-8")
    wanted = rendered(current, squad_section(RESULTS))
    if check:
        return int(current != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
