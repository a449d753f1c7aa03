"""Sweeps of the SQuAD benchmark: rows of the unpadded sparse model for several values of one option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .variants import SWEPT, Variant

SWEEPS = ("sparsity", "bits")


@dataclass(frozen=True)
class Sweep:
    """Which option, and its values in the order asked for: sparsities, or widths in bits with None = not rounded."""

    name: str
    values: list


def swept_variants(sweep: Sweep, granularities: Sequence[str]) -> list[Variant]:
    """Its rows, mask by mask.

    Over sparsities nothing is rounded, and no row has weights that were trained with a mask, since each would need its
    own training.
    """
    rows = []
    for granularity in granularities:
        for value in sweep.values:
            change = {"sparsity": value, "own_weights": False} if sweep.name == "sparsity" else {"bits": value}
            rows.append(replace(SWEPT, granularity=granularity, **change))
    return rows
