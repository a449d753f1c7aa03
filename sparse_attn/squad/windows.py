"""Contexts cut into overlapping windows of tokens, and windows put into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from sparse_attn.arguments import expect_whole
from sparse_attn.cutting import Cut, expect_fast_tokenizer
from sparse_attn.squad.reading import Question

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a model may take of a batch
_QUESTIONS_PER_CALL = 256
_CONTEXT = 1  # the second segment


def check_input_names(input_names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in MODEL_INPUTS, TypeError for one name in place of several."""
    if isinstance(input_names, str):
        raise TypeError(f"input_names is the text {input_names!r}, expected a sequence of names")
    unknown = [name for name in input_names if name not in MODEL_INPUTS]
    if unknown:
        raise ValueError(f"input_names holds {unknown[0]!r}; expected names among {', '.join(MODEL_INPUTS)}")


@dataclass(frozen=True)
class Window:
    """One piece of a question's context, behind the question, as a model reads it.

    Attributes:
        question_index: which of the questions given to `make_windows`.
        input_ids: [tokens], special tokens included.
        token_type_ids: [tokens], 1 in the context's segment, if the model has segments.
        offsets: [tokens], first character and end (excluded) in the context; None outside the context.
        start_position: token with which the question's answer starts, the first one whose place is known.
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
        TypeError: the tokenizer is not a fast one, or a length is no whole number.
        ValueError: a length is out of range, or a question leaves too little room for its context to advance;
            the message names the question.
    """
    expect_fast_tokenizer(tokenizer)
    expect_whole(max_length=max_length)
    expect_whole(0, stride=stride)
    windows: list[Window] = []
    for first in range(0, len(questions), _QUESTIONS_PER_CALL):
        batch = questions[first : first + _QUESTIONS_PER_CALL]
        windows.extend(_windows_of_batch(batch, first, tokenizer, max_length, stride))
    return windows


