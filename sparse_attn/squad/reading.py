"""Questions from SQuAD v1.1 JSON, every record checked, and splits that keep articles whole."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_attn.arguments import expect_whole
from sparse_attn.files import expect_file

_JSON_TYPES = {dict: "object", list: "array", str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Question:
    """One question on one paragraph.

    Attributes:
        id: unique in its file.
        title: title of the article the paragraph belongs to ("article 3" where the file gives none).
        context: the paragraph.
        question: the question.
        answers: the gold answers.
        answer_starts: first character of each answer in `context`; -1 for one that does not stand where its record
            says. Such an answer is scored like any other, and nothing is trained on its place.
    """

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]


def read_squad(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """Read the questions of a SQuAD v1.1 file (Rajpurkar et al., 2016) in file order.

    Args:
        path: a JSON file in the SQuAD v1.1 format.
        limit: read the first `limit` questions only; what follows them is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 JSON, a record lacks a field or has a wrong one, an id occurs twice, a
            question has no answer (SQuAD 2.0), there is no question at all, or `limit` is below 1. The message
            names file, record and field.
        TypeError: `limit` is no whole number.
    """
    expect_whole(or_none=True, limit=limit)
    path = Path(path).expanduser()
    questions: list[Question] = []
    records: dict[str, str] = {}
    for record, question in _questions(path, _load(path)):
        if question.id in records:
            raise ValueError(
                f"{path}: {record}: the id is that of {records[question.id]} too; "
                "expected ids to be unique in a file; rename one of them"
            )
        records[question.id] = record
        questions.append(question)
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{path}: no questions; expected at least one entry in some paragraph's 'qas'")
    return questions


def misplaced_answers(questions: Sequence[Question]) -> int:
    """How many answers do not stand where their record says (`Question.answer_starts` is -1)."""
    return sum(start < 0 for question in questions for start in question.answer_starts)


def split_articles(
    questions: Sequence[Question], train_share: float = 2 / 3, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Split by title into (train, held out), so that no article gives questions to both.

    Args:
        questions: questions on at least two articles.
        train_share: share of the articles, not of the questions, that go to the first list.
        seed: which articles they are. Both lists keep the order of `questions`.

    Raises:
        ValueError: fewer than two titles, or a `train_share` outside (0, 1).
    """
    if not 0 < train_share < 1:
        raise ValueError(f"train_share is {train_share}; expected a number between 0 and 1, both excluded")
    titles = sorted({question.title for question in questions})
    if len(titles) < 2:
        raise ValueError(f"questions come from {len(titles)} article(s); a split by article needs at least 2 titles")
    random.Random(seed).shuffle(titles)
    train_titles = set(titles[: min(max(round(train_share * len(titles)), 1), len(titles) - 1)])
    train = [question for question in questions if question.title in train_titles]
    held_out = [question for question in questions if question.title not in train_titles]
    return train, held_out


def _load(path: Path) -> Any:
    expect_file(path, "a SQuAD v1.1 JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); expected a SQuAD v1.1 JSON file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); is the file complete?") from error
    except RecursionError as error:
        raise ValueError(f"{path}: JSON nested too deeply; expected a SQuAD v1.1 JSON file") from error


def _questions(path: Path, content: Any):
    """Yield (name of the record, Question) in file order."""
    for article_index, article in enumerate(_field(path, "top level", content, "data", list)):
        record = f"article {article_index}"
        _expect_object(path, record, article)
        title = f"article {article_index}"
        if "title" in article:
            title = _text(path, record, article, "title")
            record = f"article {article_index} ({title!r})"
        for paragraph_index, paragraph in enumerate(_field(path, record, article, "paragraphs", list)):
            paragraph_record = f"{record}, paragraph {paragraph_index}"
            context = _text(path, paragraph_record, paragraph, "context")
            for index, entry in enumerate(_field(path, paragraph_record, paragraph, "qas", list)):
                question_record = f"{paragraph_record}, question {index}"
                question_id = _text(path, question_record, entry, "id")
                question_record = f"{question_record} (id {question_id!r})"
                yield question_record, _question(path, question_record, entry, question_id, title, context)


def _question(path: Path, record: str, entry: dict, question_id: str, title: str, context: str) -> Question:
    text = _text(path, record, entry, "question")
    if entry.get("is_impossible"):
        raise ValueError(
            f"{path}: {record}: marked 'is_impossible', a SQuAD 2.0 question without an answer; "
            "expected SQuAD v1.1; drop such questions from the file"
        )
    entries = _field(path, record, entry, "answers", list)
    if not entries:
        raise ValueError(
            f"{path}: {record}: 'answers' is empty, as for a SQuAD 2.0 question without an answer; "
            "expected SQuAD v1.1, at least one answer; drop such questions from the file"
        )
    answers, starts = [], []
    for index, answer in enumerate(entries):
        answer_record = f"{record}, answer {index}"
        answers.append(_text(path, answer_record, answer, "text"))
        start = _field(path, answer_record, answer, "answer_start", int)
        starts.append(start if start >= 0 and context.startswith(answers[-1], start) else -1)
    return Question(question_id, title, context, text, tuple(answers), tuple(starts))


def _field(path: Path, record: str, value: Any, name: str, kind: type) -> Any:
    _expect_object(path, record, value)
    if name not in value:
        present = ", ".join(repr(key) for key in value) or "none"
        raise ValueError(
            f"{path}: {record}: missing field {name!r}; expected the SQuAD v1.1 format; present: {present}"
        )
    if type(value[name]) is not kind:
        raise ValueError(
            f"{path}: {record}: field {name!r} is of type {_json_type(value[name])}; expected {_JSON_TYPES[kind]}"
        )
    return value[name]


def _text(path: Path, record: str, value: Any, name: str) -> str:
    text = _field(path, record, value, name, str)
    if not text.strip():
        raise ValueError(f"{path}: {record}: field {name!r} is blank; expected text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{path}: {record}: field {name!r} holds half of a surrogate pair; expected Unicode text")
    return text


def _expect_object(path: Path, record: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {record}: of type {_json_type(value)}; expected an object of the SQuAD v1.1 format")


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "null")
