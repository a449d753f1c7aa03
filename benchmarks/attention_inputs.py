"""Inputs of the attention benchmark: random tensors, masks in the forms that variants want, and single cases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparse_attn import SparseLayout
from sparse_attn.masks import TILE_ROWS

from .attention_workloads import FORWARD_BACKWARD, Workload
from .ceilings import kept_in_corners


class Inputs:
    """Random query, key, value and gradient of the output for a workload, as normal numbers.

    Tensors are kept as projections make them: [tokens, heads, head_dim] of all sequences, one after the other.

    Attributes:
        lengths: int32 [batch], or None where all sequences have the workload's length.
        cu_seqlens: int32 [batch + 1], where sequences start and end among the tokens.
    """

    def __init__(self, workload: Workload, device: torch.device, dtype: torch.dtype, seed: int):
        self.workload, self.device, self.dtype = workload, device, dtype
        generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device
        shape = (4, workload.tokens, workload.heads, workload.head_dim)
        self._drawn = torch.randn(shape, generator=generator).to(device, dtype)
        # Each tensor has storage of its own, as the results of projections do.
        self._in_use = {packed: [t.clone() for t in self._original(packed)] for packed in (False, True)}
        lengths = torch.tensor(workload.sequence_lengths, dtype=torch.int32)
        self.lengths = lengths.to(device) if workload.packed else None
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)

    def tensors(self, packed: bool) -> list[Tensor]:
        """Query, key, value and grad_output: packed [tokens, heads, head_dim], or padded
        [batch, heads, length, head_dim] with the strides that transformers passes (heads beside tokens)."""
        return list(self._in_use[packed])

    def restore(self) -> bool:
        """Undoes what a variant did to its inputs; says whether it did anything."""
        changed = False
        for packed, tensors in self._in_use.items():
            for tensor, original in zip(tensors, self._original(packed), strict=True):
                if not torch.equal(tensor, original):
                    tensor.copy_(original)
                    changed = True
        return changed

    def sequence(self, tensor: Tensor, index: int, head: int) -> Tensor:
        """Real rows of one sequence and head of a tensor like `tensors`: [length, head_dim]."""
        length = self.workload.sequence_lengths[index]
        if tensor.ndim == 4:
            return tensor[index, head, :length]
        start = sum(self.workload.sequence_lengths[:index])
        return tensor[start : start + length, head]

    def _original(self, packed: bool) -> tuple[Tensor, ...]:
        """What `tensors` holds at first; short sequences have zeros behind them."""
        workload = self.workload
        if packed:
            return self._drawn.unbind(0)
        if not workload.packed:
            rows = self._drawn.view(4, workload.batch, workload.length, workload.heads, workload.head_dim)
        else:
            rows = self._drawn.new_zeros(4, workload.batch, workload.length, workload.heads, workload.head_dim)
            for index, part in enumerate(self._drawn.split(workload.sequence_lengths, dim=1)):
                rows[:, index, : part.shape[1]] = part
        return rows.transpose(2, 3).unbind(0)


class LayerMask:
    """One layer's mask, and what variants make of it; each form is made once.

    Args:
        keep: bool [heads, >= length, >= length], true = kept, on the device of the inputs.
    """

    def __init__(self, keep: Tensor):
        self.keep = keep.contiguous()
        self.layout = SparseLayout(self.keep)
        self._biases: dict[tuple, Tensor] = {}

    def bias(self, inputs: Inputs) -> Tensor:
        """The mask, and padding, as a term for the scores; see `additive_mask`."""
        kind = (inputs.dtype, inputs.workload.sequence_lengths)
        if kind not in self._biases:
            self._biases[kind] = additive_mask(inputs, self.keep)
        return self._biases[kind]

    def kept(self, workload: Workload) -> int:
        """Positions kept, over all heads and the real tokens of all sequences."""
        return sum(int(self._kept_in_corners[length - 1]) for length in workload.sequence_lengths)

    def density(self, workload: Workload) -> float:
        """Share of the workload's positions that the mask keeps."""
        return self.kept(workload) / dense_positions(workload)

    def work(self, workload: Workload) -> float:
        """Share of the dense work in groups of 16 queries, which is `SparseLayout.work(16)` for whole masks."""
        groups = [-(-length // TILE_ROWS) for length in workload.sequence_lengths]
        lengths = list(zip(groups, workload.sequence_lengths, strict=True))
        touched = sum(int(self._group_columns[:, :count, :length].count_nonzero()) for count, length in lengths)
        return touched / (workload.heads * sum(count * length for count, length in lengths))

    @cached_property
    def _kept_in_corners(self) -> Tensor:
        return kept_in_corners(self.keep)

    @cached_property
    def _group_columns(self) -> Tensor:
        """Whether any query of a group of 16 keeps a key: bool [heads, groups, length]."""
        heads, query_len, key_len = self.keep.shape
        padded = torch.nn.functional.pad(self.keep, (0, 0, 0, -query_len % TILE_ROWS))
        return padded.view(heads, -1, TILE_ROWS, key_len).any(2)


def dense_positions(workload: Workload) -> int:
    """Positions of dense attention, over all heads and the real tokens of all sequences."""
    return workload.heads * sum(length * length for length in workload.sequence_lengths)


def additive_mask(inputs: Inputs, keep: Tensor | None) -> Tensor | None:
    """What is added to scores so that pruned positions and padding get no attention, or None where there is neither.

    Args:
        keep: bool [heads, >= length, >= length] or None.

    Returns:
        [batch or 1, heads or 1, length or 1, length] in the dtype of the inputs: 0, or the lowest finite number, so
        that rows of padding do not become NaN.
    """
    workload = inputs.workload
    allowed = None if keep is None else keep[None, :, : workload.length, : workload.length]
    if inputs.lengths is not None:
        keys = torch.arange(workload.length, device=inputs.device)
        real = (keys < inputs.lengths[:, None])[:, None, None, :]
        allowed = real if allowed is None else allowed & real
    if allowed is None:
        return None
    bias = torch.zeros(allowed.shape, dtype=inputs.dtype, device=inputs.device)
    return bias.masked_fill_(~allowed, torch.finfo(inputs.dtype).min)


@dataclass(frozen=True)
class Case:
    """What a variant is asked for.

    Attributes:
        workload: as measured on the device.
        direction: "forward" or "forward+backward".
        mask: "dense", "element" or "tile".
        inputs: of the workload.
        layer: the mask of one layer, or None for dense attention.
        bits: width that probabilities are rounded to, or None.
    """

    workload: Workload
    direction: str
    mask: str
    inputs: Inputs
    layer: LayerMask | None = None
    bits: int | None = None

    @property
    def training(self) -> bool:
        return self.direction == FORWARD_BACKWARD

    @property
    def bias(self) -> Tensor | None:
        """The mask and padding as a term for the scores, or None."""
        return additive_mask(self.inputs, None) if self.layer is None else self.layer.bias(self.inputs)
