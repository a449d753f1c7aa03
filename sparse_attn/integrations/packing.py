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
        places: int64 [tokens], places of the real tokens among batch * length, in order.
        cu_seqlens: int32 [batch + 1], cumulative numbers of real tokens.
        longest: the greatest of them.
        padding: bool [batch, length], true = real, where padding is elsewhere than at the end; None otherwise. There a
            token's place among the packed ones is not its position.
    """

    batch: int
    length: int
    places: Tensor
    cu_seqlens: Tensor
    longest: int
    padding: Tensor | None

    @classmethod
    def of(cls, real: Tensor) -> Packing | None:
        """The packing of a padding mask, bool [batch, length]. None where there is nothing to gain: all tokens are
        real, or none. Waits for the device, since the shapes of what follows depend on it."""
        batch, length = real.shape
        lengths = real.sum(1)
        at_end = (real == (torch.arange(length, device=real.device) < lengths[:, None])).all()
        tokens, longest, right = torch.stack((lengths.sum(), lengths.amax(), at_end)).tolist()
        if tokens in (0, batch * length):
            return None
        places = real.flatten().nonzero()[:, 0]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(batch, length, places, cu_seqlens, longest, None if right else real)

    @property
    def tokens(self) -> int:
        return self.places.shape[0]

    def packed(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] -> [tokens, ...]"""
        return padded.flatten(0, 1).index_select(0, self.places)

    def padded(self, packed: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, length, ...], zeros where padding is."""
        zeros = packed.new_zeros(self.batch * self.length, *packed.shape[1:])
        return zeros.index_copy(0, self.places, packed).unflatten(0, (self.batch, self.length))
