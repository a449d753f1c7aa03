"""Exact match and F1, the scores of SQuAD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparse_attn.extension import how_to_install
from sparse_attn.squad.reading import Question


def exact_match_and_f1(predictions: Mapping[str, str], questions: Sequence[Question]) -> tuple[float, float]:
    """Exact match and F1 in percent, means over the questions (Rajpurkar et al., 2016).

    Texts are compared without case, punctuation, articles (a, an, the) and surplus spaces. F1 is that of the
    bags of words. Of several gold answers the best one counts. Computed by `torchmetrics.text.SQuAD`, which differs
    from the official script where a gold answer and a prediction are nothing but articles and punctuation: their F1
    is 100, not 0.

    Args:
        predictions: question id -> answer, one for every question and no other.
        questions: questions with at least one gold answer each.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: there are no questions, a question has no prediction or no gold answer, or a prediction
            has no question; the message names it.
    """
    try:
        from torchmetrics.text import SQuAD
    except ImportError as error:
        raise ImportError(
            f"exact match and F1 need torchmetrics, which is not installed: {how_to_install('bench')}"
        ) from error
    _expect_same_ids(predictions, questions)
    metric = SQuAD()
    metric.update(
        [{"id": question.id, "prediction_text": predictions[question.id]} for question in questions],
        [
            {
                "id": question.id,
                "answers": {"text": list(question.answers), "answer_start": list(question.answer_starts)},
            }
            for question in questions
        ],
    )
    scores = metric.compute()
    return scores["exact_match"].item(), scores["f1"].item()


def _expect_same_ids(predictions: Mapping[str, str], questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("no questions; expected at least one to score")
    ids = {question.id for question in questions}
    if len(ids) < len(questions):
        raise ValueError(f"{len(questions)} questions have {len(ids)} different ids; expected unique ids")
    for question in questions:
        if question.id not in predictions:
            raise ValueError(f"question {question.id!r} has no prediction; expected one for every question")
        if not question.answers:
            raise ValueError(f"question {question.id!r} has no gold answer; expected at least one")
    foreign = [key for key in predictions if key not in ids]
    if foreign:
        raise ValueError(f"prediction {foreign[0]!r} belongs to none of the questions ({len(foreign)} such)")
