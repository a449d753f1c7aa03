"""Pieces of an HTML page. Every text is escaped here; only what is called markup is taken as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table that scrolls in a box of its own; the first cell of each row is the row's heading."""
    return table_of_markup(caption, columns, [table_row(*row) for row in rows], style)


def table_of_markup(caption: str, columns: Sequence[str], body: Iterable[str], style: str = "") -> str:
    """The same with rows of ready markup, as of `table_row`."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = [
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">',
        f'<table class="{style}">' if style else "<table>",
        f"<caption><span>{escape(caption)}</span></caption>",
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *body,
        "</tbody>",
        "</table>",
        "</div>",
    ]
    return "\n".join(lines)


def table_row(heading: str, *cells: str, under: str = "", style: str = "") -> str:
    """A row of a table, with the words `under` its heading in smaller letters."""
    return row_of_markup(heading, "".join(f"<td>{escape(cell)}</td>" for cell in cells), under, style)


def row_of_markup(heading: str, cells: str, under: str = "", style: str = "") -> str:
    """The same with cells of ready markup: a `<td>` each."""
    small = f"<small>{escape(under)}</small>" if under else ""
    start = f'<tr class="{style}">' if style else "<tr>"
    return f'{start}<th scope="row">{escape(heading)}{small}</th>{cells}</tr>'


def section(heading: str, *markup: str) -> str:
    """A section of the page."""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *filter(None, markup), "</section>"])


def bullets(texts: Iterable[str]) -> str:
    """A list; nothing where there are no texts."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def fact_list(facts: Mapping[str, str]) -> str:
    """Names and what they are."""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f'<dl class="facts">{pairs}</dl>'


def figures(charts: Mapping[str, str]) -> str:
    """Charts in markup below their titles, beside each other where there is room."""
    parts = [
        f"<figure><figcaption><b>{escape(title)}</b></figcaption>{chart}</figure>" for title, chart in charts.items()
    ]
    return "\n".join(['<div class="figures">', *parts, "</div>"])


def details(summary: str, markup: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>\n{markup}\n</details>"
