"""Column lists as the Triton kernels take them: the bits of a step of 32 entries lie in one word per row.

A thread that computes some entries of a row loads one word for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 32  # entries whose bits are in one word
# 32 x 32 bits are transposed by swapping the off-diagonal blocks of 16, 8, 4, 2 and 1 bits.
_LOW_HALVES = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F, 2: 0x33333333, 1: 0x55555555}


@dataclass(frozen=True)
class StepLists:
    """Column lists for one size of row groups.

    Attributes:
        stops, columns, order, full: as in `sparse_attn.layout.ColumnLists`.
        step_bits: int32 [steps, rows]; bit e of [s, r] says whether row r of the group keeps entry e of step s. Steps
            are counted from the start of each part; part number i of all, whose first entry is `start`, has its own
            from start // 32 + i on.
    """

    stops: Tensor
    columns: Tensor
    step_bits: Tensor
    order: Tensor
    full: bool

    def tensors(self) -> list[Tensor]:
        return [self.stops, self.columns, self.step_bits, self.order]

    def to(self, device: torch.device) -> StepLists:
        return StepLists(*(tensor.to(device) for tensor in self.tensors()), self.full)


def step_bits_of(stops: Tensor, row_bits: Tensor, rows: int) -> Tensor:
    """`StepLists.step_bits` from what `ColumnLists` says of groups of `rows` queries."""
    entries, words = row_bits.shape
    starts, ends = stops[..., 0].flatten().long(), stops[..., -1].flatten().long()
    first_step = starts // STEP + torch.arange(len(starts), device=starts.device)
    moves = first_step * STEP - starts  # what lies between an entry's number and its place
    places = torch.arange(entries, device=starts.device) + moves.repeat_interleave(ends - starts, output_size=entries)
    bits = row_bits.new_zeros(entries // STEP + len(starts), STEP, words)
    bits.view(-1, words)[places] = row_bits
    for width, low in _LOW_HALVES.items():  # [step, entry, word of rows] -> [step, row, word of rows]
        upper, lower = bits.view(-1, STEP // (2 * width), 2, width, words).unbind(2)
        swapped = ((upper >> width) ^ lower) & low
        lower ^= swapped
        upper ^= swapped << width
    return bits.transpose(1, 2).flatten(1)[:, :rows].contiguous()
