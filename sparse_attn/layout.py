"""A layer's global mask compiled for kernels: column lists.

Queries are taken in groups of consecutive rows. A group's list holds, per head, the sorted keys that any of its rows
keeps, and for every such key one bit per row. A kernel walks the list of its group and touches nothing else. The keys
are sorted and every 32nd key has its place in the list written down, so that a kernel knows where a shorter sequence
ends: one layout serves every length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS = (16, 32, 64, 128)  # sizes of a row group; 16 is canonical, the others are unions of it
BITS_PER_WORD = 32
STOP_KEYS = 32  # keys between two entries of ColumnLists.stops


@dataclass(frozen=True)
class ColumnLists:
    """Column lists for groups of `rows` queries.

    Attributes:
        rows: queries in a group.
        stops: int32 [heads * groups, key_blocks + 1]; entry b of list h * groups + g is the index of the list's first
            column from 32 * b on. The first stop is where the list starts, the last one where it ends.
        columns: int32 [entries], kept keys, sorted within a list.
        row_bits: int32 [entries, words]; bit r % 32 of word r // 32 says whether row r of the group keeps the key.
        full: every bit is set, so a kernel needs no bit test. Rows past the end of the mask count as set.
    """

    rows: int
    stops: torch.Tensor
    columns: torch.Tensor
    row_bits: torch.Tensor
    full: bool

    def to(self, device: torch.device) -> ColumnLists:
        moved = (tensor.to(device) for tensor in (self.stops, self.columns, self.row_bits))
        return ColumnLists(self.rows, *moved, self.full)


class SparseLayout:
    """A layer's mask in the forms that kernels want, each compiled once.

    Args:
        keep: bool [heads, query_len, key_len], true = kept, on the device where the layout shall live.
    """

    def __init__(self, keep: torch.Tensor):
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.ndim != 3:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
            raise ValueError(f"a layout is compiled from a boolean mask [heads, query_len, key_len], not from {found}")
        if 0 in keep.shape:
            raise ValueError(f"a layout needs at least one head, query and key; the mask has shape {tuple(keep.shape)}")
        self.heads, self.query_len, self.key_len = keep.shape
        self.device = keep.device
        self._source = keep
        self._keep: torch.Tensor | None = keep
        self._bias: torch.Tensor | None = None
        self._lists: dict[tuple[int, bool], ColumnLists] = {}

    def __repr__(self) -> str:
        return (
            f"SparseLayout(heads={self.heads}, query_len={self.query_len}, key_len={self.key_len}, "
            f"device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict) -> SparseLayout:
        return self  # read-only: copies of a patched model share it

    def lists(self, rows: int = 16, transposed: bool = False) -> ColumnLists:
        """The column lists for groups of `rows` queries (16, 32, 64 or 128).

        The transposed ones, which the backward pass walks, are for groups of keys: their columns are the queries that
        keep any key of the group.
        """
        if (rows, transposed) not in self._lists:
            if rows not in ROWS:
                raise ValueError(f"row groups of {rows} are not supported; choose one of {ROWS}")
            keep = self._source.transpose(1, 2) if transposed else self._source
            self._lists[rows, transposed] = _compile(keep, rows).to(self.device)
        return self._lists[rows, transposed]

    def keep(self) -> torch.Tensor:
        """The mask itself: bool [heads, query_len, key_len], true = kept."""
        if self._keep is None:
            self._keep = self._source.to(self.device)
        return self._keep

    def bias(self) -> torch.Tensor:
        """The mask as a term for scores: float32 [heads, query_len, key_len], 0 where kept and -inf where pruned."""
        if self._bias is None:
            bias = torch.zeros(self._source.shape, dtype=torch.float32, device=self.device)
            self._bias = bias.masked_fill_(~self.keep(), float("-inf"))
        return self._bias

    def work(self, rows: int = 16) -> float:
        """Share of the dense work that a kernel with groups of `rows` queries does."""
        lists = self.lists(rows)
        return lists.columns.numel() / (lists.stops.shape[0] * self.key_len)

    def to(self, device: torch.device | str) -> SparseLayout:
        """The same layout on another device. Lists move along; the dense forms are made there when asked for."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if device == self.device:
            return self
        moved = SparseLayout(self._source)
        moved.device = device
        moved._keep = None
        moved._lists = {form: lists.to(device) for form, lists in self._lists.items()}
        return moved


def _compile(keep: torch.Tensor, rows: int) -> ColumnLists:
    heads, query_len, key_len = keep.shape
    groups = -(-query_len // rows)
    words = -(-rows // BITS_PER_WORD)
    blocks = -(-key_len // STOP_KEYS)
    real_rows = torch.full((groups,), rows, device=keep.device)
    real_rows[-1] = query_len - (groups - 1) * rows
    bit_weights = (1 << torch.arange(min(rows, BITS_PER_WORD), device=keep.device)).view(1, -1, 1)
    counts, columns, row_bits, full = [], [], [], True
    for head in range(heads):  # head by head: the mask of a long sequence is large
        padded = torch.nn.functional.pad(keep[head], (0, 0, 0, groups * rows - query_len))
        kept_rows = padded.view(groups, rows, key_len).sum(1)
        group, column = kept_rows.nonzero(as_tuple=True)  # sorted by group, then by key
        packed = (padded.view(groups * words, -1, key_len) * bit_weights).sum(1).view(groups, words, key_len)
        full = full and bool((kept_rows[group, column] == real_rows[group]).all())
        counts.append(torch.bincount(group * blocks + column // STOP_KEYS, minlength=groups * blocks))
        columns.append(column.to(torch.int32))
        row_bits.append(_as_int32(packed[group, :, column]))
    ends = torch.cat(counts).cumsum(0)
    if int(ends[-1]) > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"the mask compiles to {int(ends[-1])} list entries for groups of {rows} queries, more than an int32 can "
            "number; prune more positions or use fewer heads"
        )
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1].view(-1, blocks)
    stops = torch.cat((starts, ends.view(-1, blocks)[:, -1:]), dim=1)
    return ColumnLists(rows, stops.to(torch.int32), torch.cat(columns), torch.cat(row_bits), full)


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """int64 words below 2 ** 32 as the int32 values with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
