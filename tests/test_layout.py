"""Column lists: they say exactly what the mask says."""

import copy
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import GlobalMask, SparseLayout
from sparse_attn.bitpacking import PackedMask
from sparse_attn.layout import ROWS, STOP_KEYS, order_of
from sparse_attn.step_lists import STEP
from tests.helpers import CUDA

LISTS = ("stops", "columns", "row_bits", "order")


def rebuilt(layout: SparseLayout, rows: int, split: bool) -> torch.Tensor:
    """The mask as the lists tell it, entry by entry; bits of a full first part are not looked at."""
    lists = layout.lists(rows, split=split)
    keep = torch.zeros(layout.heads, layout.query_len, layout.key_len, dtype=torch.bool)
    groups = lists.stops.shape[0] // layout.heads
    for index, parts in enumerate(lists.stops.tolist()):
        head, group = divmod(index, groups)
        for part, stops in enumerate(parts):
            for entry in range(stops[0], stops[-1]):
                for row in range(min(rows, layout.query_len - group * rows)):
                    word = int(lists.row_bits[entry, row // 32])
                    if (lists.full and part == 0) or word >> (row % 32) & 1:
                        keep[head, group * rows + row, int(lists.columns[entry])] = True
    return keep


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 33), (3, 70, 40), (1, 129, 200)])
def test_lists_rebuild_the_mask(rows, shape, split):
    for density in (0.0, 0.1, 0.6, 1.0):
        keep = torch.rand(shape) < density
        keep[:, :, :: shape[2] // 3 + 1] = True
        layout = SparseLayout(keep)
        assert torch.equal(rebuilt(layout, rows, split), keep)
        lists = layout.lists(rows, split=split)
        assert lists.parts == (2 if split and not _full(keep, rows) else 1)
        assert lists.full == (lists.parts == 2 or _full(keep, rows))
    nothing = SparseLayout(torch.zeros(shape, dtype=torch.bool))
    assert nothing.lists(rows, split=split).full and nothing.lists(rows, split=split).columns.numel() == 0


def _full(keep: torch.Tensor, rows: int) -> bool:
    """Whether rows of a group agree everywhere."""
    groups = keep.split(rows, dim=1)
    return all(bool((group.any(1) == group.all(1)).all()) for group in groups)


def test_split_parts_hold_what_all_rows_keep_and_the_rest():
    keep = torch.rand(2, 40, 90) < 0.3
    keep[:, :, 7::20] = True
    lists = SparseLayout(keep).lists(16, split=True)
    for index, (full, partial) in enumerate(lists.stops.tolist()):
        head, group = divmod(index, 3)
        rows = keep[head, group * 16 : group * 16 + 16]
        assert lists.columns[full[0] : full[-1]].tolist() == rows.all(0).nonzero()[:, 0].tolist()
        assert lists.columns[partial[0] : partial[-1]].tolist() == (rows.any(0) & ~rows.all(0)).nonzero()[:, 0].tolist()
        assert partial[0] == full[-1]


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 3), (3, 8), (2, 13)])
def test_orders_start_the_longest_lists_first(heads, groups):
    density = torch.rand(heads, groups * 16, 1)
    lists = SparseLayout(torch.rand(heads, groups * 16, 100) < density).lists(16)
    lengths = (lists.stops[:, 0, -1] - lists.stops[:, 0, 0]).tolist()
    eighth = -(-max(lengths) // 8)
    for wanted in range(1, groups + 1):
        start, count = order_of(heads, groups, wanted)
        order = lists.order[start : start + count].tolist()
        assert len(set(order)) == count and max(index % groups for index in order) < 2 * wanted
        assert {head * groups + group for head in range(heads) for group in range(wanted)} <= set(order)
        shortest = list(accumulate((lengths[index] for index in order), min))
        assert all(lengths[index] <= before + eighth for index, before in zip(order[1:], shortest))
    assert start + count == lists.order.numel()


@given(seed=st.integers(0, 1000), length=st.integers(1, 150), rows=st.sampled_from(ROWS))
@settings(deadline=None, max_examples=40)
def test_stops_say_where_a_shorter_sequence_ends(seed, length, rows):
    keep = torch.rand(2, 40, 150, generator=torch.Generator().manual_seed(seed)) < 0.2
    lists = SparseLayout(keep).lists(rows)
    block = -(-length // STOP_KEYS)
    for (stops,) in lists.stops.tolist():
        columns = lists.columns[stops[0] : stops[-1]].tolist()
        assert columns == sorted(set(columns))
        assert stops[block] - stops[0] == sum(column < block * STOP_KEYS for column in columns)


@pytest.mark.parametrize("rows", ROWS)
def test_transposed_lists_are_those_of_the_transposed_mask(rows):
    keep = torch.rand(2, 50, 70) < 0.3
    ours = SparseLayout(keep).lists(rows, transposed=True)
    theirs = SparseLayout(keep.transpose(1, 2)).lists(rows)
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 50, 70), (3, 300, 1025)])
def test_lists_compiled_on_a_gpu_are_the_same_bits(shape, transposed, split):
    density = torch.rand(shape[0], shape[1], 1)
    keep = torch.rand(shape) < density
    keep[:, :, ::9] = True
    on_cpu = SparseLayout(keep)
    for on_gpu in [on_cpu.to("cuda"), SparseLayout(keep.cuda())]:  # moved before there are lists to move
        for rows in ROWS:
            ours, theirs = (one.lists(rows, transposed, split) for one in (on_gpu, on_cpu))
            assert (ours.full, ours.parts) == (theirs.full, theirs.parts)
            for name in LISTS:
                assert getattr(ours, name).is_cuda and torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
            assert on_gpu.work(rows) == on_cpu.work(rows)


