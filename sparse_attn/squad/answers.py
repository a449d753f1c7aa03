"""Answers in words from start and end logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparse_attn.arguments import expect_whole
from sparse_attn.squad.reading import Question
from sparse_attn.squad.windows import Window


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence,
    end_logits: Sequence,
    *,
    max_answer_length: int = 30,
    best: int = 20,
) -> dict[str, str]:
    """The best span of each question over all its windows (Devlin et al., 2019).

    In every window the `best` likeliest starts meet the `best` likeliest ends. A span counts if both lie in
    the context, it does not end before it starts and it has at most `max_answer_length` tokens; its score is
    the sum of both logits. The winner is cut out of the original context, so its spelling is the text's own.

    Args:
        questions: the questions the windows were made of.
        windows: the windows, in any order.
        start_logits, end_logits: per window an array or tensor [tokens]; what follows the window's own tokens
            (a padded row) is ignored.
        max_answer_length: most tokens of an answer.
        best: starts, and ends, considered per window.

    Returns:
        Question id -> answer; "" where no span counts.

    Raises:
        TypeError: an option is no whole number.
        ValueError: the numbers of windows and logits differ, a row of logits is shorter than its window or
            not finite in the context, a question has no window, or an option is below 1.
    """
    expect_whole(max_answer_length=max_answer_length, best=best)
    if not len(windows) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"{len(windows)} windows, {len(start_logits)} rows of start logits and {len(end_logits)} rows of "
            "end logits; expected as many of each"
        )
    scores = [-np.inf] * len(questions)
    answers: list[str | None] = [None] * len(questions)
    for index, window in enumerate(windows):
        owner = window.question_index
        if not 0 <= owner < len(questions):
            raise ValueError(
                f"window {index} belongs to question {owner}, but there are {len(questions)}; "
                "expected the questions that the windows were made of"
            )
        answers[owner] = answers[owner] or ""
        start = _logits(start_logits[index], window, f"start logits of window {index}")
        end = _logits(end_logits[index], window, f"end logits of window {index}")
        span = _best_span(window, start, end, max_answer_length, best)
        if span is not None and span[0] > scores[owner]:
            scores[owner], first, last = span
            answers[owner] = questions[owner].context[window.offsets[first][0] : window.offsets[last][1]]
    for question, answer in zip(questions, answers, strict=True):
        if answer is None:
            raise ValueError(f"question {question.id!r} has no window; expected at least one for every question")
    return {question.id: answer for question, answer in zip(questions, answers, strict=True)}


def _best_span(
    window: Window, start: np.ndarray, end: np.ndarray, max_answer_length: int, best: int
) -> tuple[float, int, int] | None:
    """Score, first token and last token of the window's best span; None if it has none."""
    context = np.array([token for token, span in enumerate(window.offsets) if span is not None], dtype=np.int64)
    starts = context[np.argsort(-start[context], kind="stable")[:best], None]  # [starts, 1]
    ends = context[np.argsort(-end[context], kind="stable")[:best]]  # [ends]
    scores = np.where((ends >= starts) & (ends - starts < max_answer_length), start[starts] + end[ends], -np.inf)
    if not np.isfinite(scores).any():
        return None
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[row, column]), int(starts[row, 0]), int(ends[column])


def _logits(values, window: Window, name: str) -> np.ndarray:
    """The window's own logits as float64 [tokens]."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    values = np.asarray(values, dtype=np.float64)
    tokens = len(window.input_ids)
    if values.ndim != 1 or len(values) < tokens:
        raise ValueError(f"{name} have shape {list(values.shape)}; expected [tokens] with at least {tokens}")
    values = values[:tokens]
    in_context = np.array([span is not None for span in window.offsets])
    if not np.isfinite(values[in_context]).all():
        raise ValueError(f"{name} have NaN or infinite values in the context; expected finite logits")
    return values
