"""Which questions are evaluated, and which ones a model and its mask are made from."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from sparse_attn.squad.reading import Question, read_squad, split_articles

from ..device import ROOT
from ..pages import write_json

OWN_QUESTIONS = ROOT / "benchmarks" / "questions" / "questions.json"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class QuestionSets:
    """Questions to evaluate on and, where there are any, to train and to collect averages on.

    `training_name` and `evaluation_name` say where they come from; `own_training` whether the training
    questions are those of `own_questions`.
    """

    evaluation: list[Question]
    evaluation_name: str
    training: list[Question] | None
    training_name: str | None
    own_training: bool = False


def choose_questions(options: Namespace) -> QuestionSets:
    """The questions that `options` ask for.

    Without --data the held-out articles of the project's own questions are evaluated on, and training uses
    the others. The articles of --data are split only for --finetune without --train-data.

    Raises FileNotFoundError and ValueError for what cannot be read.
    """
    training = training_name = None
    if options.data is None:
        own_training, evaluation = own_questions()
        evaluation_name = "own questions, held-out articles"
    else:
        evaluation = read_questions(options.data, "validation", options.cache)
        evaluation_name = Path(options.data).name
    if options.train_data is not None:
        training = read_questions(options.train_data, "train", options.cache)
        training_name = Path(options.train_data).name
    elif options.data is None:
        training, training_name = own_training, "own questions, training articles"
    elif options.finetune:
        training, evaluation = split_articles(evaluation)
        training_name = f"{evaluation_name}, training articles"
        evaluation_name = f"{evaluation_name}, held-out articles"
    own_training = options.data is None and options.train_data is None
    return QuestionSets(evaluation[: options.limit], evaluation_name, training, training_name, own_training)


def own_questions() -> tuple[list[Question], list[Question]]:
    """The project's own questions: (training articles, held-out articles)."""
    return split_articles(read_squad(OWN_QUESTIONS))


def read_questions(name: str, split: str, cache: Path) -> list[Question]:
    """Questions of a file, or of a data set on the hub by its name (which needs the package datasets)."""
    path = Path(name)
    if path.exists() or path.suffix == ".json" or not HUB_NAME.fullmatch(name):
        return read_squad(path)
    copy = cache / "data" / f"{name.replace('/', '--')}-{split}.json"
    if not copy.exists():
        records = _hub_records(name, split)
        write_json(squad_format(records), copy)  # which other processes may be writing too
    return read_squad(copy)


def squad_format(records) -> dict:
    """SQuAD v1.1 JSON from flat records (id, title, context, question, answers), the form of the hub."""
    articles: dict[str, dict[str, list]] = {}
    for record in records:
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(record["answers"]["text"], record["answers"]["answer_start"])
        ]
        question = {"id": record["id"], "question": record["question"], "answers": answers}
        articles.setdefault(record["title"], {}).setdefault(record["context"], []).append(question)
    return {
        "version": "1.1",
        "data": [
            {
                "title": title,
                "paragraphs": [{"context": context, "qas": questions} for context, questions in contexts.items()],
            }
            for title, contexts in articles.items()
        ],
    }


def _hub_records(name: str, split: str):
    try:
        from datasets import load_dataset
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such file; to read a data set of that name from the hub, install datasets: "
            "pip install datasets"
        ) from None
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # datasets raises errors of many libraries
        raise ValueError(f"{name}: no such file, and no readable {split} split on the hub: {error}") from error
