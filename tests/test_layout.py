"""Column lists: they say exactly what the mask says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import GlobalMask, SparseLayout
from sparse_attn.layout import ROWS, STOP_KEYS


def rebuilt(layout: SparseLayout, rows: int) -> torch.Tensor:
    """The mask as the lists tell it, entry by entry."""
    lists = layout.lists(rows)
    keep = torch.zeros(layout.heads, layout.query_len, layout.key_len, dtype=torch.bool)
    groups = lists.stops.shape[0] // layout.heads
    for index, stops in enumerate(lists.stops.tolist()):
        head, group = divmod(index, groups)
        for entry in range(stops[0], stops[-1]):
            for row in range(min(rows, layout.query_len - group * rows)):
                word = int(lists.row_bits[entry, row // 32])
                if word >> (row % 32) & 1:
                    keep[head, group * rows + row, int(lists.columns[entry])] = True
    return keep


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 33), (3, 70, 40), (1, 129, 200)])
def test_lists_rebuild_the_mask(rows, shape):
    for density in (0.0, 0.1, 0.6, 1.0):
        keep = torch.rand(shape) < density
        layout = SparseLayout(keep)
        assert torch.equal(rebuilt(layout, rows), keep)
        lists = layout.lists(rows)
        assert lists.full == bool((keep.any(-1).any() == 0) or _full(keep, rows))


def _full(keep: torch.Tensor, rows: int) -> bool:
    """Whether rows of a group agree everywhere."""
    groups = keep.split(rows, dim=1)
    return all(bool((group.any(1) == group.all(1)).all()) for group in groups)


@given(seed=st.integers(0, 1000), length=st.integers(1, 150), rows=st.sampled_from(ROWS))
@settings(deadline=None, max_examples=40)
def test_stops_say_where_a_shorter_sequence_ends(seed, length, rows):
    keep = torch.rand(2, 40, 150, generator=torch.Generator().manual_seed(seed)) < 0.2
    lists = SparseLayout(keep).lists(rows)
    block = -(-length // STOP_KEYS)
    for stops in lists.stops.tolist():
        columns = lists.columns[stops[0] : stops[-1]].tolist()
        assert columns == sorted(set(columns))
        assert stops[block] - stops[0] == sum(column < block * STOP_KEYS for column in columns)


@pytest.mark.parametrize("rows", ROWS)
def test_transposed_lists_are_those_of_the_transposed_mask(rows):
    keep = torch.rand(2, 50, 70) < 0.3
    ours = SparseLayout(keep).lists(rows, transposed=True)
    theirs = SparseLayout(keep.transpose(1, 2)).lists(rows)
    for name in ("stops", "columns", "row_bits"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_work_is_what_a_kernel_touches():
    keep = torch.zeros(1, 32, 100, dtype=torch.bool)
    keep[0, 0, :10] = True
    layout = SparseLayout(keep)
    assert layout.work(16) == pytest.approx(0.05) and layout.work(32) == pytest.approx(0.10)


def test_tile_masks_need_no_bit_test():
    tile = GlobalMask.random(1, 2, 64, sparsity=0.7, granularity="tile").layout(0)
    assert tile.lists(16).full and not tile.lists(32).full


def test_bias_and_bad_masks():
    layout = SparseLayout(torch.tensor([[[True, False]]]))
    assert layout.bias().tolist() == [[[0.0, float("-inf")]]]
    with pytest.raises(ValueError, match="row groups of 24"):
        layout.lists(24)
    with pytest.raises(ValueError, match="not from torch.float32"):
        SparseLayout(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="at least one head"):
        SparseLayout(torch.ones(1, 0, 2, dtype=torch.bool))
