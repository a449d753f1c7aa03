"""Passages about one, two or three subjects of a topic, and questions on them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.questions.topics import Ask, Block, Topic, fill
from benchmarks.questions.values import Names, draw_values

_LEADS = (
    "as for {subject}, ",
    "in the case of {subject}, ",
    "about {subject} the records say this: ",
    "with {subject} things are different: ",
)


@dataclass(frozen=True)
class Plan:
    """How a passage is made: how many subjects, how many blocks each, how many questions in all.

    The subjects of a passage are told about in the same blocks, so that every fact has its double. With
    `interleaved`, they take turns block by block; otherwise one comes after the other.
    """

    subjects: int
    blocks: int
    questions: int
    interleaved: bool = False


@dataclass
class _Writer:
    """The text so far, and per statement where it is and what can be asked about it."""

    text: str = ""
    last_values: dict[str, str] | None = None
    statements: list[tuple[int, Block, dict[str, str]]] = field(default_factory=list)


def write_paragraph(topic: Topic, article: int, region: str, plan: Plan, names: Names, rng: random.Random) -> dict:
    """A paragraph of the SQuAD v1.1 format, its questions without ids.

    Where there are three wordings or more, each of a topic's articles does without another one, so that
    articles differ in wording as well as in content.
    """
    used: set[str] = set()
    subjects = []
    for _ in range(plan.subjects):
        values = draw_values(topic.values, names, rng, used) | {"region": region}
        subjects.append(values | {"subject": fill(topic.subject, values)})
    blocks = [topic.blocks[0], *rng.sample(topic.blocks[1:], min(plan.blocks, len(topic.blocks)) - 1)]
    order = [(block, values) for block in blocks for values in subjects]
    if not plan.interleaved:
        order = [(block, values) for values in subjects for block in blocks]
    writer = _Writer()
    for block, values in order:
        sentence = rng.choice(_without_one(block.sentences, article))
        _write_statement(writer, topic, block, sentence, values, rng)
    return {"context": writer.text, "qas": _ask(writer, article, plan.questions, rng)}


def _write_statement(
    writer: _Writer, topic: Topic, block: Block, sentence: str, values: dict[str, str], rng: random.Random
) -> None:
    changed = writer.last_values is not values
    if changed and "{subject}" not in sentence and "{it}" not in sentence:
        sentence = _with_subject(sentence, values, rng)
    short = values["subject"] if changed or rng.random() < 0.35 else fill(topic.short, values)
    statement = fill(sentence, values | {"it": short})
    if writer.text:
        writer.text += " "
    writer.statements.append((len(writer.text), block, values))
    writer.text += _upper_first(statement)
    writer.last_values = values


def _with_subject(sentence: str, values: dict[str, str], rng: random.Random) -> str:
    """The sentence with the subject's full name for its first pronoun, or else behind words that name it."""
    pronoun, _, rest = sentence.partition(" ")
    if pronoun == "It":
        return "{subject} " + rest
    if pronoun == "Its":
        return ("{subject}' " if values["subject"].endswith("s") else "{subject}'s ") + rest
    return rng.choice(_LEADS) + _lower_first(sentence)


def _ask(writer: _Writer, article: int, number: int, rng: random.Random) -> list[dict]:
    """Questions all over the passage, in random order, none twice; most of them worded much as the passage is."""
    ends = [start - 1 for start, _, _ in writer.statements[1:]] + [len(writer.text)]
    chances: list[tuple[int, int, Ask, dict[str, str]]] = []
    for (start, block, values), end in zip(writer.statements, ends, strict=True):
        chances.extend((start, end, ask, values) for ask in block.asks)
    entries = []
    for start, end, ask, values in rng.sample(chances, min(number, len(chances))):
        answers = [_find(writer.text, start, end, fill(answer, values)) for answer in ask.answers]
        near, *far = ask.wordings
        wording = near if rng.random() < 0.7 else rng.choice(_without_one(far, article))
        entries.append({"question": _upper_first(fill(wording, values)), "answers": answers})
    return entries


def _find(text: str, start: int, end: int, answer: str) -> dict:
    """The answer as an entry of the SQuAD v1.1 format, with the capital of its place in the text."""
    first = f"[{re.escape(answer[0].lower() + answer[0].upper())}]"
    found = list(re.finditer(rf"(?<![\w,.]){first}{re.escape(answer[1:])}(?!\w|,\d)", text[start:end]))
    if len(found) != 1:
        raise ValueError(f"answer {answer!r} is {len(found)} times in {text[start:end]!r}; expected once")
    return {"text": found[0].group(), "answer_start": start + found[0].start()}


def _without_one(wordings: Sequence[str], article: int) -> list[str]:
    if len(wordings) < 3:
        return list(wordings)
    return [wording for index, wording in enumerate(wordings) if index != article % len(wordings)]


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower_first(template: str) -> str:
    return template[:1].lower() + template[1:]