def length_sorted_batches(
    windows: Sequence[Window], batch_size: int | None = None, *, tokens_per_batch: int | None = None
) -> list[list[int]]:
    """Indices of the windows, longest first, in batches by count or by a budget of tokens.

    Windows of one length keep their order. The first batch has the longest windows, so a lack of memory shows early.

    Args:
        windows: what to put into batches.
        batch_size: windows a batch (the last may be smaller). Either this or `tokens_per_batch`.
        tokens_per_batch: most tokens of a batch, padding included: its windows times its longest one.

    Raises:
        ValueError: both or neither were given, one is below 1, or a window is longer than the budget.
        TypeError: one is no whole number.
    """
    if (batch_size is None) == (tokens_per_batch is None):
        raise ValueError(
            f"batch_size is {batch_size} and tokens_per_batch {tokens_per_batch}; expected one of them, and one only"
        )
    expect_whole(or_none=True, batch_size=batch_size, tokens_per_batch=tokens_per_batch)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].input_ids))
    if tokens_per_batch is None:
        return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    batches, first = [], 0
    while first < len(order):
        longest = len(windows[order[first]].input_ids)
        if longest > tokens_per_batch:
            raise ValueError(
                f"tokens_per_batch is {tokens_per_batch}; expected at least the longest window's {longest}"
            )
        batches.append(order[first : first + tokens_per_batch // longest])
        first += len(batches[-1])
    return batches


class WindowTensors:
    """Windows as flat tensors, so that a batch of them is put together by a few tensor operations.

    Attributes:
        lengths: int64 [windows], tokens of each.
        input_ids, token_type_ids: int64 [tokens of all windows], one window after the other.
    """

    def __init__(self, windows: Sequence[Window]):
        if not windows:
            raise ValueError("no windows to collate; expected at least one")
        self.lengths = torch.tensor([len(window.input_ids) for window in windows], device="cpu")
        self.input_ids = _flat([window.input_ids for window in windows])
        self.token_type_ids = _flat([window.token_type_ids for window in windows])
        self._starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, indices: Sequence[int], pad_token_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Tensors of the windows `indices`, padded on the right.

        Args:
            indices: the windows of the batch, at least one.
            pad_token_id: the tokenizer's padding token.
            pad_to: length of the rows; the longest window's if None.

        Returns:
            int64 tensors [windows, length]: input_ids, attention_mask (1 = token, 0 = padding) and token_type_ids.

        Raises:
            ValueError: a window is longer than `pad_to`, or the tokenizer has no padding token.
        """
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; expected an id: give the tokenizer a padding token")
        rows = torch.as_tensor(indices, device="cpu")
        lengths = self.lengths[rows].unsqueeze(1)
        longest = int(lengths.max())
        if pad_to is not None and longest > pad_to:
            raise ValueError(f"a window has {longest} tokens, more than pad_to ({pad_to}); raise pad_to")
        columns = torch.arange(longest if pad_to is None else pad_to, device="cpu")
        real = columns < lengths
        places = (self._starts[rows].unsqueeze(1) + columns).clamp(max=len(self.input_ids) - 1)
        return {
            "input_ids": self.input_ids[places].masked_fill(~real, pad_token_id),
            "attention_mask": real.long(),
            "token_type_ids": self.token_type_ids[places] * real,
        }

    def packed(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors of the windows `indices` in one row without padding.

        Returns:
            int64 tensors [1, tokens of the batch]: input_ids, token_type_ids and position_ids (from 0 in every
            window), and cu_seqlens, int32 [windows + 1], where the windows begin and the last one ends.
        """
        rows = torch.as_tensor(indices, device="cpu")
        lengths = self.lengths[rows]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        positions = torch.arange(int(bounds[-1]), device="cpu") - bounds[:-1].repeat_interleave(lengths)
        places = (positions + self._starts[rows].repeat_interleave(lengths)).unsqueeze(0)
        return {
            "input_ids": self.input_ids[places],
            "token_type_ids": self.token_type_ids[places],
            "position_ids": positions.unsqueeze(0),
            "cu_seqlens": bounds.int(),
        }


def collate(windows: Sequence[Window], pad_token_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a batch with its labels, padded on the right.

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
    return {
        **WindowTensors(windows).padded(range(len(windows)), pad_token_id, pad_to),
        "start_positions": torch.tensor([window.start_position for window in windows], device="cpu"),
        "end_positions": torch.tensor([window.end_position for window in windows], device="cpu"),
    }


def _flat(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=sum(map(len, rows))))


def _windows_of_batch(
    questions: Sequence[Question], first: int, tokenizer, max_length: int, stride: int
) -> Iterator[Window]:
    encoding = tokenizer(
        [question.question for question in questions],
        [question.context for question in questions],
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        verbose=False,
    )
    for row, question in enumerate(questions):
        segments = encoding.sequence_ids(row)
        cut = Cut(segments, _CONTEXT, max_length, stride)
        if not cut.bounds:
            raise ValueError(_no_room(question, segments, cut, max_length, stride))
        ids, types = encoding["input_ids"][row], encoding["token_type_ids"][row]
        offsets = [
            span if segment == _CONTEXT else None
            for span, segment in zip(encoding["offset_mapping"][row], segments, strict=True)
        ]
        answer = _tokens_of_answer(question, offsets)
        for bounds in cut.bounds:
            held = bool(answer) and bounds[0] <= answer[0] and answer[-1] < bounds[1]
            yield Window(
                question_index=first + row,
                input_ids=cut.window(ids, bounds),
                token_type_ids=cut.window(types, bounds),
                offsets=cut.window(offsets, bounds),
                start_position=cut.place(answer[0], bounds) if held else 0,
                end_position=cut.place(answer[-1], bounds) if held else 0,
            )


def _tokens_of_answer(question: Question, offsets: list[tuple[int, int] | None]) -> list[int]:
    """The tokens that have a character of the first answer whose place is known: characters for which the tokenizer has
    no token (spaces, control characters) at the answer's ends do not hide it."""
    placed = [(text, start) for text, start in zip(question.answers, question.answer_starts) if start >= 0]
    if not placed:
        return []
    text, start = placed[0]
    end = start + len(text)
    return [place for place, span in enumerate(offsets) if span is not None and span[0] < end and span[1] > start]


def _no_room(question: Question, segments: list[int | None], cut: Cut, max_length: int, stride: int) -> str:
    special = segments.count(None)
    return (
        f"question {question.id!r} ({question.question[:60]!r}) has {len(segments) - special - cut.tokens} tokens, "
        f"which with {special} special tokens leaves {max(cut.room, 0)} of max_length {max_length} for its context "
        f"of {cut.tokens}; expected more than the stride ({stride}): raise max_length, lower the "
        "stride or shorten the question"
    )
