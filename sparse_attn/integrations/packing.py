"""Batches without padding: the real tokens of a padded batch side by side, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the real tokens of a padded batch are.

    Attributes:
        batch, length: of the padded batch.
        tokens: how many are real.
        places: int64 [rows], places of the real tokens among batch * length, in order. Packed tensors may have rows
            beyond them, for numbers of rows that recur; these repeat the last token and mean nothing.
        cu_seqlens: int32 [batch + 1], cumulative numbers of real tokens.
        longest: the greatest of them.
        real: bool [batch, length], the padding mask, where padding is elsewhere than at the end; None otherwise. There
            a token's place among the packed ones is not its position.
    """

    batch: int
    length: int
    tokens: int
    places: Tensor
    cu_seqlens: Tensor
    longest: int
    real: Tensor | None

    @classmethod
    def of(cls, real: Tensor) -> Packing | bool:
        """The packing of a padding mask, bool [batch, length]. Where there is nothing to gain, whether all tokens are
        real or none is. Waits for the device, since the shapes of what follows depend on it."""
        batch, length = real.shape
        lengths = real.sum(1)
        at_end = (real == (torch.arange(length, device=real.device) < lengths[:, None])).all()
        tokens, longest, right = torch.stack((lengths.sum(), lengths.amax(), at_end)).tolist()
        if tokens in (0, batch * length):
            return tokens > 0
        places = real.flatten().nonzero()[:, 0]
        if real.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            rows = min(recurring_rows(tokens), batch * length)
            rows = tokens if (1, rows) == (batch, length) else rows  # the shape says what is packed
            places = torch.cat((places, places[-1:].expand(rows - tokens)))
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(batch, length, tokens, places, cu_seqlens, longest, None if right else real)

    @property
    def rows(self) -> int:
        return self.places.shape[0]

    def packed(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] -> [1, rows, ...]; no view, for which torch.compile would compile a layer anew."""
        return padded.flatten(0, 1).unsqueeze(0).index_select(1, self.places)

    def padded(self, packed: Tensor) -> Tensor:
        """[tokens or rows, ...] -> [batch, length, ...], zeros where padding is."""
        zeros = packed.new_zeros(self.batch * self.length, *packed.shape[1:])
        placed = zeros.index_copy(0, self.places[: self.tokens], packed[: self.tokens])
        return placed.unflatten(0, (self.batch, self.length))

    def with_all_rows(self, packed: Tensor) -> Tensor:
        """[tokens, ...] -> [rows, ...], zeros beyond the tokens."""
        if self.rows == self.tokens:
            return packed
        return torch.cat((packed, packed.new_zeros(self.rows - self.tokens, *packed.shape[1:])))


def recurring_rows(tokens: int) -> int:
    """The least number of rows that holds so many tokens and is one of 32 between two powers of 2.

    On a CPU oneDNN compiles a kernel for every number of rows that it meets and keeps it, which takes a millisecond
    and half a megabyte each. Batches without padding would hardly ever have the same number twice.
    """
    unit = max(1, 1 << tokens.bit_length() >> 6)
    return -(-tokens // unit) * unit
