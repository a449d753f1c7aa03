"""A layer's global mask compiled for kernels: column lists.

Queries are taken in groups of consecutive rows. A group's list holds, per head, the sorted keys that any of its rows
keeps, and for every such key one bit per row. A kernel walks the list of its group and touches nothing else. The keys
are sorted and every 32nd key has its place in the list written down, so that a kernel knows where a shorter sequence
ends: one layout serves every length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from .arguments import expect_whole
from .bitpacking import PackedMask
from .step_lists import StepLists, step_bits_of

ROWS = (16, 32, 64, 128)  # sizes of a row group; 16 is canonical, the others are unions of it
BITS_PER_WORD = 32
STOP_KEYS = 32  # keys between two entries of ColumnLists.stops
_POSITIONS_AT_ONCE = 2**25  # whose bits are packed together, each in a byte
_WEIGHT_CLASSES = 8  # lists whose lengths differ by less than an eighth of the longest keep their order
for_training_too = torch.inference_mode(False)  # what a layout keeps, autograd may save later


@dataclass(frozen=True)
class ColumnLists:
    """Column lists for groups of `rows` queries.

    Attributes:
        rows: queries in a group.
        stops: int32 [heads * groups, parts, key_blocks + 1]; entry b of a part of list h * groups + g is the index of
            its first column from 32 * b on. The first stop is where the part starts, the last one where it ends.
        columns: int32 [entries], kept keys, sorted within a part.
        row_bits: int32 [entries, words]; bit r % 32 of word r // 32 says whether row r of the group keeps the key.
        order: int32; see `order_of`.
        full: every bit of the first part is set, so a kernel needs no bit test there. Rows past the end of the mask
            count as set. A second part, if there is one, holds the columns that some rows prune.
    """

    rows: int
    stops: torch.Tensor
    columns: torch.Tensor
    row_bits: torch.Tensor
    order: torch.Tensor
    full: bool

    @property
    def parts(self) -> int:
        return self.stops.shape[1]

    def to(self, device: torch.device) -> ColumnLists:
        moved = (tensor.to(device) for tensor in (self.stops, self.columns, self.row_bits, self.order))
        return ColumnLists(self.rows, *moved, self.full)


def order_of(heads: int, groups: int, wanted: int) -> tuple[int, int]:
    """Where `ColumnLists.order` says how to start the first `wanted` of a mask's `groups` groups of every head.

    Short inputs do not reach all groups, so there is an order for the first 1, 2, 4, ... groups of every head and one
    for all of them, one after the other. Each numbers lists (head * groups + group), longest first, so that no long
    list starts last and runs alone; lists of similar length stay together by head, whose keys they share.

    Returns:
        (start, count): of the shortest order that holds the wanted groups.
    """
    doublings = max(wanted - 1, 0).bit_length()
    return heads * ((1 << doublings) - 1), heads * min(1 << doublings, groups)


class SparseLayout:
    """A layer's mask in the forms that kernels want, each compiled once.

    Args:
        keep: bool [heads, query_len, key_len], true = kept, on the device where the layout shall live; or packed, for
            the CPU. A layout there keeps the mask in packed form alone.

    Attributes:
        heads, query_len, key_len, device: of the mask.
        arguments: what backends wanted of this layout so far, by backend and kind of call.
        automatic: the backends to try for "auto", by kind of call.
    """

    def __init__(self, keep: torch.Tensor | PackedMask):
        if isinstance(keep, torch.Tensor):
            _check(keep)
            self.device = keep.device
            self._source = PackedMask.pack(keep) if self.device.type == "cpu" else keep
        elif isinstance(keep, PackedMask):
            self.device = keep.bits.device
            self._source = keep
        else:
            raise ValueError(f"a layout is compiled from a boolean mask, not from {type(keep).__name__}")
        self.heads, self.query_len, self.key_len = keep.shape
        self._bias: torch.Tensor | None = None
        self._lists: dict[tuple[int, bool, bool], ColumnLists] = {}
        self._step_lists: dict[tuple[int, bool, bool], StepLists] = {}
        self._work: dict[int, float] = {}
        self.arguments: dict[tuple, tuple[list[torch.Tensor], tuple[int, ...]]] = {}
        self.automatic: dict[tuple, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return (
            f"SparseLayout(heads={self.heads}, query_len={self.query_len}, key_len={self.key_len}, "
            f"device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict) -> SparseLayout:
        return self  # read-only: copies of a patched model share it

    def __getstate__(self) -> dict:
        return {"source": self._source}  # lists are made again where the file is read, which may lack this device

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["source"])

    @for_training_too
    def lists(self, rows: int = 16, transposed: bool = False, split: bool = False) -> ColumnLists:
        """The column lists for groups of `rows` queries (16, 32, 64 or 128).

        The transposed ones, which the backward pass walks, are for groups of keys: their columns are the queries that
        keep any key of the group. Split ones have the columns that all rows keep in a part of their own, where the
        mask has such columns and others.
        """
        form = rows, transposed, split
        if form not in self._lists:
            self._lists[form] = self._compiled(*form).to(self.device)
        return self._lists[form]

    @for_training_too
    def step_lists(self, rows: int = 16, transposed: bool = False, split: bool = False) -> StepLists:
        """The same lists as the Triton kernels take them; the others are not kept for that."""
        form = rows, transposed, split
        if form not in self._step_lists:
            lists = self._lists[form] if form in self._lists else self._compiled(*form)
            step_bits = step_bits_of(lists.stops, lists.row_bits, rows)
            steps = StepLists(lists.stops, lists.columns, step_bits, lists.order, lists.full)
            self._step_lists[form] = steps.to(self.device)
        return self._step_lists[form]

    def _compiled(self, rows: int, transposed: bool, split: bool) -> ColumnLists:
        if rows not in ROWS:
            raise ValueError(f"row groups of {rows} are not supported; choose one of {ROWS}")
        shape = (self.key_len, self.query_len) if transposed else (self.query_len, self.key_len)
        return _compile(self._heads(transposed), shape, rows, split)

    @for_training_too
    def keep(self) -> torch.Tensor:
        """The mask itself: bool [heads, query_len, key_len], true = kept; made anew at every call."""
        keep = self._source.unpack() if isinstance(self._source, PackedMask) else self._source
        return keep.to(self.device)

    def _heads(self, transposed: bool = False) -> Iterator[torch.Tensor]:
        """The mask head by head, of which there is one at a time: bool [query_len, key_len], or [key_len, query_len].

        They lie where lists are compiled: a layout on a GPU compiles its own, others where their mask lies.
        """
        for index in range(self.heads):
            head = self._source[index]
            keep = head.unpack() if isinstance(head, PackedMask) else head
            keep = keep.to(self.device) if self.device.type == "cuda" else keep
            yield keep.T if transposed else keep

    @for_training_too
    def bias(self) -> torch.Tensor:
        """The mask as a term for scores: float32 [heads, query_len, key_len], 0 where kept and -inf where pruned."""
        if self._bias is None:
            bias = torch.zeros((self.heads, self.query_len, self.key_len), dtype=torch.float32, device=self.device)
            self._bias = bias.masked_fill_(~self.keep(), float("-inf"))
        return self._bias

    def work(self, rows: int = 16) -> float:
        """Share of the dense work that a kernel with groups of `rows` queries does.

        Raises ValueError for fewer than 1, TypeError for what is no whole number.
        """
        expect_whole(rows=rows)
        if rows not in self._work:
            entries = int(sum(_in_groups(head, rows).any(1).count_nonzero() for head in self._heads()))
            self._work[rows] = entries / (self.heads * -(-self.query_len // rows) * self.key_len)
        return self._work[rows]

    @property
    def spread(self) -> float:
        """How much more work groups of 64 queries do than groups of 16: from 1 (neighbouring queries keep the same
        keys) to 4 (they keep different ones)."""
        return self.work(64) / self.work(16) if self.work(16) else 1.0

    @for_training_too
    def to(self, device: torch.device | str) -> SparseLayout:
        """The same layout on another device. Lists move along; the dense forms are made there when asked for.

        Raises ValueError where there is no such device.
        """
        device = existing_device(device)
        if device == self.device:
            return self
        moved = SparseLayout(self._source)
        moved.device = device
        moved._lists = {form: lists.to(device) for form, lists in self._lists.items()}
        moved._step_lists = {form: lists.to(device) for form, lists in self._step_lists.items()}
        return moved


def existing_device(device: torch.device | str) -> torch.device:
    """The device with its index ("cuda" becomes "cuda:0"). Raises ValueError where there is none of that name."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise ValueError(f"device is {device!r}, which this torch has not: {str(error).splitlines()[0]}") from error