def test_layouts_elsewhere_have_lists_of_the_same_shapes():
    """Where nothing can be computed, lists come from the mask on the CPU."""
    layout = SparseLayout(torch.rand(2, 40, 50) < 0.3)
    moved = layout.to("meta")
    assert moved.lists(32).columns.device.type == moved.keep().device.type == "meta"
    assert [getattr(moved.lists(32), name).shape for name in LISTS] == [
        getattr(layout.lists(32), name).shape for name in LISTS
    ]
    assert moved.work(32) == layout.work(32) and moved.lists(32).full == layout.lists(32).full


def test_heads_are_unpacked_one_by_one(monkeypatch):
    shapes, unpack = [], PackedMask.unpack
    monkeypatch.setattr(PackedMask, "unpack", lambda self: shapes.append(tuple(self.shape)) or unpack(self))
    layout = SparseLayout(torch.rand(3, 20, 21) < 0.5)
    layout.lists(16), layout.work(16)
    assert shapes == [(20, 21)] * 6


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 33), (3, 70, 40), (1, 129, 200)])
def test_step_bits_say_what_row_bits_say(rows, shape, split, transposed):
    for density in (0.0, 0.1, 0.6, 1.0):
        keep = torch.rand(shape) < density
        keep[:, :, :: shape[2] // 3 + 1] |= density > 0
        layout = SparseLayout(keep)
        lists, steps = (form(rows, transposed, split) for form in (layout.lists, layout.step_lists))
        assert steps.full == lists.full and steps.step_bits.is_contiguous()
        assert all(getattr(steps, name) is getattr(lists, name) for name in ("stops", "columns", "order"))
        own = torch.zeros(len(lists.columns), rows, dtype=torch.bool)
        ends, step = lists.stops[..., [0, -1]].reshape(-1, 2).tolist(), 0
        for part, (start, end) in enumerate(ends):
            assert start // STEP + part >= step  # after the steps of the part before
            step = start // STEP + part
            for entry in range(start, end):
                place = entry - start
                own[entry] = steps.step_bits[step + place // STEP] >> place % STEP & 1
            step += -(-(end - start) // STEP)
        assert step <= len(steps.step_bits) and ends[-1][0] // STEP + len(ends) <= len(steps.step_bits)
        row = torch.arange(rows)
        assert torch.equal(own, (lists.row_bits[:, row // 32] >> row % 32 & 1).bool())


def test_step_lists_alone_are_kept_and_move_along():
    layout = SparseLayout(torch.rand(2, 50, 70) < 0.3)
    steps = layout.step_lists(32, split=True)
    assert layout.step_lists(32, split=True) is steps and not layout._lists
    moved = layout.to("meta").step_lists(32, split=True)
    assert [tensor.shape for tensor in moved.tensors()] == [tensor.shape for tensor in steps.tensors()]
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())
    with pytest.raises(ValueError, match="row groups of 24"):
        layout.step_lists(24)


def test_work_is_what_a_kernel_touches():
    keep = torch.zeros(1, 32, 100, dtype=torch.bool)
    keep[0, 0, :10] = True
    layout = SparseLayout(keep)
    assert layout.work(16) == pytest.approx(0.05) and layout.work(32) == pytest.approx(0.10)


def test_work_counts_the_last_group_whole():
    layout = SparseLayout(torch.ones(2, 20, 30, dtype=torch.bool))
    assert layout.work(16) == layout.work(64) == 1.0


def test_spread_says_how_unlike_neighbouring_queries_are():
    keep = torch.zeros(1, 64, 100, dtype=torch.bool)
    assert SparseLayout(keep).spread == SparseLayout(~keep).spread == 1.0
    for group in range(4):
        keep[:, 16 * group : 16 * group + 16, 10 * group : 10 * group + 10] = True
    assert SparseLayout(keep).spread == 4.0


def test_copies_of_a_model_share_its_layouts():
    layout = SparseLayout(torch.ones(1, 4, 4, dtype=torch.bool))
    assert copy.deepcopy(layout) is layout


def test_what_a_layout_cannot_do_is_named():
    layout = GlobalMask.random(1, 2, 40, sparsity=0.5).layout(0)
    with pytest.raises(ValueError, match="rows is 0, expected a whole number, at least 1"):
        layout.work(0)
    with pytest.raises(ValueError, match="device is 'nowhere', which this torch has not"):
        layout.to("nowhere")


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
    with pytest.raises(ValueError, match=r"\[heads, query_len, key_len\], not from torch.bool \(2, 2\)"):
        SparseLayout(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one head"):
        SparseLayout(torch.ones(1, 0, 2, dtype=torch.bool))
