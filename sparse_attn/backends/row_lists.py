"""The lists of the C++ kernels: what many rows of a group keep is listed for the group, what few keep for each row.

A kernel multiplies a key of a group's list with all 16 rows at once, and a key of a row's list with that row alone: for
the many keys of an element mask that few rows keep, sixteen products are more work than their own. In lists of the
transpose, for gradients of keys and values, rows and keys change places.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..layout import ColumnLists, SparseLayout, for_training_too

FEW_ROWS = 5  # at most that many keep a key of row lists: what was fastest with AVX-512
SORTED_ROWS = 4  # rows that any of the kernels takes together
MOST_ENTRIES = 2**25  # of all rows' lists; to divide more would take gigabytes


@dataclass(frozen=True)
class RowLists:
    """Column lists, and the entries that they leave to row lists.

    Attributes:
        shared: the column lists of keys that more than FEW_ROWS rows of a group keep.
        stops: int32 [heads * groups * rows + 1]; the list of a row starts at one and ends at the next.
        columns: int32 [entries], a row's keys, sorted.
        sorted_columns: int32 [entries], the same, of each four rows that follow each other sorted together: so those
            below a shorter sequence's end come first.
        sorted_places: int32 [entries], the sorted ones' number in their row's list, times the rows of a group, plus the
            row's number in its group.
    """

    shared: ColumnLists
    stops: Tensor
    columns: Tensor
    sorted_columns: Tensor
    sorted_places: Tensor

    def tensors(self) -> list[Tensor]:
        """As the kernel takes them."""
        shared = self.shared
        return [
            shared.stops, shared.columns, shared.row_bits,
            self.stops, self.columns, self.sorted_columns, self.sorted_places,
        ]  # fmt: skip


_of_layouts: WeakKeyDictionary[SparseLayout, dict[bool, RowLists | None]] = WeakKeyDictionary()


def row_lists_of(layout: SparseLayout, transposed: bool = False) -> RowLists | None:
    """The row lists of a layout on the CPU, or of its transpose, made once for all kinds of calls."""
    made = _of_layouts.setdefault(layout, {})
    if transposed not in made:
        made[transposed] = row_lists(layout.lists(transposed=transposed))
    return made[transposed]


@for_training_too
def row_lists(lists: ColumnLists) -> RowLists | None:
    """Divides lists of groups of 16 rows, in one part and on the CPU; None where there is nothing to divide, or
    very much."""
    bits = lists.row_bits[:, 0]
    rows_of_entry = sum(bits >> row & 1 for row in range(lists.rows))
    few = rows_of_entry <= FEW_ROWS
    if lists.full or not few.any() or int(rows_of_entry[few].sum()) > MOST_ENTRIES:
        return None
    kept = torch.nn.functional.pad((~few).cumsum(0), (1, 0)).to(torch.int32)
    shared = ColumnLists(
        lists.rows, kept[lists.stops], lists.columns[~few], lists.row_bits[~few], lists.order, full=False
    )
    groups = len(lists.stops)
    lengths = lists.stops[:, 0, -1] - lists.stops[:, 0, 0]
    group = torch.arange(groups, device="cpu").repeat_interleave(lengths)[few]
    bits, columns = bits[few], lists.columns[few]
    kept_by_row = [(bits >> row & 1).bool() for row in range(lists.rows)]
    counts = torch.stack([group[kept].bincount(minlength=groups) for kept in kept_by_row], dim=1)
    stops = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    row_columns, places = torch.empty(2, int(stops[-1]), dtype=torch.int32, device="cpu")
    for row, kept in enumerate(kept_by_row):
        own_group = group[kept]
        earlier = counts[:, row].cumsum(0) - counts[:, row]  # entries of the same row of groups before
        number = torch.arange(len(own_group), device="cpu") - earlier[own_group]
        entry = stops[own_group * lists.rows + row] + number
        row_columns[entry] = columns[kept]
        places[entry] = (number * lists.rows + row).to(torch.int32)
    first_rows = torch.arange(groups * lists.rows, device="cpu") // SORTED_ROWS
    quarter = first_rows.repeat_interleave(counts.flatten())
    order = (quarter * (int(columns.max()) + 1) + row_columns).argsort(stable=True)
    return RowLists(shared, stops.to(torch.int32), row_columns, row_columns[order], places[order])
