"""The SQuAD results as one HTML page that needs nothing else: no link, no script, no font."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from sparse_attn import GlobalMask

from ..pages import ABSENT
from .html_charts import row_charts, row_details, row_labels, sweep_charts, sweep_key
from .html_parts import bullets, details, fact_list, figures, section, table, table_of_markup, table_row
from .mask_pictures import mask_section
from .table import COLUMNS, PUBLISHED_LABEL, cells, is_own, measured_facts, shown_columns, with_speedups

_TEMPLATE = Path(__file__).with_name("page.html")
_IN_THE_HEADING = ("variant", "mask", "bits")  # columns that each row's heading shows, which stays in sight
_PICTURE_BYTES = 900_000
_ACCURACY = "EM and F1: exact match and F1 of SQuAD v1.1, in percent"


def write_page(results: dict[str, Any], masks: Sequence[GlobalMask], path: Path) -> None:
    """Writes the page of `results`, the content of a results.json, with pictures of the masks of its rows."""
    path.write_text(page(results, masks), encoding="utf-8")


def page(results: dict[str, Any], masks: Sequence[GlobalMask] = ()) -> str:
    """The page's HTML."""
    sections = [
        _table_section(results),
        section("Time, memory and accuracy", figures(row_charts(results["rows"]))),
        *(_sweep_section(sweep) for sweep in results.get("sweeps") or []),
        *(mask_section(mask, _PICTURE_BYTES // len(masks)) for mask in masks),
        _absent_section(results),
        _measured_section(results),
        _published_section(results.get("published") or []),
    ]
    data = results["data"]
    facts = {
        "Device": results["device"],
        "Model": results["model"],
        "Data": f"{data['name']}: {data['questions']:,} questions in {data['windows']:,} windows",
        "Date": results["date"],
        "Commit": results["commit"] or "unknown",
    }
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"SQuAD: {results['model']} on {results['device']}"),
        facts=fact_list(facts),
        sections="\n".join(filter(None, sections)),
    )


def _table_section(results: dict[str, Any]) -> str:
    caption = f"{_ACCURACY}. Speed-up: over the first row. Shaded: sparse_attn."
    return section("Results", _rows_table(caption, results["rows"]))


def _rows_table(caption: str, rows: Sequence[dict[str, Any]]) -> str:
    """The columns of the terminal's table that any row has something for."""
    lines = [cells(row) for row in rows]
    shown = [index for index in shown_columns(rows) if COLUMNS[index] not in _IN_THE_HEADING]
    body = [
        table_row(row["variant"], *(line[index] for index in shown), under=under, style="own" if is_own(row) else "")
        for row, line, under in zip(rows, lines, row_details(rows))
    ]
    return table_of_markup(caption, ["variant", *(COLUMNS[index] for index in shown)], body)


def _sweep_section(sweep: dict[str, Any]) -> str:
    name, rows = sweep["name"], sweep["rows"]
    if not rows:
        return ""
    return section(
        f"Sweep over {name}",
        figures(sweep_charts(sweep)),
        sweep_key(sweep),
        details("The figures of this sweep", _rows_table(f"Sweep over {name}. {_ACCURACY}.", rows)),
    )


def _absent_section(results: dict[str, Any]) -> str:
    rows = {kind: results.get(kind) or [] for kind in ("absent", "failed")}
    lines = [
        (label, kind, row["reason"]) for kind, found in rows.items() for label, row in zip(row_labels(found), found)
    ]
    if not lines:
        return ""
    caption = "Rows without figures. Absent: it cannot run on this machine. Failed: it ended without a result."
    return section("Not measured", table(caption, ["variant", "what", "reason"], lines, "words"))


def _measured_section(results: dict[str, Any]) -> str:
    preparation = [(step.replace("_", " "), _plain(value, ".2f")) for step, value in results["seconds"].items()]
    arguments = [(f"--{name.replace('_', '-')}", _plain(value)) for name, value in results["arguments"].items()]
    versions = {name: version or ABSENT for name, version in results["versions"].items()}
    return section(
        "How it was measured",
        bullets(measured_facts(results)),
        table("Preparation, apart from the rows.", ["step", "seconds"], preparation) if preparation else "",
        details("Versions", fact_list(versions)),
        details("Arguments", table("Arguments of the run.", ["argument", "value"], arguments, "words")),
    )


def _plain(value: object, form: str = "g") -> str:
    if value is None:
        return ABSENT
    return format(value, form) if isinstance(value, float) else str(value)


def _published_section(published: Sequence[dict[str, Any]]) -> str:
    if not published:
        return ""
    caption = f"{PUBLISHED_LABEL[0].upper()}{PUBLISHED_LABEL[1:]}."
    return section("Published figures", _rows_table(caption, with_speedups(published)))
