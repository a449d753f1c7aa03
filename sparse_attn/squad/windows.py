"""Contexts cut into overlapping windows of tokens, and windows put into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparse_attn.squad.reading import Question

_QUESTIONS_PER_CALL = 256


@dataclass(frozen=True)
class Window:
    """One piece of a question's context, behind the question, as a model reads it.

    Attributes:
        question_index: which of the questions given to `make_windows`.
        input_ids: [tokens], special tokens included.
        token_type_ids: [tokens], 1 in the context's segment.
        offsets: [tokens], first character and end (excluded) in the context; None outside the context.
        start_position: token with which the question's first answer starts.
        end_position: token with which it ends, included. Both are 0 unless this window holds all of it.
    """

    question_index: int
    input_ids: list[int]
    token_type_ids: list[int]
    offsets: list[tuple[int, int] | None]
    start_position: int
    end_position: int


def make_windows(questions: Sequence[Question], tokenizer, max_length: int = 384, stride: int = 128) -> list[Window]:
    """Cut contexts into windows that share `stride` tokens, each behind its question (Devlin et al., 2019).

    Args:
        questions: the questions; their windows come in the same order.
        tokenizer: a fast tokenizer of transformers: the windows need its character offsets.
        max_length: most tokens of a window, question and special tokens included.
        stride: context tokens that two neighbouring windows share.

    Returns:
        At least one window per question.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: a length is out of range, or a question leaves too little room for its context to advance;
            the message names the question.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; expected a fast "
            "tokenizer, such as transformers.AutoTokenizer.from_pretrained gives"
        )
    if max_length < 1 or stride < 0:
        raise ValueError(f"max_length is {max_length} and stride {stride}; expected at least 1 and at least 0")
    windows: list[Window] = []
    for first in range(0, len(questions), _QUESTIONS_PER_CALL):
        batch = questions[first : first + _QUESTIONS_PER_CALL]
        _expect_room_for_contexts(batch, tokenizer, max_length, stride)
        windows.extend(_windows_of_batch(batch, first, tokenizer, max_length, stride))
    return windows


def length_sorted_batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Indices of the windows, longest first, in batches of `batch_size` (the last may be smaller).

    Windows of one length keep their order. The first batch is the largest, so a lack of memory shows at once.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].input_ids))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def collate(windows: Sequence[Window], pad_token_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a batch, padded on the right.

    Args:
        windows: the windows of the batch, at least one.
        pad_token_id: the tokenizer's padding token.
        pad_to: length of the rows; the longest window's if None.

    Returns:
        int64 tensors: input_ids, attention_mask (1 = token, 0 = padding) and token_type_ids, each
        [windows, length], and start_positions and end_positions, [windows].

    Raises:
        ValueError: there is no window, one is longer than `pad_to`, or the tokenizer has no padding token.
    """
    if not windows:
        raise ValueError("no windows to collate; expected at least one")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; expected an id: give the tokenizer a padding token")
    longest = max(len(window.input_ids) for window in windows)
    length = longest if pad_to is None else pad_to
    if longest > length:
        raise ValueError(f"a window has {longest} tokens, more than pad_to ({pad_to}); raise pad_to")
    input_ids = torch.full((len(windows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(windows), length), dtype=torch.int64)
    token_type_ids = torch.zeros((len(windows), length), dtype=torch.int64)
    for row, window in enumerate(windows):
        tokens = len(window.input_ids)
        input_ids[row, :tokens] = torch.tensor(window.input_ids)
        attention_mask[row, :tokens] = 1
        token_type_ids[row, :tokens] = torch.tensor(window.token_type_ids)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "start_positions": torch.tensor([window.start_position for window in windows]),
        "end_positions": torch.tensor([window.end_position for window in windows]),
    }


def _windows_of_batch(
    questions: Sequence[Question], first: int, tokenizer, max_length: int, stride: int
) -> Iterator[Window]:
    encoding = tokenizer(
        [question.question for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        padding=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    owners = encoding["overflow_to_sample_mapping"]
    offsets = [
        [span if segment == 1 else None for span, segment in zip(spans, encoding.sequence_ids(row), strict=True)]
        for row, spans in enumerate(encoding["offset_mapping"])
    ]
    answers: dict[int, list[tuple[int, int]]] = {owner: [] for owner in owners}
    for owner, spans in zip(owners, offsets, strict=True):
        answers[owner].extend(_spans_of_first_answer(questions[owner], spans))
    for row, owner in enumerate(owners):
        start, end = _answer_positions(offsets[row], answers[owner])
        yield Window(
            question_index=first + owner,
            input_ids=encoding["input_ids"][row],
            token_type_ids=encoding["token_type_ids"][row],
            offsets=offsets[row],
            start_position=start,
            end_position=end,
        )


def _spans_of_first_answer(question: Question, offsets: list[tuple[int, int] | None]) -> list[tuple[int, int]]:
    """The character spans of the tokens that have a character of the first answer."""
    if not question.answers:
        return []
    start = question.answer_starts[0]
    end = start + len(question.answers[0])
    return [span for span in offsets if span is not None and span[0] < end and span[1] > start]


def _answer_positions(offsets: list[tuple[int, int] | None], answer: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the answer, (0, 0) unless its first and its last token are both in this window.

    `answer` holds the spans of the answer's tokens over all windows of the question, so that characters for
    which the tokenizer has no token (spaces, control characters) at the answer's ends do not hide it.
    """
    if not answer:
        return 0, 0
    first, last = min(answer), max(answer)
    if first not in offsets or last not in offsets:
        return 0, 0
    # Tokens can share a span (one character, several tokens): first of the first, last of the last.
    return offsets.index(first), len(offsets) - 1 - offsets[::-1].index(last)


def _expect_room_for_contexts(questions: Sequence[Question], tokenizer, max_length: int, stride: int) -> None:
    """Refuse what a tokenizer refuses without saying where: a window that holds no new context token."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    texts = [question.question for question in questions]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    for question, length in zip(questions, lengths, strict=True):
        room = max_length - special - length
        if room > stride:
            continue
        context = len(tokenizer(question.context, add_special_tokens=False, verbose=False)["input_ids"])
        if context > max(room, 0):
            raise ValueError(
                f"question {question.id!r} ({question.question[:60]!r}) has {length} tokens, which with "
                f"{special} special tokens leaves {max(room, 0)} of max_length {max_length} for its context "
                f"of {context}; expected more than the stride ({stride}): raise max_length, lower the "
                "stride or shorten the question"
            )
