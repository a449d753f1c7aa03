"""Attention of one layer and one sequence at a time, whose probabilities are added up on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import expect_whole
from ..averages import AttentionAverages, pad_corner
from ..distributed import sums_over_processes
from .packing import Packing

_SUMMED_IN_FLOAT32 = 16  # sequences, before their sum goes on in float64


@dataclass(frozen=True)
class _Sequence:
    """Where the real tokens of a sequence are: in `row` of a layer's tensors, at `places` along the length.
    `positions` are their own ones, None where these are 0, 1, 2, ..."""

    row: int
    places: slice | Tensor
    length: int
    positions: Tensor | None


class AttentionSums:
    """Sums of attention probabilities, which grow to the longest sequence seen.

    `start_batch` comes before each forward pass, then `add_layer` for each layer in order. The scores of a sequence,
    its probabilities and the layer's sum in float32 have buffers that stay: fresh memory costs more than a softmax.
    """

    def __init__(self, layers: int, heads: int, max_length: int | None):
        expect_whole(or_none=True, max_length=max_length)
        self.layers, self.heads, self.max_length = layers, heads, max_length
        self.side = max_length or 0
        self.sums = torch.zeros(layers, heads, self.side, self.side, dtype=torch.float64, device="cpu")
        self.counts = torch.zeros(self.side, self.side, dtype=torch.int64, device="cpu")
        self.sequences = self.tokens = 0
        self._layer = 0
        self._batch: list[_Sequence] = []
        self._buffers: dict[str, Tensor] = {}

    def start_batch(self) -> None:
        self._layer, self._batch = 0, []

    def add_layer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Packing | Tensor | None,
        scale: float,
        causal: bool,
    ) -> Tensor | None:
        """Attention of the next layer, added to its sums.

        Args:
            query, key, value: [batch, heads, length, head_dim], or [1, heads, tokens, head_dim] with a Packing.
            padding_mask: bool [batch, length], true = real, or the Packing in its place; None where all are real.

        Returns:
            [batch, length, heads, head_dim], zero at padding; None after the last layer, which is not computed.
        """
        if self._layer == 0:
            self._batch = _sequences(query, padding_mask)
            self._count(query.device, causal)
        layer, self._layer = self._layer, self._layer + 1
        last = self._layer == self.layers
        batch, heads, length, head_dim = value.shape
        output = None if last else value.new_zeros(batch, length, heads, head_dim)
        contiguous = [sequence for sequence in self._batch if sequence.positions is None]
        for first in range(0, len(contiguous), _SUMMED_IN_FLOAT32):
            run = contiguous[first : first + _SUMMED_IN_FLOAT32]
            length = max(sequence.length for sequence in run)
            total = self._buffer("total", length, query.device).zero_()
            for sequence in run:
                inner = slice(0, sequence.length)
                total[:, inner, inner] += self._attend(sequence, query, key, value, scale, causal, output)
            self.sums[layer, :, :length, :length] += total
        for sequence in self._batch:
            if sequence.positions is not None:
                probabilities = self._attend(sequence, query, key, value, scale, causal, output)
                at = sequence.positions
                self.sums[layer, :, at[:, None], at] += probabilities
        return output

    def averages(self, side: int, metadata: dict[str, str]) -> AttentionAverages:
        """The averages over the batches of all processes, of length `side`. Raises ValueError for none."""
        sums, counts = self.sums.cpu(), self.counts
        if side > self.side:
            sums, counts = pad_corner(sums, side, side), pad_corner(counts, side, side)
        seen = torch.tensor([self.sequences, self.tokens], device="cpu")
        sums, counts, seen = sums_over_processes([sums, counts, seen])
        sequences, tokens = seen.tolist()
        if sequences == 0:
            raise ValueError("there was no batch to collect attention from; pass at least one")
        if tokens == 0:
            raise ValueError(f"all tokens of {sequences} sequences are padding; expected some to average over")
        return AttentionAverages(sums, counts, sequences, tokens, metadata)

    def _attend(
        self, sequence: _Sequence, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool,
        output: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Probabilities of a sequence, float32 [heads, length, length], in a buffer. Fills in its rows of `output`."""
        row, places, length = sequence.row, sequence.places, sequence.length
        q, k = query[row][:, places].float(), key[row][:, places].float()
        scores = self._buffer("scores", length, query.device)
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if causal:
            scores.masked_fill_(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        probabilities = torch.softmax(scores, -1, out=self._buffer("probabilities", length, query.device))
        if output is not None:
            attended = torch.bmm(probabilities.to(value.dtype), value[row][:, places])
            output[row, places] = attended.transpose(0, 1)
        return probabilities

    def _buffer(self, name: str, length: int, device: torch.device) -> Tensor:
        """float32 [heads, length, length] with anything in it."""
        numbers = self.heads * length * length
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < numbers or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(numbers, dtype=torch.float32, device=device)
        return buffer[:numbers].view(self.heads, length, length)

    def _count(self, device: torch.device, causal: bool) -> None:
        ends = [
            sequence.length if sequence.positions is None else int(sequence.positions[-1]) + 1
            for sequence in self._batch
            if sequence.length
        ]
        longest = max(ends, default=0)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a batch has length {longest}, more than max_length {self.max_length}; truncate it or raise max_length"
            )
        if longest > self.side:
            self.side = longest
            self.sums, self.counts = (pad_corner(tensor, longest, longest) for tensor in (self.sums, self.counts))
        self.sums = self.sums.to(device)
        self.sequences += len(self._batch)
        self.tokens += sum(sequence.length for sequence in self._batch)
        real = torch.zeros(len(self._batch), longest, dtype=torch.float32, device="cpu")
        for sequence, own in zip(self._batch, real):
            own[slice(sequence.length) if sequence.positions is None else sequence.positions.cpu()] = 1
        pairs = (real.T @ real).long()  # exact: batches have fewer than 2^24 sequences
        self.counts[:longest, :longest] += pairs.tril() if causal else pairs


def _sequences(query: Tensor, padding_mask: Packing | Tensor | None) -> list[_Sequence]:
    if isinstance(padding_mask, Packing):
        starts = padding_mask.cu_seqlens.tolist()
        bounds = list(zip(starts, starts[1:]))
        if padding_mask.real is None:
            return [_Sequence(0, slice(*bound), bound[1] - bound[0], None) for bound in bounds]
        positions = padding_mask.places % padding_mask.length
        return [_Sequence(0, slice(*bound), bound[1] - bound[0], positions[slice(*bound)]) for bound in bounds]
    if padding_mask is None:
        return [_Sequence(row, slice(query.shape[2]), query.shape[2], None) for row in range(query.shape[0])]
    places = [row.nonzero()[:, 0] for row in padding_mask]
    return [_Sequence(row, positions, len(positions), positions) for row, positions in enumerate(places)]
