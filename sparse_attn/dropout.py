"""Counter-based dropout: whether a probability is dropped is a pure function of a seed and its position.

So every backend drops the same probabilities, and a backward pass draws them again instead of storing them. The mixer
is a 32-bit integer hash with low bias (xor-shift and multiply), cheap on every processor.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
ROW_STRIDE = 0x9E3779B1  # odd constants that spread consecutive counters over all 32 bits
KEY_STRIDE = 0x85EBCA77
MIX_FIRST = 0x7FEB352D
MIX_SECOND = 0x846CA68B


def mix32(word: torch.Tensor) -> torch.Tensor:
    """Hashes 32-bit words held in an int64 tensor of any shape."""
    word = ((word ^ (word >> 16)) * MIX_FIRST) & _WORD
    word = ((word ^ (word >> 15)) * MIX_SECOND) & _WORD
    return word ^ (word >> 16)


def drop_threshold(probability: float) -> int:
    """A word below this number is dropped: `probability` as a share of 2 ** 32."""
    return min(int(round(probability * 2.0**32)), _WORD)


def dropout_keep(seed: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, probability: float) -> torch.Tensor:
    """Which probabilities survive.

    Args:
        seed: int64, one element; only its low 32 bits count.
        rows: int64 [...], the number of each query row, counted over batch, heads and queries.
        keys: int64 [key_len], absolute key positions.
        probability: share of probabilities to drop.

    Returns:
        bool [..., key_len], true = kept. The caller scales by 1 / (1 - probability).
    """
    row_words = mix32((rows.to(torch.int64) * ROW_STRIDE + seed.to(rows.device).reshape(())) & _WORD)
    words = mix32((row_words.unsqueeze(-1) + keys.to(torch.int64) * KEY_STRIDE) & _WORD)
    return words >= drop_threshold(probability)
