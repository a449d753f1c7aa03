"""Why goals are missed: what figures alone do not say.

benchmarks/results/<device>/missed.json has a list for each file of results beside it that misses goals, written by who
commits them: [{"goals": [name, ...], "why": text}, ...].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

RECORD = "missed.json"


def missed_lines(path: Path, goals: Sequence[str]) -> list[str]:
    """Markdown with the reasons on record why the results of file `path` miss these goals."""
    unknown, lines = list(goals), []
    for why, explained in reasons_of(path).items():
        missed = [goal for goal in explained if goal in unknown]
        unknown = [goal for goal in unknown if goal not in missed]
        lines += [f"- {'; '.join(missed)}: {why}"] if missed else []
    return [*lines, *(f"- {goal}: nobody has written down why" for goal in unknown)]


def reasons_of(path: Path) -> dict[str, list[str]]:
    """Each reason that the record has for a file of results -> the goals that are missed for it."""
    record = path.with_name(RECORD)
    reasons = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return {one["why"]: one["goals"] for one in reasons.get(path.name, ())}
