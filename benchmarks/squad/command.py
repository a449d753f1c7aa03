"""The command that made a results file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from .options import default_of, make_parser


def command_line(arguments: Mapping[str, Any]) -> str:
    """What to type for the `arguments` of a results file, which names files but not where they lie. Options that have
    their default value are left out."""
    words, parser = ["python", "-m", "benchmarks.squad"], make_parser()
    for name, value in arguments.items():
        if value != default_of(parser, name):
            words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> Iterator[str]:
    if name == "sweep":
        for sweep in value:
            yield from ("--sweep", sweep["name"], ",".join(map(_text, sweep["values"])))
        return
    yield "--" + name.replace("_", "-")
    if isinstance(value, list):
        yield ",".join(value)
    elif value is not True:
        yield _text(value)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
