"""Which positions a global mask keeps: by rank of their average attention."""

from __future__ import annotations

import warnings

import torch


def largest(
    scores: torch.Tensor,
    seen: torch.Tensor,
    sparsity: float,
    tile_rows: int,
    scope: str,
    keep_diagonal: bool,
) -> torch.Tensor:
    """Keeps the largest 1 - sparsity of the seen positions: exactly that many, or, of tiles, as nearly as whole ones
    make it. Ties go to the earlier position.

    Args:
        scores: float64 [layers, heads, query_len, key_len].
        seen: bool [query_len, key_len]; unseen positions are pruned, but for the diagonal.
        tile_rows: consecutive queries ranked and kept together by their mean score.
        scope: "layer", "head" or "model": the positions ranked together.
        keep_diagonal: position (i, i) comes first in its ranking, within the budget. Where the budget is less than the
            diagonal, all of it is kept all the same, with a UserWarning at the caller's caller.

    Returns:
        bool, the shape of `scores`.
    """
    layers, heads, query_len, key_len = scores.shape
    diagonal = torch.zeros_like(seen)
    if keep_diagonal:
        diagonal.fill_diagonal_(True)

    # Rows of tiles: [..., groups, key_len]. A tile's score is the mean over its seen rows.
    seen_rows = _tiles(seen.double(), tile_rows).sum(-2)
    scores = _tiles(scores * seen, tile_rows).sum(-2) / seen_rows.clamp(min=1)
    diagonal = _tiles(diagonal.double(), tile_rows).sum(-2) > 0
    scores = scores.masked_fill(seen_rows == 0, -1.0).masked_fill(diagonal, float("inf"))

    ranked_together = {"layer": (layers, -1), "head": (layers * heads, -1), "model": (1, -1)}[scope]
    pools = scores.reshape(ranked_together)
    per_pool = layers * heads // pools.shape[0]
    positions = seen_rows.to(torch.int32)  # of each tile
    seen_in_pool = int(positions.sum()) * per_pool
    budget = round((1.0 - sparsity) * seen_in_pool)
    forced = int((positions * diagonal).sum()) * per_pool
    if forced > budget:
        warnings.warn(
            f"the mask keeps {forced / seen_in_pool:.1%} of the positions up to length {longest_seen(seen)}, more than "
            f"the {1.0 - sparsity:.1%} that sparsity {sparsity} asks for: the diagonal alone takes that much. Pass "
            "keep_diagonal=False, granularity='element', or averages of longer sequences",
            stacklevel=3,
        )
        budget = forced
    positions = positions.flatten().repeat(per_pool)
    keep = torch.zeros(pools.shape, dtype=torch.bool, device=pools.device)
    for pool, kept in zip(pools, keep):
        order = pool.argsort(descending=True, stable=True)
        own = positions[order]
        kept[order[2 * own.cumsum(0) - own <= 2 * budget]] = True
    keep = keep.view(layers, heads, -1, key_len) & (scores >= 0)
    return keep.repeat_interleave(tile_rows, dim=2)[:, :, :query_len]


def longest_seen(seen: torch.Tensor) -> int:
    """How many queries have seen a position, counted up to the last one. bool [query_len, key_len]"""
    return int(seen.any(1).nonzero().max()) + 1


def published_rule(mean: torch.Tensor, sparsity: float, whole: str | None = None) -> torch.Tensor:
    """The published rule: per layer, heads pooled, everything not above the percentile is pruned.

    The percentile has nearest rank and covers the published bounds of the non-zero block, except in Transformer-XL
    (`whole="transformer-xl"`), where it covers the whole array. Raises ValueError for a layer without any attention.

    Args:
        mean: float64 [layers, heads, query_len, key_len].

    Returns:
        bool, the shape of `mean`, true = kept.
    """
    keep = torch.empty(mean.shape, dtype=torch.bool, device=mean.device)
    for layer, pattern in enumerate(mean):
        rows, columns = mean.shape[2:] if whole == "transformer-xl" else published_bounds(pattern)
        block = pattern[:, :rows, :columns].flatten()
        if block.numel() == 0:
            raise ValueError(f"layer {layer} has no non-zero average attention to take a percentile of")
        rank = round(sparsity * (block.numel() - 1))  # ties to even, as the published percentile
        keep[layer] = pattern > block.sort().values[rank]
    return keep


def published_bounds(pattern: torch.Tensor) -> tuple[int, int]:
    """End of the non-zero block of a pattern [heads, query_len, key_len], with the published off-by-one:
    a block that reaches the last row or column ends one short of it."""
    non_zero = (pattern != 0).any(0)
    return _bound(non_zero.any(1)), _bound(non_zero.any(0))


def _bound(non_zero: torch.Tensor) -> int:
    indices = non_zero.nonzero()
    end = int(indices[-1]) + 1 if indices.numel() else 0
    return min(end, non_zero.numel() - 1)


def _tiles(tensor: torch.Tensor, tile_rows: int) -> torch.Tensor:
    """[..., query_len, key_len] as [..., groups, tile_rows, key_len], the last group filled with zeros."""
    missing = -tensor.shape[-2] % tile_rows
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, missing))
    return padded.view(*tensor.shape[:-2], -1, tile_rows, tensor.shape[-1])
