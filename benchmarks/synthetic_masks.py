"""Masks for long inputs: a band whose width differs by head, the first tokens global, and stripes of keys.

Every query keeps its neighbours (the band), the first tokens and every 64th key (the stripes, shifted by head); the
first tokens keep every key. The band is as wide as the density asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.masks import TILE_ROWS

GLOBAL_TOKENS = 16
STRIPE_PERIOD = 64
_NARROWEST, _WIDEST = 0.5, 1.5  # a head's band, as multiples of the mean


def synthetic_mask(
    granularity: str, device: torch.device, heads: int = 12, length: int = 4096, density: float = 0.1
) -> Tensor:
    """bool [1, heads, length, length], true = kept.

    In an element mask the band is exact for every query; in a tile mask 16 consecutive queries share one.
    Raises ValueError where global tokens and stripes alone are more than the density.
    """
    tile_rows = TILE_ROWS if granularity == "tile" else 1
    widths = _widths(heads, length, density, tile_rows)
    keys = torch.arange(length, device=device)
    first, last = (bound.to(device)[:, None] for bound in _group_bounds(length, tile_rows))
    keep = torch.empty(1, heads, length, length, dtype=torch.bool, device=device)
    for head, width in enumerate(widths):
        keep[0, head] = (keys >= first - width) & (keys <= last + width)
        keep[0, head, :, _fixed_keys(head, length).to(device)] = True
        keep[0, head, :GLOBAL_TOKENS] = True
    return keep


def _widths(heads: int, length: int, density: float, tile_rows: int) -> list[int]:
    """Keys kept to each side of a query, for every head: the largest ones within the density."""
    factors = torch.linspace(_NARROWEST, _WIDEST, heads, dtype=torch.float64).tolist() if heads > 1 else [1.0]
    bounds = _group_bounds(length, tile_rows)
    fixed = [_fixed_keys(head, length) for head in range(heads)]

    def kept(mean_width: float) -> int:
        return sum(_kept(round(mean_width * factor), own, bounds) for factor, own in zip(factors, fixed, strict=True))

    budget, low, high = density * heads * length * length, 0.0, float(length)
    if kept(low) > budget:
        raise ValueError(f"density {density} is less than what global tokens and stripes keep of {length} positions")
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) <= budget else (low, middle)
    return [round(low * factor) for factor in factors]


def _kept(width: int, fixed: Tensor, bounds: tuple[Tensor, Tensor]) -> int:
    """Positions that one head keeps, without its mask."""
    length = fixed.numel()
    start = (bounds[0] - width).clamp(min=0)
    end = (bounds[1] + width + 1).clamp(max=length)
    outside = torch.nn.functional.pad((~fixed).cumsum(0), (1, 0))  # keys before a position that are not fixed
    in_rows = fixed.sum() + outside[end] - outside[start]
    return int(in_rows[GLOBAL_TOKENS:].sum()) + min(GLOBAL_TOKENS, length) * length


def _group_bounds(length: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """First and last query of every query's group: int64 [length]."""
    first = torch.arange(length) // tile_rows * tile_rows
    return first, (first + tile_rows - 1).clamp(max=length - 1)


def _fixed_keys(head: int, length: int) -> Tensor:
    """Keys that every query of a head keeps: bool [length]."""
    keys = torch.arange(length)
    return (keys < GLOBAL_TOKENS) | (keys % STRIPE_PERIOD == head * 5 % STRIPE_PERIOD)
