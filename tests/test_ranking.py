"""In which order positions and tiles are kept, and how many of them."""

import pytest
import torch

from sparse_attn import AttentionAverages, GlobalMask


def kept(mean: torch.Tensor, sparsity: float, granularity: str = "element") -> torch.Tensor:
    """What a mask from averages keeps where all was seen and nothing is kept for the diagonal's sake."""
    averages = AttentionAverages.from_mean(mean, torch.ones(mean.shape[2:]))
    return GlobalMask.from_averages(averages, sparsity, granularity, keep_diagonal=False).keep


def test_ties_go_to_the_earlier_position():
    keep = kept(torch.full((1, 2, 4, 4), 0.25), 0.75)
    assert keep.flatten().tolist() == [True] * 8 + [False] * 24


def test_tiles_rank_by_their_mean():
    mean = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    mean[0, 0, :16, 5] = 0.2  # 16 rows of 0.2 beat one row of 0.9
    mean[0, 0, 3, 7] = 0.9
    keep = kept(mean, 1 - 1 / 64, "tile")
    assert keep[0, 0, :16, 5].all() and int(keep.sum()) == 16


def test_the_last_tile_ranks_by_the_mean_of_the_rows_that_it_has():
    mean = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    mean[0, 0, :16, 5], mean[0, 0, 16:, 7] = 0.2, 0.5  # of 4 rows, which sum to less than the 16 others
    keep = kept(mean, 1 - 4 / 400, "tile")
    assert keep[0, 0, 16:, 7].all() and int(keep.sum()) == 4


@pytest.mark.parametrize("length", [17, 33, 390])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_tiles_count_as_the_positions_that_they_have(length, sparsity):
    """The last queries may be few, and their tiles large or small on average."""
    for factor in (0.1, 10.0):
        mean = torch.rand(1, 2, length, length, dtype=torch.float64)
        mean[:, :, length // 16 * 16 :] *= factor
        density = kept(mean, sparsity, "tile").double().mean().item()
        assert abs(density - (1 - sparsity)) <= 8 / (2 * length**2)
