"""Row lists and the shared lists beside them say together what the mask says."""

import pytest
import torch

from sparse_attn import SparseLayout, extension, log_table
from sparse_attn.backends import native_cpu
from sparse_attn.backends import row_lists as module
from sparse_attn.backends.row_lists import FEW_ROWS, RowLists, row_lists
from tests.helpers import random_layout

pytestmark = pytest.mark.skipif(not extension.available(), reason="the C++ extension is not built")


def decoded(lists: RowLists, heads: int, query_len: int, key_len: int) -> torch.Tensor:
    groups = -(-query_len // 16)
    keep = torch.zeros(heads * groups * 16, key_len, dtype=torch.bool)
    for index, stops in enumerate(lists.shared_stops[:, 0]):
        entries = slice(stops[0], stops[-1])
        for key, bits in zip(lists.shared_columns[entries].tolist(), lists.shared_bits[entries].tolist()):
            rows = [row for row in range(16) if bits >> row & 1]
            assert len(rows) > FEW_ROWS
            keep[[16 * index + row for row in rows], key] = True
    stops = lists.stops.tolist()
    for row, (start, end) in enumerate(zip(stops[:-1], stops[1:])):
        keys = lists.columns[start:end]
        assert bool((keys.diff() > 0).all()) and not keep[row, keys].any()
        keep[row, keys] = True
    for first in range(0, len(keep), 4):
        start, end = stops[first], stops[first + 4]
        columns, places = lists.sorted_columns[start:end], lists.sorted_places[start:end]
        assert bool((columns.diff() >= 0).all()) and set((places % 16 // 4).tolist()) <= {first % 16 // 4}
        listed = [stops[first // 16 * 16 + place % 16] + place // 16 for place in places.tolist()]
        assert sorted(listed) == list(range(start, end)) and torch.equal(columns, lists.columns[listed])
    return keep.view(heads, groups * 16, key_len)[:, :query_len]


@pytest.mark.parametrize("query_len", [17, 40, 75, 112])
@pytest.mark.parametrize("sparsity", [0.6, 0.8, 0.999])
def test_they_hold_the_mask(query_len, sparsity):
    layout = random_layout(3, query_len, sparsity, "cpu")
    lists = row_lists(layout.lists())
    assert torch.equal(decoded(lists, 3, query_len, query_len), layout.keep())
    assert {tensor.dtype for tensor in lists} == {torch.int32}


def test_stops_of_shared_lists_are_where_blocks_of_keys_begin():
    lists = row_lists(random_layout(2, 100, 0.6, "cpu").lists())
    for stops in lists.shared_stops[:, 0].tolist():
        for block, (start, end) in enumerate(zip(stops[:-1], stops[1:])):
            assert set((lists.shared_columns[start:end] // 32).tolist()) <= {block}


@pytest.mark.parametrize("keep", [torch.ones(2, 40, 40), torch.zeros(1, 8, 8), torch.ones(1, 16, 40)])
def test_nothing_is_divided_where_rows_keep_the_same_or_nothing(keep):
    assert not any(map(len, row_lists(SparseLayout(keep.bool()).lists())))


def test_all_kinds_of_calls_share_them():
    layout = random_layout(2, 40, 0.7, "cpu")
    inference, _ = native_cpu.layout_arguments(layout, 64, torch.float32, None, training=False)
    training, _ = native_cpu.layout_arguments(layout, 32, torch.float16, log_table(3), training=True)
    assert all(own is other for own, other in zip(inference, training[:10], strict=True))


def test_a_band_is_not_divided_but_the_transpose_of_its_stripes():
    place = torch.arange(256)
    keep = ((place - place[:, None]).abs() <= 48) | (place % 64 == 0)
    layout = SparseLayout(keep[None])
    assert not any(map(len, row_lists(layout.lists())))
    assert all(map(len, row_lists(layout.lists(transposed=True))))


def test_very_many_entries_are_not_divided(monkeypatch):
    lists = random_layout(2, 40, 0.7, "cpu").lists()
    assert all(map(len, row_lists(lists)))
    monkeypatch.setattr(module, "MOST_ENTRIES", 10)
    assert not any(map(len, row_lists(lists)))
