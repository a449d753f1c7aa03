"""Fragment lists say what the mask says, and rows that are read together lie in different banks."""

import pytest
import torch

from benchmarks.attention_workloads import WORKLOADS
from sparse_attn import SparseLayout
from sparse_attn.backends.fragment_lists import NO_GROUP, FragmentLists, fragment_lists
from tests.helpers import random_layout


def decoded(lists: FragmentLists, heads: int, query_len: int, key_len: int, row_bytes: int) -> torch.Tensor:
    """The mask that fragment lists describe, read as the kernel does: lane by lane."""
    groups = -(-query_len // 16)
    keep = torch.zeros(heads, groups * 16, key_len, dtype=torch.bool)
    words = lists.words.long() & 0xFFFFFFFF
    # As a warp copies them: lanes that copy a row stand beside each other and take 8 rows one after the other.
    rows_at_once = 512 // row_bytes
    copied = lists.places.view(heads, -1, rows_at_once, 8).transpose(2, 3).reshape(heads, -1).long() & 0xFFFF
    for head in range(heads):
        for group in range(groups):
            first = int(lists.first_steps[head, group])
            for step in range(first, first - (-int(lists.counts[head, group, -1]) // 32)):
                places = words[step] >> 16
                keys = places // row_bytes
                assert torch.equal(places, copied[head, keys])
                for lane in range(32):
                    for bit in range(16):
                        if words[step, lane] >> bit & 1:
                            row, key = lane // 4 + 8 * (bit % 4 // 2), 8 * (bit // 4) + 2 * (lane % 4) + bit % 2
                            assert not keep[head, 16 * group + row, keys[key]]
                            keep[head, 16 * group + row, keys[key]] = True
    return keep[:, :query_len]


def conflicts(lists: FragmentLists) -> float:
    """How many rows of 8 that are read together lie in the same banks, at the mean: 1 is none."""
    tiles = (lists.words.view(-1, 8) >> 16 & 0xFFFF).tolist()
    most = 0
    for tile in tiles:
        banks = [row // 16 % 8 for row in set(tile)]
        most += max(banks.count(bank) for bank in banks)
    return most / len(tiles)


@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize("granularity", ["element", "tile"])
def test_they_hold_the_mask(granularity, row_bytes):
    for query_len, sparsity in ((1, 0.5), (75, 0.7), (112, 0.0), (40, 0.999)):
        layout = random_layout(2, query_len, sparsity, "cpu", granularity)
        lists = fragment_lists(layout, row_bytes)
        assert torch.equal(decoded(lists, 2, query_len, query_len, row_bytes), layout.keep())


def test_counts_and_order_follow_the_lists():
    keep = torch.rand(2, 100, 90) < 0.05
    keep[0, 32:48] = True
    keep[1, 64:80] = False
    lists = fragment_lists(SparseLayout(keep), 128)
    kept = torch.nn.functional.pad(keep, (0, 0, 0, 12)).view(2, 7, 16, 90).any(2)
    for block, end in enumerate((0, 32, 64, 96)):
        assert torch.equal(lists.counts[:, :, block], kept[:, :, :end].sum(-1).int())
    assert lists.order[0, 0] == 2 and lists.order[1, 6] == 4
    assert lists.order[:, :7].sort(1).values.tolist() == [list(range(7))] * 2
    assert (lists.order[:, 7:] == NO_GROUP).all()


def test_heads_with_most_work_come_first():
    keep = torch.zeros(70, 40, 40, dtype=torch.bool)
    for head in range(70):
        keep[head, :, : 1 + 13 * head % 40] = True
    heaviest = fragment_lists(SparseLayout(keep), 128).heaviest
    steps = [3 * -(-(1 + 13 * head % 40) // 32) for head in heaviest]
    assert sorted(heaviest) == list(range(64)) and steps == sorted(steps, reverse=True)


def test_a_large_mask_is_cut_to_what_fits():
    layout = random_layout(1, 600, 0.9, "cpu")
    corner = fragment_lists(SparseLayout(layout.keep()[:, :512, :512]), 64)
    for own, expected in zip(fragment_lists(layout, 64).tensors(), corner.tensors(), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize(("granularity", "limit"), [("element", 1.2), ("tile", 1.1)])
def test_rows_read_together_lie_in_different_banks(granularity, limit, row_bytes):
    """On a mask of a real model. Keys in natural order, placed by their number, take 1.3 and 1.2 turns."""
    squad = next(workload for workload in WORKLOADS if workload.name == "squad384")
    keep = squad.masks(granularity, torch.device("cpu"))[0]
    assert conflicts(fragment_lists(SparseLayout(keep), row_bytes)) < limit