def _check(keep: torch.Tensor) -> None:
    if keep.dtype != torch.bool or keep.ndim != 3:
        found = f"{keep.dtype} {tuple(keep.shape)}"
        raise ValueError(f"a layout is compiled from a boolean mask [heads, query_len, key_len], not from {found}")
    if 0 in keep.shape:
        raise ValueError(f"a layout needs at least one head, query and key; the mask has shape {tuple(keep.shape)}")


def _in_groups(keep: torch.Tensor, rows: int) -> torch.Tensor:
    """[query_len, key_len] -> bool [groups, rows, key_len]; rows past the end keep nothing."""
    groups = -(-keep.shape[0] // rows)
    # What follows is several times as fast on contiguous keys.
    padded = torch.nn.functional.pad(keep.contiguous(), (0, 0, 0, groups * rows - keep.shape[0]))
    return padded.view(groups, rows, -1)


def _compile(heads: Iterable[torch.Tensor], shape: tuple[int, int], rows: int, split: bool) -> ColumnLists:
    """The lists of heads bool [query_len, key_len], their `shape`, on their device; the same bits on every device."""
    query_len, key_len = shape
    groups = -(-query_len // rows)
    words = -(-rows // BITS_PER_WORD)
    blocks = -(-key_len // STOP_KEYS)
    head_entries, any_full, any_partial = [], False, False
    for head in heads:  # one by one: the mask of a long sequence is large
        real_rows = torch.full((groups, 1), rows, device=head.device)
        real_rows[-1] = query_len - (groups - 1) * rows
        grouped = _in_groups(head, rows).view(torch.uint8)
        counts = grouped.sum(1, dtype=torch.uint8)
        group, column = counts.nonzero(as_tuple=True)  # sorted by group, then by key
        some = grouped.split(max(1, _POSITIONS_AT_ONCE // grouped[0].numel()))
        octets = torch.cat([_octets(part) for part in some])[group, :, column]
        partial = (counts < real_rows)[group, column]
        any_full, any_partial = any_full or not bool(partial.all()), any_partial or bool(partial.any())
        head_entries.append((group, column.to(torch.int32), _words(octets, words), partial))
    parts = 2 if split and any_full and any_partial else 1
    counts, columns, row_bits = [], [], []
    for group, column, bits, partial in head_entries:
        if parts == 2:
            group = group * parts + partial
            by_part = group.argsort(stable=True)
            group, column, bits = group[by_part], column[by_part], bits[by_part]
        counts.append(torch.bincount(group * blocks + column // STOP_KEYS, minlength=groups * parts * blocks))
        columns.append(column)
        row_bits.append(bits)
    ends = torch.cat(counts).cumsum(0)
    if int(ends[-1]) * words > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"the mask compiles to {int(ends[-1])} list entries of {words} words for groups of {rows} queries, more "
            "than an int32 can number; prune more positions or use fewer heads"
        )
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1].view(-1, parts, blocks)
    stops = torch.cat((starts, ends.view(-1, parts, blocks)[:, :, -1:]), dim=2)
    lengths = torch.cat(counts).view(len(head_entries), groups, -1).sum(2)
    return ColumnLists(
        rows, stops.to(torch.int32), torch.cat(columns), torch.cat(row_bits), _orders(lengths),
        full=parts == 2 or not any_partial,
    )  # fmt: skip


def _orders(lengths: torch.Tensor) -> torch.Tensor:
    """What `order_of` describes, for the lengths of lists [heads, groups]. -> int32, on the same device"""
    heads, groups = lengths.shape
    lists = torch.arange(heads * groups, device=lengths.device).view(heads, groups)
    weight = -(-lengths * _WEIGHT_CLASSES // lengths.max().clamp(min=1))
    orders = []
    for doublings in range((groups - 1).bit_length() + 1):
        own = weight[:, : 1 << doublings].flatten().argsort(descending=True, stable=True)
        orders.append(lists[:, : 1 << doublings].flatten()[own])
    return torch.cat(orders).to(torch.int32)


def _octets(grouped: torch.Tensor) -> torch.Tensor:
    """Bits of eight rows each: uint8 [groups, rows, key_len], 0 or 1, -> uint8 [groups, rows / 8, key_len]."""
    groups, rows, key_len = grouped.shape
    weights = (1 << torch.arange(8, device=grouped.device)).to(torch.uint8)
    return (grouped.view(groups, rows // 8, 8, key_len) * weights.view(1, 1, 8, 1)).sum(2, dtype=torch.uint8)


def _words(octets: torch.Tensor, words: int) -> torch.Tensor:
    """uint8 [entries, octets], of the lowest bits first, -> int32 [entries, words] with the same bits."""
    by_word = octets.view(len(octets), words, octets.shape[1] // words).to(torch.int64)
    return (by_word << 8 * torch.arange(by_word.shape[2], device=octets.device)).sum(2).to(torch.int32)  # 31: the sign
