"""The lists of the C++ kernels: what many rows of a group keep is listed for the group, what few keep for each row.

A kernel multiplies a key of a group's list with all 16 rows at once, and a key of a row's list with that row alone: for
the many keys of an element mask that few rows keep, sixteen products are more work than their own. In lists of the
transpose, for gradients of keys and values, rows and keys change places.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..layout import ColumnLists, SparseLayout, for_training_too

FEW_ROWS = 5  # at most that many keep a key of row lists: what was fastest with AVX-512
LEAST_SHARE = 8  # an eighth of the entries must go there: a band's edges are fewer, and cost more than they save
MOST_ENTRIES = 2**25  # of all rows' lists; more would take gigabytes for a model

torch.library.define(
    "sparse_attn::divide_lists",
    "(Tensor stops, Tensor columns, Tensor row_bits, int few_rows, int least_moved, int most_entries) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class RowLists(NamedTuple):
    """Column lists divided, int32, as the kernels take them; all empty where they are better not divided.

    Attributes:
        shared_stops, shared_columns, shared_bits: column lists of keys that more than FEW_ROWS rows of a group keep.
        stops: [heads * groups * rows + 1]; the list of a row starts at one and ends at the next.
        columns: [entries], a row's keys, sorted.
        sorted_columns: [entries], the same, of each four rows that follow each other sorted together: so those below a
            shorter sequence's end come first.
        sorted_places: [entries], the sorted ones' number in their row's list, times the rows of a group, plus the row's
            number in its group.
    """

    shared_stops: Tensor
    shared_columns: Tensor
    shared_bits: Tensor
    stops: Tensor
    columns: Tensor
    sorted_columns: Tensor
    sorted_places: Tensor


_of_layouts: WeakKeyDictionary[SparseLayout, dict[bool, RowLists]] = WeakKeyDictionary()


def row_lists_of(layout: SparseLayout, transposed: bool = False) -> RowLists:
    """The row lists of a layout on the CPU, or of its transpose, made once for all kinds of calls."""
    made = _of_layouts.setdefault(layout, {})
    if transposed not in made:
        made[transposed] = row_lists(layout.lists(transposed=transposed))
    return made[transposed]


@for_training_too
def not_divided() -> RowLists:
    """What says so to a kernel."""
    return RowLists(*torch.empty(7, 0, dtype=torch.int32, device="cpu"))


@for_training_too
def row_lists(lists: ColumnLists) -> RowLists:
    """Divides lists of groups of 16 rows, in one part and on the CPU, where enough of them are to be divided, but not
    very many. Needs the extension."""
    if lists.full:
        return not_divided()
    limits = FEW_ROWS, len(lists.columns) // LEAST_SHARE, MOST_ENTRIES
    return RowLists(*torch.ops.sparse_attn.divide_lists(lists.stops, lists.columns, lists.row_bits, *limits))
