"""Encoded texts cut into windows that a model can read.

Tokenizers cut too, but versions 0.23.1 and 0.23.2 lose most of what lies beyond the first window
(https://github.com/huggingface/tokenizers/pull/2098).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Cut:
    """Where one segment of an encoded text is cut; the tokens before and after it belong to every window.

    Attributes:
        tokens: length of the segment.
        room: most tokens of it in one window, 0 or less where there is none.
        bounds: first place and end (excluded) of each window's part; empty where the windows could not advance.
    """

    def __init__(self, segments: Sequence[int | None], segment: int, max_length: int, stride: int = 0):
        """
        Args:
            segments: [tokens], as `sequence_ids` of an encoding gives them.
            segment: which of them is cut.
            max_length: most tokens of a window, those before and after included.
            stride: tokens that two neighbouring windows share.
        """
        places = [place for place, one in enumerate(segments) if one == segment]
        self._begin, self._end = (places[0], places[-1] + 1) if places else (len(segments), len(segments))
        self.tokens = self._end - self._begin
        self.room = max_length - (len(segments) - self.tokens)
        if self.tokens <= self.room:
            self.bounds = [(self._begin, self._end)]
        elif stride < self.room:
            starts = range(self._begin, self._end - stride, self.room - stride)
            self.bounds = [(start, min(start + self.room, self._end)) for start in starts]
        else:
            self.bounds = []

    def window(self, items: Sequence[Item], bounds: tuple[int, int]) -> list[Item]:
        """The items of one window, of `items` [tokens]."""
        start, end = bounds
        return [*items[: self._begin], *items[start:end], *items[self._end :]]

    def place(self, token: int, bounds: tuple[int, int]) -> int:
        """Where a token of the segment that the window holds lies in it."""
        return token - bounds[0] + self._begin


def expect_fast_tokenizer(tokenizer) -> None:
    """Raises TypeError for a tokenizer that does not say from where in a text its tokens come."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; expected a fast "
            "tokenizer, such as transformers.AutoTokenizer.from_pretrained gives"
        )
