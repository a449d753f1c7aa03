"""Topics: what the passages say and what is asked, read from the text files in topics/.

    titles: TITLE | TITLE           one a article; {region} is the article's own
    subject: FULL NAME | SHORT NAME
    let NAME, NAME = KIND ARGUMENTS a slot each; kinds are those of values.py
                                    (an empty line ends a block)
    - SENTENCE                      wordings of one statement, of which a passage has one
    - SENTENCE
    ? ANSWER / ANSWER :: QUESTION | QUESTION
                                    gold answers, each in every wording, and wordings of the question:
                                    first one in the passage's words, then others in other words

{slot} stands for a value, {subject} for the full name, {it} for the full or the short one. The first block
opens a passage; the others follow in any order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.questions.values import KINDS, ValueLine

_SLOT = re.compile(r"\{([\w.]+)\}")
_FOLDER = Path(__file__).parent / "topics"


@dataclass(frozen=True)
class Ask:
    """Wordings of a question and its gold answers, as templates."""

    answers: tuple[str, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Wordings of a statement and what can be asked about it."""

    sentences: tuple[str, ...]
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Topic:
    name: str
    titles: tuple[str, ...]
    subject: str
    short: str
    values: tuple[ValueLine, ...]
    blocks: tuple[Block, ...]


def read_topics() -> list[Topic]:
    """All topics, sorted by name. Raises ValueError with file and line for what cannot be read."""
    return [_read_topic(path) for path in sorted(_FOLDER.glob("*.txt"))]


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its slots replaced by their values."""
    return _SLOT.sub(lambda slot: values[slot.group(1)], template)


def _read_topic(path: Path) -> Topic:
    head, *parts = path.read_text(encoding="utf-8").strip().split("\n\n")
    fields: dict[str, str] = {}
    values = []
    for line in head.splitlines():
        if line.startswith("let "):
            names, kind = _halves(path, line[len("let ") :], "=")
            kind, _, arguments = kind.partition(" ")
            if kind not in KINDS:
                raise ValueError(f"{path}: {line!r}: unknown kind {kind!r}; expected one of {sorted(KINDS)}")
            values.append(ValueLine(tuple(name.strip() for name in names.split(",")), kind, arguments))
        else:
            key, fields[key] = _halves(path, line, ":")
    blocks = tuple(_read_block(path, part) for part in parts)
    subject, short = _halves(path, fields["subject"], "|")
    topic = Topic(path.stem, _list(fields["titles"], "|"), subject, short, tuple(values), blocks)
    _expect_slots_declared_and_used(path, topic)
    return topic


def _read_block(path: Path, text: str) -> Block:
    sentences, asks = [], []
    for line in text.splitlines():
        if line.startswith("- "):
            sentences.append(line[2:])
        elif line.startswith("? "):
            answers, wordings = _halves(path, line[2:], "::")
            asks.append(Ask(_list(answers, " / "), _list(wordings, "|")))
        else:
            raise ValueError(f"{path}: {line!r}: expected '- ' before a sentence or '? ' before a question")
    if not sentences:
        raise ValueError(f"{path}: {text!r}: a block without a sentence")
    return Block(tuple(sentences), tuple(asks))


def _expect_slots_declared_and_used(path: Path, topic: Topic) -> None:
    declared = {name for line in topic.values for name in line.names}
    templates = [topic.subject, topic.short, *topic.titles]
    for block in topic.blocks:
        templates += [*block.sentences, *(text for ask in block.asks for text in ask.answers + ask.wordings)]
    used = {slot.removesuffix(".last") for template in templates for slot in _SLOT.findall(template)}
    wrong = declared ^ (used - {"subject", "it", "region"})
    if wrong:
        raise ValueError(f"{path}: slots {sorted(wrong)} are declared and not used, or used and not declared")


def _halves(path: Path, line: str, separator: str) -> tuple[str, str]:
    left, found, right = line.partition(separator)
    if not found:
        raise ValueError(f"{path}: {line!r}: expected {separator!r} in it")
    return left.strip(), right.strip()


def _list(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator))
